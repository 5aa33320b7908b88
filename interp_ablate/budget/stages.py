"""The budget of a run: memory and time of each stage, by arithmetic from a model's config.

No weights are loaded; `tests/budget` holds each formula against what torch counts on small models.

Knows: which calls each stage makes, and what it holds. Does not know: weights, or what a stage measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interp_ablate.budget.costs import (
    Call,
    Machine,
    Workload,
    activation_bytes,
    adapter_bytes,
    forward_flops,
    gradient_flops,
    kv_places,
    saved_bytes,
    trained_bytes,
)
from interp_ablate.budget.sizes import Dimensions, dimensions_of
from interp_ablate.models.backends.bridge_shortcuts import SPARE
from interp_ablate.search.gradient_fit import N_KEPT, N_TOKENS, PASSAGE_TOKENS
from interp_ablate.storage.output_folder import WAITING
from interp_ablate.weights.plan_to_weights import BLOCK

if TYPE_CHECKING:
    import pandas as pd


class Stage(NamedTuple):
    """A row of the table; memory in bytes."""

    stage: str
    memory: int
    """On the devices, beside the weights."""
    host: int
    """In the machine's RAM."""
    calls: Sequence[Call]
    note: str
    seconds: float | None = None
    """Default: those of the calls, without Python, kernel launches, tokenizing or scoring of texts."""


def _calls(
    sizes: Dimensions, work: Workload, prompts: int, batch: int, steps: Sequence[tuple[int, int]], logits: int
) -> list[Call]:  # fmt: skip
    """The shared prefix once, then for each batch every step: (cached tokens, new tokens) of a row."""
    prefix, size = work.shared(prompts), sizes.dtype_bytes
    body = size * sizes.parameters_a_step(prefix, logits=False)
    calls = [Call(forward_flops(sizes, rows=1, new=prefix), body)] if prefix else []
    for start in range(0, prompts, batch):
        rows = min(batch, prompts - start)
        for past, new in steps:
            flops = forward_flops(sizes, rows=rows, new=new, past=past, logits=logits)
            weights = size * sizes.parameters_a_step(rows * new, logits=bool(logits))
            calls.append(Call(flops, weights + rows * (past > 0) * sizes.cache_bytes(past)))
    return calls


def forward_calls(
    sizes: Dimensions, work: Workload, prompts: int, *, more: int = 0, logits: int = 0
) -> list[Call]:
    """The calls that read `prompts` prompts, each with `more` tokens behind it."""
    prefix = work.shared(prompts)
    return _calls(sizes, work, prompts, work.rows, [(prefix, work.tokens - prefix + more)], logits)


def decode_calls(sizes: Dimensions, work: Workload, prompts: int) -> list[Call]:
    """The calls that answer `prompts` prompts, none ending early: prefix, prompts, a token at a time."""
    prefix = work.shared(prompts)
    steps = [(work.tokens + step, 1) for step in range(work.max_new_tokens - 1)]
    first = (prefix, work.tokens - prefix)
    return _calls(sizes, work, prompts, work.decoded_rows, [first, *steps], 1)


def forward_bytes(
    sizes: Dimensions, work: Workload, prompts: int, *, more: int = 0, logits: int = 0
) -> int:
    """Bytes that `forward_calls` hold at once: a batch's KV cache, its live activations, its logits."""
    prefix, rows = work.shared(prompts), min(prompts, work.rows)
    new = work.tokens - prefix + more
    cache = 0
    if prefix:
        cache = rows * sizes.cache_bytes(prefix + new, prefix + new + SPARE) + sizes.cache_bytes(
            prefix
        )
    live = activation_bytes(sizes, rows=rows, new=new)
    scores = rows * logits * sizes.d_vocab * (sizes.dtype_bytes + 8)
    return cache + live + scores


def decode_bytes(sizes: Dimensions, work: Workload, prompts: int) -> tuple[int, int]:
    """Bytes that `decode_calls` hold at once: the KV cache, and live activations with logits."""
    prefix, rows = work.shared(prompts), min(prompts, work.decoded_rows)
    places = kv_places(tokens=work.tokens, max_new_tokens=work.max_new_tokens, prefix=prefix)
    tokens = work.tokens + work.max_new_tokens - 1
    cache = rows * sizes.cache_bytes(tokens, places) + (sizes.cache_bytes(prefix) if prefix else 0)
    live = activation_bytes(sizes, rows=rows, new=work.tokens - prefix)
    return cache, live + rows * sizes.d_vocab * (sizes.dtype_bytes + 8)


