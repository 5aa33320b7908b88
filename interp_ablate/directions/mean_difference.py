"""Directions: what an estimator found at one site, and how well it separates.

Knows: difference in means, its controls (random, shuffled labels), separation on held-out prompts,
saving and loading. Does not know: how activations were obtained, or what will be done along a direction.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.class_separation import check_two_sets, separation
from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction, orthogonalized
from interp_ablate.directions.direction_set import Directions, HasActivations
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site


def difference_in_means(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
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
    check_two_sets(positive, negative, site)
    means = [values.double().mean(0) for values in (positive, negative)]
    difference = means[0] - means[1]
    norm = float(difference.norm())
    if norm <= ZERO_TOLERANCE * max(float(mean.norm()) for mean in means):
        return None
    return Direction(difference, norm, site, position, method, source=source)


def estimate_directions(
    train: HasActivations, held_out: HasActivations | None = None, *, source: str = ""
) -> Directions:
    """Difference in means at every site and position, each also orthogonalized to the negative mean.

    Args:
        train: labelled activations (`collect` over a ContrastSet).
        held_out: labelled activations of other prompts; with them every direction carries how well it
            separates prompts that did not make it.
        source: what identifies model and prompts, kept with the result.

    Raises:
        DirectionError: activations without labels, or no site with a direction at all.
    """
    if train.labels is None or (held_out is not None and held_out.labels is None):
        raise DirectionError("directions need labels: collect a ContrastSet, not a list of prompts")
    found, left_out = [], {}
    for site in train.sites:
        for position in train.positions:
            values = train.at(site, position)
            positive, negative = values[train.labels], values[~train.labels]
            first = difference_in_means(positive, negative, site, position=position, source=source)
            if first is None:
                left_out[f"{site}[{position}]"] = (
                    "the difference in means is zero: this place sees the same activation whatever the "
                    "prompt says"
                )
                continue
            both = [first]
            try:
                both.append(orthogonalized(first, negative.double().mean(0)))
            except DirectionError as error:
                left_out[f"{site}[{position}] orthogonalized"] = str(error)
            for item in both:
                if held_out is not None and held_out.labels is not None:
                    projections = held_out.at(site, position).double() @ item.vector
                    item = replace(item, separation=separation(projections, held_out.labels))
                found.append(item)
    if not found:
        raise DirectionError(
            "no site has a direction: the two sets give the same activations everywhere. Are the "
            "prompts the same, or the positions before the instruction?"
        )
    return Directions(tuple(found), left_out, source)
