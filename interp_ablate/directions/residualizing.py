"""SRA: a direction without what it shares with the directions of protected concepts, by ridge regression.

Knows: vectors, and the ridge that takes protected ones out of another. Does not know: prompts, models, or any edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction, as_direction, as_vector
from interp_ablate.directions.direction_set import Directions, as_set
from interp_ablate.display import shortened
from interp_ablate.errors import DirectionError
from interp_ablate.settings import RIDGE

SUFFIX = "_residualized"


def residualized(
    direction: Direction,
    protected: Iterable[Direction | Float[Tensor, " d_model"]],
    *,
    ridge: float = RIDGE,
) -> Direction:
    """The direction without what protected concepts' directions explain of it.

    With the protected unit vectors as the columns of A, the raw direction r becomes r - A w, where
    w = (A^T A + ridge I)^-1 A^T r. With ridge 0 nothing is left along any protected direction (its projection on
    their span is taken out; they may depend on each other). A ridge leaves a little: of one concept ridge / (1 + ridge)
    of its part. In return, protected directions that are nearly parallel do not take out their difference, which
    is noise. The norm is that of the remainder. Source: surgical refusal ablation (Cristofano 2026,
    https://arxiv.org/abs/2601.08489); the default ridge is this package's.

    Raises:
        DirectionError: no protected direction, another d_model, one that is zero or not finite; a ridge that is no
            finite number from 0; nothing left but rounding.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 <= ridge < math.inf:
        raise DirectionError(f"a ridge is a finite number from 0; got {ridge!r}")
    raw = as_direction(direction).raw
    atoms = torch.stack([_unit(each, direction) for each in _listed(protected)], dim=1)
    # (A^T A + ridge I) w = A^T r, solved as least squares: its rows are those of A and of sqrt(ridge) I.
    weights = torch.linalg.lstsq(
        torch.cat([atoms, math.sqrt(ridge) * torch.eye(atoms.shape[1], dtype=atoms.dtype)]),
        torch.cat([raw, raw.new_zeros(atoms.shape[1])])[:, None],
        driver="gelsd",
    ).solution[:, 0]
    rest = raw - atoms @ weights
    if float(rest.norm()) <= ZERO_TOLERANCE * float(raw.norm()):
        raise DirectionError(
            f"nothing is left of the direction at {direction.site}[{direction.position}]: the {atoms.shape[1]} "
            "protected directions span it. Protect fewer concepts, or use a larger ridge"
        )
    norm, method = float(rest.norm()), f"{direction.method}{SUFFIX}"
    source = direction.source
    return Direction(rest, norm, direction.site, direction.position, method, source=source)


def residualized_directions(
    directions: Directions, protected: Mapping[str, Directions], *, ridge: float = RIDGE
) -> Directions:
    """Every direction without what the protected concepts' directions at its own place explain of it.

    Args:
        directions: those to clean; their separation was measured along another vector, so it is dropped.
        protected: from the name of a concept to its directions (`estimate_directions` of its own two sets of prompts).
            At each site and position the first one is taken. A concept that has none there explains nothing there.

    Raises:
        DirectionError: as `residualized`; no direction is left at all.
    """
    if not isinstance(protected, Mapping) or not protected:
        raise DirectionError(
            f"protected concepts are a dict from a name to its directions, at least one; got {shortened(repr(protected))}"
        )
    directions, sets = as_set(directions), [as_set(each) for each in protected.values()]
    left_out, items = dict(directions.left_out), []
    for item in directions:
        here = [at for each in sets if (at := _at_its_place(each, item)) is not None]
        try:
            if not here:
                raise DirectionError("no protected concept has a direction here")
            items.append(residualized(item, here, ridge=ridge))
        except DirectionError as error:
            left_out[f"{item.site}[{item.position}]{SUFFIX}"] = str(error)
    if not items:
        first = next(iter(left_out.values()), "there was none to begin with")
        raise DirectionError(f"no direction is left: {first}")
    return Directions(tuple(items), left_out, directions.source)


def _at_its_place(protected: Directions, item: Direction) -> Direction | None:
    places = (each for each in protected if each.site == item.site)
    return next((each for each in places if each.position == item.position), None)


def _listed(protected: Iterable[Direction | Tensor]) -> list[Direction | Tensor]:
    """The protected vectors as a list; one vector alone is a list of one, not of its numbers."""
    if isinstance(protected, Direction) or (isinstance(protected, Tensor) and protected.ndim == 1):
        return [protected]
    if isinstance(protected, Mapping):
        raise DirectionError(
            "protected directions by name: give their values here, or use residualized_directions, which takes names"
        )
    items = list(protected) if isinstance(protected, Iterable) else [protected]
    if not items:
        raise DirectionError("give at least one protected direction to take out")
    return items


def _unit(protected: Direction | Tensor, direction: Direction) -> Float[Tensor, " d_model"]:
    """A protected vector, scaled to unit length."""
    vector = as_vector(protected)
    if vector.shape != direction.vector.shape:
        raise DirectionError(
            f"the direction has the shape {tuple(direction.vector.shape)}, a protected one "
            f"{tuple(vector.shape)}: both are vectors of one stream"
        )
    length = float(vector.norm())
    if not 0 < length < math.inf:
        raise DirectionError("a protected direction is zero or not finite: leave it out")
    return vector / length
