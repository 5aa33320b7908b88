"""Candidates and trials: one plan to try, and what came of it, as plain data.

Knows: how a candidate becomes a plan along a direction, and which directions are distinct. Does not know:
scores, journals or searches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from interp_ablate.directions import Direction
from interp_ablate.edits import Ablate, Plan, band
from interp_ablate.sites import Site

Operation = Literal["ablate", "band", "fitted"]
Stage = Literal["screen", "refine", "finalist"]


@dataclass(frozen=True)
class Candidate:
    """One plan to try: a direction by its site and position, and what is done along it.

    "ablate" is full strength at every writer of the stream; "band" gives attention and MLP outputs
    strengths that fall off linearly from a centre layer (see `edits.band`); "fitted" gives every writer
    `scale` times a strength of its own, found by gradient for a budget of KL (see `fit`).
    """

    layer: int
    point: str
    position: str = "-1"
    method: str = "difference_in_means"
    stage: Stage = "screen"
    operation: Operation = "ablate"
    attention_strength: float | None = None
    attention_layer: float | None = None
    mlp_strength: float | None = None
    mlp_layer: float | None = None
    width: float | None = None
    budget: float | None = None
    scale: float | None = None
    strengths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.strengths is not None:  # a list in the journal, text in a table
            values = (
                json.loads(self.strengths) if isinstance(self.strengths, str) else self.strengths
            )
            object.__setattr__(self, "strengths", tuple(float(value) for value in values) or None)

    @property
    def key(self) -> str:
        """Identity in the journal; fitted strengths follow from the rest."""
        return json.dumps(
            {k: v for k, v in asdict(self).items() if k != "strengths"}, sort_keys=True
        )

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
        return cls(**values | {"layer": int(row["layer"]), "position": str(row["position"])})

    def plan(self, direction: Direction, writers: Sequence[Site]) -> Plan:
        """The plan along a direction: the candidate's own, or a control put in its place.

        `writers`: the model's (`model.writers`).
        """
        if self.operation == "ablate":
            return Plan((Ablate(direction, writers),))
        if self.operation == "fitted":
            return self._fitted(direction, writers)
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

    def _fitted(self, direction: Direction, writers: Sequence[Site]) -> Plan:
        assert self.strengths is not None and self.scale is not None
        scaled = {
            site: round(self.scale * strength, 6)
            for site, strength in zip(writers, self.strengths, strict=True)
        }
        kept = {site: strength for site, strength in scaled.items() if strength}
        return Plan((Ablate(direction, kept, strength=tuple(kept.values())),))


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
