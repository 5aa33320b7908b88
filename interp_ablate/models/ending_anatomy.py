"""Anatomy of what leaves the last block: whether what is read of it, by the final norm or the unembedding, is the same.

Knows: calls outside the blocks. Does not know: plans, hooks that stay, files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.models.module_calls import Recorded, recording, stream_of
from interp_ablate.models.module_sums import TOLERANCE, wide_of


@torch.no_grad()
def measure_ending(hf: Any, run: Callable[[], Any], last_block: str) -> str:
    """What is written between the last block and the first module that reads what it returned; empty for nothing.

    A factor on the whole stream is nothing: a direction that is not there stays away.
    """
    inside = last_block.rpartition(".")[0]
    modules = {
        name: module
        for name, module in hf.named_modules()
        if name == last_block
        or (name and not isinstance(module, nn.ModuleList) and not name.startswith(f"{inside}."))
    }
    with recording(modules) as calls:
        run()
    left = wide_of(calls[last_block][-1].output)
    order = list(calls)
    after = order.index(last_block) + 1
    # a norm that runs before the blocks too stands earlier in the order
    again = [name for name in order[:after] if name != last_block and len(calls[name]) > 1]
    if any((_beside(calls[name][-1], left) or (1.0, 0.0))[0] <= TOLERANCE for name in again):
        return ""
    for name in order[after:]:
        found = _beside(calls[name][-1], left)
        if found is None:
            continue
        share, tolerance = found
        if share <= tolerance:
            return ""
        return (
            f"after the last block: {share:.1%} of what {name} reads is nothing that {last_block} returned, and no "
            "site or weight of a block holds it"
        )
    return ""


def _beside(call: Recorded, left: Tensor) -> tuple[float, float] | None:
    """The share of what a call reads that is no multiple of the stream, and what rounding allows; None if it reads none."""
    read = next((stream_of(v) for v in (*call.args, *call.kwargs.values())), None)
    size = float(left.pow(2).sum())
    if read is None or not size or not read.is_floating_point():
        return None
    if read.numel() != left.numel() or read.shape[-1] != left.shape[-1]:
        return None
    wide = wide_of(read).reshape(left.shape)
    if not bool(wide.isfinite().all()):
        return 0.0, 0.0  # a spoiled weight is said elsewhere
    factor = (wide * left).sum() / size
    share = float((wide - factor * left).norm() / wide.norm().clamp(min=1e-30))
    return share, max(TOLERANCE, 4 * torch.finfo(read.dtype).eps)
