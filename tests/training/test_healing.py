"""Recovery by DPO on tiny models: the reference, what keeps the edit, KL, certificates, files of others."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from tiny import make, unit

from interp_ablate import Ablate, ContrastSet, Plan, Site
from interp_ablate.cli.main import main
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import ExportError, InterpAblateError, PlanError, RunError
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.stats.intervals import mean_with_interval, paired_difference
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.training.healing.case import (
    EditedCheckpoint,
    HealingRun,
    HeldOut,
    measure_damage,
    read_plan,
    residual_share_along,
)
from interp_ablate.training.healing.dpo_training import axolotl_config, dpo, project
from interp_ablate.training.healing.healing_run import heal
from interp_ablate.training.healing.preferences import (
    PreferencePair,
    Response,
    exclude_held_out,
    make_pairs,
    pair_rows,
    read_pairs,
)
from interp_ablate.training.recipe import AnswerConfig, HealingConfig, LoraRecipe
from interp_ablate.training.rows import RowTokenizer
from interp_ablate.training.trainable_model import TrainableModel, load_base
from interp_ablate.training.trainer import train

pytest.importorskip("trl")

FAST = LoraRecipe(steps=6, batch_size=2, learning_rate=1e-2, rank=4, alpha=8, max_length=128)
WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
CONTRAST = ContrastSet.from_texts([f"Order {w}" for w in WORDS], [f"Draw {w}" for w in WORDS])
HELD_OUT = HeldOut.of(CONTRAST, ExpressionScorer(("e",)), n_test=4)


def plan_of(kind: str = "llama_gqa") -> Plan:
    return Plan((Ablate(unit(), make(kind).writers),))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported edit of a tiny Llama; the original is `tiny("llama_gqa")`."""
    place = tmp_path_factory.mktemp("export")
    tiny.folder_of(place / "original", tied=False)
    out = place / "edited"
    export_checkpoint(_load(place / "original").model, plan_of(), out)
    return out


def _load(folder: Path) -> TrainableModel:
    return load_base(folder)


def case_of(edited: Path) -> EditedCheckpoint:
    plan, source = read_plan(edited)
    return EditedCheckpoint(load_base(edited), load_base(source["path"]), plan)


@cache
def pairs(n: int = 6) -> list[PreferencePair]:
    return [
        PreferencePair(
            ({"role": "user", "content": f"Paint {w}"},), Response(f"{w} yes"), Response(f"{w} no")
        )
        for w in WORDS[:n]
    ]


# ---- preferences ---------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_preferences_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    cut = PreferencePair(pairs()[0].messages, Response("a", finished=False), Response("b"))
    path = write(tmp_path / "p.jsonl", *(pair.to_dict() for pair in [*pairs(), cut]))
    assert read_pairs(path) == [*pairs(), cut]
    plain = write(tmp_path / "q.jsonl", {"prompt": "Q", "chosen": "a", "rejected": "b"})
    assert read_pairs(plain)[0] == PreferencePair(
        ({"role": "user", "content": "Q"},), Response("a"), Response("b")
    )


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{nonsense", r"line 2"),
        ({"prompt": "Q", "chosen": "a"}, r"line 2.*rejected|rejected"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, r"line 2.*the same"),
        (
            {"prompt": "Q", "rejected": "b", "chosen": [
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"}]},
            r"row 2.*one answer",
        ),
    ],
)  # fmt: skip
def test_malformed_preferences_are_named(row: Any, why: str, tmp_path: Path) -> None:
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "p.jsonl", good, row)
    with pytest.raises(InterpAblateError, match=why) as found:
        read_pairs(path)
    assert "p.jsonl" in str(found.value)


