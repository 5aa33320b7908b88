"""The edit of one site's activations inside a forward call, under one plan or one plan a row.

Knows: maps stacked over plans, positions, dtypes and devices. Does not know: models, hook points, or how rows are batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.edits.affine import Affine, rescale_rows
from interp_ablate.edits.edit import Positions
from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site

Maps = Sequence[tuple[Positions, Affine]]


@dataclass(frozen=True, eq=False)
class _Step:
    """The maps of all plans (None: a plan has none) at one step of a site's order, of equal positions."""

    kind: Positions
    maps: list[Affine | None]


def _in_order(maps: Sequence[Maps]) -> list[_Step]:
    """Maps of all plans, step by step in their order; at one step, those of equal positions together."""
    steps = []
    for i in range(max(len(each) for each in maps)):
        entries = [each[i] if i < len(each) else None for each in maps]
        for kind in dict.fromkeys(entry[0] for entry in entries if entry is not None):
            affines = [e[1] if e is not None and e[0] == kind else None for e in entries]
            steps.append(_Step(kind, affines))
    return steps


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
        if call is None or call.plans is None:
            raise PlanError(
                "there is a plan for every row, and only this Model's own methods know which row is "
                "whose: use model.generate, model.logits or collect instead of calling model.tl"
            )
        return ready._of_rows(call.plans)

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
        self.slots: list[_Slot | _NormKept] = [
            _NormKept(step.maps) if norm_kept and step.kind == "all" else _Slot.of(step, d_model)
            for step in _in_order(maps)
        ]

    def __call__(self, x: Tensor, call: ForwardCall | None) -> Tensor:
        for slot in self.slots:
            edited = slot.at(x, call)(x)
            # always by mask: asking whether such positions occur would make the device wait at every site
            x = edited if slot.kind == "all" else self._only(slot.kind, call, edited, x)
        return x

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
