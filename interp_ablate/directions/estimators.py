"""Estimators beside difference in means: PCA, rank-k subspaces, LDA, logistic regression, LEACE.

Knows: which of them say what a model writes and which only tell two sets apart, signs, norms, outliers,
directions between layers, and one table that compares them. Does not know: models, or any edit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions.class_separation import separation
from interp_ablate.directions.direction import Direction, orthogonalized
from interp_ablate.directions.direction_set import Directions, HasActivations
from interp_ablate.directions.discriminants import lda, logistic
from interp_ablate.directions.leace_eraser import leace
from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.directions.subspaces import pca
from interp_ablate.directions.two_sets import (
    NO_DIFFERENCE,
    as_float64,
    checked_means,
    signed_direction,
)
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

if TYPE_CHECKING:
    import pandas as pd


class Estimator(Protocol):
    """What `ESTIMATORS` holds: two labelled sets at one site to a direction there."""

    def __call__(
        self,
        positive: Float[Tensor, "prompt d_model"],
        negative: Float[Tensor, "prompt d_model"],
        site: Site,
        *,
        position: str = ...,
        source: str = ...,
    ) -> Direction | None: ...


ESTIMATORS: dict[str, Estimator] = {
    "difference_in_means": difference_in_means,
    "pca": pca,
    "lda": lda,
    "logistic": logistic,
}


# ---- over all sites, and side by side ------------------------------------------------------------


def estimate_with(
    method: str,
    train: HasActivations,
    held_out: HasActivations | None = None,
    *,
    sites: Iterable[Site] | None = None,
    source: str = "",
) -> Directions:
    """One estimator of `ESTIMATORS` at every site and position; where it finds nothing, the reason.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        sites: only these, of those collected; default: all.

    Raises:
        DirectionError: an unknown method; activations without labels, with NaN or of another d_model; no
            site with a direction at all.
    """
    if method not in ESTIMATORS:
        raise DirectionError(
            f"unknown estimator {method!r}: accepted are {', '.join(ESTIMATORS)} (subspace and leace "
            "give more than one direction: call them for one site)"
        )
    labels = _labels_of(train)
    held_labels = None if held_out is None else _labels_of(held_out)
    found, left_out = [], {}
    for site in _chosen(sites, train.sites):
        for position in train.positions:
            values, place = train.at(site, position), f"{site}[{position}]"
            positive, negative = values[labels], values[~labels]
            if difference_in_means(positive, negative, site) is None:  # NaN and bad shapes raise
                left_out[place] = NO_DIFFERENCE
                continue
            try:
                item = ESTIMATORS[method](
                    positive, negative, site, position=position, source=source
                )
            except DirectionError as error:
                left_out[place] = str(error)
                continue
            if item is not None and held_out is not None and held_labels is not None:
                item = _measured(item, held_out.at(site, position), held_labels)
            if item is not None:
                found.append(item)
    if not found:
        first = next(iter(left_out.items()), ("no site was given", "give one or more"))
        raise DirectionError(f"no site has a direction of {method}; {first[0]}: {first[1]}")
    return Directions(tuple(found), left_out, source)


def _labels_of(activations: HasActivations) -> Bool[Tensor, " prompt"]:
    if activations.labels is None:
        raise DirectionError("directions need labels: collect a ContrastSet, not a list of prompts")
    return activations.labels


def _chosen(sites: Iterable[Site] | None, there: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites asked for, in the order in which they were collected."""
    if sites is None:
        return there
    wanted = set(sites)
    unknown = sorted(str(site) for site in wanted - set(there))
    if unknown:
        raise DirectionError(
            f"no activations at {unknown[0]}: collected were {len(there)} sites"
            + (f" from {there[0]} to {there[-1]}" if there else "")
        )
    return tuple(site for site in there if site in wanted)


def _measured(
    item: Direction, values: Float[Tensor, "prompt d_model"], labels: Bool[Tensor, " prompt"]
) -> Direction:
    if values.shape[1] != len(item.vector):
        raise DirectionError(
            f"d_model differs at {item.site}: {len(item.vector)} in training, {values.shape[1]} held "
            "out; collect both with the same model"
        )
    return replace(item, separation=separation(as_float64(values) @ item.vector, labels.cpu()))


# What `comparison` lists: an estimator and its rows.
COMPARED: dict[str, tuple[str, ...]] = {
    "difference_in_means": ("difference_in_means",),
    "difference_in_means_orthogonalized": ("difference_in_means_orthogonalized",),
    "pca": ("pca",),
    "lda": ("lda",),
    "logistic": ("logistic",),
    "leace": ("leace_write", "leace_read"),
}


def comparison(
    train: HasActivations, held_out: HasActivations, site: Site, position: str | int = "-1"
) -> pd.DataFrame:
    """One row an estimator: AUC and d' on held-out prompts, cosine to the difference in means, norm.

    `norm` is the gap of the training means along the unit direction. An estimator that cannot be had here
    (too few prompts, a package that is missing) keeps its row, with NaN and the reason in `left_out`. The
    row leace_write is the difference in means again: what LEACE adds is what it reads along.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model; no difference in means.
    """
    import pandas as pd

    labels, held_labels = _labels_of(train), _labels_of(held_out)
    place = str(position)
    values, held = train.at(site, place), held_out.at(site, place)
    means = checked_means(values[labels], values[~labels], site, place)
    rows = []
    for name, item, reason in _side_by_side(values[labels], values[~labels], means):
        row: dict[str, Any] = {"estimator": name, "left_out": reason}
        if item is not None:
            measured = _measured(item, held, held_labels).separation
            assert measured is not None
            cosine = float(item.vector @ means.vector)
            norm = float(item.vector @ means.raw)
            row.update(auc=measured.auc, d_prime=measured.d_prime, cosine=cosine, norm=norm)
        rows.append(row)
    columns = ["estimator", "auc", "d_prime", "cosine", "norm", "left_out"]
    return pd.DataFrame(rows, columns=columns)


def _side_by_side(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> list[tuple[str, Direction | None, str]]:
    """Every row's name and direction, or None and the reason."""
    rows: list[tuple[str, Direction | None, str]] = []
    for method, names in COMPARED.items():
        try:
            made = _rows_of(method, positive, negative, means)
        except DirectionError as error:
            rows.extend((name, None, str(error)) for name in names)
        else:
            rows.extend((name, item, "") for name, item in zip(names, made, strict=True))
    return rows


def _rows_of(
    method: str,
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> list[Direction | None]:
    site, position = means.site, means.position
    if method == "difference_in_means_orthogonalized":
        return [orthogonalized(means, as_float64(negative).mean(0))]
    if method == "leace":
        eraser = leace(positive, negative, site, position=position)
        parts = zip(COMPARED[method], (eraser.write, eraser.read), strict=True)
        return [signed_direction(part, means, name, "") for name, part in parts]
    return [ESTIMATORS[method](positive, negative, site, position=position)]
