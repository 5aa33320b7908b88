"""FLOPs and bytes of forward calls, gradients and KV caches, from a model's sizes.

Knows: the formulas, the work and the machine. Does not know: which stage makes which calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interp_ablate.errors import InterpAblateError
from interp_ablate.models.model_files import check_gguf, transformers_reads
from interp_ablate.models.sources import read_hf_config, resolve
from interp_ablate.settings import DECODED_ROWS, MAX_NEW_TOKENS, STEP_ROWS, STREAM_ROWS, setting
from interp_ablate.training.recipe import RECIPE

if TYPE_CHECKING:
    from interp_ablate.budget.sizes import Dimensions


def config_at(name: str | Path) -> Any:
    """The config of a folder, of a config.json, or of whatever `load_model` takes; no weights, no code.

    Raises:
        ModelError: none of these, or one that transformers does not understand.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.name == "config.json":
        return read_hf_config(path if path.is_dir() else path.parent)
    source = resolve(name)
    file = Path(source.path or "")
    gguf = {"gguf_file": file.name} if source.kind == "gguf" else {}
    from transformers import AutoConfig

    if gguf:
        check_gguf(file)
    advice = "give a folder with config.json; without a network hub names do not work"
    with transformers_reads(f"the config of {source.name!r}", advice):
        return AutoConfig.from_pretrained(str(file.parent) if gguf else source.name, **gguf)


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
    answers: int = setting(300, "that a persona is extracted from")
    trained_rows: int = setting(RECIPE.batch_size, "rows of a training step")
    trained_tokens: int = setting(RECIPE.max_length, "of such a row")
    rank: int = setting(RECIPE.rank, "of the LoRA that is trained")
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
        from interp_ablate.models.forward import MIN_SHARED_PREFIX

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

    A multiplication and an addition are two.
    """
    blocks = new * sizes.token_flops + sizes.pair_flops(past, new)
    return rows * (blocks + logits * sizes.logit_flops)


def gradient_flops(
    sizes: Dimensions, *, rows: int, new: int, past: int = 0, logits: int = 0, prefix: bool = False
) -> int:
    """FLOPs of a forward call and of the way back to the activations, in which weights get no gradient.

    Back, a product with a weight costs what it cost before (not twice that, as in training), attention
    scores cost twice. `prefix`: only keys and values go on from here, so that the last layer's other
    products have no way back.
    """
    forward = forward_flops(sizes, rows=rows, new=new, past=past, logits=logits)
    without = 0
    if prefix and sizes.layers:
        last = sizes.layers[-1]
        others = (
            sizes.token_flops // sizes.n_layers
            - 2 * sizes.d_model * last.token // sizes.dtype_bytes
        )
        without = rows * new * (others + 2 * last.pairs * (past + new))
    return 2 * forward + rows * sizes.pair_flops(past, new) - without


def kv_places(*, tokens: int, max_new_tokens: int, prefix: int = 0) -> int:
    """Tokens that a row's KV cache has room for after decoding, its spare places included.

    A cache behind a shared prefix is made with spare places; another one gets them when decoding adds to it.
    """
    from interp_ablate.models.backends.bridge_shortcuts import SPARE

    made_with = SPARE if prefix else 0
    grown = math.ceil(max(0, max_new_tokens - 1 - made_with) / (SPARE + 1))
    return tokens + made_with + (SPARE + 1) * grown


def saved_bytes(sizes: Dimensions, *, rows: int, new: int, past: int = 0) -> int:
    """Bytes that a gradient step keeps of the blocks of one forward call, with an erasure at every writer.

    Of each token: what the blocks keep, and the inputs of the erasures; and the keys and values of all tokens so
    far, repeated to every query head.
    """
    erasures = (2 * sizes.n_layers + 1) * sizes.d_model * sizes.dtype_bytes
    seen = past * sum(layer.repeated for layer in sizes.layers)
    return rows * (new * (sizes.saved + erasures) + new * new * sizes.saved_pairs + seen)


def adapter_bytes(sizes: Dimensions, *, rank: int, writers: bool = True) -> int:
    """Bytes of a LoRA in training: weights, gradients and Adam's two moments, all float32.

    Without `writers`, of one on what reads the residual stream alone.
    """
    return 16 * rank * (sizes.linear if writers else sizes.readers)[0]


def trained_bytes(sizes: Dimensions, *, rows: int, new: int, writers: bool = True) -> int:
    """Bytes that a training step keeps of rows: of the blocks, of the adapters' inputs, and of the logits.

    An adapter reads its input in float32: each has a copy of its own where the model is narrower. Logits are there
    in the model's dtype, as float32, as log-probabilities and as their gradient.
    """
    inputs = (sizes.linear if writers else sizes.readers)[1]
    if sizes.dtype_bytes == 4:  # queries, keys and values share theirs, and so do gate and up
        inputs -= sizes.readers[2]
    logits = new * sizes.d_vocab * (12 + sizes.dtype_bytes)
    return saved_bytes(sizes, rows=rows, new=new) + rows * (4 * new * inputs + logits)


def activation_bytes(sizes: Dimensions, *, rows: int, new: int) -> int:
    """Bytes of activations alive at once in a forward call: one block's, by the rule that sizes batches."""
    return rows * new * (6 * sizes.d_model + 3 * sizes.d_inner) * sizes.dtype_bytes
