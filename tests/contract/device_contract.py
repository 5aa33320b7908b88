"""Everything on a second device: tensors there and on the CPU do not mix, `.numpy()` and float64 are for the CPU.

The device is `pretend:0` (tests/support), which computes on the CPU and refuses what an accelerator refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from tiny import N_LAYERS, folder_of, rows_of, unit

from interp_ablate import (
    Ablate,
    Add,
    Plan,
    Site,
    collect,
    everywhere,
    export_checkpoint,
    load_model,
    precision,
)
from interp_ablate.activations.collection import collect_moments
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.edits.kinds import Clamp, Erase
from interp_ablate.evaluation.float32_kl import first_token_kl_floor, float32_first_token_kl
from interp_ablate.evaluation.metrics import (
    TargetLogOdds,
    UneditedAnswerLogProb,
    answer_metrics,
    continuation_scores,
    first_token_kl,
)
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.export.lora import export_lora
from interp_ablate.models.load import from_hf, hf_from_name
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import bounded_kl
from interp_ablate.search.gradient_fit import fit_data, fit_edit

ANYTHING = ExpressionScorer((), patterns=("",))  # every answer expresses it
ROWS = rows_of(9, 14, 11, 20)
PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
SITE = Site(1, "resid_pre")


@pytest.fixture(autouse=True, params=("float64", "no float64", "two devices"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device as CUDA is, one as MPS is, and layers spread over two."""
    if request.param == "no float64":
        monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"pretend"})
        monkeypatch.setattr(pretend_device, "HAS_FLOAT64", False)
    with pretend_device.on():
        yield "auto" if request.param == "two devices" else "pretend:0"


def both(source: Path, device: str) -> tuple[Any, Any]:
    """One model on the CPU, and on the other device or devices."""
    here, there = (load_model(source, device=place) for place in ("cpu", device))
    blocks = {parameter.device for parameter in there.tl.blocks.parameters()}
    assert len(blocks) == (2 if device == "auto" else 1)
    return here, there


@pytest.fixture
def pair(tmp_path: Path, device: str) -> tuple[Any, Any]:
    return both(folder_of(tmp_path / "source"), device)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)


def test_the_device_refuses_what_accelerators_refuse() -> None:
    there, here = torch.ones(2, 3, device="pretend:0"), torch.ones(2, 3)
    assert (there + 1).cpu().equal(here + 1)
    for mixed in (lambda: there + here, lambda: there + torch.ones(2, 3, device="pretend:1")):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    if not pretend_device.HAS_FLOAT64:
        for wide in (there.double, lambda: here.double().to("pretend:0")):
            with pytest.raises(TypeError, match="float64"):
                wide()


def test_load_and_logits(pair: Any) -> None:
    here, there = pair
    assert there.device.type == "pretend"
    same(there.logits(ROWS, keep=3), here.logits(ROWS, keep=3))
    assert there.fingerprint == here.fingerprint


def test_collect_and_directions(pair: Any) -> None:
    sites = [SITE, Site(2, "resid_post")]
    first = []
    for model in pair:
        activations = collect(model, ROWS, sites, (-1, -2))
        first.append(activations)
        mean = difference_in_means(activations.at(SITE)[:2], activations.at(SITE)[2:], site=SITE)
        assert mean.vector.device.type == "cpu"
    for site in sites:
        same(first[1].at(site), first[0].at(site))


def test_plans_applied(pair: Any) -> None:
    plans = [PLAN, None, Plan((Add(unit(1), SITE, coefficient=3.0),)), PLAN]
    here, there = pair
    results = []
    for model in (here, there):
        with model.applied(PLAN):
            together = model.logits(ROWS)
        with model.applied_each(plans):
            each, text = model.logits(ROWS), model.generate(ROWS, max_new_tokens=6)
        results.append((together, each, text))
    same(results[1][0], results[0][0])
    same(results[1][1], results[0][1])
    assert results[1][2] == results[0][2]


@pytest.mark.parametrize("positions", ("all", "prompt", "generated"))
def test_positions_and_generation(pair: Any, positions: Any) -> None:
    plan = Plan((Add(unit(1), SITE, coefficient=3.0, positions=positions),))
    texts = []
    for model in pair:
        with model.applied(plan):
            texts.append(model.generate(ROWS, max_new_tokens=6))
    assert texts[0] == texts[1]
    assert pair[1].generate(ROWS, max_new_tokens=4, temperature=1.0)


