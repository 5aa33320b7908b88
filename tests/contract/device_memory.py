"""How much lives on a device at once: whole copies of a model, counted by the tensors that each copy has once.

Counted are the weights of the blocks' last projections (as many as a copy has blocks) on a pretend device, at every moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend_device
import pytest
from pretend_device import Watch
from tiny import N_LAYERS, folder_of, rows_of, unit

from interp_ablate import Ablate, ContrastSet, Plan, export_checkpoint, load_model
from interp_ablate.directions.direction import Direction
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

DOWN = (32, 48)  # of mlp.down_proj: of no activation and of no other weight
WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
RECIPE = LoraRecipe(steps=2, batch_size=2, learning_rate=1e-2, rank=4, alpha=8, max_length=128)


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
    measure = TraitMeasure(along, ("How?", "Why?"), make_scorer("lexicon:length"), max_new_tokens=5)
    arms = [TrainingArm("plain"), TrainingArm("preventative", addition_plan(along, 2.0, "all"))]
    living: list[int] = []
    prevent(
        PreventativeExperiment(base, samples, measure, arms, RECIPE),
        tmp_path / "out",
        on_step=lambda *_: living.append(projections.now),
    )
    assert living == [N_LAYERS] * 4 and projections.most <= N_LAYERS + 2
