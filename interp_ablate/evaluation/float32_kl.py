"""First-token KL of plans, measured in float32, and the floor below which such a KL is rounding.

Knows: that bfloat16 has a floor of some thousandths of a nat. Does not know: limits, or how KLs are summarized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import first_token_kl, kl_divergence
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.float32 import HALF, in_float32

FLOOR_PROMPTS = 32  # prompts that the floor is measured on, at most


def float32_first_token_kl(
    unedited: ModelOutputs, plans: Sequence[Plan]
) -> list[Float[Tensor, " prompt"]]:
    """First-token KLs of plans from the unedited model, in nats, with weights in float32 (`in_float32`)."""
    if unedited.model.dtype not in HALF:
        return [first_token_kl(unedited.with_plan(plan), unedited) for plan in plans]
    with in_float32(unedited.model.tl):
        baseline = unedited.fresh(None)
        return [first_token_kl(unedited.fresh(plan), baseline) for plan in plans]


def first_token_kl_floor(unedited: ModelOutputs) -> tuple[float, str]:
    """The mean first-token KL between prompts run in a batch and each alone, and the dtype it was measured in.

    Both are the unedited model: what differs is the order of its sums. A KL near it says nothing.
    """
    outputs = unedited.head(FLOOR_PROMPTS)
    with in_float32(outputs.model.tl):
        together = outputs.fresh(None).first_logprobs
        alone = [ModelOutputs(outputs.model, [row]).first_logprobs for row in outputs.rows]
        kl = kl_divergence(together, torch.cat(alone)).mean()
        return abs(float(kl)), str(outputs.model.dtype).removeprefix("torch.")
