"""The edit of one site's activations inside a forward call, under one plan or one plan a row.

Knows: maps stacked over plans, positions, dtypes and devices. Does not know: models, hook points, or how rows are batched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_ablate.edits.affine import Affine, rescale_rows
from interp_ablate.edits.conditional import Gate
from interp_ablate.edits.edit import Positions
from interp_ablate.edits.rotation import Rotation, turn
from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site

# Where a map works (positions, or positions and a condition of the prompt), and the map.
Maps = Sequence[tuple[Positions | Gate, Affine | Rotation]]


@dataclass(frozen=True, eq=False)
class _Step:
    """The maps of all plans (None: a plan has none) at one step of a site's order, of equal positions and kind."""

    kind: Positions
    maps: list[Any]
    conditions: list[str | None] | None
    """Of each plan the key of the condition under which its map works; None where no map has one."""


def _in_order(maps: Sequence[Maps]) -> list[_Step]:
    """Maps of all plans, step by step in their order; at one step, those of equal positions and kind together."""
    steps = []
    for i in range(max(len(each) for each in maps)):
        entries = [each[i] if i < len(each) else None for each in maps]
        for kind in dict.fromkeys(_kind(entry) for entry in entries if entry is not None):
            chosen = [e if e is not None and _kind(e) == kind else None for e in entries]
            conditions = [
                entry[0].condition if entry is not None and isinstance(entry[0], Gate) else None
                for entry in chosen
            ]
            found = [None if entry is None else entry[1] for entry in chosen]
            steps.append(_Step(kind[0], found, conditions if any(conditions) else None))
    return steps


def _kind(entry: tuple[Positions | Gate, Affine | Rotation]) -> tuple[Positions, bool, bool]:
    """The positions of a map, whether it has a condition, whether it is a rotation."""
    where, found = entry
    conditional = isinstance(where, Gate)
    positions = where.positions if isinstance(where, Gate) else where
    return positions, conditional, isinstance(found, Rotation)


def plans_of_rows(call: ForwardCall | None) -> Int[Tensor, " batch"]:
    """The plan of each row of a call.

    Raises:
        PlanError: a call that nobody knows the rows of.
    """
    if call is None or call.plans is None:
        raise PlanError(
            "there is a plan for every row, and only this Model's own methods know which row is "
            "whose: use model.generate, model.logits or collect instead of calling model.tl"
        )
    return call.plans


