"""`persona train`: fine-tuning with and without preventative steering.

Knows: flags and what is printed. Does not know: how a model is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import trait_scorer
from interp_ablate.cli.persona_monitor import asked_questions
from interp_ablate.cli.training_options import _base, _note, _prepare, _recipe, _recipe_flags
from interp_ablate.errors import RunError


def add_persona_commands(commands: Any) -> None:
    """Adds `persona train`."""
    train = commands.add_parser(
        "train", help="fine-tune with the trait's vector added, so that the trait is not learned"
    )
    train.add_argument("folder", help="persona folder")
    train.add_argument(
        "data", nargs="?",
        help="samples: ShareGPT, messages, Alpaca, ... files; or planted:NAME, the samples with the "
        "trait of a bundled mixture",
    )  # fmt: skip
    train.add_argument(
        "--from-rollouts",
        action="store_true",
        help="train on the persona's own answers under its positive system prompts, without these",
    )
    train.add_argument("--out", required=True)
    train.add_argument("--model", help="model to train (default: the persona's)")
    train.add_argument(
        "--coefficient", type=float, help="of the vector while training (default: the persona's)"
    )
    train.add_argument("--positions", choices=("all", "generated"), default="all")
    train.add_argument(
        "--plain-too", action="store_true", help="also without the vector, to compare"
    )
    train.add_argument(
        "--control", action="store_true", help="also with a random vector of the same length"
    )
    train.add_argument("--scorer", help="default: the trait's")
    train.add_argument("--questions", type=int, help="for evaluation (default: all of the trait's)")
    train.add_argument(
        "--max-new-tokens", type=int, default=48, help="of measured answers (default 48)"
    )
    _recipe_flags(train)
    train.set_defaults(work=_train)


# ---- persona train -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    if bool(args.data) == args.from_rollouts:
        raise RunError("give DATA, or --from-rollouts for the persona's own answers: one of them")
    _prepare(args)
    from interp_ablate.directions.direction import random_directions
    from interp_ablate.persona.persona import addition_plan, load_persona
    from interp_ablate.plots.training import save_trait
    from interp_ablate.training.preventative.prevention import (
        PLAIN,
        PREVENTATIVE,
        RANDOM,
        PreventativeExperiment,
        TrainingArm,
        prevent,
    )
    from interp_ablate.training.preventative.trait_measure import TraitMeasure

    persona = load_persona(args.folder)
    scorer = trait_scorer(args.scorer, persona.trait, Path(args.folder))
    samples, counts = _samples(args)
    coefficient = persona.coefficient if args.coefficient is None else args.coefficient
    plan = addition_plan(persona.direction, coefficient, positions=args.positions)
    conditions = [TrainingArm(PLAIN)] if args.plain_too else []
    conditions.append(TrainingArm(PREVENTATIVE, plan))
    if args.control:
        (one,) = random_directions(persona.direction, 1, seed=args.seed or 0)
        added = addition_plan(one, coefficient, positions=args.positions)
        conditions.append(TrainingArm(RANDOM, added))
    yardstick = TraitMeasure(
        persona.direction,
        asked_questions(args, persona),
        scorer,
        max_new_tokens=args.max_new_tokens,
    )
    comparison = PreventativeExperiment(
        _base(args, args.model or _model_of(persona)),
        samples,
        yardstick,
        conditions,
        _recipe(args),
    )
    report = prevent(
        comparison,
        args.out,
        what={"trait": persona.trait.name, "coefficient": coefficient, "data": counts},
        overwrite=args.force,
        on_step=lambda name, n: _note(args, f"{name}: step {n}") if n % 10 == 0 else None,
    )
    save_trait(report, Path(args.out) / "figures" / "preventative.png")
    _print_trait(report)
    print(f"report: {Path(args.out) / 'report.json'}")
    return 0


def _model_of(persona: Any) -> str:
    """The name of a persona's model, if one can be loaded by it."""
    from interp_ablate.models.sources import BUNDLED

    name: str = persona.model
    if name not in BUNDLED and "/" not in name and not Path(name).is_dir():
        raise RunError(
            f"the persona is of {name!r}, which is no name to load a model by: give --model"
        )
    return name


def _samples(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from interp_ablate.datasets.chat_reader import read_samples
    from interp_ablate.datasets.labelled_mixtures import data_and_label
    from interp_ablate.training.preventative.samples import samples_of, samples_of_rollouts

    if args.from_rollouts:
        found, counts = samples_of_rollouts(Path(args.folder) / "rollouts.jsonl")
        return found, {"from": "rollouts", **counts}
    data, label = data_and_label(args.data)
    samples = (each for each in read_samples(data) if label is None or each.raw[label])
    return samples_of(samples), {"from": args.data}


def _print_trait(report: dict[str, Any]) -> None:
    from interp_ablate.training.preventative.prevention import PLAIN, PREVENTED

    print(f"{'':<14} {'score':>22} {'projection':>24} {'KL a token':>12}")
    for name, found in report["conditions"].items():
        kl = "" if found["kl"] is None else f"{found['kl']['mean']:.3f}"
        print(
            f"{name:<14} {_said(found['score'], 1):>22} {_said(found['projection'], 2):>24} {kl:>12}"
        )
    for key, name in PREVENTED.items():
        if key in report:
            found = report[key]
            print(
                f"prevented ({PLAIN} - {name}): score {_said(found['score'], 1)}, projection "
                f"{_said(found['projection'], 2)}"
            )


def _said(value: dict[str, Any], digits: int) -> str:
    if value["mean"] is None:
        return "no value"
    low, high = value["interval"]
    lacking = f" ({value['no_value']} without)" if value.get("no_value") else ""
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{lacking}"
