"""Budget: what a model needs at each stage, memory and time, by arithmetic from its config.

Knows: sizes of decoders, how many operations and bytes each stage takes, two rates of a machine. Does not
know: weights, devices, or what a stage measures. Nothing is loaded and nothing is run; `tests/test_budget.py`
holds each formula against what torch counts on small models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.export.tensor_copy import WAITING
from interp_ablate.fit import N_KEPT, N_TOKENS, PASSAGE_TOKENS, STEP_ROWS
from interp_ablate.kv_cache import SPARE
from interp_ablate.model import DECODED_ROWS, MIN_SHARED_PREFIX, STREAM_ROWS
from interp_ablate.sources import read_hf_config, resolve
from interp_ablate.weights import BLOCK

if TYPE_CHECKING:
    import pandas as pd

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Form:
    """What a model type's config does not say in numbers.

    `positions` and `mlp_width` name fields of the config. A bias is there always, never, or where the named field of the config is true. `norms` are those of a
    block over d_model; `head_norm` says whether queries and keys are normed a head, as a whole, or not.
    `wide_norm`: the norm computes, and keeps for the gradient, a float32 copy of what it reads.
    `saved_mlp` counts the tensors of d_mlp numbers that a gradient keeps for each token of a block.
    """

    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    head_norm: Literal["none", "head", "whole"] = "none"
    wide_norm: bool = True
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    positions: str | None = None
    mlp_width: str = "intermediate_size"
    saved_mlp: int = 3


_BIASED = Form(qkv_bias="attention_bias", out_bias="attention_bias")
# model_type of the Hugging Face config -> form; a missing one raises.
FORMS: dict[str, Form] = {
    "llama": Form(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "smollm3": Form(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Form(),
    "phi3": Form(),
    "qwen2": Form(qkv_bias=True),
    "qwen3": Form(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="head"),
    "gemma": _BIASED,
    "gemma2": Form(qkv_bias="attention_bias", out_bias="attention_bias", norms=4),
    "gemma3_text": Form(
        qkv_bias="attention_bias", out_bias="attention_bias", norms=4, head_norm="head"
    ),
    "olmo2": Form(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="whole"),
    "gpt2": Form(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        positions="max_position_embeddings", mlp_width="n_inner", saved_mlp=4,
    ),
    "gpt_neox": Form(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias="attention_bias",
        out_bias="attention_bias", mlp_bias=True, saved_mlp=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a decoder that everything else follows from; `biases` are those of one block."""

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
    form: Form = Form()

    @property
    def queries(self) -> int:
        return self.n_heads * self.d_head

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values, in one layer."""
        return self.n_kv_heads * self.d_head

    @property
    def block_matrices(self) -> int:
        """Weights of a block that multiply each token: attention's four and the MLP's two or three."""
        mlp = (3 if self.form.gated else 2) * self.d_mlp
        return self.d_model * (2 * self.queries + 2 * self.keys + mlp)

    @property
    def unembedding(self) -> int:
        return self.d_model * self.d_vocab

    @property
    def parameters(self) -> int:
        """Every parameter, counted once: a tied unembedding is the embedding."""
        norm = self.d_model * (2 if self.form.norm_bias else 1)
        block = self.block_matrices + self.biases + self.form.norms * norm + self._head_norms
        embeddings = (1 if self.tied else 2) * self.unembedding + self.n_positions * self.d_model
        return self.n_layers * block + norm + embeddings

    @property
    def _head_norms(self) -> int:
        widths = {"none": 0, "head": 2 * self.d_head, "whole": self.queries + self.keys}
        return widths[self.form.head_norm]

    @property
    def parameters_a_step(self) -> int:
        """Parameters that a forward call with logits reads: of an embedding of its own only some rows."""
        return self.parameters - (0 if self.tied else self.unembedding)

    @property
    def n_residual_sites(self) -> int:
        """What `collect` reads by default: resid_pre, resid_mid and resid_post of every layer."""
        return 3 * self.n_layers


def dimensions_of(hf_config: Any) -> Dimensions:
    """Read from a Hugging Face config.

    Raises:
        InterpAblateError: a model type whose form is not declared (mixtures of experts among them).
    """
    form = FORMS.get(hf_config.model_type)
    if form is None:
        raise InterpAblateError(
            f"no arithmetic for model type {hf_config.model_type!r}: there is for "
            f"{', '.join(FORMS)}. For a decoder of the same shape, make Dimensions(...) by hand"
        )
    d_model, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    d_head = getattr(hf_config, "head_dim", None) or d_model // heads
    d_mlp = getattr(hf_config, form.mlp_width) or 4 * d_model

    def there(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(getattr(hf_config, bias))

    biases = there(form.qkv_bias) * (heads + 2 * kv_heads) * d_head + there(form.out_bias) * d_model
    biases += there(form.mlp_bias) * ((2 if form.gated else 1) * d_mlp + d_model)
    return Dimensions(
        n_layers=hf_config.num_hidden_layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        n_positions=getattr(hf_config, form.positions) if form.positions else 0,
        biases=biases,
        form=form,
    )


@dataclass(frozen=True)
class Workload:
    """How much is asked of the model. All prompts count as equally long: padding is not counted.

    Args:
        prompts: a side, whose activations are collected.
        scored: prompts a side that a trial scores.
        fitted: rows of each kind that a gradient step of a fit reads.
        tokens: of a prompt, `prefix` included.
        prefix: tokens in front that all prompts share (a chat template's).
        new_tokens: of an answer.
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
    new_tokens: int = 32
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


class Stage(NamedTuple):
    """A row of the table. `memory` is on the devices beside the weights, `host` in the machine's RAM;
    bytes. `seconds` has no Python, kernel launches, tokenizing or scoring of texts in it.
    """

    stage: str
    memory: int
    host: int
    calls: Sequence[Call]
    note: str
    seconds: float | None = None


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


def kv_places(*, tokens: int, new_tokens: int, prefix: int = 0) -> int:
    """Tokens that a row's KV cache has room for after decoding, its spare places included.

    Nothing is spared in a cache that decoding never adds to.
    """
    if prefix:
        return (
            tokens + SPARE + (SPARE + 1) * math.ceil(max(0, new_tokens - 1 - SPARE) / (SPARE + 1))
        )
    return tokens + (SPARE + 1) * math.ceil((new_tokens - 1) / (SPARE + 1))


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


def live_bytes(sizes: Dimensions, *, rows: int, new: int, dtype_bytes: int) -> int:
    """Activations alive at once in a forward call: those of one block, by the rule that sizes batches."""
    return rows * new * (6 * sizes.d_model + 3 * sizes.d_mlp) * dtype_bytes


# ---- stages --------------------------------------------------------------------------------------


def _spans(total: int, rows: int) -> list[int]:
    """Rows of each batch."""
    return [min(rows, total - start) for start in range(0, total, rows)]


def _pass(
    sizes: Dimensions, work: Workload, prompts: int, *, more: int = 0, logits: int = 0
) -> list[Call]:
    """The calls of `prompts` rows with `more` tokens behind each: the prefix once, then the batches."""
    prefix, each = work.shared(prompts), kv_bytes(sizes, work.dtype_bytes)
    without = sizes.n_layers * sizes.block_matrices * work.dtype_bytes
    reads = without + (sizes.unembedding * work.dtype_bytes if logits else 0)
    calls = [Call(forward_flops(sizes, rows=1, new=prefix), without)] if prefix else []
    new = work.tokens - prefix + more
    for rows in _spans(prompts, work.rows):
        flops = forward_flops(sizes, rows=rows, new=new, past=prefix, logits=logits)
        calls.append(Call(flops, reads + rows * prefix * each))
    return calls


def _passing(
    sizes: Dimensions, work: Workload, prompts: int, *, more: int = 0, logits: int = 0
) -> int:
    """Bytes that such calls hold at once: a batch's KV cache, its live activations, its logits."""
    prefix, rows = work.shared(prompts), min(prompts, work.rows)
    new = work.tokens - prefix + more
    places = rows * (prefix + new + SPARE) + prefix if prefix else 0
    live = live_bytes(sizes, rows=rows, new=new, dtype_bytes=work.dtype_bytes)
    scores = rows * logits * sizes.d_vocab * (work.dtype_bytes + 8)
    return places * kv_bytes(sizes, work.dtype_bytes) + live + scores


def load_stage(sizes: Dimensions, work: Workload, machine: Machine) -> Stage:
    """Weights from disk; over several devices they pass through the machine's RAM in parts."""
    size = sizes.parameters * work.dtype_bytes
    host = size if machine.devices == 1 else 0
    note = f"{sizes.parameters / 1e9:.2f}e9 parameters, {size / 1e9:.1f} GB of weights"
    return Stage("load", 0, host, (), note, size / machine.disk)


def collect_stage(sizes: Dimensions, work: Workload) -> Stage:
    """All residual sites of every prompt's last token, both sides; no logits."""
    prompts = 2 * work.prompts
    row = sizes.n_residual_sites * sizes.d_model
    rows = min(prompts, work.rows)
    held = 2 * rows * row * work.dtype_bytes  # as captured, and as one tensor
    host = prompts * row * work.dtype_bytes + (2 * rows + 4) * row * 8  # values; moments in float64
    calls = _pass(sizes, work, prompts)
    note = (
        f"{prompts} prompts, {sizes.n_residual_sites} sites, {work.shared(prompts)} tokens run once"
    )
    return Stage("collect", _passing(sizes, work, prompts) + held, host, calls, note)


def decode_calls(sizes: Dimensions, work: Workload, prompts: int) -> list[Call]:
    """The calls that answer `prompts` prompts, none ending early: prefix, prompts, a token at a time."""
    prefix, each = work.shared(prompts), kv_bytes(sizes, work.dtype_bytes)
    weights = sizes.parameters_a_step * work.dtype_bytes
    body = sizes.n_layers * sizes.block_matrices * work.dtype_bytes
    calls = [Call(forward_flops(sizes, rows=1, new=prefix), body)] if prefix else []
    for rows in _spans(prompts, work.decoded_rows):
        for step in range(work.new_tokens):
            past = prefix if step == 0 else work.tokens + step - 1
            new = work.tokens - prefix if step == 0 else 1
            flops = forward_flops(sizes, rows=rows, new=new, past=past, logits=1)
            calls.append(Call(flops, weights + rows * past * each))
    return calls


def trial_stage(sizes: Dimensions, work: Workload) -> Stage:
    """Teacher-forced own words of one side, first tokens of the other, answers to both."""
    prompts = 2 * work.scored
    prefix, rows = work.shared(prompts), min(prompts, work.decoded_rows)
    first = _pass(sizes, work, work.scored, more=N_TOKENS, logits=N_TOKENS + 1)
    second = _pass(sizes, work, work.scored, logits=1)
    answers = decode_calls(sizes, work, prompts)
    places = kv_places(tokens=work.tokens, new_tokens=work.new_tokens, prefix=prefix)
    cache = (rows * places + prefix) * kv_bytes(sizes, work.dtype_bytes)
    live = live_bytes(sizes, rows=rows, new=work.tokens - prefix, dtype_bytes=work.dtype_bytes)
    live += rows * sizes.d_vocab * (work.dtype_bytes + 8)
    passing = _passing(sizes, work, work.scored, more=N_TOKENS, logits=N_TOKENS + 1)
    note = (
        f"{prompts} answers of {work.new_tokens} tokens; a step reads "
        f"{sizes.parameters_a_step * work.dtype_bytes / 1e9:.1f} GB of weights, KV cache {cache / 1e9:.2f} GB"
    )
    return Stage("trial", max(cache + live, passing), 0, (*first, *second, *answers), note)


class _Side(NamedTuple):
    """Rows that a gradient step reads: tokens behind each prompt, logits, bytes kept a logit."""

    rows: int
    more: int
    logits: int
    kept: int


def _sides(work: Workload, passages: bool) -> list[_Side]:
    own = _Side(work.fitted, N_TOKENS, N_TOKENS + 1, 4)  # log-probabilities in float32
    kept = _Side(work.fitted, N_KEPT - 1, N_KEPT, 12)  # and the reference's chances in float64
    unwanted = _Side(max(work.fitted // 2, 1), PASSAGE_TOKENS - 1, PASSAGE_TOKENS, 4)
    return [own, kept, *([unwanted] if passages else [])]


def fit_stage(sizes: Dimensions, work: Workload, *, passages: bool = False) -> Stage:
    """A gradient step: each side forward and back by itself, all of its rows in one graph."""
    calls, held = [], []
    weights = sizes.parameters_a_step * work.dtype_bytes
    for side in _sides(work, passages):
        prefix = work.shared(side.rows)
        new = work.tokens - prefix + side.more
        flops = gradient_flops(sizes, rows=side.rows, new=new, past=prefix, logits=side.logits)
        size = side.rows * side.logits * sizes.d_vocab * side.kept
        size += saved_bytes(
            sizes, rows=side.rows, new=new, past=prefix, dtype_bytes=work.dtype_bytes
        )
        if prefix:
            flops += gradient_flops(sizes, rows=1, new=prefix, prefix=True)
            size += saved_bytes(sizes, rows=1, new=prefix, dtype_bytes=work.dtype_bytes)
        calls.append(Call(flops, (4 if prefix else 2) * weights))
        held.append(size + live_bytes(sizes, rows=side.rows, new=new, dtype_bytes=work.dtype_bytes))
    what = f"{work.fitted} + {work.fitted} rows" + (
        f" + {max(work.fitted // 2, 1)} passages" if passages else ""
    )
    name = "gradient step" + (", with passages" if passages else "")
    return Stage(name, max(held), 0, calls, what)


def export_stage(sizes: Dimensions, work: Workload, machine: Machine) -> Stage:
    """`export --source`: one writer as a whole, blocks of it in float32, what waits for the disk."""
    largest = sizes.d_model * max(sizes.d_mlp, sizes.queries) * work.dtype_bytes
    host = largest + 2 * BLOCK * 4 + WAITING
    size = sizes.parameters * work.dtype_bytes
    note = f"largest tensor that is held {largest / 1e9:.2f} GB; {size / 1e9:.1f} GB of disk"
    return Stage("export, streamed", 0, host, (), note, 2 * size / machine.disk)


def budget(
    hf_config: Any, workload: Workload | None = None, machine: Machine | None = None
) -> pd.DataFrame:
    """A row a stage: memory on the devices, RAM, operations, bytes read, seconds, and whether it fits.

    Args:
        hf_config: a Hugging Face config (`read_hf_config`), or `Dimensions`.

    Columns: stage; memory, weights included, and host, both in bytes; flops; reads, the bytes of weights
    and KV cache that are read; seconds; fits, whether the devices' memory holds it; note.

    Raises:
        InterpAblateError: a model type without arithmetic.
    """
    import pandas as pd

    work, machine = workload or Workload(), machine or Machine()
    sizes = hf_config if isinstance(hf_config, Dimensions) else dimensions_of(hf_config)
    weights = sizes.parameters * work.dtype_bytes
    rows = []
    for stage in (
        load_stage(sizes, work, machine),
        collect_stage(sizes, work),
        trial_stage(sizes, work),
        fit_stage(sizes, work),
        fit_stage(sizes, work, passages=True),
        export_stage(sizes, work, machine),
    ):
        memory = 0 if stage.stage.startswith("export") else weights + stage.memory
        rows.append(
            {
                "stage": stage.stage,
                "memory": memory,
                "host": stage.host,
                "flops": sum(call.flops for call in stage.calls),
                "reads": sum(call.reads for call in stage.calls),
                "seconds": machine.seconds(stage.calls) if stage.seconds is None else stage.seconds,
                "fits": memory <= machine.memory * machine.devices,
                "note": stage.note,
            }
        )
    return pd.DataFrame(rows)


def as_text(table: pd.DataFrame) -> str:
    """The table in GB, TFLOP and seconds, for people."""
    lines = [f"{'stage':<26}{'memory GB':>10}{'RAM GB':>9}{'TFLOP':>10}{'seconds':>10}  fits  note"]
    for row in table.to_dict("records"):
        lines.append(
            f"{row['stage']:<26}{row['memory'] / 1e9:>10.4g}{row['host'] / 1e9:>9.3g}"
            f"{row['flops'] / 1e12:>10.4g}{row['seconds']:>10.3g}  {'yes' if row['fits'] else 'NO':<4}"
            f"  {row['note']}"
        )
    return "\n".join(lines)


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

    try:
        return AutoConfig.from_pretrained(str(file.parent) if gguf else source.name, **gguf)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"transformers cannot read the config of {source.name!r}: {reason[0]} Give a folder with "
            "config.json; without a network hub names do not work"
        ) from error
