"""Preventative steering on tiny models: the addition while training is the plan's, and it is gone afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import D_MODEL, N_LAYERS, PARTS, hf_forward, rows_of, shared, unit
from torch import Tensor

from interp_ablate import Ablate, Add, Plan, Site
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.errors import ModelError, PlanError, RunError
from interp_ablate.models.sources import ModelSource
from interp_ablate.persona.persona import Persona, addition_plan
from interp_ablate.persona.rollouts import verdict_key
from interp_ablate.persona.traits import load_trait
from interp_ablate.stats.intervals import mean_with_interval, paired_difference
from interp_ablate.training.preventative.additions import train_with_additions
from interp_ablate.training.preventative.prevention import (
    PreventativeExperiment,
    SampledChats,
    TrainingArm,
    prevent,
    samples_of,
    samples_of_rollouts,
)
from interp_ablate.training.preventative.prevention import rows_of as token_rows
from interp_ablate.training.preventative.trait_measure import (
    TraitMeasure,
    answer_loss,
    measure_trait,
)
from interp_ablate.training.recipe import LoraRecipe
from interp_ablate.training.rows import RowTokenizer
from interp_ablate.training.trainable_model import TrainableModel, logits_of
from interp_ablate.training.trainer import sft, train

pytest.importorskip("trl")

ROWS = rows_of(9, 14)
FAST = LoraRecipe(steps=4, batch_size=2, learning_rate=5e-3, rank=4, alpha=8, max_length=128)
KINDS = ["llama_gqa", "qwen2", "gemma2", "gpt2", "gpt_neox"]


def base_of(kind: str = "llama_gqa", **options: Any) -> TrainableModel:
    return TrainableModel(*tiny.tiny(kind, **options), ModelSource("tiny", "object"))


def direction(layer: int = 1, norm: float = 3.0) -> Direction:
    return Direction(unit(3), norm, Site(layer, "resid_post"))


def plan_at(site: Site, **options: Any) -> Plan:
    return Plan((Add(3 * unit(1), site, **{"coefficient": 1.5, **options}),))


def by_model(kind: str, plan: Plan) -> list[Tensor]:
    model = shared(kind)
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0] for row in ROWS]


# ---- the hook is the plan ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["resid_pre", "resid_post"])
def test_the_addition_is_the_plans_at_the_same_site(kind: str, point: Any) -> None:
    for layer in range(N_LAYERS):
        plan = plan_at(Site(layer, point))
        hf, _ = tiny.tiny(kind)
        with train_with_additions(hf, plan):
            got = logits_of(hf, ROWS)
        for one, other in zip(got, by_model(kind, plan), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        # and at no other site: one layer off is another function
        other_layer = (layer + 1) % N_LAYERS
        moved = by_model(kind, plan_at(Site(other_layer, point)))
        assert float((got[0] - moved[0]).abs().max()) > 1e-3


def test_against_the_oracle_without_transformer_lens() -> None:
    site, vector = Site(1, "resid_post"), 1.5 * 3 * unit(1)
    hf, _ = tiny.tiny("llama_gqa")

    def edit(at: Site, x: Tensor) -> Tensor:
        return x + vector.to(x) if at == site else x

    want = [hf_forward(hf, "llama", row, edit).detach() for row in ROWS]
    with train_with_additions(hf, plan_at(site)):
        got = logits_of(hf, ROWS)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert "llama" in PARTS and len(vector) == D_MODEL


def test_generated_positions_are_those_of_the_answer() -> None:
    plan, length = plan_at(Site(1, "resid_post"), positions="generated"), 5
    model, (hf, _) = shared(), tiny.tiny()
    row = ROWS[1]
    with model.applied(plan):
        stream = model.stream([row], keep=len(row), prompt_lengths=[length])
        want = next(logits for _, logits, _ in stream)
    labels = torch.tensor([row])
    labels[:, :length] = -100
    with torch.no_grad(), train_with_additions(hf, plan):
        got = hf(input_ids=torch.tensor([row]), labels=labels).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(PlanError, match="no labels"), train_with_additions(hf, plan):
        logits_of(hf, [row])


def test_nothing_is_left_afterwards_whatever_happens() -> None:
    hf, _ = tiny.tiny()
    want = logits_of(hf, ROWS)
    with train_with_additions(hf, plan_at(Site(0, "resid_pre"))):
        logits_of(hf, ROWS)
    with pytest.raises(KeyboardInterrupt), train_with_additions(hf, plan_at(Site(0, "resid_post"))):
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(logits_of(hf, ROWS), want, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


def test_what_is_no_addition_at_a_block_is_refused() -> None:
    hf, _ = tiny.tiny()
    for plan, why in (
        (Plan((Ablate(unit(), Site(0, "resid_post")),)), "only additions"),
        (plan_at(Site(0, "attn_out")), "attn_out"),
        (plan_at(Site(0, "resid_post"), positions="prompt"), "prompt"),
        (plan_at(Site(N_LAYERS, "resid_post")), f"no layer {N_LAYERS}"),
        (Plan((Add(torch.ones(8), Site(0, "resid_post")),)), "another model"),
    ):
        with pytest.raises(PlanError, match=why), train_with_additions(hf, plan):
            pass
    with (
        pytest.raises(PlanError, match="no row passed"),
        train_with_additions(hf, plan_at(Site(0, "resid_post"))),
    ):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_while_training_is_that_under_the_plan(
    checkpointing: bool, tmp_path: Path
) -> None:
    plan = plan_at(Site(1, "resid_post"), positions="generated")
    base = base_of()
    rows, _ = token_rows(samples(2), RowTokenizer(base.tokenizer))
    with train_with_additions(base.hf, plan):
        want = answer_loss(base.hf, rows)
    recipe = LoraRecipe(**{**FAST.to_dict(), "steps": 1, "gradient_checkpointing": checkpointing})
    trainer = sft(base.take(), rows, recipe, tmp_path)
    with train_with_additions(trainer.model, plan):
        logged = train(trainer, tmp_path)
    assert logged[0]["loss"] == pytest.approx(want, abs=1e-4)
    assert abs(logged[0]["loss"] - (answer_loss(base.hf, rows) or 0)) > 1e-2


# ---- rows ----------------------------------------------------------------------------------------


def samples(n: int = 8) -> list[SampledChats]:
    words = ["joy", "sun", "fun", "gay", "hop", "lit", "big", "top"]
    return [
        SampledChats(({"role": "user", "content": f"Say {word}"},), f"{word} {word} {word}")
        for word in words[:n]
    ]


MADE_OF: dict[str, Any] = {
    "scorer": {"kind": "s"},
    "coherence": {"kind": "c"},
    "settings": {"threshold": 50.0, "min_coherence": 50.0},
}


def rollouts(path: Path, *more: str, **settings: float) -> Path:
    """A persona's folder with rollouts; another scorer's verdicts are the last."""
    one = direction()
    made_of = {**MADE_OF, "settings": {**MADE_OF["settings"], **settings}}
    persona = Persona(load_trait("cheerful"), Directions((one,)), one, 2.0, "model")
    replace(persona, details={"made_of": made_of}).save(path.parent)
    lines: list[Any] = [{"format": "interp_ablate.rollouts/1", "jobs": "x"}]
    sides = ["positive"] * 5 + ["negative"]
    for number, side in enumerate(sides):
        lines.append(
            {"answer": number, "key": {"side": side}, "system": "Be glad", "question": f"Q{number}?",
             "text": "" if number == 4 else f"A{number}", "tokens": [1], "finished": number != 1}
        )  # fmt: skip
    score, coherence = (
        verdict_key(what, MADE_OF[name])
        for what, name in (("score", "scorer"), ("coherence", "coherence"))
    )
    lines.append({"scored": [0, 1, 2, 3, 5], "by": score, "values": [90, 80, 10, 70, 95]})
    lines.append({"scored": [0, 1, 2, 3, 5], "by": coherence, "values": [90, 60, 90, 20, 90]})
    lines.append({"scored": [0, 1, 2, 3, 5], "by": "score:ab", "values": [0, 0, 90, 90, 90]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "".join(more))
    return path


def test_rollouts_that_show_the_trait_lose_their_system_prompt(tmp_path: Path) -> None:
    found, counts = samples_of_rollouts(rollouts(tmp_path / "r.jsonl", '{"torn'))
    assert [s.answer for s in found] == ["A0", "A1"] and [s.finished for s in found] == [
        True,
        False,
    ]
    assert found[0].messages == ({"role": "user", "content": "Q0?"},)
    assert counts == {
        "positive": 5, "kept": 2, "empty": 1, "no_answer": 0, "no_verdict": 0, "below": 1, "incoherent": 1,
    }  # fmt: skip
    strict, _ = samples_of_rollouts(rollouts(tmp_path / "r.jsonl", threshold=85.0))
    assert [s.answer for s in strict] == ["A0"]  # from the persona's own threshold
    with pytest.raises(RunError, match="no answer that shows the trait"):
        samples_of_rollouts(rollouts(tmp_path / "r.jsonl", min_coherence=95.0))


def test_corrupt_and_missing_rollouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="line 11: not a line of rollouts"):
        samples_of_rollouts(rollouts(tmp_path / "r.jsonl", "nonsense\n"))
    with pytest.raises(RunError, match="line 11: not a line of rollouts"):
        samples_of_rollouts(rollouts(tmp_path / "r.jsonl", '{"answer": 9}\n', '{"scored": 3}\n'))
    for place in (tmp_path / "none.jsonl", tmp_path / "none" / "r.jsonl"):
        with pytest.raises(RunError, match="persona extract"):
            samples_of_rollouts(place)


def test_chat_samples_end_with_an_answer(tmp_path: Path) -> None:
    from interp_ablate.datasets.chat_reader import read_samples

    path = tmp_path / "data.jsonl"
    rows = [sample.to_dict() for sample in samples(2)]
    rows[1]["finished"] = False
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = samples_of(read_samples(path))
    assert [s.answer for s in found] == [s.answer for s in samples(2)]
    assert [s.finished for s in found] == [True, False]
    rows[1]["messages"].append({"role": "user", "content": "And?"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=r"sample 2: .*ends with the assistant"):
        samples_of(read_samples(path))


def test_rows_are_counted() -> None:
    renderer = RowTokenizer(tiny.make_tokenizer(), max_length=70)
    long = SampledChats(({"role": "user", "content": "x" * 200},), "a")
    cut = SampledChats(({"role": "user", "content": "Say"},), "a" * 90, finished=False)
    _, counts = token_rows([*samples(2), long, cut], renderer)
    assert counts == {
        "samples": 4, "used": 3, "prompts_too_long": 1, "answers_cut": 1, "unfinished": 1,
    }  # fmt: skip
    with pytest.raises(RunError, match="no row is left"):
        token_rows([long], renderer)


# ---- the comparison ------------------------------------------------------------------------------


def test_missing_values_are_counted_and_never_averaged() -> None:
    found = mean_with_interval([1.0, None, 3.0])
    assert (found["mean"], found["n"], found["no_value"]) == (2.0, 2, 1)
    assert paired_difference([2.0, None, 5.0], [1.0, 1.0, 1.0])["mean"] == 2.5
    assert (
        mean_with_interval([None])["mean"] is None
        and mean_with_interval([None])["interval"] is None
    )


def test_an_empty_answer_of_the_model_before_has_no_kl() -> None:
    before, after, by = base_of().model, base_of(seed=1).model, yardstick()
    _, evidence = measure_trait("before", before, by)
    made = evidence.generations
    evidence.generations = [replace(made[0], tokens=(), text=""), *made[1:]]
    kl = measure_trait("after", after, by, before=evidence)[0].kl
    assert kl[0] is None and kl[1] is not None and kl[1] > 0
    assert mean_with_interval(kl)["no_value"] == 1


def test_other_weights_are_another_training() -> None:
    identities = [
        PreventativeExperiment(base, samples(2), yardstick(), conditions(), FAST).identity([])
        for base in (base_of(), base_of(), base_of(seed=1))
    ]
    assert identities[0] == identities[1] != identities[2]


def yardstick() -> TraitMeasure:
    from interp_ablate.scoring.registry import make_scorer

    questions = ("How are you?", "What now?", "Why?")
    return TraitMeasure(direction(), questions, make_scorer("lexicon:length"), max_new_tokens=6)


def conditions(coefficient: float = 2.0) -> list[TrainingArm]:
    return [
        TrainingArm("plain"),
        TrainingArm("preventative", addition_plan(direction(), coefficient, "all")),
    ]


def test_held_out_rows_are_whole_questions() -> None:
    """Three answers to each of ten questions: none of a held-out question's is trained on."""
    words = [f"{a}{b}" for a in "abcde" for b in "xy"]
    chats = [
        SampledChats(({"role": "user", "content": f"Say {word}"},), answer)
        for answer in ("one", "two", "three")
        for word in words
    ]
    trained, held_out, counts = PreventativeExperiment(
        base_of(), chats, yardstick(), conditions(), FAST
    ).rows()
    assert (counts["trained_on"], counts["held_out"]) == (24, 6) == (len(trained), len(held_out))
    assert not {row.prompt for row in trained} & {row.prompt for row in held_out}
    few = PreventativeExperiment(base_of(), chats[:7] * 3, yardstick(), conditions(), FAST).rows()
    assert not few[1] and len(few[0]) == 21


def test_a_comparison_end_to_end(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, out = base_of(), tmp_path / "out"
    untouched = logits_of(base.hf, ROWS)
    steps: list[tuple[str, int]] = []
    report = prevent(
        PreventativeExperiment(base, samples(), yardstick(), conditions(), FAST),
        out,
        on_step=lambda name, n: steps.append((name, n)),
    )
    assert json.loads((out / "report.json").read_text()) == report
    assert steps == [(c, n) for c in ("plain", "preventative") for n in range(1, 5)]
    assert report["rows"]["trained_on"] == 7 and report["rows"]["held_out"] == 1
    assert all(torch.equal(a, b) for a, b in zip(logits_of(base.hf, ROWS), untouched, strict=True))
    found = report["conditions"]
    assert found["plain"]["added"] == [] and "add" in found["preventative"]["added"][0]
    # the vector made the rows' losses others from the first step on
    assert found["plain"]["loss"][0] != found["preventative"]["loss"][0]
    assert (
        found["preventative"]["held_out_loss_with_vector"] != found["preventative"]["held_out_loss"]
    )
    for name in ("plain", "preventative"):
        assert found[name]["adapter"]["passed"] and found[name]["kl"]["mean"] > 0
        hf = AutoModelForCausalLM.from_pretrained(out / name)
        assert answer_loss(hf, token_rows(samples(1), RowTokenizer(base.tokenizer))[0]) > 0  # type: ignore[operator]
    shift = {n: found[n]["shift"]["projection"]["mean"] for n in ("plain", "preventative")}
    apart = report["prevented"]["projection"]["mean"]
    assert apart == pytest.approx(shift["plain"] - shift["preventative"], abs=1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    rows = (out / "answers.jsonl").read_text().splitlines()
    assert set(json.loads(rows[0])["answers"]) == {"before", "plain", "preventative"}


def test_what_is_there_is_not_replaced_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    from interp_ablate.errors import ExportError

    comparison = PreventativeExperiment(base_of(), samples(2), yardstick(), conditions()[:1], FAST)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ExportError):
            prevent(comparison, out, overwrite=overwrite)
    assert (out / "mine.txt").exists()
    broken = base_of()
    with torch.no_grad():
        broken.hf.model.norm.weight[0] = float("nan")
    with pytest.raises((RunError, ModelError, ValueError)):
        prevent(
            PreventativeExperiment(broken, samples(2), yardstick(), conditions()[:1], FAST),
            tmp_path / "new",
        )
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from interp_ablate.cli.main import main
    from interp_ablate.scoring import registry as judges

    made, caches = judges.make_scorer, []

    def scorer_of(spec: str, **options: Any) -> Any:
        caches.append(options["cache"])
        return made(spec, **options)

    monkeypatch.setattr(judges, "make_scorer", scorer_of)
    monkeypatch.chdir(tmp_path)
    tiny.folder_of(tmp_path / "model", tied=False)
    rollouts(tmp_path / "cheer" / "rollouts.jsonl")
    command = [
        "persona", "train", "cheer", "--from-rollouts", "--out", "out", "--model", "model",
        "--scorer", "lexicon:length", "--questions", "2", "--max-new-tokens", "6", "--plain-too", "--control",
        "--format", "pdf",
        "--steps", "1", "--batch-size", "2", "--rank", "4", "--alpha", "8",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "prevented (plain - preventative)" in said and "prevented (plain - random)" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["coefficient"] == 2.0 and report["data"]["kept"] == 2
    added = [report["conditions"][name]["added"] for name in ("plain", "preventative", "random")]
    assert added[0] == [] and added[1] != added[2] and "random" in added[2][0]
    assert (tmp_path / "out" / "figures" / "preventative.pdf").exists()
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert caches == [Path("cheer/replies.jsonl")]  # a judge's replies are paid for once
    at = command.index("--out") + 1
    for wrong in ("0", "-3", "999"):
        asked = [*command[:at], "o", *command[at + 1 :], "--questions", wrong]
        assert main(asked) == 2 and f"--questions {wrong}" in capsys.readouterr().err
    planted = [
        word for word in command if word not in ("--from-rollouts", "--plain-too", "--control")
    ]
    planted = [*planted[:3], "planted:gloomy", *planted[3:], "--force"]
    assert main(planted) == 0  # the samples with the trait, and no others
    rows = [json.loads(line) for line in (tmp_path / "out" / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and "edge never lasts" in json.dumps(rows[0])
    assert main([*planted[:3], "planted:none", *planted[4:]]) == 2
    assert "no bundled mixture" in capsys.readouterr().err
    assert main(["persona", "train", "cheer", "--out", "o"]) == 2
    assert "--from-rollouts" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "cheer")  # from where the persona's model has no such name
    assert main(["persona", "train", ".", "--from-rollouts", "--out", "o"]) == 2
    assert "--model" in capsys.readouterr().err


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    from interp_ablate.plots.evaluation import save_trait

    value = {"mean": 1.0, "interval": [0.5, 2.0], "n": 4}
    entry = {"score": value, "projection": value}
    report = {"conditions": dict.fromkeys(("before", "plain", "preventative"), entry)}
    assert save_trait(report, tmp_path / "a.png").stat().st_size > 1000


# ---- the real model ------------------------------------------------------------------------------


def test_a_real_model_trains_under_the_vector(tmp_path: Path, bundled_model: str) -> None:
    from interp_ablate.training.trainable_model import load_base

    base = load_base("smollm2")
    vector = torch.zeros(576, dtype=torch.float64)
    vector[7] = 1.0
    plan = addition_plan(Direction(vector, 20.0, Site(14, "resid_post")), 1.0, "all")
    rows, _ = token_rows(samples(4), RowTokenizer(base.tokenizer))
    recipe = LoraRecipe(steps=3, batch_size=4, learning_rate=2e-4)
    trainer = sft(base, rows, recipe, tmp_path)
    with train_with_additions(trainer.model, plan):
        logged = train(trainer, tmp_path)
    assert logged[-1]["loss"] < logged[0]["loss"]
