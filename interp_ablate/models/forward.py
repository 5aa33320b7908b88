"""Forward passes over batches: what is captured.

Knows: captures. Does not know: plans.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from interp_ablate.models.batches import Batch

Capture = Callable[[Float[Tensor, "batch pos d_model"], Batch], Tensor]
