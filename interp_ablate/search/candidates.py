"""Candidates and trials: one plan to try, and what came of it, as plain data.

Knows: how a candidate becomes a plan along a direction, and which directions are distinct. Does not know:
scores, journals or searches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.presets import band
from interp_ablate.sites import Site

EditKind = Literal["ablate", "band", "fitted"]
Stage = Literal["screen", "refine", "finalist"]
Fits = Mapping[str, Ablate | Erase]


@dataclass(frozen=True)
class Candidate:
    """One plan to try: a direction by its site and position, and what is done along it.

    "ablate" is full strength at every writer of the stream; "band" gives attention and MLP outputs
    strengths that fall off linearly from a centre layer (see `edits.band`); "fitted" is `scale` times
    an edit found by gradient from the direction on (see `fit`), kept under the name `fit`.
    """

    layer: int
    point: str
    position: str = "-1"
    method: str = "difference_in_means"
    stage: Stage = "screen"
    operation: EditKind = "ablate"
    attention_strength: float | None = None
    attention_layer: float | None = None
    mlp_strength: float | None = None
    mlp_layer: float | None = None
    width: float | None = None
    fit: str | None = None
    scale: float | None = None
    prompts: int | None = None  # a side that it was screened on; None for all

    @property
    def key(self) -> str:
        """Identity in the journal."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def site(self) -> Site:
        return Site(self.layer, self.point)  # type: ignore[arg-type]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Candidate:
        """From a row of the trials' table; NaN stands for None."""
        values: dict[str, Any] = {
            each.name: None
            if row[each.name] in ("", None) or row[each.name] != row[each.name]
            else row[each.name]
            for each in fields(cls)
        }
        values |= {"layer": int(row["layer"]), "position": str(row["position"])}
        if values["prompts"] is not None:
            values["prompts"] = int(values["prompts"])
        return cls(**values)

    def plan(self, direction: Direction, writers: Sequence[Site], fits: Fits | None = None) -> Plan:
        """The plan along a direction: the candidate's own, or a control put in its place.

        `writers`: the model's (`model.writers`).
        """
        if self.operation == "ablate":
            return Plan((Ablate(direction, writers),))
        if self.operation == "fitted":
            assert self.fit is not None and self.scale is not None and fits is not None
            edit = scaled(fits[self.fit], self.scale)
            return Plan(() if edit is None else (edit,))
        assert self.attention_strength is not None and self.attention_layer is not None
        assert self.mlp_strength is not None and self.mlp_layer is not None
        assert self.width is not None
        attention, mlp = (site.point for site in writers[-2:])
        return band(
            direction,
            writers[-1].layer + 1,
            attention=(self.attention_strength, self.attention_layer),
            mlp=(self.mlp_strength, self.mlp_layer),
            width=self.width,
            points=(attention, mlp),
        )

    def control(self, direction: Direction, writers: Sequence[Site], fits: Fits) -> Plan:
        """The same plan along a direction that is none of the concept's; fitted edits are `along_control_direction`."""
        if self.operation != "fitted":
            return self.plan(direction, writers)
        assert self.fit is not None
        return self.plan(
            direction, writers, {self.fit: along_control_direction(fits[self.fit], direction)}
        )


def scaled(
    edit: Ablate | Erase, factor: float, places: Sequence[int] | None = None
) -> Ablate | Erase | None:
    """The edit, or its part at some places, with every strength times a factor.

    Sites with strength 0 are left out; None where none is left.
    """
    chosen = range(len(edit.sites)) if places is None else places
    amounts = {edit.sites[i]: round(factor * edit.amounts[i], 6) for i in chosen}
    kept = {site: amount for site, amount in amounts.items() if amount}
    return _again(edit, edit.vectors, kept) if kept else None


def along_control_direction(edit: Ablate | Erase, direction: Direction) -> Ablate | Erase:
    """A control: the edit along another direction; lengths, angles, sites and strengths stay.

    An `Ablate`'s vectors are reflected so that the first is the direction. An `Erase` writes along the
    direction and reads it too, with a random rest of the same length: reflected, its `read` would still
    read most of what it was fitted to read, and be no control.
    """
    unit = direction.vector.to(edit.vectors)
    if isinstance(edit, Erase):
        beside = float((edit.read - edit.write).norm())
        generator = torch.Generator().manual_seed(0x7E57)  # not a seed of random_direction
        rest = torch.randn(len(unit), generator=generator, dtype=unit.dtype)
        rest = rest - (rest @ unit) * unit
        vectors = torch.stack([unit, unit + beside * rest / rest.norm()])
        return _again(edit, vectors, dict(zip(edit.sites, edit.amounts)))
    axis = edit.vectors[0] - unit
    length = float(axis.norm())
    if length < 1e-9:
        return edit
    axis = axis / length
    reflected = edit.vectors - 2 * (edit.vectors @ axis)[:, None] * axis
    return _again(edit, reflected, dict(zip(edit.sites, edit.amounts)))


def _again(edit: Ablate | Erase, vectors: Tensor, strengths: dict[Site, float]) -> Ablate | Erase:
    same: dict[str, Any] = {
        "strength": tuple(strengths.values()),
        "positions": edit.positions,
        "label": edit.label,
    }
    if isinstance(edit, Erase):
        values = dict(zip(edit.sites, edit.values))
        kept = [values[site] for site in strengths]
        return Erase(vectors[0], vectors[1], strengths, value=kept, **same)
    return Ablate(vectors, strengths, norm_preserving=edit.norm_preserving, **same)


@dataclass(frozen=True)
class Trial:
    """A finished candidate: its scores, or why it failed. One line of the journal."""

    candidate: Candidate
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        return cls(**{**data, "candidate": Candidate(**data["candidate"])})


def distinct(directions: Iterable[Direction]) -> list[Direction]:
    """Directions without repeats: resid_pre of a layer is resid_post of the layer before."""
    every, found = list(directions), []
    have = {item.site for item in every}
    for item in every:
        before = Site(item.site.layer - 1, "resid_post") if item.site.layer else None
        if item.site.point == "resid_pre" and before in have:
            continue
        found.append(item)
    return found


def screening(directions: Iterable[Direction]) -> list[Candidate]:
    """One candidate a distinct direction: full ablation everywhere (and addition at its own site)."""
    return [
        Candidate(item.site.layer, item.site.point, item.position, item.method)
        for item in distinct(directions)
    ]


DirectionKey = tuple[int, str, str]  # layer, point, position of a direction
