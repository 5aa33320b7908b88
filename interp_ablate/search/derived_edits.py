"""Edits made of other edits: weaker ones, and controls that write along other directions.

Knows: how an edit is rescaled and turned. Does not know: parameters, scores or trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions.direction import (
    Direction,
    as_direction,
    orthogonalized,
    random_direction,
)
from interp_ablate.directions.mean_difference import difference_in_means, shuffled_labels
from interp_ablate.edits.affine import orthonormal_rows
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import NotFiniteError, PlanError
from interp_ablate.sites import Site

N_RANDOM_CONTROLS = 2
SCALING_STEPS, SAME_KL = 8, 1.15  # a KL within 15% counts as equal
NO_KL = 1e-7  # nats that are rounding
FAR_OFF = 10.0  # logarithm of a KL's ratio to the one asked for, where there is no KL


def scaled(
    edit: Ablate | Erase, factor: float, places: Sequence[int] | None = None
) -> Ablate | Erase | None:
    """The edit, or its part at some places, with every strength times a factor.

    Sites with strength 0 are left out; None where none is left.
    """
    chosen = range(len(edit.sites)) if places is None else places
    amounts = {edit.sites[i]: round(factor * edit.amounts[i], 6) for i in chosen}
    strengths = {site: amount for site, amount in amounts.items() if amount}
    return _rebuilt(edit, edit.vectors, strengths) if strengths else None


def along_control_direction(edit: Ablate | Erase, direction: Direction) -> Ablate | Erase:
    """A control: the edit along another direction; lengths, angles, sites and strengths stay.

    The other directions of a subspace are random, at right angles to it: those of the edit would still remove
    most of what it removes. An `Erase` writes along the direction and reads it too, with a random rest of the same
    length: its own `read` would still read most of what it was fitted to read. One direction has one control.
    """
    unit = as_direction(direction).vector
    if len(unit) != edit.d_model:
        raise PlanError(f"the plan has d_model {edit.d_model}, the direction {len(unit)}")
    strengths = dict(zip(edit.sites, edit.amounts))
    generator = torch.Generator().manual_seed(int(direction.fingerprint[:8], 16))
    others = torch.randn(len(edit.vectors), len(unit), generator=generator, dtype=unit.dtype)
    others[0] = unit
    frame = orthonormal_rows(others)
    if isinstance(edit, Erase):
        beside = float((edit.read - edit.write).norm())
        return _rebuilt(edit, torch.stack([unit, unit + beside * frame[1]]), strengths)
    return _rebuilt(edit, frame, strengths)


def _rebuilt(edit: Ablate | Erase, vectors: Tensor, strengths: dict[Site, float]) -> Ablate | Erase:
    same: dict[str, Any] = {
        "strength": tuple(strengths.values()),
        "positions": edit.positions,
        "label": edit.label,
    }
    if isinstance(edit, Erase):
        values = dict(zip(edit.sites, edit.values))
        return Erase(
            vectors[0], vectors[1], strengths, value=[values[site] for site in strengths], **same
        )
    return Ablate(vectors, strengths, norm_preserving=edit.norm_preserving, **same)


def random_directions(like: Direction, *, seed: int) -> list[tuple[str, Direction]]:
    """Random directions of equal norm, by name; the same ones for one seed."""
    seeds = [1000 * seed + i for i in range(N_RANDOM_CONTROLS)]
    return [(f"random {i}", random_direction(like, seed=each)) for i, each in enumerate(seeds)]


def shuffled_labels_direction(
    values: Float[Tensor, "prompt d_model"],
    labels: Bool[Tensor, " prompt"],
    like: Direction,
    *,
    orthogonal: bool,
    seed: int,
) -> Direction | None:
    """The difference in means of prompts whose labels were shuffled; None where there is none.

    Args:
        orthogonal: whether what lies along the negative mean is taken out, as of the direction it controls.

    Raises:
        DirectionError: nothing is left of it.
    """
    shuffled = shuffled_labels(labels, seed=seed)
    null = difference_in_means(
        values[shuffled],
        values[~shuffled],
        like.site,
        position=like.position,
        method="shuffled_labels",
    )
    if null is None or not orthogonal:
        return null
    return orthogonalized(null, values[~shuffled].double().mean(0))


def control_plan(plan: Plan, direction: Direction) -> Plan:
    """The plan turned to write along another direction, all its strengths kept.

    Raises:
        PlanError: an edit that is neither an `Ablate` nor an `Erase`: of it there is no such control.
    """
    return Plan(tuple(along_control_direction(edit, direction) for edit in _turnable(plan)))


def _turnable(plan: Plan) -> list[Ablate | Erase]:
    edits: list[Ablate | Erase] = []
    for edit in plan if isinstance(plan, Plan) else Plan(plan):
        if not isinstance(edit, (Ablate, Erase)):
            raise PlanError(
                f"{edit!r:.120} has no control and no scale here: both are of plans of Ablate and Erase alone"
            )
        edits.append(edit)
    return edits


def scaled_to_kl(
    plan: Plan, kl: float, kl_of: Callable[[Plan], float]
) -> tuple[Plan, float] | None:
    """The plan with all its strengths times a factor, so that its KL is about `kl`; and the factor.

    None where no factor gives a KL.

    Args:
        kl_of: measures a plan's KL, in nats; called at most SCALING_STEPS times.

    Raises:
        PlanError: an edit that is neither an `Ablate` nor an `Erase`.
    """
    edits = _turnable(plan)

    def times(factor: float) -> Plan:
        parts = [scaled(edit, factor) for edit in edits]
        return Plan(tuple(part for part in parts if part is not None))

    return strength_at_kl(times, kl, kl_of)


def strength_at_kl(
    family: Callable[[float], Plan],
    kl: float,
    kl_of: Callable[[Plan], float],
    *,
    start: float = 1.0,
    greatest: float = math.inf,
) -> tuple[Plan, float] | None:
    """The plan of a family whose KL is about `kl`, and its strength.

    A KL grows about with the square of a small strength: the first steps; once one strength is too weak and one too
    strong, the next lies on the line between them, both in logarithms. The strength that comes nearest is taken, of
    those that change nothing (a condition that no prompt meets) the last; None where no strength gives a KL.

    Args:
        family: from a strength above 0 to a plan.
        kl_of: measures a plan's KL, in nats; called at most SCALING_STEPS times.
        start: the strength that is tried first.
        greatest: no strength above it is tried; where it is too weak, the nearest so far is taken.
    """
    limit = math.log(greatest)
    factor, weak, strong = (
        min(math.log(start), limit),
        (-math.inf, 0.0),
        (math.inf, 0.0),
    )  # with their misses
    nearest: tuple[float, Plan, float] | None = None
    for _ in range(SCALING_STEPS):
        strength = math.exp(factor)
        try:
            candidate = family(strength)
            miss = math.log(max(kl_of(candidate), min(NO_KL, kl / 10)) / kl)
        except NotFiniteError:  # so strong that nothing finite is left
            miss = FAR_OFF
        if miss < FAR_OFF and (nearest is None or abs(miss) <= nearest[0]):
            nearest = abs(miss), candidate, strength
        if abs(miss) < math.log(SAME_KL):
            break
        if miss < 0 and factor >= limit:
            break
        weak, strong = ((factor, miss), strong) if miss < 0 else (weak, (factor, miss))
        if math.isfinite(strong[0] - weak[0]):
            share = weak[1] / (weak[1] - strong[1])
            factor = weak[0] + min(max(share, 0.15), 0.85) * (strong[0] - weak[0])
        else:
            factor = min(factor - min(max(miss / 2, -2.0), 2.0), limit)
    return nearest and nearest[1:]