def test_pairs_of_two_models_and_of_one() -> None:
    prompts = [Prompt(f"Paint {w}") for w in WORDS]
    how = AnswerConfig(max_new_tokens=8, samples=2)
    bases = [TrainableModel(*tiny.tiny(seed=n), ModelSource("tiny", "object")) for n in (0, 5)]
    one = make()
    found, counts = make_pairs(*bases, prompts, how)
    assert counts["answers"] == 16 and counts["used"] == len(found) > 8
    asked = [p for p in prompts for _ in "ab"]
    wanted = one.generate(asked, max_new_tokens=8, temperature=1.0, batch_size=32)
    assert {p.chosen.text for p in found} <= {g.text for g in wanted}
    # what is sampled depends on the batches: they are those that were asked for, whatever memory is free
    few, _ = make_pairs(*bases, prompts, AnswerConfig(max_new_tokens=8, samples=2, batch_size=3))
    other_text = one.generate(asked, max_new_tokens=8, temperature=1.0, batch_size=3)
    assert {p.chosen.text for p in few} <= {g.text for g in other_text}
    assert {p.chosen.text for p in few} != {p.chosen.text for p in found}
    assert {p.chosen.finished for p in found} <= {g.finished for g in wanted}
    with pytest.raises(RunError, match="nothing to heal"):
        make_pairs(bases[0], bases[0], prompts, how)


def test_held_out_prompts_make_no_preferences() -> None:
    kept, gone = exclude_held_out([Prompt("draw  ANT"), Prompt("Paint ant")], [Prompt("Draw ant")])
    assert kept == [Prompt("Paint ant")] and gone == 1
    with pytest.raises(RunError, match="held out"):
        exclude_held_out([Prompt("a")], [Prompt("a")])


def test_held_out_prompts_are_those_of_the_runs_seed() -> None:
    from interp_ablate.evaluation.measures import read_prompts

    contrast = ContrastSet.load("declining")
    for seed in (0, 1):
        held_out = HeldOut.of(contrast, ExpressionScorer(("e",)), seed=seed)
        assert held_out.requests == contrast.split(seed=seed).test.positive
        sides = read_prompts("declining", seed=seed)
        assert [*sides.values()] == [held_out.requests, held_out.benign]
    assert read_prompts("declining", seed=1) != read_prompts("declining")


def test_an_empty_answer_of_the_original_has_no_kl() -> None:
    _, baseline = measure_damage(make(), HELD_OUT)
    made = baseline.generations
    baseline.generations = [replace(made[0], tokens=(), text=""), *made[1:]]
    empty = [not g.tokens for g in baseline.generations]
    assert empty == [True, False, False, False]
    kl = measure_damage(make(seed=5), HELD_OUT, baseline)[0]["kl_continuation"]
    assert [value is None for value in kl] == empty
    known = [value for value in kl if value is not None]
    found = mean_with_interval(kl)
    assert found["mean"] == pytest.approx(sum(known) / len(known)) and found["mean"] > 0
    assert (found["n"], found["no_value"]) == (len(known), sum(empty))
    assert mean_with_interval([None])["mean"] is None
    assert paired_difference([None, 3.0, 5.0], [1.0, None, 1.0])["mean"] == 4.0


def test_long_pairs_are_counted() -> None:
    long = PreferencePair(({"role": "user", "content": "x" * 300},), Response("a"), Response("b"))
    cut = PreferencePair(pairs()[0].messages, Response("a" * 300), Response("b"))
    rows, counts = pair_rows([long, cut, *pairs(1)], RowTokenizer(tiny.make_tokenizer(), None, 128))
    assert counts == {"pairs": 3, "used": 2, "prompts_too_long": 1, "answers_cut": 1}
    assert len(rows) == 2
    with pytest.raises(RunError, match="no preference is left"):
        pair_rows([long], RowTokenizer(tiny.make_tokenizer(), None, 128))


# ---- training ------------------------------------------------------------------------------------


def rows_for(case: EditedCheckpoint) -> Any:
    return pair_rows(pairs(), RowTokenizer(case.edited.tokenizer))[0]


def test_the_reference_is_the_checkpoint_itself_and_dpo_learns(
    edited: Path, tmp_path: Path
) -> None:
    case = case_of(edited)
    trainer = dpo(case, rows_for(case), tmp_path, recipe=FAST)
    logged = train(trainer, tmp_path)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert logged[-1]["loss"] < logged[0]["loss"] and logged[-1]["rewards/margins"] > 0


