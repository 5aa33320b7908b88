"""How well a direction separates two sets of activations.

Knows: Cohen's d, AUC and their checks. Does not know: how the direction was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site


@dataclass(frozen=True)
class Separation:
    """How well projections on a direction tell the two sets apart.

    `auc` is the probability that a positive prompt projects higher than a negative one (ties count
    half). `d_prime` is the distance of the two means in units of the pooled standard deviation.
    """

    auc: float
    d_prime: float


def check_two_sets(
    positive: Float[Tensor, "prompt d_model"], negative: Float[Tensor, "prompt d_model"], site: Site
) -> None:
    for label, values in (("positive", positive), ("negative", negative)):
        if values.ndim != 2 or not len(values):
            raise DirectionError(
                f"{label} activations at {site} have shape {tuple(values.shape)}; "
                "accepted is [prompt, d_model] with at least one prompt"
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


def separation(
    projections: Float[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]
) -> Separation:
    """AUC and d' of projections under the labels (True = positive).

    Raises:
        DirectionError: NaN or infinity, labels that are not one bool a projection, or only one set.
    """
    if labels.dtype != torch.bool or labels.shape != projections.shape or labels.ndim != 1:
        raise DirectionError(
            f"separation needs one bool a projection (True = positive); got {labels.dtype} of shape "
            f"{tuple(labels.shape)} for projections of shape {tuple(projections.shape)}"
        )
    if not torch.isfinite(projections).all():
        raise DirectionError(
            "projections hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )
    positive, negative = projections[labels].double(), projections[~labels].double()
    if not len(positive) or not len(negative):
        raise DirectionError("separation needs prompts of both sets")
    pairs = positive[:, None] - negative[None, :]
    auc = float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())
    gap = float(positive.mean() - negative.mean())
    degrees = max(len(positive) + len(negative) - 2, 1)
    squares = sum(float((group - group.mean()).square().sum()) for group in (positive, negative))
    spread = (squares / degrees) ** 0.5
    return Separation(
        auc, gap / spread if spread > 0 else float("inf") * (gap or 0.0) if gap else 0.0
    )