@dataclass(eq=False)
class _Slot:
    """The maps of all plans at one step, stacked: ranks are filled up with zeros."""

    kind: Positions
    left: Float[Tensor, "plan d_model k"]
    right: Float[Tensor, "plan d_model k"]
    shift: Float[Tensor, "plan d_model"] | None
    """None where no plan adds anything."""
    _ready: dict[tuple[torch.dtype, torch.device], _Slot] = field(default_factory=dict)
    _rows: tuple[Tensor, _Slot] | None = None

    @classmethod
    def of(cls, step: _Step, d_model: int) -> _Slot:
        rank = max(affine.left.shape[1] for affine in step.maps if affine is not None)
        left = torch.zeros(len(step.maps), d_model, rank, dtype=torch.float64)
        right, shift = torch.zeros_like(left), torch.zeros(len(left), d_model, dtype=torch.float64)
        for i, affine in enumerate(step.maps):
            if affine is not None:
                k = affine.left.shape[1]
                left[i, :, :k], right[i, :, :k], shift[i] = affine.left, affine.right, affine.shift
        return cls(step.kind, left, right, shift if bool(shift.any()) else None)

    def to(self, like: Tensor) -> _Slot:
        """The same in the dtype and on the device of `like`; converted once."""
        key = (like.dtype, like.device)
        if key not in self._ready:
            shift = None if self.shift is None else self.shift.to(like)
            self._ready[key] = _Slot(self.kind, self.left.to(like), self.right.to(like), shift)
        return self._ready[key]

    def at(self, x: Tensor, call: ForwardCall | None) -> _Slot:
        """The maps for these activations: in their dtype, one a row where plans differ by row."""
        ready = self.to(x)
        if len(ready.left) == 1:
            return ready
        return ready._of_rows(plans_of_rows(call))

    def _of_rows(self, plans: Int[Tensor, " batch"]) -> _Slot:
        """One map a row; kept until other rows come (decoding asks again and again for the same)."""
        if self._rows is None or self._rows[0] is not plans:
            index = plans.to(self.left.device)
            shift = None if self.shift is None else self.shift[index]
            chosen = _Slot(self.kind, self.left[index], self.right[index], shift)
            self._rows = (plans, chosen)
        return self._rows[1]

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if len(self.left) > 1:
            # some MLPs flatten batch and position
            rows = x.reshape(len(self.left), -1, x.shape[-1])
            return self._of_each(rows).view(x.shape)
        flat = x.reshape(-1, x.shape[-1])
        base = flat if self.shift is None else flat + self.shift[0]
        left, right = self.left[0], self.right[0]
        if left.shape[1] == 1:  # most edits: twice as fast as a matrix product of width 1
            return torch.addcmul(base, (flat @ right), left[:, 0]).view(x.shape)
        return torch.addmm(base, flat @ right, left.T).view(x.shape)

    def _of_each(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """A map a row. Few columns one by one: ten times as fast as small batched matrix products."""
        edited = x if self.shift is None else x + self.shift[:, None]
        left, right = self.left.transpose(1, 2), self.right.transpose(1, 2)
        if left.shape[1] > 4:
            return torch.baddbmm(edited, x @ right.transpose(1, 2), left)
        for k in range(left.shape[1]):
            amount = (x * right[:, k, None]).sum(-1, keepdim=True)
            edited = torch.addcmul(edited, amount, left[:, k, None])
        return edited


@dataclass(eq=False)
class _Turn:
    """The rotations of all plans at one step, stacked; a plan without one has a plane of zeros, which turns nothing.

    Computed in float32 at least, so that norms stay in 16 bits too.
    """

    kind: Positions
    planes: Float[Tensor, "plan 2 d_model"]
    angles: Float[Tensor, " plan"]
    """In radians."""
    shares: Float[Tensor, " plan"]
    adaptive: Bool[Tensor, " plan"]

    @classmethod
    def of(cls, step: _Step, d_model: int) -> _Turn:
        planes = torch.zeros(len(step.maps), 2, d_model, dtype=torch.float64)
        angles, shares = torch.zeros(2, len(step.maps), dtype=torch.float64)
        adaptive = torch.zeros(len(step.maps), dtype=torch.bool)
        for i, rotation in enumerate(step.maps):
            if rotation is not None:
                planes[i], adaptive[i] = rotation.plane, rotation.adaptive
                angles[i], shares[i] = math.radians(rotation.angle), rotation.strength
        return cls(step.kind, planes, angles, shares, adaptive)

    def at(self, x: Tensor, call: ForwardCall | None) -> _Turn:
        """The rotations for these activations, one a row where plans differ by row."""
        wide = x if x.element_size() >= 4 else x.float()
        numbers = (part.to(wide) for part in (self.planes, self.angles, self.shares))
        parts = (*numbers, self.adaptive.to(x.device))
        if len(self.planes) > 1:
            index = plans_of_rows(call).to(x.device)
            parts = tuple(part[index] for part in parts)
        planes, angles, shares, adaptive = parts
        return _Turn(self.kind, planes, angles, shares, adaptive)

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        rows = x.reshape(len(self.planes), -1, x.shape[-1]).to(self.planes)
        inside = rows @ self.planes.transpose(1, 2)
        moved = turn(inside, self.angles[:, None], self.shares[:, None]) - inside
        spared = self.adaptive[:, None, None] & (inside[..., :1] <= 0)
        moved = moved.masked_fill(spared, 0.0)
        return (rows + moved @ self.planes).to(x).view(x.shape)


@dataclass(frozen=True, eq=False)
class _NormKept:
    """A map whose rows get their norms back, in the precision in which weights are edited.

    (So that rounding is not scaled up.) For one plan only.
    """

    maps: list[Affine | None]
    kind: Positions = "all"

    def at(self, x: Tensor, call: ForwardCall | None) -> _NormKept:
        return self

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        (affine,) = self.maps
        assert affine is not None
        wide = to_float64(x) if x.element_size() >= 4 else x.float()
        rescaled = rescale_rows(wide, affine, eps=torch.finfo(x.dtype).eps)[0]
        return (rescaled + affine.shift.to(rescaled)).to(x)


class SiteWriter:
    """Writes one site: `writer(x, call)` returns the edited activations.

    Args:
        maps: for each plan its maps at this site in order (`Plan.maps_at`); none for a plan that does
            not write here.
        norm_kept: the rows get their norms back after the map (an embedding under a norm-preserving
            ablation); for one plan only.
    """

    def __init__(
        self, site: Site, maps: Sequence[Maps], d_model: int, *, norm_kept: bool = False
    ) -> None:
        self.site = site
        self.slots: list[tuple[_Slot | _Turn | _NormKept, list[str | None] | None]] = []
        for step in _in_order(maps):
            slot: _Slot | _Turn | _NormKept
            if any(isinstance(each, Rotation) for each in step.maps):
                slot = _Turn.of(step, d_model)
            elif norm_kept and step.kind == "all":
                slot = _NormKept(step.maps)
            else:
                slot = _Slot.of(step, d_model)
            self.slots.append((slot, step.conditions))

    def __call__(self, x: Tensor, call: ForwardCall | None) -> Tensor:
        for slot, conditions in self.slots:
            edited = slot.at(x, call)(x)
            if conditions is not None:
                edited = self._where_met(conditions, call, edited, x)
            # always by mask: asking whether such positions occur would make the device wait at every site
            x = edited if slot.kind == "all" else self._only(slot.kind, call, edited, x)
        return x

    @staticmethod
    def _where_met(
        conditions: list[str | None], call: ForwardCall | None, edited: Tensor, x: Tensor
    ) -> Tensor:
        """What was edited, in the rows whose prompt meets the condition of their plan."""
        if call is None:
            raise PlanError(
                "the plan has a condition of the prompt, which only this Model's own methods can tell: "
                "use model.generate, model.logits or collect instead of calling model.tl"
            )
        keys = dict.fromkeys(key for key in conditions if key is not None)
        if missing := [key for key in keys if key not in call.decisions]:
            raise PlanError(f"a condition of the plan was not read in this pass ({missing[0][:8]})")
        met = torch.zeros(len(call.tokens), dtype=torch.bool, device=x.device)
        for key in keys:
            decided = call.decisions[key].to(x.device)
            if len(conditions) > 1:
                own = torch.tensor([each == key for each in conditions], device=x.device)
                decided = decided & own[plans_of_rows(call).to(x.device)]
            met = met | decided
        rows = met[:, None].expand(call.tokens.shape).reshape(x.shape[:-1])[..., None]
        return torch.where(rows, edited, x)

    @staticmethod
    def _only(kind: Positions, call: ForwardCall | None, edited: Tensor, x: Tensor) -> Tensor:
        """What was edited, at positions of one kind."""
        if call is None:
            raise PlanError(
                f"the plan edits {kind!r} positions, which only this Model's own methods can tell: "
                "use model.generate, model.logits or collect instead of calling model.tl"
            )
        generated = call.generated.to(x.device).reshape(x.shape[:-1])[..., None]
        there, elsewhere = (edited, x) if kind == "generated" else (x, edited)
        return torch.where(generated, there, elsewhere)
