"""Shared arithmetic of the estimators over two sets of activations.

Knows: means, signs, spreads. Does not know: any one method.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction
from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

if TYPE_CHECKING:
    import numpy as np

# Axes whose lengths differ by less than this fraction are one another's equals: none of them is first.
TIE_TOLERANCE = 1e-9
NO_DIFFERENCE = (
    "the difference in means is zero: this place sees the same activation whatever the prompt says"
)


def fingerprint_of(tensors: list[Tensor], words: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(words).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- what the estimators share -------------------------------------------------------------------


def as_float64(values: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_model"]:
    return values.detach().to("cpu", torch.float64)


def checked_means(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    site: Site,
    position: str,
) -> Direction:
    """The difference in means, which gives every estimator its checks, its sign and its norm."""
    found = difference_in_means(positive, negative, site, position=position)
    if found is None:
        raise DirectionError(
            f"no direction at {site}[{position}]: {NO_DIFFERENCE}; use another place"
        )
    return found


def signed_direction(
    vector: Float[Tensor, " d_model"], means: Direction, method: str, source: str
) -> Direction:
    """The direction along which positives project higher; its norm is the gap of the means along it."""
    unit = Direction(vector, 1.0, means.site, means.position, method).vector
    along = float(unit @ means.raw)
    if abs(along) <= ZERO_TOLERANCE * means.norm:
        raise DirectionError(
            f"{method} at {means.site}[{means.position}] is orthogonal to the difference in means: the "
            "two sets project alike on it, so that it has no sign; use difference_in_means"
        )
    unit = unit if along > 0 else -unit
    return Direction(unit, abs(along), means.site, means.position, method, source=source)


def paired_differences(
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> Float[Tensor, "pair d_model"]:
    pairs = min(len(positive), len(negative))
    first = as_float64(positive[:pairs])
    differences = first - as_float64(negative[:pairs])
    if float(differences.norm()) <= ZERO_TOLERANCE * float(first.norm()):
        raise DirectionError(
            f"the first {pairs} positive and negative activations at {means.site}[{means.position}] "
            "are the same pair by pair: there is nothing to find axes of. Give sets of equal size "
            "whose i-th prompts differ, or use difference_in_means"
        )
    return differences


def check_spread(
    method: str,
    positive: Float[Tensor, "prompt d_model"],
    negative: Float[Tensor, "prompt d_model"],
    means: Direction,
) -> None:
    """A covariance needs two prompts a side, and prompts that differ.

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


def standardized_sets(
    positive: Float[Tensor, "prompt d_model"], negative: Float[Tensor, "prompt d_model"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All prompts with mean 0 and variance 1 in every dimension, labels, and the scale of each.

    A direction found in this space is one of the stream when it is divided by the scale.
    """
    from sklearn.preprocessing import StandardScaler

    rows = torch.cat([as_float64(positive), as_float64(negative)]).numpy()
    labels = (torch.arange(len(rows)) < len(positive)).numpy()
    scaler = StandardScaler()
    return scaler.fit_transform(rows), labels, scaler.scale_


def check_values(values: Tensor) -> None:
    if values.ndim == 0 or 0 in values.shape or not values.is_floating_point():
        raise DirectionError(
            f"activations are a float tensor [..., d_model]; got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise DirectionError(
            "activations hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )
