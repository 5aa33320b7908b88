"""The arithmetic of `budget` against what torch counts: operations, caches, parameters, saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import config_classes, tiny_config
from tiny import PARTS, make, rows_of, shared, tiny
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from interp_ablate import collect, load_model
from interp_ablate.budget.costs import (
    Machine,
    Workload,
    adapter_bytes,
    config_at,
    forward_flops,
    kv_places,
    saved_bytes,
    trained_bytes,
)
from interp_ablate.budget.sizes import Dimensions, dimensions_of
from interp_ablate.budget.stages import (
    as_text,
    budget,
    collect_stage,
    decode_calls,
    fit_stage,
    forward_calls,
    trial_stage,
)
from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.backends.bridge_shortcuts import SPARE
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.gradient_fit import (
    KL_WEIGHT,
    N_KEPT,
    N_TOKENS,
    UNLIKELY,
    FitData,
    _kl,
    answer_logprobs,
    fit_data,
)

KINDS = list(PARTS)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "gpt_oss")
FEW = ("llama_gqa", "gpt2", "qwen2", "gemma")
PREFIX, TOKENS = 9, 14
LLAMA_70B = dimensions_of(
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    )
)  # fmt: skip


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Operations of all matrix products inside; attention as products, which is how torch can count it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


def endless(kind: str) -> Model:
    """A model whose answers end at the limit only."""
    model = make(kind)
    model.__dict__["eos_token_ids"] = frozenset()
    return model


def near(found: float, expected: float, tolerance: float) -> None:
    assert abs(found / expected - 1) <= tolerance, f"{found} for {expected}: {found / expected:.4f}"


# --------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("tied", [False, True], ids=("untied", "tied"))
@pytest.mark.parametrize("kind", KINDS)
def test_parameters(kind: str, tied: bool) -> None:
    hf, _ = tiny(kind, tied=tied)
    sizes = dimensions_of(hf.config)
    assert sizes.parameters == sum(p.numel() for p in hf.parameters())
    assert sizes.tied == tied


def test_sizes_of_a_published_model() -> None:
    """Llama 3.3 70B, from its published config: 70.55e9 parameters."""
    assert LLAMA_70B.parameters == LLAMA_70B.active == 70_553_706_496
    assert LLAMA_70B.cache_bytes(1) == 327_680
    assert "240 sites" in collect_stage(LLAMA_70B, Workload()).note


# --------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_forward_call(kind: str) -> None:
    hf, tokenizer = tiny(kind)
    if kind in EXPERTS:
        hf.set_experts_implementation("eager")  # the operations of the others torch does not count
    model, rows = from_hf(hf, tokenizer), rows_of(TOKENS, TOKENS, TOKENS)
    sizes = dimensions_of(model.hf_config, 4)
    with counted() as total:
        model.logits(rows, keep=2)
    near(total(), forward_flops(sizes, rows=3, new=TOKENS, logits=2), 0.003)


@pytest.mark.parametrize("kind", FEW)
def test_operations_of_collect(kind: str) -> None:
    model = shared(kind)
    work = Workload(prompts=3, tokens=TOKENS, prefix=PREFIX, rows=4)
    rows = rows_of(*[TOKENS] * 6, prefix=PREFIX)
    collect(model, rows, batch_size=4)  # once a model it is measured what rows may share
    with counted() as total:
        collect(model, rows, batch_size=4)
    calls = forward_calls(dimensions_of(model.hf_config, 4), work, 6)
    assert len(calls) == 3  # the prefix, four rows, two rows
    near(total(), sum(call.flops for call in calls), 0.003)


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("kind", FEW)
def test_operations_of_decoding(kind: str, prefix: int) -> None:
    model = endless(kind)
    work = Workload(tokens=TOKENS, prefix=prefix, max_new_tokens=7, decoded_rows=2)
    rows = rows_of(*[TOKENS] * 3, prefix=prefix)
    model.generate(rows, max_new_tokens=7)  # once a model it is measured what rows may share
    with counted() as total:
        model.generate(rows, max_new_tokens=7, batch_size=2)
    calls = decode_calls(dimensions_of(model.hf_config, 4), work, 3)
    assert len(calls) == 2 * 7 + (prefix > 0)
    near(total(), sum(call.flops for call in calls), 0.003)


# --------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("max_new_tokens", [2, SPARE + 1, SPARE + 2, 2 * SPARE + 4])
def test_kv_cache(prefix: int, max_new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of Model's own cache after decoding, spare places included."""
    model, caches = endless("llama_gqa"), []
    for name in ("new_cache", "gathered_cache"):
        inner = getattr(model._backend, name)
        monkeypatch.setattr(
            model._backend, name, lambda *a, inner=inner: caches.append(inner(*a)) or caches[-1]
        )
    rows = rows_of(*[TOKENS] * 3, prefix=prefix)
    model.generate(rows, max_new_tokens=max_new_tokens)
    held = sum(buffer.nbytes for layer in caches[-1].layers for buffer in layer._buffers)
    places = kv_places(tokens=TOKENS, max_new_tokens=max_new_tokens, prefix=prefix)
    sizes = dimensions_of(model.hf_config, 4)
    assert held == 3 * sizes.cache_bytes(TOKENS, places)


@pytest.mark.parametrize("kind", FEW)
def test_values_of_collect(kind: str) -> None:
    model = shared(kind)
    values = collect(model, rows_of(12, 13, 14, 15)).values
    sizes = dimensions_of(model.hf_config, 4)
    assert values.nbytes == 4 * 3 * sizes.n_layers * sizes.d_model * 4


# --------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["all", "readers"])
@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2"])
def test_memory_of_a_training_step(kind: str, where: Any, dtype: torch.dtype) -> None:
    """What a LoRA keeps for the way back, and its parameters, gradients and moments, which AdamW makes."""
    peft = pytest.importorskip("peft")
    from interp_ablate.training.lora_targets import lora_config, lora_targets
    from interp_ablate.training.recipe import LoraRecipe

    hf, _ = tiny(kind)
    sizes, rows, new = dimensions_of(hf.config, dtype.itemsize), 4, 48
    hf.to(dtype).requires_grad_(False).train()
    weights = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    model = peft.get_peft_model(hf, lora_config(hf, LoraRecipe(rank=4), lora_targets(hf, where)))
    adapters = [p for p in model.parameters() if p.requires_grad]
    writers, size = where == "all", dtype.itemsize
    assert adapter_bytes(sizes, rank=4, writers=writers) == 16 * sum(p.numel() for p in adapters)
    weights |= {p.untyped_storage().data_ptr() for p in adapters}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.randint(0, sizes.d_vocab, (rows, new))
    with saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=ids, labels=ids, use_cache=False)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    logits = (
        rows * new * sizes.d_vocab * (12 + size)
    )  # of which the way back keeps the log-probabilities
    expected = trained_bytes(sizes, rows=rows, new=new, writers=writers) - logits
    near(found - 4 * rows * new * sizes.d_vocab, expected, 0.25)


# --------------------------------------------------------------------------------- a gradient step


class Step:
    """One gradient step of a fit, a side at a time: what it keeps, and its operations."""

    def __init__(self, model: Model, data: FitData) -> None:
        model.tl.requires_grad_(False)  # as the checkpoint's weights are: a split QKV is made anew
        self.model, self.data = model, data
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(model.d_model, generator=generator) / model.d_model**0.5
        self.leaves = [vector.clone().requires_grad_(), vector.clone().requires_grad_()]
        self.leaves.append(torch.full((len(model.writers),), 0.3, requires_grad=True))

    def loss(self, side: str) -> Tensor:
        if side == "kl":
            return KL_WEIGHT * _kl(self.model, self.data)
        return torch.nn.functional.softplus(
            answer_logprobs(self.model, self.data) - UNLIKELY
        ).mean()

    def saved(self, side: str) -> int:
        """Bytes of all distinct storages kept for the way back, weights left out."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.tl.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            place = x.untyped_storage().data_ptr()
            if place not in weights:
                kept[place] = x
            return x

        read, write, strengths = self.leaves
        erasing = self.model.plans.fitting_erasure(read, write, self.model.writers, strengths)
        with erasing, saved_tensors_hooks(keep, lambda x: x):
            self.loss(side)
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    def run(self) -> None:
        """Forward and back, a side at a time."""
        read, write, strengths = self.leaves
        for side in ("own", "kl"):
            with self.model.plans.fitting_erasure(read, write, self.model.writers, strengths):
                self.loss(side).backward()

    def flops(self) -> int:
        with counted() as total:
            self.run()
        return total()


def steps_data(model: Model, rows: int, tokens: int, prefix: int) -> FitData:
    """Training rows of equal length from a model's own answers, all of which count as expressing."""
    return fit_data(
        ModelOutputs(model, rows_of(*[tokens] * rows, prefix=prefix), max_new_tokens=N_TOKENS + 1),
        ModelOutputs(
            model, rows_of(*[tokens] * rows, prefix=prefix, seed=2), max_new_tokens=N_KEPT
        ),
        ExpressionScorer((), patterns=("",)),
    )