def test_export(pair: Any, tmp_path: Path) -> None:
    assert export_checkpoint(pair[1], PLAN, tmp_path / "out", prompts=ROWS[:2])["passed"]


def test_lora(pair: Any, tmp_path: Path) -> None:
    assert export_lora(pair[1], PLAN, tmp_path / "out", prompts=ROWS[:2])["passed"]


@pytest.mark.parametrize("keep_values", (True, False))
def test_pooled_collection(pair: Any, keep_values: bool) -> None:
    function = collect if keep_values else collect_moments
    here, there = (function(model, ROWS, [SITE], ("response_mean", -1)) for model in pair)
    for name in ("values",) if keep_values else ("mean", "squares"):
        same(getattr(there, name), getattr(here, name))


@pytest.mark.parametrize("kind", ("gemma2", "gpt2", "qwen3"))
def test_architectures(kind: str, tmp_path: Path, device: str) -> None:
    here, there = both(folder_of(tmp_path / "source", kind), device)
    plan = Plan((Ablate(unit(), here.writers),))
    results = []
    for model in (here, there):
        with model.applied(plan):
            results.append(model.logits(ROWS))
    same(results[1], results[0])
    assert export_checkpoint(there, plan, tmp_path / "out", prompts=ROWS[:1])["passed"]


@pytest.mark.parametrize(
    "edit",
    (
        Ablate(unit(), Site(1, "mlp_out"), norm_preserving=True),
        Clamp(unit(), Site(1, "resid_mid"), value=2.0),
        Erase(unit(1), unit(1) + unit(2), Site(1, "resid_pre")),
    ),
    ids=("norm_preserving", "clamp", "erase"),
)
def test_kinds_of_edits(pair: Any, edit: Any) -> None:
    results = []
    for model in pair:
        with model.applied(Plan((edit,))):
            results.append(model.logits(ROWS))
    same(results[1], results[0])


def test_scores(pair: Any) -> None:
    results = []
    for model in pair:
        base = ModelOutputs(model, ROWS, max_new_tokens=4)
        edited = base.with_plan(PLAN)
        results.append(
            [
                bounded_kl(first_token_kl(edited, base))["kl"],
                float(TargetLogOdds((5, 7))(edited, base).mean()),
                float(UneditedAnswerLogProb(ANYTHING)(edited, base).mean()),
                *(float(values.mean()) for values in continuation_scores(edited, base).values()),
                *(sum(map(float, column)) for column in answer_metrics(edited, base).values()),  # type: ignore[arg-type]
                *float32_first_token_kl(base, [PLAN])[0].tolist(),
                first_token_kl_floor(base)[0],
            ]
        )
    assert results[1] == pytest.approx(results[0], abs=1e-4)


def test_fit(pair: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two devices without the way back: torch counts one device of a kind that is made in Python."""
    direction, losses = Direction(unit(3), 1.0, Site(1, "resid_post")), []

    def backward(loss: torch.Tensor) -> None:
        losses.append(float(loss.detach()))
        if device != "auto":
            torch.autograd.backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for model in pair:
        positive = ModelOutputs(model, ROWS, max_new_tokens=4)
        data = fit_data(positive, ModelOutputs(model, rows_of(13, 15, seed=2)), ANYTHING)
        data = data.with_loops([positive])
        edit = fit_edit(model, direction, data, kl_weight=0.1, steps=2)
        assert edit.vectors.device.type == "cpu" and edit.vectors.isfinite().all()
    half = len(losses) // 2
    assert losses[half:] == pytest.approx(losses[:half], rel=1e-3)


def test_monitor(pair: Any) -> None:
    direction = Direction(unit(3), 1.0, SITE)
    values = [[v for _, v in model.monitor(ROWS[0], direction, max_new_tokens=5)] for model in pair]
    assert values[1] == pytest.approx(values[0], abs=1e-4)


@pytest.mark.parametrize("kind", ("llama_gqa", "gemma2"))
def test_export_from_memory(kind: str, tmp_path: Path, device: str) -> None:
    """Without a folder behind the model, what is written is read from the device."""
    source = folder_of(tmp_path / "source", kind)
    hf, tokenizer, _ = hf_from_name(source, dtype="float32", device=device, trust_remote_code=False)
    model = from_hf(hf, tokenizer)
    plan = Plan((Ablate(unit(), model.writers),))
    assert export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS[:1])["passed"]
    assert export_lora(model, plan, tmp_path / "lora", prompts=ROWS[:1])["passed"]
