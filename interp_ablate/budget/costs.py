"""A model's sizes from its config, and FLOPs and bytes of its forward calls, gradients and KV caches.

Knows: the formulas, the work and the machine, what a config does not say. Does not know: which stage makes which
calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from interp_ablate.errors import InterpAblateError
from interp_ablate.models.model_files import check_gguf, transformers_reads
from interp_ablate.models.sources import read_hf_config, resolve
from interp_ablate.settings import DECODED_ROWS, MAX_NEW_TOKENS, STEP_ROWS, STREAM_ROWS, setting
from interp_ablate.training.recipe import RECIPE


@dataclass(frozen=True)
class ConfigTraits:
    """The traits of a model type that its config does not say in numbers.

    A bias is always there, never, or where the named field of the config is true.
    """

    gated: bool = True
    """True for an MLP of three matrices."""
    norms: int = 2
    """Norms of a block over d_model."""
    norm_bias: bool = False
    head_norm: Literal["none", "head", "whole"] = "none"
    """Norms of queries and keys: none, one a head, or one over all heads."""
    wide_norm: bool = True
    """True where a norm keeps a float32 copy of its input for the gradient."""
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    positions: str | None = None
    """Field of the config with the number of learned positions."""
    mlp_width: str = "intermediate_size"
    """Field of the config with the width of the MLP."""
    saved_mlp: int = 3
    """Tensors of d_mlp numbers that a gradient keeps for each token of a block."""


_BIASED = ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias")
# model_type of the Hugging Face config -> its traits; a missing one raises.
TRAITS: dict[str, ConfigTraits] = {
    "llama": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "smollm3": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": ConfigTraits(),
    "phi3": ConfigTraits(),
    "qwen2": ConfigTraits(qkv_bias=True),
    "qwen3": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="head"),
    "gemma": _BIASED,
    "gemma2": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", norms=4),
    "gemma3_text": ConfigTraits(
        qkv_bias="attention_bias", out_bias="attention_bias", norms=4, head_norm="head"
    ),
    "olmo2": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="whole"),
    "gpt2": ConfigTraits(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        positions="max_position_embeddings", mlp_width="n_inner", saved_mlp=4,
    ),
    "gpt_neox": ConfigTraits(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias="attention_bias",
        out_bias="attention_bias", mlp_bias=True, saved_mlp=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a decoder that everything else follows from."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool
    n_positions: int = 0
    biases: int = 0
    """Bias parameters of one block."""
    traits: ConfigTraits = ConfigTraits()

    @property
    def queries(self) -> int:
        """Width of a token's queries in one layer."""
        return self.n_heads * self.d_head

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values, in one layer."""
        return self.n_kv_heads * self.d_head

    @property
    def block_matrices(self) -> int:
        """Weights of a block that multiply each token: attention's four and the MLP's two or three."""
        mlp = (3 if self.traits.gated else 2) * self.d_mlp
        return self.d_model * (2 * self.queries + 2 * self.keys + mlp)

    @property
    def unembedding(self) -> int:
        """Weights of the unembedding."""
        return self.d_model * self.d_vocab

    @property
    def parameters(self) -> int:
        """Every parameter, counted once: a tied unembedding is the embedding."""
        norm = self.d_model * (2 if self.traits.norm_bias else 1)
        block = self.block_matrices + self.biases + self.traits.norms * norm + self._head_norms
        embeddings = (1 if self.tied else 2) * self.unembedding + self.n_positions * self.d_model
        return self.n_layers * block + norm + embeddings

    @property
    def _head_norms(self) -> int:
        widths = {"none": 0, "head": 2 * self.d_head, "whole": self.queries + self.keys}
        return widths[self.traits.head_norm]

    @property
    def parameters_a_step(self) -> int:
        """Parameters that a forward call with logits reads; of an untied embedding it reads only some rows."""
        return self.parameters - (0 if self.tied else self.unembedding)

    @property
    def n_residual_sites(self) -> int:
        """Number of sites that `collect` reads by default: resid_pre, resid_mid and resid_post of every layer."""
        return 3 * self.n_layers


def dimensions_of(hf_config: Any) -> Dimensions:
    """Read from a Hugging Face config.

    Raises:
        InterpAblateError: a model type without an entry in `TRAITS` (mixtures of experts among them).
    """
    traits = TRAITS.get(hf_config.model_type)
    if traits is None:
        raise InterpAblateError(
            f"no arithmetic for model type {hf_config.model_type!r}: there is for "
            f"{', '.join(TRAITS)}. For a decoder of the same shape, make Dimensions(...) by hand"
        )
    d_model, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    d_head = getattr(hf_config, "head_dim", None) or d_model // heads
    d_mlp = getattr(hf_config, traits.mlp_width) or 4 * d_model

    def has(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(getattr(hf_config, bias))

    biases = has(traits.qkv_bias) * (heads + 2 * kv_heads) * d_head + has(traits.out_bias) * d_model
    biases += has(traits.mlp_bias) * ((2 if traits.gated else 1) * d_mlp + d_model)
    return Dimensions(
        n_layers=hf_config.num_hidden_layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        n_positions=getattr(hf_config, traits.positions) if traits.positions else 0,
        biases=biases,
        traits=traits,
    )


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
    from interp_ablate.models.backends.bridge_shortcuts import SPARE

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


def adapted_widths(sizes: Dimensions, *, writers: bool = True) -> tuple[int, int]:
    """A block's linear layers: their inputs and outputs added up, and the inputs alone.

    Without `writers`, those that read the residual stream alone.
    """
    n_up, d_model = (2 if sizes.traits.gated else 1), sizes.d_model
    read = (3 + n_up) * d_model
    made = sizes.queries + 2 * sizes.keys + n_up * sizes.d_mlp
    written = sizes.queries + sizes.d_mlp if writers else 0
    return read + made + written + (2 * d_model if writers else 0), read + written


def adapter_bytes(sizes: Dimensions, *, rank: int, writers: bool = True) -> int:
    """Bytes of a LoRA in training: weights, gradients and Adam's two moments, all float32."""
    return 16 * rank * sizes.n_layers * adapted_widths(sizes, writers=writers)[0]


def trained_bytes(
    sizes: Dimensions, *, rows: int, new: int, dtype_bytes: int, writers: bool = True
) -> int:
    """Bytes that a training step keeps of rows: of the blocks, of the adapters' inputs, and of the logits.

    An adapter reads its input in float32: each has a copy of its own where the model is narrower. Logits are there
    in the model's dtype, as float32, as log-probabilities and as their gradient.
    """
    n_up, d_model = (2 if sizes.traits.gated else 1), sizes.d_model
    inputs = adapted_widths(sizes, writers=writers)[1]
    if dtype_bytes == 4:  # queries, keys and values share theirs, and so do gate and up
        inputs -= (2 + n_up - 1) * d_model
    adapters = 4 * rows * new * sizes.n_layers * inputs
    logits = rows * new * sizes.d_vocab * (12 + dtype_bytes)
    return saved_bytes(sizes, rows=rows, new=new, dtype_bytes=dtype_bytes) + adapters + logits


def activation_bytes(sizes: Dimensions, *, rows: int, new: int, dtype_bytes: int) -> int:
    """Bytes of activations alive at once in a forward call: one block's, by the rule that sizes batches."""
    return rows * new * (6 * sizes.d_model + 3 * sizes.d_mlp) * dtype_bytes
