"""Whether a backend computes what the checkpoint computes.

Knows: fixed tokens and tolerances. Does not know: hooks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp_ablate.errors import ModelError


def lens_tokenizer(tokenizer: Any) -> Any:
    """A copy for TransformerLens, marked so that it is not reloaded from a hub to add a BOS token."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", getattr(own, "name_or_path", ""))
    own.init_kwargs["add_bos_token"] = True
    return own


def fixed_tokens(d_vocab: int, width: int) -> Int[Tensor, "1 width"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, d_vocab, (1, width), generator=generator)


def check_logits(got: Tensor, want: Tensor, hf: Any, what: str, tolerance: float) -> None:
    """Raise where a TransformerLens object does not compute what the checkpoint does.

    A checkpoint that itself gives NaN or infinity is not held against TransformerLens.
    """
    if not bool(torch.isfinite(want).all()):
        return
    scale = max(float(want.abs().max()), 1.0)
    error = float((got.float() - want).abs().max())
    limit = max(tolerance, 64 * torch.finfo(next(hf.parameters()).dtype).eps * scale)
    if not error <= limit:
        other = "bridge" if "Hooked" in what else "hooked"
        raise ModelError(
            f"the {what} {type(hf).__name__} differs from the checkpoint by {error:.3g} in its logits "
            f"(limit {limit:.3g}): TransformerLens does not reproduce this architecture; another "
            f"version of it may, or backend={other!r}"
        )
