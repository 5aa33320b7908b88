"""A half-precision model in float32 for a while, so that small differences are not lost in rounding.

Knows: which tensors are half, and whether their float32 copies fit into memory. Does not know: what is measured.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from interp_ablate.models.quantized_modules import packed_parameters
from interp_ablate.models.sources import free_memory

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
SHARE_OF_FREE = 0.7  # of a device's free memory that the copies may take; the passes need the rest


@contextmanager
def in_float32(module: nn.Module, *, level: int = logging.WARNING) -> Iterator[bool]:
    """Hold a module's half-precision weights in float32 inside the block, if a copy fits into memory.

    Each number of bfloat16 and float16 is one of float32: the model is the same but for the rounding of what it
    computes. The weights are kept, and are the same tensors afterwards. Where memory is short, weights are offloaded,
    or nothing is half, the module stays as it is, and False is given.

    Args:
        level: of the log's line that memory is short.
    """
    tensors = [*module.parameters(), *module.buffers()]
    codes = packed_parameters(module)
    half = list({id(t): t for t in tensors if t.dtype in HALF and id(t) not in codes}.values())
    needed: Counter[torch.device] = Counter()
    for each in half:
        needed[each.device] += 4 * each.numel()
    short = [
        device
        for device, size in needed.items()
        if device.type == "meta" or size > SHARE_OF_FREE * free_memory(device)
    ]
    kinds = {device.type for device in needed}
    parked = "cpu" in kinds and len(kinds) > 1  # whoever moves weights in turn moves the copies
    if not half or short or parked:
        if half:
            why = "its weights are moved while it runs" if parked else f"no memory on {short[0]}"
            logger.log(level, "%s for the weights in float32: measuring in %s", why, half[0].dtype)
        yield False
        return
    config, kept = getattr(module, "cfg", None), [each.data for each in half]
    dtype = getattr(config, "dtype", None)  # plain transformers have none of their own
    try:
        for each in half:
            each.data = each.data.float()
        if config is not None and dtype is not None:
            config.dtype = torch.float32
        yield True
    finally:
        if config is not None and dtype is not None:
            config.dtype = dtype
        for each, data in zip(half, kept):
            each.data = data
