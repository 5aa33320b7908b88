"""FLOPs and bytes of forward calls, gradients and KV caches.

Knows: arithmetic over sizes. Does not know: which stage makes which calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from interp_ablate.budget.sizes import Dimensions
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.forward import DECODED_ROWS, MIN_SHARED_PREFIX, STREAM_ROWS
from interp_ablate.models.kv_cache import SPARE
from interp_ablate.search.gradient_fit import STEP_ROWS
from interp_ablate.settings import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Workload:
    """How much is asked of the model. All prompts count as equally long: padding is not counted.

    Args:
        prompts: a side, whose activations are collected.
        scored: prompts a side that a trial scores.
        fitted: rows of each kind that a gradient step of a fit reads.
        tokens: of a prompt, `prefix` included.
        prefix: tokens in front that all prompts share (a chat template's).
        max_new_tokens: of an answer.
        rows: in a batch of forward passes; `decoded_rows` in one that is decoded.
        dtype_bytes: of a number: 4 for float32, 2 for bfloat16.

    Raises:
        InterpAblateError: numbers out of range.
    """

    prompts: int = 64
    scored: int = 32
    fitted: int = STEP_ROWS
    tokens: int = 60
    prefix: int = 40
    max_new_tokens: int = MAX_NEW_TOKENS
    rows: int = STREAM_ROWS
    decoded_rows: int = DECODED_ROWS
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        low = [f.name for f in fields(self) if f.name != "prefix" and getattr(self, f.name) < 1]
        if low or not 0 <= self.prefix < self.tokens:
            raise InterpAblateError(
                f"every number of a workload is at least 1, and the shared prefix shorter than the "
                f"{self.tokens} tokens of a prompt; got {self}"
            )

    def shared(self, rows: int) -> int:
        """Tokens in front that are run once for `rows` prompts: none for one prompt, or for very few."""
        return self.prefix if rows > 1 and self.prefix >= MIN_SHARED_PREFIX else 0


@dataclass(frozen=True)
class Machine:
    """Rates that a machine reaches, not those on its data sheet, and the memory it has.

    The defaults are two GPUs like NVIDIA's H100 SXM: 40% of 989 TFLOP/s in bf16 and 60% of 3.35 TB/s.
    Layers spread over devices (`--device auto`) run one after the other: memory adds up, rates do not.

    Args:
        flops: of matrix products in the model's dtype, a second, of one device.
        bandwidth: bytes a second, of one device's memory.
        memory: bytes, of one device.
        disk: bytes a second, of checkpoints read and written.

    Raises:
        InterpAblateError: numbers that are not above 0.
    """

    flops: float = 4e14
    bandwidth: float = 2e12
    memory: float = 80e9
    devices: int = 2
    disk: float = 1e9

    def __post_init__(self) -> None:
        if not all(getattr(self, f.name) > 0 for f in fields(self)):
            raise InterpAblateError(f"every number of a machine is above 0; got {self}")

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of forward calls one after the other, each bound by arithmetic or by memory."""
        return sum(max(call.flops / self.flops, call.reads / self.bandwidth) for call in calls)


class Call(NamedTuple):
    """One forward call: floating point operations, and bytes of weights and of KV cache it reads."""

    flops: int
    reads: int


# ---- formulas ------------------------------------------------------------------------------------


def forward_flops(sizes: Dimensions, *, rows: int, new: int, past: int = 0, logits: int = 0) -> int:
    """Of a forward call over `rows` x `new` tokens after `past` cached ones, `logits` positions a row.

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
    """Of a forward call and the way back to the activations, in which weights get no gradient.

    Back, a product with a weight costs what it cost before (not twice that, as in training), attention
    scores cost twice. `prefix`: only keys and values go on from here, so that the last layer's other
    products have no way back.
    """
    forward = forward_flops(sizes, rows=rows, new=new, past=past, logits=logits)
    tokens = rows * new
    scores = 4 * tokens * (past + new) * sizes.queries
    back = forward + sizes.n_layers * scores
    if prefix:
        others = sizes.block_matrices - 2 * sizes.d_model * sizes.keys
        back -= 2 * tokens * others + 2 * scores
    return forward + back


def kv_bytes(sizes: Dimensions, dtype_bytes: int) -> int:
    """Of the KV cache, a token of a row. Sliding windows count as if they were the whole sequence."""
    return 2 * sizes.n_layers * sizes.keys * dtype_bytes


def kv_places(*, tokens: int, max_new_tokens: int, prefix: int = 0) -> int:
    """Tokens that a row's KV cache has room for after decoding, its spare places included.

    Nothing is spared in a cache that decoding never adds to.
    """
    if prefix:
        return (
            tokens
            + SPARE
            + (SPARE + 1) * math.ceil(max(0, max_new_tokens - 1 - SPARE) / (SPARE + 1))
        )
    return tokens + (SPARE + 1) * math.ceil((max_new_tokens - 1) / (SPARE + 1))


def saved_bytes(
    sizes: Dimensions, *, rows: int, new: int, past: int = 0, dtype_bytes: int = 4
) -> int:
    """What a gradient step keeps of the blocks of one forward call, an erasure at every writer.

    A token and block: what the norms read, what the erasures read, queries and attention's output, the
    MLP's inner tensors; and the keys and values of all tokens so far, repeated to every query head.
    """
    form, d_model = sizes.form, sizes.d_model
    norm = max(4, dtype_bytes) if form.wide_norm else dtype_bytes
    head_norms = 0 if form.head_norm == "none" else sizes.queries + sizes.keys
    token = norm * (form.norms * d_model + head_norms)
    token += dtype_bytes * (2 * d_model + 2 * sizes.queries + form.saved_mlp * sizes.d_mlp)
    seen = 2 * sizes.queries * dtype_bytes * (past + new)
    ends = d_model * new * (norm + dtype_bytes)  # the embedding's erasure, the final norm
    return rows * (sizes.n_layers * (token * new + seen) + ends)


def activation_bytes(sizes: Dimensions, *, rows: int, new: int, dtype_bytes: int) -> int:
    """Activations alive at once in a forward call: those of one block, by the rule that sizes batches."""
    return rows * new * (6 * sizes.d_model + 3 * sizes.d_mlp) * dtype_bytes


# ---- stages --------------------------------------------------------------------------------------


def batch_sizes(total: int, rows: int) -> list[int]:
    """Rows of each batch."""
    return [min(rows, total - start) for start in range(0, total, rows)]
