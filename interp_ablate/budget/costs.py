"""FLOPs and bytes of forward calls, gradients and KV caches.

Knows: the formulas, the work and the machine. Does not know: which stage makes which calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from interp_ablate.budget.sizes import Dimensions
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.backends.bridge_shortcuts import SPARE
from interp_ablate.models.forward import DECODED_ROWS, MIN_SHARED_PREFIX, STREAM_ROWS
from interp_ablate.search.gradient_fit import STEP_ROWS
from interp_ablate.settings import MAX_NEW_TOKENS, setting


@dataclass(frozen=True)
class Workload:
    """The work that is asked of the model. All prompts count as equally long: padding is not counted.

    Raises:
        InterpAblateError: numbers out of range.
    """

    prompts: int = setting(64, "a side, collected")
    scored: int = setting(32, "a side, in a trial")
    fitted: int = setting(STEP_ROWS, "rows of each kind in a gradient step")
    tokens: int = setting(60, "of a prompt, the prefix included")
    prefix: int = setting(40, "tokens in front that all prompts share (a chat template's)")
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "of an answer")
    rows: int = setting(STREAM_ROWS, "a forward batch")
    decoded_rows: int = setting(DECODED_ROWS, "a decoding batch")
    dtype_bytes: int = 2
    """Of a number: 4 for float32, 2 for bfloat16."""

    def __post_init__(self) -> None:
        low = [f.name for f in fields(self) if f.name != "prefix" and getattr(self, f.name) < 1]
        if low or not 0 <= self.prefix < self.tokens:
            raise InterpAblateError(
                f"every number of a workload is at least 1, and the shared prefix shorter than the "
                f"{self.tokens} tokens of a prompt; got {self}"
            )

    def shared(self, rows: int) -> int:
        """Number of tokens in front that are run once for `rows` prompts; 0 for one prompt, or for few tokens."""
        return self.prefix if rows > 1 and self.prefix >= MIN_SHARED_PREFIX else 0


@dataclass(frozen=True)
class Machine:
    """Rates that a machine reaches, not those on its data sheet, and the memory it has.

    The defaults are two GPUs like NVIDIA's H100 SXM: 40% of 989 TFLOP/s in bf16 and 60% of 3.35 TB/s.

    Raises:
        InterpAblateError: numbers that are not above 0.
    """

    flops: float = setting(4e14, "of matrix products in the model's dtype, a second and device")
    bandwidth: float = setting(2e12, "bytes of memory a second and device")
    memory: float = setting(80e9, "bytes a device")
    devices: int = setting(2, "GPUs")
    disk: float = setting(1e9, "bytes a second, of checkpoints read and written")

    def __post_init__(self) -> None:
        if not all(getattr(self, f.name) > 0 for f in fields(self)):
            raise InterpAblateError(f"every number of a machine is above 0; got {self}")

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of forward calls one after the other, each bound by arithmetic or by memory."""
        return sum(max(call.flops / self.flops, call.reads / self.bandwidth) for call in calls)


class Call(NamedTuple):
    """The cost of one forward call."""

    flops: int
    reads: int
    """Bytes of weights and of KV cache that it reads."""


def forward_flops(sizes: Dimensions, *, rows: int, new: int, past: int = 0, logits: int = 0) -> int:
    """FLOPs of one forward call: `rows` x `new` tokens, each after `past` cached ones; `logits` positions a row.

    A multiplication and an addition are two. Attention scores are counted for every pair of a new token
    and a token so far, as masked kernels compute them, not for half of them.
    """
    tokens = rows * new
    attention = 4 * tokens * (past + new) * sizes.queries
    products = sizes.n_layers * (2 * tokens * sizes.block_matrices + attention)
    return products + 2 * rows * logits * sizes.unembedding


def gradient_flops(
    sizes: Dimensions, *, rows: int, new: int, past: int = 0, logits: int = 0, prefix: bool = False
) -> int:
    """FLOPs of a forward call and of the way back to the activations, in which weights get no gradient.

    Back, a product with a weight costs what it cost before (not twice that, as in training), attention
    scores cost twice. `prefix`: only keys and values go on from here, so that the last layer's other
    products have no way back.
    """
    forward = forward_flops(sizes, rows=rows, new=new, past=past, logits=logits)
    scores = 4 * rows * new * (past + new) * sizes.queries
    others = sizes.block_matrices - 2 * sizes.d_model * sizes.keys
    without = 2 * rows * new * others + 2 * scores if prefix else 0
    return 2 * forward + sizes.n_layers * scores - without


def kv_bytes(sizes: Dimensions, dtype_bytes: int) -> int:
    """Bytes of KV cache per token and row. Sliding windows count as if they were the whole sequence."""
    return 2 * sizes.n_layers * sizes.keys * dtype_bytes


def kv_places(*, tokens: int, max_new_tokens: int, prefix: int = 0) -> int:
    """Tokens that a row's KV cache has room for after decoding, its spare places included.

    A cache behind a shared prefix is made with spare places; another one gets them when decoding adds to it.
    """
    made_with = SPARE if prefix else 0
    grown = math.ceil(max(0, max_new_tokens - 1 - made_with) / (SPARE + 1))
    return tokens + made_with + (SPARE + 1) * grown


def saved_bytes(
    sizes: Dimensions, *, rows: int, new: int, past: int = 0, dtype_bytes: int = 4
) -> int:
    """Bytes that a gradient step keeps of the blocks of one forward call, with an erasure at every writer.

    Of each token and block: inputs of the norms and of the erasures, queries and attention's output, the MLP's
    inner tensors; and the keys and values of all tokens so far, repeated to every query head.
    """
    traits, d_model = sizes.traits, sizes.d_model
    norm = max(4, dtype_bytes) if traits.wide_norm else dtype_bytes
    head_norms = 0 if traits.head_norm == "none" else sizes.queries + sizes.keys
    token = norm * (traits.norms * d_model + head_norms)
    token += dtype_bytes * (2 * d_model + 2 * sizes.queries + traits.saved_mlp * sizes.d_mlp)
    seen = 2 * sizes.queries * dtype_bytes * (past + new)
    ends = d_model * new * (norm + dtype_bytes)  # the embedding's erasure, the final norm
    return rows * (sizes.n_layers * (token * new + seen) + ends)


def activation_bytes(sizes: Dimensions, *, rows: int, new: int, dtype_bytes: int) -> int:
    """Bytes of activations alive at once in a forward call: one block's, by the rule that sizes batches."""
    return rows * new * (6 * sizes.d_model + 3 * sizes.d_mlp) * dtype_bytes
