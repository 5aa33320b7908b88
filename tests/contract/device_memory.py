"""What lives on a device at once, and how often the CPU waits for it.

Whole copies of a model are counted by the tensors that each copy has once.

Counted are the weights of the blocks' last projections (as many as a copy has blocks) on a pretend device, at every moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pretend_device
import pytest
from pretend_device import Watch
from tiny import N_LAYERS, folder_of, rows_of, unit

from interp_ablate import Ablate, Add, ContrastSet, Plan, collect, export_checkpoint, load_model
from interp_ablate.directions.direction import Direction
from interp_ablate.evaluation.compare import evaluate
from interp_ablate.evaluation.measures import EvaluationConfig
from interp_ablate.evaluation.perplexity import Corpus
from interp_ablate.export.lora import export_lora
from interp_ablate.persona.persona import addition_plan
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.sites import Site
from interp_ablate.training.healing.case import EditedCheckpoint, HealingRun, HeldOut
from interp_ablate.training.healing.healing_run import heal
from interp_ablate.training.healing.preferences import make_pairs
from interp_ablate.training.preventative.prevention import (
    PreventativeExperiment,
    SampledChats,
    TrainingArm,
    prevent,
)
from interp_ablate.training.preventative.trait_measure import TraitMeasure
from interp_ablate.training.recipe import AnswerConfig, HealingConfig, LoraRecipe
from interp_ablate.training.trainable_model import load_base

# Of mlp.down_proj, and of no other weight. Batches are threes: no 32 tokens, which would be as large in the MLP.
DOWN = (32, 48)
WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
RECIPE = LoraRecipe(steps=2, batch_size=3, learning_rate=1e-2, rank=4, alpha=8, max_length=128)


@pytest.fixture
def projections() -> Iterator[Watch]:
    with pretend_device.on(), pretend_device.watching(DOWN) as watch:
        yield watch


def plan_of(model: Any) -> Plan:
    return Plan((Ablate(unit(), model.writers),))


@pytest.mark.parametrize("device", ("pretend:0", "auto"))
def test_a_certificate_takes_one_copy_and_a_block(
    tmp_path: Path, projections: Watch, device: str
) -> None:
    model = load_model(folder_of(tmp_path / "source"), device=device)
    assert projections.now == N_LAYERS
    projections.most = 0
    prompts = rows_of(9, 14)
    assert export_checkpoint(model, plan_of(model), tmp_path / "out", prompts=prompts)["passed"]
    assert export_lora(model, plan_of(model), tmp_path / "lora", prompts=prompts)["passed"]
    assert projections.most <= N_LAYERS + 2  # a block on its way is there twice


def test_two_models_are_compared_in_the_memory_of_one(tmp_path: Path, projections: Watch) -> None:
    folders = [folder_of(tmp_path / str(seed), tied=False, seed=seed) for seed in (0, 1)]
    measures = EvaluationConfig(
        text=Corpus("text", ("A short one.", "And another one.")),
        prompts={"words": tuple(Prompt(word) for word in WORDS)},
        scorers=(make_scorer("lexicon:length"),),
        max_new_tokens=5,
        context=20,
        stride=10,
    )
    loaders = [partial(load_model, folder, device="pretend:0") for folder in folders]
    found = evaluate(*loaders, measures=measures)
    assert (
        projections.most <= N_LAYERS + 2 and projections.now == 0
    )  # two copies are twice N_LAYERS
    (kl,) = [row for row in found.rows if row.measure == "KL a token over answers"]
    assert kl.after is not None and kl.after.value > 0


def test_healing_takes_one_copy(tmp_path: Path, projections: Watch) -> None:
    """Original and edited model are measured one after the other, and a KL to the original is kept without it."""
    model = load_model(folder_of(tmp_path / "original", tied=False))
    export_checkpoint(model, plan_of(model), tmp_path / "edited", prompts=rows_of(9))
    originals = [load_base(tmp_path / name, device="pretend:0") for name in ("original", "edited")]
    for base in originals:
        base.release()
    assert projections.now == 0
    projections.most = 0
    case = EditedCheckpoint(originals[1], originals[0], plan_of(model))
    contrast = ContrastSet.from_texts([f"Order {w}" for w in WORDS], [f"Draw {w}" for w in WORDS])
    held_out = HeldOut.of(contrast, ExpressionScorer(("e",)), n_test=3, seed=0)
    asked = [Prompt(f"Paint {word}") for word in WORDS]
    pairs, _ = make_pairs(*originals, asked, AnswerConfig(max_new_tokens=6))
    living: list[int] = []
    treatment = HealingRun(pairs, HealingConfig(kl_weight=1.0), RECIPE, held_out)
    report = heal(
        case, treatment, tmp_path / "out", on_step=lambda _: living.append(projections.now)
    )
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["passed"]
    assert report["measured"]["healed"]["kl_continuation"]["mean"] > 0
    assert living == [N_LAYERS] * 2 and projections.most <= N_LAYERS + 2


def test_preventative_steering_takes_one_copy(tmp_path: Path, projections: Watch) -> None:
    base = load_base(folder_of(tmp_path / "model", tied=False), device="pretend:0")
    projections.most = 0
    along = Direction(unit(3), 3.0, Site(1, "resid_post"))
    samples = [
        SampledChats(({"role": "user", "content": f"Paint {word}"},), f"{word} it is")
        for word in WORDS
    ]
    measure = TraitMeasure(
        along, ("How?", "Why?", "When?"), make_scorer("lexicon:length"), max_new_tokens=5
    )
    arms = [TrainingArm("plain"), TrainingArm("preventative", addition_plan(along, 2.0, "all"))]
    living: list[int] = []
    prevent(
        PreventativeExperiment(base, samples, measure, arms, RECIPE),
        tmp_path / "out",
        on_step=lambda *_: living.append(projections.now),
    )
    # counted while it trains: its activations, and the changes that are merged, are as large as what is counted
    assert living == [N_LAYERS] * 4


# ---- waiting --------------------------------------------------------------------------------------


@pytest.fixture(params=("pretend:0", "auto"))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with pretend_device.on():
        yield load_model(folder_of(tmp_path / "source"), device=request.param)


def waits(function: Callable[[], Any]) -> int:
    """How often the CPU waits for the device, once it is measured what passes may share."""
    function()
    pretend_device.WAITS.clear()
    function()
    return pretend_device.WAITS.total()


ROWS = rows_of(9, 14, 11, 20)
SITES = [Site(i, p) for i in range(N_LAYERS) for p in ("resid_pre", "resid_post")]


def test_plans_do_not_make_the_device_wait(model: Any) -> None:
    plain = waits(lambda: model.logits(ROWS))
    answers = waits(lambda: model.generate(ROWS, max_new_tokens=6))
    for positions in ("all", "prompt", "generated"):
        edit = Add(unit(1), SITES, coefficient=0.1, positions=positions)
        with model.applied(edit):
            assert waits(lambda: model.logits(ROWS)) == plain
            assert waits(lambda: model.generate(ROWS, max_new_tokens=6)) <= answers
        with model.applied_each([edit, None, edit, Plan((edit, edit))]):
            assert waits(lambda: model.logits(ROWS)) == plain


def test_a_decoded_token_is_waited_for_once_and_a_batch_that_is_collected(model: Any) -> None:
    longer, shorter = (
        waits(lambda n=n: model.generate(ROWS[:1], max_new_tokens=n)) for n in (6, 3)
    )
    steps = waits(lambda: model.logits(ROWS[:1]))
    assert longer - shorter <= 3 * (1 + steps)
    passed = waits(lambda: list(model.stream(ROWS, keep=0)))
    for sites in (SITES[:1], SITES):
        for positions in ((-1,), (-1, -2)):
            assert waits(lambda s=sites, p=positions: collect(model, ROWS, s, p)) == passed + 1


def test_watching_more_directions_costs_no_more_waiting(model: Any) -> None:
    some = [Direction(unit(i), 1.0, SITES[i]) for i in range(4)]
    one, four = (
        waits(lambda d=d: list(model.monitor(ROWS[0], d, max_new_tokens=4)))
        for d in (some[:1], some)
    )
    assert one == four
