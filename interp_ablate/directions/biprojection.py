"""Biprojection: a direction measured at one layer, made orthogonal to what other layers hold of the negative set.

Knows: one direction and the negative means of the sites where it is to be removed. Does not know: plans or weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from interp_ablate.directions.direction import Direction, as_direction, orthogonalized
from interp_ablate.directions.direction_set import Directions, HasActivations
from interp_ablate.directions.mean_difference import as_float64, labels_of
from interp_ablate.errors import DirectionError
from interp_ablate.sites import SiteLike, as_sites


def biprojected_directions(
    direction: Direction,
    activations: HasActivations,
    sites: SiteLike | Iterable[SiteLike] | None = None,
) -> Directions:
    """One direction for every site: the given one without its part along that site's negative mean.

    What a layer is to lose is measured where it shows best, and what that layer needs for other prompts is measured
    at the layer itself. `ablate_by_layer` removes each from what its own layer writes. The direction of the
    source's own site is that of projected abliteration (`orthogonalized`). Source: norm-preserving biprojected
    abliteration (Lai 2025, https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration).

    Args:
        direction: what was measured, at any site.
        activations: labelled activations that have the direction's position; only the negative prompts are read.
        sites: where it is to be removed; default: every collected site of the direction's point.

    Raises:
        DirectionError: activations without labels or negative prompts, a site or position that was not collected,
            another d_model; no site where anything is left of the direction.
    """
    direction, labels = as_direction(direction), labels_of(activations)
    if not bool((~labels).any()):
        raise DirectionError("biprojection needs negative prompts, whose mean it spares")
    if direction.position not in activations.positions:
        raise DirectionError(
            f"the direction was read at position {direction.position}, and the activations hold "
            f"{', '.join(activations.positions)}: collect that one"
        )
    chosen = (
        [site for site in activations.sites if site.point == direction.site.point]
        if sites is None
        else as_sites(sites)
    )
    items, left_out = [], {}
    for site in chosen:
        values = activations.at(site, direction.position)
        if values.shape[1] != len(direction.vector):
            raise DirectionError(
                f"the direction has d_model {len(direction.vector)}, the activations at {site} {values.shape[1]}"
            )
        try:
            made = orthogonalized(direction, as_float64(values[~labels]).mean(0))
        except DirectionError as error:
            left_out[f"{site}[{direction.position}]"] = str(error)
            continue
        source = f"{direction.source} measured at {direction.site}".strip()
        items.append(
            Direction(made.vector, made.norm, site, made.position, "biprojected", source=source)
        )
    if not items:
        reason = next(iter(left_out.values()), f"no site of {direction.site.point} was collected")
        raise DirectionError(f"no site has a biprojected direction: {reason}")
    return Directions(tuple(items), left_out, direction.source)
