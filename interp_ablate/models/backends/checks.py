"""Checks that a backend computes the same logits as the checkpoint.

Knows: fixed tokens, tolerances, signs of processed weights. Does not know: hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp_ablate.errors import ModelError
from interp_ablate.models.backends.backend import ForwardCall

# Times what half precision does to the checkpoint's own logits. Of 36 tiny types in both dtypes, what TransformerLens
# computes rightly is 1.4 times that away at most, and what it does not (Cohere's, Falcon's with ALiBi) 5.4 at least.
ROUNDINGS = 3


def tokenizer_copy(tokenizer: Any) -> Any:
    """A copy for TransformerLens, marked so that it is not reloaded from a hub to add a BOS token."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", getattr(own, "name_or_path", ""))
    own.init_kwargs["add_bos_token"] = True
    return own


def fixed_tokens(d_vocab: int, width: int) -> Int[Tensor, "1 width"]:
    """Random token ids that are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, d_vocab, (1, width), generator=generator)


def plain_call(tokens: Int[Tensor, "1 pos"]) -> ForwardCall:
    """One row of tokens, without a cache."""
    ones = torch.ones_like(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return ForwardCall(tokens, ones, positions, ones.sum(1))


def fixed_calls(d_vocab: int, device: torch.device, cache: Any) -> Iterator[ForwardCall]:
    """A prompt of 11 fixed tokens, and one decoding call after it with the cache."""
    width = 12
    tokens = fixed_tokens(d_vocab, width).to(device)
    ones, positions = torch.ones_like(tokens), torch.arange(width, device=device)[None]
    for part in (slice(0, width - 1), slice(width - 1, width)):
        yield ForwardCall(
            tokens[:, part], ones[:, : part.stop], positions[:, part], ones.sum(1), cache
        )


def logit_difference(
    got: Tensor, want: Tensor, dtype: torch.dtype, tolerance: float
) -> tuple[float, float]:
    """The largest difference of two logits, and the limit that rounding in `dtype` allows."""
    scale = max(float(want.abs().max()), 1.0)
    return float((got.float() - want).abs().max()), max(
        tolerance, 64 * torch.finfo(dtype).eps * scale
    )


def check_logits(
    got: Tensor,
    want: Tensor,
    hf: Any,
    what: str,
    tolerance: float,
    exact: Tensor | None = None,
) -> None:
    """Refuse a TransformerLens object that does not compute the checkpoint's logits.

    A checkpoint that itself gives NaN or infinity is not held against TransformerLens.

    Args:
        exact: the checkpoint's logits in float32, where it is half precision and they were measured: what rounding
            does is then known, and not only limited.

    Raises:
        ModelError: the logits differ by more than rounding.
    """
    if not bool(torch.isfinite(want).all()):
        return
    error, limit = logit_difference(got, want, next(hf.parameters()).dtype, tolerance)
    if error <= limit and exact is not None:
        error, limit = _typical(got - want), max(tolerance, ROUNDINGS * _typical(want - exact))
    if not error <= limit:
        other = "bridge" if "Hooked" in what else "hooked"
        raise ModelError(
            f"the {what} {type(hf).__name__} differs from the checkpoint by {error:.3g} in its logits "
            f"(limit {limit:.3g}): TransformerLens does not reproduce this architecture; another "
            f"version of it may, or backend={other!r}"
        )


def _typical(difference: Tensor) -> float:
    """The length of a difference of logits at the median position: rounding may make a router choose otherwise at one."""
    return float(difference.norm(dim=-1).median())


def refuse_processed(obj: Any) -> None:
    """Refuse weights that TransformerLens folded or centred.

    Raises:
        ModelError: processed weights, with how to load raw ones.
    """
    norm = str(getattr(obj.cfg, "normalization_type", ""))
    folded = type(obj).__name__ == "HookedTransformer" and norm.endswith("Pre")
    if folded or getattr(obj, "_weights_processed", False):
        raise ModelError(
            f"this {type(obj).__name__} has processed weights (normalization {norm!r}): LayerNorm is "
            "folded into the weights and writing weights may be centred, so directions and exports "
            "would not be those of the checkpoint. Load it raw: "
            "HookedTransformer.from_pretrained_no_processing(...), or a Bridge without "
            "enable_compatibility_mode()"
        )
