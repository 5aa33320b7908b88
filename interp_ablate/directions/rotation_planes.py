"""The plane of angular steering: a feature's direction, and the main axis of the directions of all layers beside it.

Knows: how the second axis is found. Does not know: what is turned, or to which angle.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, as_direction, as_directions
from interp_ablate.errors import DirectionError

SMALLEST_REST = 1e-6  # of a unit axis: less beside the feature has no direction of its own


def steering_plane(
    feature: Direction, candidates: Iterable[Direction]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Two orthonormal vectors for `Rotate`: the feature's direction, and the second axis of the plane.

    The second axis is the first principal component (uncentred) of the candidates' unit vectors, without what lies along
    the feature; candidates are the same contrast's directions at other layers. Its sign is that of the candidates' mean.
    Source: Vu and Nguyen 2025, https://arxiv.org/abs/2510.26243.

    Raises:
        DirectionError: candidates of another d_model, or all along the feature: there is no plane.
    """
    first = as_direction(feature).vector
    rows = [candidate.vector for candidate in as_directions(candidates)]
    if not rows or any(row.shape != first.shape for row in rows):
        raise DirectionError(
            f"a steering plane needs candidates of the feature's d_model {len(first)}; got "
            f"{[len(row) for row in rows][:4]}"
        )
    units = torch.stack(rows)
    _, lengths, axes = torch.linalg.svd(units, full_matrices=False)
    for axis in axes[
        lengths > SMALLEST_REST * lengths[0]
    ]:  # the first may be the feature's own direction
        rest = axis - (axis @ first) * first
        if float(rest.norm()) > SMALLEST_REST:
            second = rest / rest.norm()
            second = second - (second @ first) * first
            sign = 1.0 if float(units.mean(0) @ second) >= 0 else -1.0
            return first, sign * second / second.norm()
    raise DirectionError(
        "every candidate lies along the feature's direction: there is no plane to turn in. Give directions of other layers"
    )
