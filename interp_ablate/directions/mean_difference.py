"""Difference in means, and the checks, signs and spreads that every other estimator takes from it.

Knows: two labelled sets of activations at a site, and the loop over sites and positions. Does not know: how
activations were obtained, any other estimator, or what is done along a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.directions.direction import (
    ZERO_TOLERANCE,
    Direction,
    PerPrompt,
    orthogonalized,
    separation,
)
from interp_ablate.directions.direction_set import Directions, HasActivations
from interp_ablate.display import shortened
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

# Axes whose lengths differ by less than this fraction count as equal: none of them is the first.
TIE_TOLERANCE = 1e-9
NO_DIFFERENCE = (
    "the difference in means is zero: this place sees the same activation whatever the prompt says"
)


def difference_in_means(
    positive: PerPrompt,
    negative: PerPrompt,
    site: Site,
    *,
    position: str = "-1",
    method: str = "difference_in_means",
    source: str = "",
) -> Direction | None:
    """Mean of the positive activations minus mean of the negative ones, in float64.

    Returns None where the difference is zero to rounding: the site sees the same activation whatever
    the prompt (the last template token at the first layer), so it carries no direction.
    Source: Arditi et al. 2024, https://arxiv.org/abs/2406.11717; Belrose 2023 on why the mean difference.

    Raises:
        DirectionError: NaN, empty sets, or shapes that do not fit.
    """
    _check_two_sets(positive, negative, site)
    means = [as_float64(values).mean(0) for values in (positive, negative)]
    difference = means[0] - means[1]
    norm = float(difference.norm())
    if norm <= ZERO_TOLERANCE * max(float(mean.norm()) for mean in means):
        return None
    return Direction(difference, norm, site, position, method, source=source)


def estimate_directions(
    train: HasActivations,
    held_out: HasActivations | None = None,
    *,
    orthogonalized_too: bool = False,
    source: str = "",
) -> Directions:
    """Difference in means at every site and position.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        orthogonalized_too: a second estimator beside it: each direction also orthogonalized to the
            negative mean.
        source: what identifies model and prompts, kept with the result.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model; no site with a
            direction at all.
    """
    variants: dict[str, Estimate] = {"": lambda means, positive, negative: means}
    if orthogonalized_too:
        variants[" orthogonalized"] = lambda means, positive, negative: orthogonalized(
            means, as_float64(negative).mean(0)
        )
    labels_of(train)  # refuses what is no activations
    directions = directions_at(train.sites, train, held_out, variants, source=source)
    if not directions:
        raise DirectionError(
            "no site has a direction: the two sets give the same activations everywhere. Are the "
            "prompts the same, or the positions before the instruction?"
        )
    return directions


# The difference in means at a place, the positive set, the negative set -> a direction there, or none.
Estimate = Callable[[Direction, Tensor, Tensor], Direction | None]


def directions_at(
    sites: Iterable[Site],
    train: HasActivations,
    held_out: HasActivations | None,
    variants: Mapping[str, Estimate],
    *,
    source: str,
) -> Directions:
    """The directions of every variant at each site and position, and the reasons where there is none.

    A variant's name is what a reason is filed under, behind the place. With held-out activations every
    direction carries its separation.

    Raises:
        DirectionError: activations without labels, with NaN or of another d_model.
    """
    labels = labels_of(train)
    held_labels = None if held_out is None else labels_of(held_out)
    items: list[Direction] = []
    left_out: dict[str, str] = {}
    for site in sites:
        for position in train.positions:
            values = train.at(site, position)
            positive, negative = values[labels], values[~labels]
            means = difference_in_means(positive, negative, site, position=position, source=source)
            if means is None:
                left_out[f"{site}[{position}]"] = NO_DIFFERENCE
                continue
            for name, estimate in variants.items():
                try:
                    item = estimate(means, positive, negative)
                except DirectionError as error:
                    left_out[f"{site}[{position}]{name}"] = str(error)
                    continue
                if item is not None and held_out is not None and held_labels is not None:
                    item = with_separation(item, held_out.at(site, position), held_labels)
                items += [] if item is None else [item]
    return Directions(tuple(items), left_out, source)


def labels_of(activations: HasActivations) -> Bool[Tensor, " prompt"]:
    """The labels of activations (True = positive).

    Raises:
        DirectionError: something else than activations; they are of a list of prompts, without labels; or of every
            token.
    """
    if not isinstance(activations, HasActivations):
        raise DirectionError(
            "directions are made of activations, such as collect(model, contrast, sites); got "
            f"{shortened(repr(activations))} ({type(activations).__name__})"
        )
    if not activations.positions:
        raise DirectionError(
            "a direction is made of one vector a prompt, and these are activations of every token: average them, "
            "as in activations.mean('response'), or collect positions that every prompt has, such as -1"
        )
    if activations.labels is None:
        raise DirectionError("directions need labels: collect a ContrastSet, not a list of prompts")
    return activations.labels


def shuffled_labels(labels: Bool[Tensor, " prompt"], *, seed: int) -> Bool[Tensor, " prompt"]:
    """Labels that carry no information: both sides hold the same share of former positives.

    (A plain permutation leaves the sides unequal by chance, and what is estimated then still has a part
    of the true direction.) The sizes of the sides stay.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [labels.cpu().eq(side).nonzero()[:, 0] for side in (True, False)]
    n_swapped = round(len(sides[0]) * len(sides[1]) / max(len(labels), 1))
    shuffled = labels.cpu().clone()
    for side in sides:
        chosen = side[torch.randperm(len(side), generator=generator)[:n_swapped]]
        shuffled[chosen] = ~shuffled[chosen]
    return shuffled


