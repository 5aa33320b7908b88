"""Directions beside directions: cosines with the band that shuffled labels give, and angles between subspaces.

Two directions of one stream share more than chance in all of d_model would: activations lie along few axes. So the
band is not that of random vectors: the same estimator makes directions from the same activations with labels that
say nothing, and their cosines are what a cosine has to leave.

Knows: vectors, estimators, activations. Does not know: models, or whether two models share a basis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import (
    Direction,
    as_direction,
    as_directions,
    orthogonalized,
)
from interp_ablate.directions.direction_set import HasActivations
from interp_ablate.directions.estimators import estimator_named
from interp_ablate.directions.mean_difference import as_float64, label_shuffles, labels_of
from interp_ablate.directions.subspaces import Subspace
from interp_ablate.errors import DirectionError, InterpAblateError

if TYPE_CHECKING:
    import pandas as pd

Some = Direction | Iterable[Direction] | Mapping[str, Direction]
COLUMNS = (
    "first", "second", "first_layer", "second_layer", "cosine", "null_low", "null_high", "outside", "n_shuffled",
)  # fmt: skip
_ORTHOGONALIZED = "_orthogonalized"
_FEWEST = 39  # shuffles from which the extreme ones are a 95% band


def cosine_table(
    some: Some,
    others: Some | None = None,
    *,
    activations: HasActivations | None = None,
    other_activations: HasActivations | None = None,
    n_shuffled: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """The cosine of every pair of directions, with the band of the same cosine where labels say nothing.

    A row a pair: first, second, their layers, cosine, null_low, null_high (the middle 95% of cosines after labels
    were shuffled and the directions estimated again), outside (whether the cosine has left the band), n_shuffled.
    Without activations there is no band. One pair in twenty leaves its band by chance.

    Args:
        some: directions, by names of yours or their own.
        others: those to compare with; default: the same ones, each pair once.
        activations: what `some` were estimated from, with labels.
        other_activations: the same for `others`; without them those stay as they are. Of the same prompts, both
            sides are estimated from the same shuffles.
        n_shuffled: how often labels are shuffled, at least 39.

    Raises:
        DirectionError: no directions, two of one name, or another d_model; with activations too few shuffles, and
            a method or place that they cannot give again.
    """
    import pandas as pd

    rows, columns = _named(some), _named(some if others is None else others)
    _check_widths({**rows, **{f"other {name}": item for name, item in columns.items()}})
    cosines = _vectors(rows) @ _vectors(columns).T
    low = high = torch.full_like(cosines, torch.nan)
    if activations is None:
        if other_activations is not None:
            raise DirectionError(
                "other_activations need activations, those of the first directions"
            )
        n_shuffled = 0
    else:
        left = _shuffled(rows, activations, n_shuffled, seed)
        right = _vectors(columns)[None]
        if others is None or other_activations is not None:
            right = _shuffled(columns, other_activations or activations, n_shuffled, seed)
        null = left @ right.transpose(1, 2)
        low, high = torch.nanquantile(null, torch.tensor([0.025, 0.975], dtype=null.dtype), dim=0)
    table: list[dict[str, Any]] = []
    for i, (first, a) in enumerate(rows.items()):
        for j, (second, b) in enumerate(columns.items()):
            if others is None and j <= i:
                continue
            cosine, ends = float(cosines[i, j]), (float(low[i, j]), float(high[i, j]))
            outside = None if np.isnan(ends).any() else not ends[0] <= cosine <= ends[1]
            table.append(
                dict(zip(COLUMNS, (first, second, a.site.layer, b.site.layer, cosine, *ends, outside, n_shuffled)))
            )  # fmt: skip
    return pd.DataFrame(table, columns=list(COLUMNS)).astype({"outside": "boolean"})


def shuffled_directions(
    direction: Direction, activations: HasActivations, count: int = 100, *, seed: int = 0
) -> list[Direction]:
    """What the direction's estimator makes of the same activations with shuffled labels: controls.

    Raises:
        DirectionError: as `cosine_table`.
    """
    vectors = _shuffled({direction.name: direction}, activations, count, seed)[:, 0]
    return [
        replace(direction, vector=vector, separation=None, source="shuffled labels")
        for vector in vectors
        if torch.isfinite(vector).all()
    ]


def principal_angles(
    first: Subspace | Some | Float[Tensor, "k d_model"],
    second: Subspace | Some | Float[Tensor, "k d_model"],
) -> Float[np.ndarray, " angle"]:
    """The principal angles between two subspaces in degrees, the smallest first.

    There are as many as the smaller subspace has dimensions. Directions span a subspace. Source: Björck and Golub
    1973, https://doi.org/10.1090/S0025-5718-1973-0348991-3, as in scipy.

    Raises:
        DirectionError: another d_model; directions that depend on each other.
    """
    from scipy.linalg import subspace_angles

    a, b = (_basis(each) for each in (first, second))
    if a.shape[1] != b.shape[1]:
        raise DirectionError(f"the subspaces are of d_model {a.shape[1]} and {b.shape[1]}")
    return np.rad2deg(subspace_angles(a.numpy().T, b.numpy().T))[::-1]


def _basis(given: Subspace | Some | Tensor) -> Float[Tensor, "k d_model"]:
    if isinstance(given, Subspace):
        return given.vectors
    if not isinstance(given, Tensor):
        items = _named(given)
        _check_widths(items)
        given = _vectors(items)
    rows = as_float64(given)
    if rows.ndim != 2 or int(torch.linalg.matrix_rank(rows)) < len(rows):
        raise DirectionError(
            f"vectors of shape {tuple(rows.shape)} span no subspace of as many dimensions: give independent rows "
            "[k, d_model]"
        )
    return rows


def _named(some: Some) -> dict[str, Direction]:
    if isinstance(some, Mapping):
        named = {name: as_direction(item) for name, item in some.items()}
    else:
        items = as_directions(some)
        named = {item.name: item for item in items}
        if len(named) < len(items):
            names = [item.name for item in items]
            again = next(name for name in names if names.count(name) > 1)
            raise DirectionError(
                f"two directions are called {again}: give a dict with names of yours"
            )
    if not named:
        raise DirectionError("there is no direction to compare")
    return named


def _check_widths(items: Mapping[str, Direction]) -> None:
    widths = {name: len(item.vector) for name, item in items.items()}
    (first, width), *_ = widths.items()
    other = next((name for name in widths if widths[name] != width), None)
    if other is not None:
        raise DirectionError(
            f"{first} has d_model {width}, and {other} {widths[other]}: streams of different widths have no "
            "cosine. Compare directions of one model, or of a model and its fine-tunes"
        )


def _vectors(items: Mapping[str, Direction]) -> Float[Tensor, "direction d_model"]:
    return torch.stack([item.vector for item in items.values()])


def _shuffled(
    items: Mapping[str, Direction], activations: HasActivations, count: int, seed: int
) -> Float[Tensor, "shuffle direction d_model"]:
    """Unit vectors of the same estimators after each shuffle; NaN where one finds no direction."""
    if count < _FEWEST:
        raise DirectionError(f"n_shuffled={count}: a band of 95% takes {_FEWEST} shuffles or more")
    labels = labels_of(activations)
    shuffles = label_shuffles(labels, count, seed=seed)
    made = []
    for name, item in items.items():
        try:
            values = as_float64(activations.at(item.site, item.position))
        except InterpAblateError as error:
            raise DirectionError(f"{name} cannot be estimated again: {error}") from error
        _check_same(name, item, values[labels], values[~labels])
        made.append(torch.stack([_estimate(item, values[y], values[~y]) for y in shuffles]))
    return torch.stack(made, 1)


def _check_same(name: str, item: Direction, positive: Tensor, negative: Tensor) -> None:
    """Refuse activations that do not give the direction itself."""
    if positive.shape[1] != len(item.vector):
        raise DirectionError(
            f"{name} has d_model {len(item.vector)}, its activations {positive.shape[1]}"
        )
    again = _estimate(item, positive, negative)
    if not float(again @ item.vector) > 0.999:
        raise DirectionError(
            f"{name} is not what {item.method} gives of these activations: give those that it was estimated "
            "from, or none (there is no band then)"
        )


def _estimate(item: Direction, positive: Tensor, negative: Tensor) -> Float[Tensor, " d_model"]:
    """The unit vector of a direction's own estimator; NaN where it finds none."""
    method = item.method.removesuffix(_ORTHOGONALIZED)
    estimator = estimator_named(method)
    try:
        made = estimator(positive, negative, item.site, position=item.position)
        if made is not None and method != item.method:
            made = orthogonalized(made, negative.mean(0))
    except DirectionError:
        made = None
    return torch.full_like(item.vector, torch.nan) if made is None else made.vector