def load_stage(sizes: Dimensions, work: Workload, machine: Machine) -> Stage:
    """Weights from disk; over several devices they pass through the machine's RAM in parts."""
    size = sizes.parameters * sizes.dtype_bytes
    host = size if machine.devices == 1 else 0
    note = f"{sizes.parameters / 1e9:.2f}e9 parameters, {size / 1e9:.1f} GB of weights"
    if sizes.idle:
        note += f"; {sizes.active / 1e9:.2f}e9 are active for a token"
    if sizes.towers:
        note += f"; {sizes.towers / 1e9:.2f}e9 are in other towers than the text's"
    return Stage("load", 0, host, (), note, size / machine.disk)


def collect_stage(sizes: Dimensions, work: Workload) -> Stage:
    """All residual sites of every prompt's last token, both sides; no logits."""
    prompts = 2 * work.prompts
    sites = 3 * sizes.n_layers  # resid_pre, resid_mid and resid_post of each
    row = sites * sizes.d_model
    rows = min(prompts, work.rows)
    held = 2 * rows * row * sizes.dtype_bytes  # as captured, and as one tensor
    host = (
        prompts * row * sizes.dtype_bytes + (2 * rows + 4) * row * 8
    )  # values; moments in float64
    calls = forward_calls(sizes, work, prompts)
    note = f"{prompts} prompts, {sites} sites, {work.shared(prompts)} tokens run once"
    return Stage("collect", forward_bytes(sizes, work, prompts) + held, host, calls, note)


def trial_stage(sizes: Dimensions, work: Workload) -> Stage:
    """The unedited answers of one side teacher-forced, first tokens of the other, answers to both."""
    prompts = 2 * work.scored
    first = forward_calls(sizes, work, work.scored, more=N_TOKENS, logits=N_TOKENS + 1)
    second = forward_calls(sizes, work, work.scored, logits=1)
    answers = decode_calls(sizes, work, prompts)
    cache, live = decode_bytes(sizes, work, prompts)
    passing = forward_bytes(sizes, work, work.scored, more=N_TOKENS, logits=N_TOKENS + 1)
    read = sizes.dtype_bytes * sizes.parameters_a_step(min(prompts, work.decoded_rows))
    note = (
        f"{prompts} answers of {work.max_new_tokens} tokens; a step reads "
        f"{read / 1e9:.1f} GB of weights, caches {cache / 1e9:.2f} GB"
    )
    return Stage("trial", max(cache + live, passing), 0, (*first, *second, *answers), note)


