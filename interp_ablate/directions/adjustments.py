"""Directions made from directions: winsorized, interpolated between layers.

Knows: adjustments of data or layers. Does not know: hooks and plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.two_sets import check_values
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Point, Site

# ---- outliers, and layers between layers ---------------------------------------------------------


def winsorized(
    values: Float[Tensor, "*batch d_model"], quantile: float = 0.995
) -> Float[Tensor, "*batch d_model"]:
    """Every vector's coordinates clipped to the given quantile of their own absolute values.

    A few massive dimensions dominate the means of some models; abliteration tools clip them before they
    take means. The quantile is interpolated between order statistics, as numpy's is. Returns a new
    tensor of the same dtype; quantile 1 changes nothing.

    Raises:
        DirectionError: no float tensor with an axis d_model; NaN or infinity; a quantile not in (0, 1].
    """
    check_values(values)
    if isinstance(quantile, bool) or not isinstance(quantile, Real) or not 0 < quantile <= 1:
        raise DirectionError(
            f"a quantile is more than 0 and at most 1 (1 clips nothing); got {quantile!r}"
        )
    place = float(quantile) * (values.shape[-1] - 1)
    below = math.floor(place)
    top = values.abs().topk(values.shape[-1] - below, dim=-1).values.double()
    lower = top[..., -1:]
    upper = top[..., -2:-1] if top.shape[-1] > 1 else lower
    limit = (lower + (upper - lower) * (place - below)).to(values.dtype)
    return values.clamp(-limit, limit)


@dataclass(frozen=True)
class MassiveDimension:
    """A dimension of the stream with its mean absolute activation, and how many medians that is."""

    index: int
    mean_abs: float
    ratio: float


def massive_dimensions(
    values: Float[Tensor, "*batch d_model"], *, factor: float = 20.0
) -> tuple[MassiveDimension, ...]:
    """Dimensions whose mean |x| is at least `factor` times the median dimension's, largest first.

    Such dimensions decide means, norms and cosines. `winsorized` clips them. Of single activations Sun et
    al. 2024 (https://arxiv.org/abs/2402.17762) call massive what is 1000 times the median; a mean
    over prompts is less.

    Raises:
        DirectionError: no float tensor with an axis d_model; NaN or infinity; a factor not above 1.
    """
    check_values(values)
    if isinstance(factor, bool) or not isinstance(factor, Real) or not 1 < factor < math.inf:
        raise DirectionError(f"a factor is a number above 1; got {factor!r}")
    sizes = values.double().abs().reshape(-1, values.shape[-1]).mean(0)
    middle = float(sizes.quantile(0.5))
    found = [
        MassiveDimension(index, size, size / middle if middle else math.inf)
        for index, size in enumerate(sizes.tolist())
        if size > 0 and size >= factor * middle
    ]
    return tuple(sorted(found, key=lambda item: (-item.mean_abs, item.index)))


def interpolated(
    directions: Directions,
    layer: float,
    point: Point,
    *,
    position: str | None = None,
    method: str | None = None,
) -> Direction:
    """The unit direction at a fractional layer: between those of the two layers around it, renormalized.

    The norm is interpolated too; the site is the nearest layer's (halves go up). A whole layer gives its
    own direction unchanged; in between there is no separation, which nobody has measured.

    Args:
        position, method: which of several at a site; default: of the first direction at this point.

    Raises:
        DirectionError: a layer that is no finite number from 0, or around which a direction is missing;
            neighbours that point in opposite ways.
    """
    if isinstance(layer, bool) or not isinstance(layer, Real) or not 0 <= layer < math.inf:
        raise DirectionError(f"a fractional layer is a finite number from 0; got {layer!r}")
    layer = float(layer)
    sites = [Site(number, point) for number in (math.floor(layer), math.ceil(layer))]
    lower, upper = (_looked_up(directions, site, position, method) for site in sites)
    share = layer - sites[0].layer
    if share == 0:
        return lower
    vector = (1 - share) * lower.vector + share * upper.vector
    if float(vector.norm()) <= ZERO_TOLERANCE:
        raise DirectionError(
            f"the directions at {sites[0]} and {sites[1]} point in opposite ways: there is none "
            f"between them at layer {layer:g}; use a whole layer"
        )
    return Direction(
        vector,
        (1 - share) * lower.norm + share * upper.norm,
        sites[math.floor(share + 0.5)],
        lower.position,
        lower.method,
        source=f"{lower.source} layer {layer:g}".strip(),
    )


def _looked_up(
    directions: Directions, site: Site, position: str | None, method: str | None
) -> Direction:
    at_point = [
        item
        for item in directions
        if item.site.point == site.point
        and position in (None, item.position)
        and method in (None, item.method)
    ]
    if not at_point:
        raise DirectionError(
            f"no direction at any {site.point}"
            + (f", position {position}" if position else "")
            + (f", method {method}" if method else "")
            + f": there are {len(directions)} at {sorted({item.site.point for item in directions})}"
        )
    return directions[site, at_point[0].position, at_point[0].method]