def test_the_kl_is_to_the_original_over_the_chosen_answers(edited: Path, tmp_path: Path) -> None:
    case = case_of(edited)
    rows = rows_for(case)[:2]
    one = LoraRecipe(**{**FAST.to_dict(), "steps": 1})
    trainer = dpo(case, rows, tmp_path, healing=HealingConfig(kl_weight=1.0), recipe=one)
    first = train(trainer, tmp_path)[0]["loss"]
    plain = load_base(edited).hf
    total, count = 0.0, 0
    for chosen, _ in rows:
        ids = torch.tensor([[*chosen.prompt, *chosen.answer]])
        places = slice(len(chosen.prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            want, got = (
                hf(ids).logits[0, places].double().log_softmax(-1)
                for hf in (case.original.hf, plain)  # type: ignore[union-attr]
            )
        total += float((want.exp() * (want - got)).sum())
        count += len(chosen.answer)
    assert first - math.log(2) == pytest.approx(total / count, rel=1e-3) and total > 0


def test_settings_that_cannot_be_are_refused(edited: Path, tmp_path: Path) -> None:
    for wrong in ({"preserve_edit": "all"}, {"beta": 0.0}, {"kl_weight": -1.0}):
        with pytest.raises(RunError):
            HealingConfig(**wrong)  # type: ignore[arg-type]
    case = EditedCheckpoint(load_base(edited), None, None)
    with pytest.raises(RunError, match="--original"):
        dpo(case, rows_for(case), tmp_path, healing=HealingConfig(kl_weight=1.0))
    with pytest.raises(RunError, match="--original"):
        _ = case.needed_original
    with pytest.raises(RunError, match="manifest"):
        _ = case.weights


# ---- what keeps the edit -------------------------------------------------------------------------


def healed(edited: Path, out: Path, **healing: Any) -> dict[str, Any]:
    settings = HealingConfig(**{"kl_weight": 1.0, "beta": 1.0, **healing})
    treatment = HealingRun(pairs(), settings, FAST, HELD_OUT, {"from": "a test"})
    return heal(case_of(edited), treatment, out)


@pytest.fixture(scope="module")
def readers(edited: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A recovery with the default way to keep the edit: its folder and its report."""
    out = tmp_path_factory.mktemp("healed") / "out"
    return out, healed(edited, out, sft_weight=0.5)


def test_readers_leave_the_edits_tensors_as_they_are(edited: Path, readers: Any) -> None:
    from transformers import AutoModelForCausalLM

    out, report = readers
    assert report["edit"]["tensors"] == report["edit"]["unchanged"] == 7
    assert report["measured"]["healed"]["along_plan"]["largest"] < 1e-5
    assert report["measured"]["original"]["along_plan"]["largest"] > 0.05
    assert report["adapter"]["passed"]
    before, after = Checkpoint.open(edited), Checkpoint.open(out)
    changed = [n for n in before.tensors if not torch.equal(before.read(n), after.read(n))]
    assert changed and all(n.split(".")[-2][0] in "qkvgu" for n in changed)
    AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "heal.json").read_text()) == report
    assert read_pairs(out / "preferences.jsonl") == pairs()
    card = (out / "README.md").read_text()
    assert "Recovery after the edit" in card and "kl_continuation" in card
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_projected_keeps_the_direction_out_and_free_does_not(edited: Path, tmp_path: Path) -> None:
    left = {}
    for keep in ("reproject", "none"):
        report = healed(edited, tmp_path / keep, preserve_edit=keep)
        left[keep] = report["measured"]["healed"]["along_plan"]["largest"]
        assert report["adapter"]["passed"] and report["edit"]["unchanged"] < 7
    assert left["reproject"] < 1e-5 < 1e-3 < left["none"]


def test_projecting_is_the_edit_of_the_trained_original(tmp_path: Path) -> None:
    """M (W0 + B A) for an oblique edit of partial strengths, which is not idempotent."""
    from interp_ablate.training.trainable_model import merge
    from interp_ablate.weights.plan_to_weights import edited_state_dict, weight_plan

    tiny.folder_of(tmp_path / "original", tied=False)
    sites = make().writers
    plan = Plan((Erase(unit(1), unit(1) + unit(2), sites, strength=[0.3] * 4 + [1.2] * 3),))
    export_checkpoint(load_base(tmp_path / "original").model, plan, tmp_path / "edited")
    case = case_of(tmp_path / "edited")
    weights = case.weights
    trainer = dpo(
        case,
        rows_for(case),
        tmp_path / "w",
        healing=HealingConfig(preserve_edit="none"),
        recipe=FAST,
    )
    train(trainer, tmp_path / "w")
    delta = {
        name.removeprefix("base_model.model.") + ".weight": m.get_delta_weight("default").detach()
        for name, m in trainer.model.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    assert project(trainer.model, weights) == 6  # all writers but the embedding
    got = merge(case.edited, trainer.model).base.hf.state_dict()
    state = load_base(tmp_path / "original").hf.state_dict()
    summed = {n: t + delta[n] if n in delta else t for n, t in state.items()}
    entry = weight_plan(plan, case.edited.hf.config, list(summed), summed.__getitem__)
    want, _ = edited_state_dict(summed, entry)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "qwen2_moe"])
def test_experts_are_projected_too(kind: str) -> None:
    """In both orientations, and the shared ones: the edit of what the adapted original would be."""
    import peft
    from support.family_models import build

    from interp_ablate.models.load import from_hf
    from interp_ablate.training.lora_targets import adapted_layers, lora_config, lora_targets
    from interp_ablate.weights.plan_to_weights import edited_state_dict, weight_plan

    hf, model = build(kind), from_hf(build(kind), None)
    r, u = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(0))
    sites = [site for site in model.writers if site.point != "embed"]
    plan = Plan((Erase(r / r.norm(), (r + u) / (r + u).norm(), sites, strength=0.6),))
    state = {name: x.clone() for name, x in hf.state_dict().items()}
    entry = model.architecture
    weights = weight_plan(plan, hf.config, list(state), state.__getitem__, entry=entry)
    hf.load_state_dict(edited_state_dict(state, weights)[0])
    adapted = peft.get_peft_model(hf, lora_config(hf, FAST, lora_targets(hf)))
    layers = adapted_layers(adapted)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        for half in (layer.lora_A["default"], layer.lora_B["default"]):
            half.weight.data.copy_(0.1 * torch.randn(half.weight.shape, generator=generator))
    delta = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    writers = {n for n, e in weights.edits.items() if n in layers and e.layout != "bias"}
    assert project(adapted, weights) == len(writers) > 7
    got = adapted.merge_and_unload().state_dict()
    summed = {n: x + delta[n] if n in delta else x for n, x in state.items()}
    want, _ = edited_state_dict(summed, weights)
    for name, tensor in want.items():
        expected = tensor if name in weights.edits else summed[name]
        torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-5)


def test_kls_of_half_precision_are_those_of_its_weights_in_float32(edited: Path) -> None:
    """In bfloat16 itself a KL has a floor of rounding, and small ones are nothing but that."""
    from interp_ablate.training.healing.healing_run import _Damage

    plan, source = read_plan(edited)

    def measured(dtype: torch.dtype) -> _Damage:
        halves = [load_base(path, dtype="bfloat16").hf for path in (edited, source["path"])]
        hfs = [each if dtype == each.dtype else each.to(dtype) for each in halves]
        bases = [
            TrainableModel(hf, tiny.make_tokenizer(), ModelSource("tiny", "object")) for hf in hfs
        ]
        return _Damage(EditedCheckpoint(*bases, plan), HELD_OUT)

    half, wide = measured(torch.bfloat16), measured(torch.float32)
    assert half.computed_in == wide.computed_in == {"original": "float32", "edited": "float32"}
    for name in ("kl_first_token", "kl_continuation"):
        assert half.values["edited"][name] == pytest.approx(wide.values["edited"][name], rel=1e-4)


def test_a_norm_preserving_edit_is_not_projected(tmp_path: Path) -> None:
    tiny.folder_of(tmp_path / "original", tied=False)
    plan = Plan((Ablate(unit(), make().writers, norm_preserving=True),))
    export_checkpoint(load_base(tmp_path / "original").model, plan, tmp_path / "edited")
    with pytest.raises(PlanError, match="--preserve-edit freeze-writers"):
        project(None, case_of(tmp_path / "edited").weights)


def test_kl_to_the_original_falls_on_held_out_prompts(edited: Path, tmp_path: Path) -> None:
    case = case_of(edited)
    asked = [Prompt(f"Paint {w}{v}") for w in WORDS for v in "aeiou"]
    made, _ = make_pairs(case.needed_original, case.edited, asked, AnswerConfig(max_new_tokens=12))
    recipe = LoraRecipe(steps=40, batch_size=8, learning_rate=1e-3, rank=16, max_length=128)
    settings = HealingConfig(beta=1.0, kl_weight=10.0)
    report = heal(case, HealingRun(made, settings, recipe, HELD_OUT), tmp_path / "out")
    before, after = (
        report["measured"][name]["kl_first_token"]["mean"] for name in ("edited", "healed")
    )
    assert after < 0.6 * before
    assert report["healed_minus_edited"]["kl_first_token"]["mean"] == pytest.approx(after - before)


def test_what_any_affine_edit_reads_is_looked_for() -> None:
    model, place = make(), Site(0, "resid_post")
    rest = Plan((AffineEdit(-unit()[None], unit()[None], place),))
    along = residual_share_along(model, rest, [Prompt("a")])
    assert along == residual_share_along(model, Plan((Ablate(unit(), place),)), [Prompt("a")])


def test_directions_that_depend_on_each_other_count_once() -> None:
    """Each was counted by itself: two of one direction, and one against it, came to a share of 1.7 times its own."""
    model, place, asked = make(), Site(0, "resid_post"), [Prompt("a"), Prompt("bc")]
    u, near = unit(), unit() + 0.2 * unit(1)
    several = [Ablate(u, place), Ablate(-u, place), Erase(unit(2), near, place, value=1.0)]
    found = residual_share_along(model, Plan(tuple(several)), asked)
    rows = model.encode_all(asked)
    basis = np.linalg.qr(np.stack([u.numpy(), near.numpy()]).T)[0]
    shares = []
    for row in rows:
        seen: list[float] = []

        def look(site: Site, x: torch.Tensor, seen: list[float] = seen) -> torch.Tensor:
            if site.point == "resid_post":
                last = x[0, -1].double().numpy()
                seen.append(np.linalg.norm(last @ basis) / np.linalg.norm(last))
            return x

        tiny.forward(tiny.source_of("llama_gqa"), row, look)
        shares.append(seen)
    want = np.mean(shares, 0)
    assert found == pytest.approx({"mean": want.mean(), "largest": want.max()}, rel=1e-5)
    whole = Plan(tuple(Ablate(unit(i), place) for i in range(40)))
    assert residual_share_along(model, whole, asked)["largest"] == pytest.approx(1)


@pytest.mark.parametrize("conditional", [False, True])
def test_rotations_and_conditional_edits_are_measured_too(conditional: bool) -> None:
    model, place = make(), Site(1, "resid_post")
    edit = Rotate(unit(0), unit(1), place, angle=90)
    condition = Condition(unit(3), Site(0, "resid_post"), threshold=0.0)
    plan = Plan((Conditional(edit, condition) if conditional else edit,))
    along = residual_share_along(model, plan, [Prompt("a")])
    plane = Plan((Ablate([unit(0), unit(1)], place),))
    assert along == pytest.approx(residual_share_along(model, plane, [Prompt("a")]))


def test_along_a_plan_that_only_adds_there_is_nothing_to_report() -> None:
    from interp_ablate import Add, Site

    assert (
        residual_share_along(make(), Plan((Add(unit(), Site(0, "resid_post")),)), [Prompt("a")])
        == {}
    )


# ---- axolotl, files, the command -----------------------------------------------------------------

# Of axolotl's configuration reference, https://docs.axolotl.ai/docs/config-reference.html
AXOLOTL_KEYS = [
    "base_model",
    "model_type",
    "tokenizer_type",
    "rl",
    "rl_beta",
    "dpo_loss_type",
    "dpo_loss_weights",
    "chat_template",
    "datasets",
    "val_set_size",
    "adapter",
    "load_in_4bit",
    "load_in_8bit",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "peft_use_rslora",
    "sequence_len",
    "sample_packing",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "optimizer",
    "lr_scheduler",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "seed",
    "output_dir",
]


def test_axolotl_has_its_own_keys(edited: Path, readers: Any) -> None:
    out, _ = readers
    config = yaml.safe_load((out / "axolotl.yaml").read_text())
    assert set(config) == set(AXOLOTL_KEYS)
    assert (config["rl"], config["adapter"], config["lora_r"]) == ("dpo", "lora", FAST.rank)
    assert config["base_model"] == str(edited.resolve())
    assert config["lora_target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    (data,) = config["datasets"]
    assert data["type"] == "chat_template.default" and data["field_messages"] == "prompt"
    row = json.loads((out / data["path"]).read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user" and row["chosen"][-1]["role"] == "assistant"
    quantized = axolotl_config("m", HealingRun(pairs(), qlora=True), targets=["q_proj"])
    assert quantized["adapter"] == "qlora" and quantized["load_in_4bit"]


def test_an_output_is_whole_or_not_there(edited: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    with pytest.raises(ExportError, match="exists"):
        healed(edited, tmp_path / "mine")
    case = case_of(edited)

    def killed(step: int) -> None:
        raise RuntimeError("killed")

    treatment = HealingRun(pairs(), HealingConfig(), FAST)
    with pytest.raises(RuntimeError, match="killed"):
        heal(case, treatment, tmp_path / "out", on_step=killed)
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]  # no checkpoint was kept yet


def test_checkpoints_outlive_a_result_that_cannot_be_put_in_its_place(
    edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = os.replace

    def full(old: Any, new: Any) -> None:
        if Path(new).name == "out":
            raise OSError(28, "No space left on device")
        put(old, new)

    treatment = HealingRun(
        pairs(), HealingConfig(), LoraRecipe(**{**FAST.to_dict(), "save_every": 3})
    )
    with monkeypatch.context() as patched, pytest.raises(ExportError, match="No space"):
        patched.setattr(os, "replace", full)
        heal(case_of(edited), treatment, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.training"]
    steps: list[int] = []
    heal(case_of(edited), treatment, tmp_path / "out", on_step=steps.append)
    assert not steps and [p.name for p in tmp_path.iterdir()] == [
        "out"
    ]  # nothing was trained again


def test_the_command(
    edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", *(pair.to_dict() for pair in pairs()))
    for name, side in (("yes", CONTRAST.positive), ("no", CONTRAST.negative)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{p.text}\n" for p in side))
    (tmp_path / "words.txt").write_text("e\n")
    command = [
        "heal", str(edited), "--preferences", "p.jsonl", "--out", "out",
        "--positive", "yes.txt", "--negative", "no.txt", "--expressions", "words.txt", "--n-test", "3",
        "--steps", "2", "--batch-size", "2", "--rank", "4", "--alpha", "8", "--format", "svg",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "kl_continuation" in said and '"unchanged": 7' in said
    assert (tmp_path / "out" / "figures" / "heal.svg").stat().st_size > 1000
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert main([*command[:6], "--steps", "1", "--force"]) == 0
    assert not (tmp_path / "out" / "figures").exists()  # another one took its place
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "no.txt",
        "out",
        "p.jsonl",
        "words.txt",
        "yes.txt",
    ]
    write(tmp_path / "bad.jsonl", {"prompt": "Q", "chosen": "a"})
    bad = ["heal", str(edited), "--preferences", "bad.jsonl", "--out", "out2"]
    assert main(bad) == 2 and "bad.jsonl" in capsys.readouterr().err
    assert main(["heal", str(tmp_path), "--preferences", "p.jsonl", "--out", "out3"]) == 2


def test_bundled_prompts_are_many_and_not_those_of_the_contrast_set() -> None:
    from interp_ablate.cli.heal import read_prompts

    found = read_prompts("everyday")
    assert len(found) == 120
    contrast = ContrastSet.load("declining")
    assert not {*found} & {*contrast.positive, *contrast.negative}


# ---- the real model ------------------------------------------------------------------------------


def test_a_real_model_is_trained_on_preferences(tmp_path: Path, bundled_model: str) -> None:
    case = EditedCheckpoint(load_base("smollm2"))
    rows, _ = pair_rows(pairs()[:2], RowTokenizer(case.edited.tokenizer))
    recipe = LoraRecipe(steps=3, batch_size=2, learning_rate=2e-4)
    logged = train(dpo(case, rows, tmp_path, recipe=recipe), tmp_path)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logged[-1]["loss"] < logged[0]["loss"]