def fit_stage(sizes: Dimensions, work: Workload, *, passages: bool = False) -> Stage:
    """A gradient step: each side forward and back by itself, all of its rows in one graph."""
    unwanted, size = max(work.fitted // 2, 1), sizes.dtype_bytes
    weights = size * sizes.parameters_a_step(work.fitted * work.tokens)
    sides = [  # rows, tokens behind each prompt, logits, bytes kept a logit
        (work.fitted, N_TOKENS, N_TOKENS + 1, 4),  # log-probabilities in float32
        (work.fitted, N_KEPT - 1, N_KEPT, 8),  # and the reference's chances
        *([(unwanted, PASSAGE_TOKENS - 1, PASSAGE_TOKENS, 4)] if passages else []),
    ]
    calls, memory = [], []
    for rows, more, logits, kept_bytes in sides:
        prefix = work.shared(rows)
        new = work.tokens - prefix + more
        flops = gradient_flops(sizes, rows=rows, new=new, past=prefix, logits=logits)
        held = rows * logits * sizes.d_vocab * kept_bytes
        held += saved_bytes(sizes, rows=rows, new=new, past=prefix)
        held += activation_bytes(sizes, rows=rows, new=new)
        if prefix:
            flops += gradient_flops(sizes, rows=1, new=prefix, prefix=True)
            held += saved_bytes(sizes, rows=1, new=prefix)
        calls.append(Call(flops, (4 if prefix else 2) * weights))
        memory.append(held)
    name = "gradient step" + (", with passages" if passages else "")
    note = f"{work.fitted} + {work.fitted} rows" + (f" + {unwanted} passages" if passages else "")
    return Stage(name, max(memory), 0, calls, note)


def persona_stage(sizes: Dimensions, work: Workload) -> Stage:
    """The answers that a persona is extracted from, and one pass over them that averages the stream."""
    answers, prompts = decode_calls(sizes, work, work.answers), work.answers
    passes = forward_calls(sizes, work, prompts, more=work.max_new_tokens)
    memory = max(
        sum(decode_bytes(sizes, work, prompts)),
        forward_bytes(sizes, work, prompts, more=work.max_new_tokens),
    )
    note = f"{prompts} answers of {work.max_new_tokens} tokens, read once more"
    return Stage("persona extract", memory, 0, (*answers, *passes), note)


def train_stage(sizes: Dimensions, work: Workload) -> Stage:
    """A step of `persona train`: a LoRA on all linear layers; the model is read again for each arm."""
    rows, new, size = work.trained_rows, work.trained_tokens, sizes.dtype_bytes
    memory = adapter_bytes(sizes, rank=work.rank)
    memory += trained_bytes(sizes, rows=rows, new=new)
    flops = gradient_flops(sizes, rows=rows, new=new, logits=new)
    calls = [Call(flops, 2 * size * sizes.parameters_a_step(rows * new))]
    note = (
        f"{rows} rows of {new} tokens, LoRA of rank {work.rank}; without --gradient-checkpointing"
    )
    return Stage("persona train, a step", memory, 0, calls, note)


def heal_stage(sizes: Dimensions, work: Workload) -> Stage:
    """A step of `heal`: chosen and rejected rows, the chosen once more for the KL; the reference has no gradient.

    Of the original, its unembedding is there.
    """
    rows, new, size = work.trained_rows, work.trained_tokens, sizes.dtype_bytes
    memory = adapter_bytes(sizes, rank=work.rank, writers=False) + sizes.unembedding * size
    memory += trained_bytes(sizes, rows=3 * rows, new=new, writers=False)
    flops = gradient_flops(sizes, rows=3 * rows, new=new, logits=new)
    flops += forward_flops(sizes, rows=2 * rows, new=new, logits=new)
    calls = [Call(flops, 4 * size * sizes.parameters_a_step(rows * new))]
    note = f"{rows} pairs of {new} tokens; the original's unembedding beside the edited model"
    return Stage("heal, a step", memory, 0, calls, note)


def certificate_stage(sizes: Dimensions, work: Workload, machine: Machine) -> Stage:
    """The reloaded export beside the hooked model: embeddings, and one block at a time; the rest in RAM."""
    size, ends = sizes.dtype_bytes, (1 if sizes.tied else 2) * sizes.unembedding
    whole = sizes.parameters * size
    memory = (ends + sizes.block) * size
    note = "the export, block by block, beside the model"
    return Stage("certificate", memory, whole, (), note, whole / machine.disk)


def export_stage(sizes: Dimensions, work: Workload, machine: Machine) -> Stage:
    """`export --source`: one writer as a whole, blocks of it in float32, what waits for the disk."""
    largest = sizes.largest * sizes.dtype_bytes
    host = largest + 2 * BLOCK * 4 + WAITING
    size = sizes.parameters * sizes.dtype_bytes
    note = f"largest tensor that is held {largest / 1e9:.2f} GB; {size / 1e9:.1f} GB of disk"
    return Stage("export, streamed", 0, host, (), note, 2 * size / machine.disk)


def budget(
    hf_config: Any, workload: Workload | None = None, machine: Machine | None = None
) -> pd.DataFrame:
    """The table, a row a stage.

    Columns: stage; memory (on the devices, weights included) and host, in bytes; flops; reads (bytes of weights and
    KV cache); seconds; fits (True where the devices' memory holds it); note.

    Args:
        hf_config: a Hugging Face config (`read_hf_config`), or `Dimensions`.

    Raises:
        InterpAblateError: a model that does not run without data.
    """
    import pandas as pd

    work, machine = workload or Workload(), machine or Machine()
    sizes = hf_config
    if not isinstance(sizes, Dimensions):
        sizes = dimensions_of(hf_config, work.dtype_bytes)
    weights = sizes.parameters * sizes.dtype_bytes
    rows = []
    for stage in (
        load_stage(sizes, work, machine),
        collect_stage(sizes, work),
        trial_stage(sizes, work),
        fit_stage(sizes, work),
        fit_stage(sizes, work, passages=True),
        persona_stage(sizes, work),
        train_stage(sizes, work),
        heal_stage(sizes, work),
        certificate_stage(sizes, work, machine),
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
