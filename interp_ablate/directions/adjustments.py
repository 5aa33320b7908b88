"""Adjustments around an estimate: activations winsorized before it, directions interpolated between layers after it.

Knows: activations and directions. Does not know: hooks or plans.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.directions.direction_set import Directions, as_set
from interp_ablate.display import shortened
from interp_ablate.errors import DirectionError
from interp_ablate.precision import to_float64
from interp_ablate.sites import Point, Site


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
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or not values.ndim or 0 in values.shape or not values.is_floating_point():
        came = (
            f"{values.dtype} of shape {tuple(values.shape)}"
            if is_tensor
            else shortened(repr(values))
        )
        raise DirectionError(f"activations are a float tensor [..., d_model]; got {came}")
    if not torch.isfinite(values).all():
        raise DirectionError(
            "activations hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )
    if isinstance(quantile, bool) or not isinstance(quantile, Real) or not 0 < quantile <= 1:
        raise DirectionError(
            f"a quantile is more than 0 and at most 1 (1 clips nothing); got {quantile!r}"
        )
    place = float(quantile) * (values.shape[-1] - 1)
    below = math.floor(place)
    top = to_float64(values.abs().topk(values.shape[-1] - below, dim=-1).values)
    lower = top[..., -1:]
    upper = top[..., -2:-1] if top.shape[-1] > 1 else lower
    limit = (lower + (upper - lower) * (place - below)).to(values)
    return values.clamp(-limit, limit)


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
    directions = as_set(directions)
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
        each
        for each in directions
        if each.site.point == site.point and each.is_of(position, method)
    ]
    if not at_point:
        raise DirectionError(
            f"no direction at any {site.point}"
            + (f", position {position}" if position else "")
            + (f", method {method}" if method else "")
            + f": there are {len(directions)} at {sorted({item.site.point for item in directions})}"
        )
    return directions[site, at_point[0].position, at_point[0].method]
