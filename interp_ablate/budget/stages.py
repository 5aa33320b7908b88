"""Budget: what a model needs at each stage, memory and time, by arithmetic from its config.

Knows: sizes of decoders, how many operations and bytes each stage takes, two rates of a machine. Does not
know: weights, devices, or what a stage measures. Nothing is loaded and nothing is run; `tests/test_budget.py`
holds each formula against what torch counts on small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from interp_ablate.budget.costs import (
    Call,
    Machine,
    Workload,
    activation_bytes,
    batch_sizes,
    forward_flops,
    gradient_flops,
    kv_bytes,
    kv_places,
    saved_bytes,
)
from interp_ablate.budget.sizes import Dimensions, dimensions_of
from interp_ablate.models.kv_cache import SPARE
from interp_ablate.search.gradient_fit import N_KEPT, N_TOKENS, PASSAGE_TOKENS
from interp_ablate.storage.output_folder import WAITING
from interp_ablate.weights.edited_tensors import BLOCK

if TYPE_CHECKING:
    import pandas as pd


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


def _pass(
    sizes: Dimensions, work: Workload, prompts: int, *, more: int = 0, logits: int = 0
) -> list[Call]:
    """The calls of `prompts` rows with `more` tokens behind each: the prefix once, then the batches."""
    prefix, each = work.shared(prompts), kv_bytes(sizes, work.dtype_bytes)
    without = sizes.n_layers * sizes.block_matrices * work.dtype_bytes
    reads = without + (sizes.unembedding * work.dtype_bytes if logits else 0)
    calls = [Call(forward_flops(sizes, rows=1, new=prefix), without)] if prefix else []
    new = work.tokens - prefix + more
    for rows in batch_sizes(prompts, work.rows):
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
    live = activation_bytes(sizes, rows=rows, new=new, dtype_bytes=work.dtype_bytes)
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
    for rows in batch_sizes(prompts, work.decoded_rows):
        for step in range(work.max_new_tokens):
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
    places = kv_places(tokens=work.tokens, max_new_tokens=work.max_new_tokens, prefix=prefix)
    cache = (rows * places + prefix) * kv_bytes(sizes, work.dtype_bytes)
    live = activation_bytes(
        sizes, rows=rows, new=work.tokens - prefix, dtype_bytes=work.dtype_bytes
    )
    live += rows * sizes.d_vocab * (work.dtype_bytes + 8)
    passing = _passing(sizes, work, work.scored, more=N_TOKENS, logits=N_TOKENS + 1)
    note = (
        f"{prompts} answers of {work.max_new_tokens} tokens; a step reads "
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
        held.append(
            size + activation_bytes(sizes, rows=side.rows, new=new, dtype_bytes=work.dtype_bytes)
        )
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
