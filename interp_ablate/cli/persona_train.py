"""`persona train`: fine-tuning with and without preventative steering.

Knows: flags and what is printed. Does not know: how a model is trained.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import (
    JudgeSettings,
    TrainingSettings,
    estimate_text,
    judge_settings,
    load_trainable,
    prepare,
    tell,
    tell_spent,
    trait_scorer,
)
from interp_ablate.cli.persona_options import asked_questions
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting
from interp_ablate.training.recipe import LoraRecipe


@dataclass(frozen=True)
class Train(TrainingSettings):
    """What is trained on which samples, and how it is measured."""

    folder: str = setting(help="persona folder", positional=True)
    data: str | None = setting(
        None,
        "samples: ShareGPT, messages, Alpaca, ... files; or planted:NAME, the samples with the trait of a "
        "bundled mixture",
        positional=True,
    )
    from_rollouts: bool = setting(
        False,
        "train on the persona's own answers under its positive system prompts, without these",
    )
    model: str | None = setting(None, "model to train (default: the persona's)")
    coefficient: float | None = setting(
        None, "of the vector while training (default: the persona's)"
    )
    positions: Any = setting("all", "where the vector is added", choices=("all", "generated"))
    plain_too: bool = setting(False, "also without the vector, to compare")
    control: bool = setting(False, "also with a random vector of the same length")
    scorer: str | None = setting(None, "default: the trait's")
    questions: int | None = setting(None, "for evaluation (default: all of the trait's)")
    max_new_tokens: int = setting(48, "tokens of a measured answer, at most")


add = adding(Train, LoraRecipe, JudgeSettings, FigureSettings)


def run(args: Namespace) -> int:
    """Train every arm, measure the trait in each, and print a table."""
    settings, figures = settings_from(args, Train), figure_settings(args)
    if bool(settings.data) == settings.from_rollouts:
        raise RunError("give DATA, or --from-rollouts for the persona's own answers: one of them")
    prepare(settings)
    from interp_ablate.persona.persona import load_persona
    from interp_ablate.plots.evaluation import save_trait
    from interp_ablate.training.preventative.prevention import PreventativeExperiment, prevent
    from interp_ablate.training.preventative.trait_measure import TraitMeasure

    persona, recipe = load_persona(settings.folder), settings_from(args, LoraRecipe)
    folder = Path(settings.folder)
    scorer = trait_scorer(settings.scorer, persona.trait, folder, judge_settings(args))
    samples, counts = _samples(settings)
    coefficient = persona.coefficient if settings.coefficient is None else settings.coefficient
    arms = _arms(settings, persona, coefficient, recipe.seed)
    questions = asked_questions(settings.questions, persona)
    measure = TraitMeasure(
        persona.direction, questions, scorer, max_new_tokens=settings.max_new_tokens
    )
    base = load_trainable(settings, settings.model or _model_of(persona))
    report = prevent(
        PreventativeExperiment(base, samples, measure, arms, recipe),
        settings.out,
        what={"trait": persona.trait.name, "coefficient": coefficient, "data": counts},
        overwrite=settings.force,
        on_step=lambda name, n: tell(args, f"{name}: step {n}") if n % 10 == 0 else None,
    )
    tell_spent(args, scorer)
    path = Path(settings.out) / "figures" / figures.named("preventative.png")
    save_trait(report, path, dpi=figures.dpi)
    _print_trait(report)
    adapted = next(arm["adapted"] for arm in report["conditions"].values() if "adapted" in arm)
    print(f"the LoRA adapted {adapted}")
    print(f"report: {Path(settings.out) / 'report.json'}")
    return 0


def _arms(settings: Train, persona: Any, coefficient: float, seed: int) -> list[Any]:
    from interp_ablate.directions.direction import random_directions
    from interp_ablate.persona.persona import addition_plan
    from interp_ablate.training.preventative import prevention

    def plan(direction: Any) -> Any:
        return addition_plan(direction, coefficient, positions=settings.positions)

    arms = [prevention.TrainingArm(prevention.PLAIN)] if settings.plain_too else []
    arms.append(prevention.TrainingArm(prevention.PREVENTATIVE, plan(persona.direction)))
    if settings.control:
        (control,) = random_directions(persona.direction, 1, seed=seed)
        arms.append(prevention.TrainingArm(prevention.RANDOM, plan(control)))
    return arms


def _model_of(persona: Any) -> str:
    """The name of a persona's model, if one can be loaded by it."""
    from interp_ablate.models.sources import BUNDLED

    name: str = persona.model
    if name not in BUNDLED and "/" not in name and not Path(name).is_dir():
        raise RunError(
            f"the persona is of {name!r}, which is no name to load a model by: give --model"
        )
    return name


def _samples(settings: Train) -> tuple[Any, dict[str, Any]]:
    from interp_ablate.datasets.chat_reader import read_samples
    from interp_ablate.datasets.labelled_mixtures import data_and_label
    from interp_ablate.training.preventative.prevention import samples_of, samples_of_rollouts

    if settings.from_rollouts or settings.data is None:
        samples, counts = samples_of_rollouts(Path(settings.folder) / "rollouts.jsonl")
        return samples, {"from": "rollouts", **counts}
    data, label = data_and_label(settings.data)
    chosen = (each for each in read_samples(data) if label is None or each.raw[label])
    return samples_of(chosen), {"from": settings.data}


def _print_trait(report: dict[str, Any]) -> None:
    from interp_ablate.training.preventative.prevention import PLAIN, PREVENTED

    print(f"{'':<14} {'score':>22} {'projection':>24} {'KL a token':>12}")
    for name, arm in report["conditions"].items():
        kl = "" if arm["kl"] is None else f"{arm['kl']['mean']:.3f}"
        score, projection = estimate_text(arm["score"], 1), estimate_text(arm["projection"], 2)
        print(f"{name:<14} {score:>22} {projection:>24} {kl:>12}")
    for key, name in PREVENTED.items():
        if key in report:
            score = estimate_text(report[key]["score"], 1)
            projection = estimate_text(report[key]["projection"], 2)
            print(f"prevented ({PLAIN} - {name}): score {score}, projection {projection}")