def label_shuffles(
    labels: Bool[Tensor, " prompt"], count: int, *, seed: int
) -> list[Bool[Tensor, " prompt"]]:
    """So many `shuffled_labels`, the same ones for a seed, and others for another."""
    return [shuffled_labels(labels, seed=1000 * seed + i) for i in range(count)]


def with_separation(
    item: Direction, values: PerPrompt, labels: Bool[Tensor, " prompt"]
) -> Direction:
    """The direction with how well it separates these activations.

    Raises:
        DirectionError: activations of another d_model, with NaN, or of one set only.
    """
    if values.shape[1] != len(item.vector):
        raise DirectionError(
            f"d_model differs at {item.site}: {len(item.vector)} in training, {values.shape[1]} held "
            "out; collect both with the same model"
        )
    return replace(item, separation=separation(as_float64(values) @ item.vector, labels.cpu()))


def as_float64(values: PerPrompt) -> PerPrompt:
    """Activations in float64 on the CPU, where every estimate is computed."""
    return values.detach().to("cpu", torch.float64)


def _check_two_sets(positive: PerPrompt, negative: PerPrompt, site: Site) -> None:
    for label, values in (("positive", positive), ("negative", negative)):
        if not isinstance(values, Tensor) or values.ndim != 2 or not len(values):
            is_tensor = isinstance(values, Tensor)
            came = (
                f"have shape {tuple(values.shape)}" if is_tensor else f"are {type(values).__name__}"
            )
            raise DirectionError(
                f"{label} activations at {site} {came}; accepted is [prompt, d_model] with at least one prompt"
            )
        if not torch.isfinite(values).all():
            rows = (~torch.isfinite(values).all(-1)).nonzero().flatten().tolist()
            raise DirectionError(
                f"{label} activations at {site} hold NaN or infinity (prompts {rows[:5]}): "
                "check the model's dtype; float16 often overflows, bfloat16 or float32 do not"
            )
    if positive.shape[1] != negative.shape[1]:
        raise DirectionError(
            f"d_model differs at {site}: {positive.shape[1]} against {negative.shape[1]}"
        )


def checked_means(positive: PerPrompt, negative: PerPrompt, site: Site, position: str) -> Direction:
    """The difference in means, which gives every estimator its checks, its sign and its norm.

    Raises:
        DirectionError: as `difference_in_means`, and a difference of zero.
    """
    means = difference_in_means(positive, negative, site, position=position)
    if means is None:
        raise DirectionError(
            f"no direction at {site}[{position}]: {NO_DIFFERENCE}; use another place"
        )
    return means


def signed_direction(
    vector: Float[Tensor, " d_model"], means: Direction, method: str, source: str
) -> Direction:
    """The direction along which positives project higher; its norm is the gap of the means along it.

    Raises:
        DirectionError: a vector orthogonal to the difference in means.
    """
    unit = Direction(vector, 1.0, means.site, means.position, method).vector
    along = float(unit @ means.raw)
    if abs(along) <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"{method} at {means.site}[{means.position}] is orthogonal to the difference in means: the "
            "two sets project alike on it, so that it has no sign; use difference_in_means"
        )
    unit = unit if along > 0 else -unit
    return Direction(unit, abs(along), means.site, means.position, method, source=source)


def check_spread(method: str, positive: PerPrompt, negative: PerPrompt, means: Direction) -> None:
    """Check that a covariance can be estimated: two prompts a side, and prompts that differ.

    Raises:
        DirectionError: one prompt a side, or no spread within the sets.
    """
    if min(len(positive), len(negative)) < 2:
        raise DirectionError(
            f"{method} estimates a covariance, which takes two prompts a side or more; got "
            f"{len(positive)} positive and {len(negative)} negative at {means.site}"
            f"[{means.position}]: give more prompts, or use difference_in_means"
        )
    sets = [as_float64(values) for values in (positive, negative)]
    spread = max(float((values - values.mean(0)).norm()) for values in sets)
    if spread <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"{method} estimates a covariance, and the prompts of each set give one and the same "
            f"activation at {means.site}[{means.position}]: use difference_in_means there"
        )