@cache
def tiny_step(kind: str, prefix: int, rows: int = 4) -> Step:
    model = endless(kind)
    return Step(model, steps_data(model, rows, TOKENS, prefix))


def expected_saved(sizes: Dimensions, side: str, *, rows: int, tokens: int, prefix: int) -> int:
    """The formula for the blocks, and the logits as `fit_stage` counts them."""
    more, logits, kept = (N_TOKENS, N_TOKENS + 1, 4) if side == "own" else (N_KEPT - 1, N_KEPT, 8)
    new = tokens - prefix + more
    size = saved_bytes(sizes, rows=rows, new=new, past=prefix)
    if prefix:
        size += saved_bytes(sizes, rows=1, new=prefix)
    return size + rows * logits * kept * sizes.d_vocab


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("kind", (*FEW, "gemma2"))
def test_operations_of_a_gradient_step(kind: str, prefix: int) -> None:
    """Weights get no gradient: a product costs twice the forward one, attention scores three times."""
    step = tiny_step(kind, prefix)
    work = Workload(tokens=TOKENS, prefix=prefix, fitted=4, dtype_bytes=4)
    calls = fit_stage(dimensions_of(step.model.hf_config, 4), work).calls
    near(step.flops(), sum(call.flops for call in calls), 0.003)


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("side", ["own", "kl"])
@pytest.mark.parametrize("kind", (*FEW, "qwen3", "gemma3_text", "olmo2"))
def test_saved_tensors_of_a_gradient_step(kind: str, side: str, prefix: int) -> None:
    step = tiny_step(kind, prefix)
    sizes = dimensions_of(step.model.hf_config, 4)
    expected = expected_saved(sizes, side, rows=4, tokens=TOKENS, prefix=prefix)
    near(step.saved(side), expected, 0.15)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma"])
def test_saved_tensors_in_16_bits(kind: str) -> None:
    """Norms keep float32 whatever the model's dtype is."""
    hf, tokenizer = tiny(kind)
    model = from_hf(hf.to(torch.bfloat16), tokenizer)
    model.__dict__["eos_token_ids"] = frozenset()
    step, sizes = Step(model, steps_data(model, 4, TOKENS, PREFIX)), dimensions_of(hf.config, 2)
    for side in ("own", "kl"):
        expected = expected_saved(sizes, side, rows=4, tokens=TOKENS, prefix=PREFIX)
        near(step.saved(side), expected, 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_step_of_a_real_model(dtype: str, bundled_model: str) -> None:
    """SmolLM2-135M: saved tensors, and the operations, with a chat template's length of prefix."""
    model, tokens, prefix = load_model("smollm2", dtype=dtype), 60, 40
    model.__dict__["eos_token_ids"] = frozenset()
    sizes = dimensions_of(model.hf_config, getattr(torch, dtype).itemsize)
    step = Step(model, steps_data(model, 4, tokens, prefix))
    for side in ("own", "kl"):
        expected = expected_saved(sizes, side, rows=4, tokens=tokens, prefix=prefix)
        near(step.saved(side), expected, 0.1)
    if dtype == "float32":
        work = Workload(tokens=tokens, prefix=prefix, fitted=4)
        near(step.flops(), sum(call.flops for call in fit_stage(sizes, work).calls), 0.003)


# --------------------------------------------------------------------------------- peaks


def peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors made inside `run` held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events))


@cache
def wide() -> Model:
    """A Llama whose activations outweigh what does not grow with it; its answers end at the limit."""
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 6}
    model = make("llama_gqa", **sizes, num_attention_heads=8)
    model.__dict__["eos_token_ids"] = frozenset()
    return model


