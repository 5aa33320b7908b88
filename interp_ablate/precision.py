"""float64 where a device has it.

Knows: which devices lack float64. Does not know: what is computed.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}


def to_float64(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The tensor in float64: on its own device, or on the CPU where that device has no float64."""
    return x.cpu().double() if x.device.type in WITHOUT_FLOAT64 else x.double()
