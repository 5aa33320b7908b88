"""A filter of layers: those where the two sets' means lie on opposite sides of zero along the direction.

Knows: projections of means. Does not know: how directions were estimated, or what is done at a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.directions.direction_set import Directions, HasActivations, as_set
from interp_ablate.directions.mean_difference import as_float64, labels_of
from interp_ablate.errors import DirectionError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("layer", "point", "position", "method", "positive", "negative", "opposite")


def mean_projections(
    directions: Direction | Iterable[Direction], activations: HasActivations
) -> pd.DataFrame:
    """Both sets' mean activation projected on each direction, and whether the two have opposite signs.

    A row a direction: layer, point, position, method, positive and negative (scalar products with the unit vector,
    nothing is centred), opposite (their product is below 0). Where both means lie on one side, a projection of zero is
    no place between the two sets; the paper steers at the other layers alone. Source: discriminative layer selection
    (Dang and Ngo 2026, https://arxiv.org/abs/2601.19375).

    Args:
        directions: each is projected on at its own site and position. One `Direction` alone is projected on at every
            collected site: a single direction for all layers.
        activations: labelled ones; held-out prompts say more than those that made the directions.

    Raises:
        DirectionError: activations without labels, of one set only, or of another d_model; no direction; a site that
            was not collected.
    """
    import pandas as pd

    labels = labels_of(activations)
    if bool(labels.all()) or not bool(labels.any()):
        raise DirectionError("the signs of two means need prompts of both sets")
    if isinstance(directions, Direction):
        places = [(site, directions.position, directions) for site in activations.sites]
    else:
        places = [(item.site, item.position, item) for item in as_directions(directions)]
    if not places:
        raise DirectionError("there is no direction to project on")
    rows: list[dict[str, Any]] = []
    for site, position, item in places:
        projections = as_float64(activations.at(site, position)) @ item
        means = [float(projections[side].mean()) for side in (labels, ~labels)]
        about = (site.layer, site.point, position, item.method)
        rows.append(dict(zip(COLUMNS, (*about, *means, means[0] * means[1] < 0))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def with_opposite_signs(directions: Directions, activations: HasActivations) -> Directions:
    """Only the directions on which the two sets' means project with opposite signs (`mean_projections`).

    The others are in `left_out`, with both projections. `{each.site.layer for each in kept}` are the layers to edit.

    Raises:
        DirectionError: as `mean_projections`; no direction passes.
    """
    directions = as_set(directions)
    table = mean_projections(directions, activations)
    kept, left_out = [], dict(directions.left_out)
    for item, row in zip(directions, table.itertuples(index=False), strict=True):
        if row.opposite:
            kept.append(item)
            continue
        left_out[f"{item.site}[{item.position}] {item.method}"] = (
            f"both sets' means lie on one side of zero: {row.positive:.4g} and {row.negative:.4g}"
        )
    if not kept:
        raise DirectionError(
            f"none of {len(directions)} directions has the two sets' means on opposite sides of zero: use all "
            "layers, or activations at other positions"
        )
    return Directions(tuple(kept), left_out, directions.source)