@pytest.mark.parametrize("prefix", [0, 40])
def test_peak_memory_of_every_stage(prefix: int) -> None:
    """The table's memory holds what is needed and, within a third, no more."""
    model, n = wide(), 60
    sizes, rows = dimensions_of(model.hf_config, 4), rows_of(*[n] * 32, prefix=prefix)
    work = Workload(
        prompts=16, scored=16, fitted=8, tokens=n, prefix=prefix, max_new_tokens=32, dtype_bytes=4
    )
    step = Step(model, steps_data(model, 8, n, prefix))
    found = {
        "collect": (peak(lambda: collect(model, rows, batch_size=32)), collect_stage(sizes, work)),
        "trial": (peak(lambda: model.generate(rows, max_new_tokens=32)), trial_stage(sizes, work)),
        "step": (peak(lambda: step.run()), fit_stage(sizes, work)),
    }
    ratios = {name: measured / stage.memory for name, (measured, stage) in found.items()}
    assert all(0.75 <= ratio <= 1.05 for ratio in ratios.values()), ratios


# --------------------------------------------------------------------------------- the table


def column(table: Any, name: str) -> dict[str, float]:
    return dict(zip(table["stage"], table[name]))


def test_the_table_follows_the_formulas() -> None:
    work = Workload(scored=4, tokens=20, prefix=10, max_new_tokens=3, dtype_bytes=2)
    machine = Machine(flops=1e12, bandwidth=1e30, memory=80e9, devices=2, disk=1e9)
    table = budget(LLAMA_70B, work, machine)
    assert [stage.split(",")[0] for stage in table["stage"]] == [
        *("load", "collect", "trial", "gradient step", "gradient step", "persona extract"),
        *("persona train", "heal", "certificate", "export"),
    ]
    weights = 2 * LLAMA_70B.parameters
    memory, flops, seconds = (column(table, name) for name in ("memory", "flops", "seconds"))
    assert memory["load"] == weights and seconds["load"] == weights / 1e9
    parts = (
        {"rows": 1, "new": 10},
        {"rows": 4, "new": 14, "past": 10, "logits": 5},
        {"rows": 1, "new": 10},
        {"rows": 4, "new": 10, "past": 10, "logits": 1},
        {"rows": 1, "new": 10},
        {"rows": 8, "new": 10, "past": 10, "logits": 1},
        {"rows": 8, "new": 1, "past": 20, "logits": 1},
        {"rows": 8, "new": 1, "past": 21, "logits": 1},
    )
    assert flops["trial"] == sum(forward_flops(LLAMA_70B, **part) for part in parts)
    assert seconds["trial"] == pytest.approx(flops["trial"] / 1e12)
    assert memory["trial"] > weights + 8 * (20 + SPARE) * 327_680
    assert table["memory"][3] < table["memory"][4]  # passages are longer


def test_what_bounds_a_stage() -> None:
    """Decoding few rows is bound by reading the weights, collecting by arithmetic."""
    table = budget(LLAMA_70B, Workload(scored=1, max_new_tokens=100))
    machine, reads = Machine(), column(table, "reads")
    assert column(table, "seconds")["trial"] == pytest.approx(
        reads["trial"] / machine.bandwidth, rel=0.1
    )
    collected = column(table, "flops")["collect"] / machine.flops
    assert column(table, "seconds")["collect"] == pytest.approx(collected, rel=0.1)


def test_what_does_not_fit() -> None:
    assert column(budget(LLAMA_70B, None, Machine(devices=1)), "fits")["load"] == 0
    fits = column(budget(LLAMA_70B, Workload(fitted=32)), "fits")
    assert fits["load"] and fits["collect"] and fits["trial"] and not fits["gradient step"]
    assert column(budget(LLAMA_70B, Workload(fitted=8)), "fits")["gradient step"]


def test_text_holds_every_stage() -> None:
    table = budget(LLAMA_70B)
    lines = as_text(table).splitlines()
    assert len(lines) == 1 + len(table) and "141.1" in lines[1]
    assert all(line.startswith(stage) for line, stage in zip(lines[1:], table["stage"]))


def test_configs_are_found(tmp_path: Path) -> None:
    hf, _ = tiny("qwen2")
    hf.config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert dimensions_of(config_at(name)) == dimensions_of(hf.config)
    with pytest.raises(ModelError, match="no model at"):
        config_at(tmp_path / "nothing" / "here")


def test_refused() -> None:
    with pytest.raises(InterpAblateError, match="no arithmetic for this xmod model"):
        budget(tiny_config(config_classes()["xmod"]))
    with pytest.raises(InterpAblateError, match="shared prefix shorter"):
        Workload(tokens=10, prefix=10)
    with pytest.raises(InterpAblateError, match="at least 1"):
        Workload(max_new_tokens=0)
    with pytest.raises(InterpAblateError, match="above 0"):
        Machine(disk=0)
