"""Rotate: angular steering, which turns the activation within a plane to an angle and keeps its norm.

Knows: the map, its plane, its JSON. Does not know: how a plane is chosen, or how the map is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import NormGain, as_vectors, one_row, orthonormal_rows
from interp_ablate.edits.edit import (
    EditBase,
    Positions,
    joined_label,
    one_or_many,
    range_text,
    strength_per_site,
    written_sites,
)
from interp_ablate.errors import PlanError
from interp_ablate.sites import Site, SiteLike

Plane = Float[Tensor, "2 d_model"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The map of angular steering at one site: what lies in the plane is turned to an angle, the rest stays."""

    plane: Plane
    """Two orthonormal rows: the feature's direction, and the one at 90 degrees."""
    angle: float
    """In degrees, from the feature's direction towards the other one."""
    strength: float
    """The share of the way to the angle, along the shorter arc: 1 is all of it."""
    adaptive: bool
    """Only activations whose projection on the feature's direction is above 0 are turned."""

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        plane, angle = self.plane.to(x), x.new_tensor(math.radians(self.angle))
        inside = x @ plane.T
        moved = turn(inside, angle, x.new_tensor(self.strength)) - inside
        if self.adaptive:
            moved = torch.where(inside[..., :1] > 0, moved, torch.zeros_like(moved))
        return x + moved @ plane


def turn(
    inside: Float[Tensor, "*batch 2"],
    angle: Float[Tensor, "*batch"],
    share: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch 2"]:
    """Points of a plane, turned by a share of the shorter arc to an angle (in radians); their lengths stay."""
    here = torch.atan2(inside[..., 1], inside[..., 0])
    arc = torch.remainder(angle - here + math.pi, 2 * math.pi) - math.pi
    there = here + share * arc
    return inside.norm(dim=-1, keepdim=True) * torch.stack([there.cos(), there.sin()], -1)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Rotate(EditBase):
    """Angular steering: x -> x - proj(x) + |proj(x)| * (the unit vector at an angle), with proj onto a plane.

    The norm of x stays, and all that lies outside the plane. Angle 0 is all along the feature's direction, 180 all
    against it, 90 along the plane's second axis. With `adaptive` only activations that are aligned with the feature
    (a projection above 0) are turned; this spares what has nothing to do with it. A strength below 1 goes a share of
    the way along the shorter arc, so that there are weaker rotations too, which keep the norm just as well.
    Source: Vu and Nguyen 2025, https://arxiv.org/abs/2510.26243, who turn the inputs of attention and MLP at every
    layer; here the sites are chosen freely. No weights hold it: the length within the plane is a square root of what
    the activation is.

    `feature` and `second` span the plane: of `second`, what is orthogonal to the feature counts.
    """

    op: ClassVar[str] = "rotate"
    amount: ClassVar[str] = "strength"
    hooks_only: ClassVar[str] = (
        "a rotation to an angle, whose size depends on the activation in a way that is not affine"
    )
    adaptive: bool
    angles: tuple[float, ...]
    """The angle at each site, in degrees."""

    def __init__(
        self,
        feature: Direction | Float[Tensor, " d_model"],
        second: Direction | Float[Tensor, " d_model"],
        sites: SiteLike | Iterable[SiteLike],
        *,
        angle: float | Sequence[float],
        strength: float | Sequence[float] = 1.0,
        adaptive: bool = False,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        rows = [one_row(as_vectors(vector), "rotate") for vector in (feature, second)]
        if rows[0].shape != rows[1].shape:
            raise PlanError(
                f"the plane's vectors have d_model {rows[0].shape[1]} and {rows[1].shape[1]}: both are of one stream"
            )
        vectors, places = orthonormal_rows(torch.cat(rows)), written_sites(sites)
        self._set(
            adaptive=bool(adaptive), angles=strength_per_site(angle, places, "angle"),
            positions=positions, label=label or joined_label(feature, second),
        )  # fmt: skip
        self._place(
            feature, places, strength, positions=positions, vectors=vectors, label=self.label
        )

    def _numbers(self) -> str:
        only = ", adaptive" if self.adaptive else ""
        return f"angle {range_text(self.angles)} degrees{only}, {super()._numbers()}"

    def at_sites(self, pairs: Sequence[tuple[Site, Site]]) -> Rotate:
        edit = super().at_sites(pairs)
        edit._set(angles=tuple(self.angles[self.sites.index(old)] for old, _ in pairs))
        return edit

    def _map(self, i: int) -> Any:
        return Rotation(self.vectors, self.angles[i], self.amounts[i], self.adaptive)

    def _map_before_norm(self, i: int, gain: NormGain) -> Any:
        raise PlanError(
            f"{self!r} at {self.sites[i]}, before a norm that rescales what it gives: rotate the stream itself, at "
            "resid_pre or resid_post, or after the norm, at attn_out or mlp_out"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "angle": one_or_many(self.angles),
            "adaptive": self.adaptive,
        }

    @classmethod
    def _from_entry(cls, entry: dict[str, Any]) -> Rotate:
        vectors = torch.tensor(entry["vectors"], dtype=torch.float64)
        if vectors.ndim != 2 or len(vectors) != 2:
            raise PlanError(
                f'"vectors" of a rotation are two rows of d_model; got {tuple(vectors.shape)}'
            )
        if not isinstance(entry["adaptive"], bool):
            raise PlanError(f'"adaptive" of a rotation is true or false; got {entry["adaptive"]!r}')
        options = {
            name: entry[name] for name in ("angle", "strength", "adaptive", "positions", "label")
        }
        edit = cls(vectors[0], vectors[1], entry["sites"], **options)
        edit._take_stored(vectors)
        return edit
