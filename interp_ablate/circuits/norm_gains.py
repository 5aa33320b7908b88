"""The gain of a norm, measured from what goes in and what comes out.

Knows: RMS norms and layer norms, with biases or without. Does not know: modules or their names.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.precision import to_float64


def through_norm(
    x: Float[Tensor, "token d_model"],
    y: Float[Tensor, "token d_model"],
    vectors: Float[Tensor, "vector d_model"],
    *,
    tolerance: float = 2e-3,
) -> Float[Tensor, "vector d_model"] | None:
    """Vectors of the stream as a reader after the norm sees them, its scale left out; None if y is no norm of x.

    The gain is the slope of y over the normalized x, dimension by dimension; a layer norm centres the vectors
    too. Where y is x, vectors stay as they are.
    """
    x, y, vectors = (to_float64(each).cpu() for each in (x, y, vectors))
    if torch.allclose(x, y, rtol=tolerance, atol=0):
        return vectors
    for centred in (False, True):
        stream = x - x.mean(-1, keepdim=True) if centred else x
        normal = stream / stream.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        mean_in, mean_out = normal.mean(0), y.mean(0)
        inside, outside = normal - mean_in, y - mean_out
        gain = (inside * outside).sum(0) / inside.pow(2).sum(0).clamp(min=1e-30)
        if float((outside - gain * inside).norm()) <= tolerance * float(y.norm()):
            return (vectors - vectors.mean(-1, keepdim=True) if centred else vectors) * gain
    return None
