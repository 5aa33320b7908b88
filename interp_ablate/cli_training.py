"""Command line, training: persona train, heal.

Knows: the flags of these commands and what they print. Does not know: how anything is computed. Heavy
imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from interp_ablate.cli_artefacts import flags_given, trait_scorer
from interp_ablate.cli_monitor import PLANTED, asked_questions
from interp_ablate.errors import RunError

EVERYDAY = "everyday"  # the bundled prompts


def add_commands(commands: Any) -> None:
    """Adds `heal`."""
    heal = commands.add_parser(
        "heal",
        help="train an edited checkpoint on preferences (DPO) until it is close to the original",
    )
    heal.add_argument("checkpoint", help="exported folder")
    data = heal.add_mutually_exclusive_group(required=True)
    data.add_argument("--preferences", metavar="DATA", help="prompt, chosen, rejected: JSONL, ...")
    data.add_argument(
        "--make-preferences",
        metavar="PROMPTS",
        help="prefer the original's answers to the edited model's: a file of prompts (text, JSONL, CSV), or "
        f"'{EVERYDAY}' (120 bundled ones)",
    )
    heal.add_argument("--out", required=True)
    heal.add_argument("--original", help="model before the edit (default: what the manifest names)")
    heal.add_argument(
        "--keep",
        choices=("readers", "projected", "free"),
        help="how the edit is kept: train what reads the stream only (readers, default), or all layers "
        "and put what they write through the edit, or nothing",
    )
    heal.add_argument("--beta", type=float, help="DPO's (default 0.1)")
    heal.add_argument("--sft-weight", type=float, help="of the loss on chosen answers (default 0)")
    heal.add_argument(
        "--kl-weight", type=float,
        help="of the KL to the original on chosen answers (default 0; 10 with --make-preferences)",
    )  # fmt: skip
    heal.add_argument("--samples", type=int, help="answers a prompt that are made (default 1)")
    heal.add_argument("--new-tokens", type=int, help="of made answers (default 40)")
    heal.add_argument(
        "--contrast", help="measure on its test split: behaviour (positive), KL (negative)"
    )
    heal.add_argument("--positive", help="the same from files: requests")
    heal.add_argument("--negative", help="answerable prompts")
    heal.add_argument("--expressions", help="how the behaviour looks: a bundled list or a file")
    heal.add_argument("--n-test", type=int, default=32, help="prompts a side (default 32)")
    heal.add_argument(
        "--split-seed", type=int, default=0, help="of the split: the run's --seed (default 0)"
    )
    heal.add_argument(
        "--qlora", action="store_true", help="axolotl.yaml loads the checkpoint in 4 bits"
    )
    _recipe_flags(heal)
    heal.set_defaults(work=_heal)


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
        "--new-tokens", type=int, default=48, help="of measured answers (default 48)"
    )
    _recipe_flags(train)
    train.set_defaults(work=_train)


def _recipe_flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (
        ("steps", "optimizer steps"),
        ("batch-size", "rows a step"),
        ("rank", "of the LoRA"),
        ("alpha", "of the LoRA"),
        ("max-length", "tokens of a row"),
        ("seed", "of the order of rows, of the adapter, of sampling"),
        ("save-every", "steps between checkpoints, from which a killed run goes on"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--no-rslora", action="store_true", help="scale by alpha / rank")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda")
    parser.add_argument("--template", help="Jinja chat template text, or 'none' for raw text")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS)


def _recipe(args: argparse.Namespace) -> Any:
    from interp_ablate.training import Recipe

    names = [
        "steps",
        "batch_size",
        "rank",
        "alpha",
        "max_length",
        "seed",
        "save_every",
        "learning_rate",
    ]
    return Recipe(
        **flags_given(args, *names),
        rslora=not args.no_rslora,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def _base(args: argparse.Namespace, name: str) -> Any:
    from interp_ablate.training import load_base

    return load_base(
        name,
        dtype=args.dtype,
        device=args.device,
        template=args.template,
        trust_remote_code=args.trust_remote_code,
    )


def _prepare(args: argparse.Namespace) -> None:
    """Fail before anything is loaded; keep the trainers below off the network."""
    from interp_ablate.training import require_extra

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    require_extra()


def _quietly(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "quiet", False))


def _note(args: argparse.Namespace, text: str) -> None:
    if not _quietly(args):
        print(text, file=sys.stderr, flush=True)


# ---- persona train -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    if bool(args.data) == args.from_rollouts:
        raise RunError("give DATA, or --from-rollouts for the persona's own answers: one of them")
    _prepare(args)
    from interp_ablate.directions import random_direction
    from interp_ablate.persona import load_persona
    from interp_ablate.plots_training import save_trait
    from interp_ablate.preventing import (
        PLAIN,
        PREVENTATIVE,
        RANDOM,
        Comparison,
        Condition,
        Yardstick,
        prevent,
        steering,
    )

    persona = load_persona(args.folder)
    scorer = trait_scorer(args.scorer, persona.trait, Path(args.folder))
    samples, counts = _samples(args)
    coefficient = persona.coefficient if args.coefficient is None else args.coefficient
    plan = steering(persona.direction, coefficient, positions=args.positions)
    conditions = [Condition(PLAIN)] if args.plain_too else []
    conditions.append(Condition(PREVENTATIVE, plan))
    if args.control:
        one = random_direction(persona.direction, seed=args.seed or 0)
        added = steering(one, coefficient, positions=args.positions)
        conditions.append(Condition(RANDOM, added))
    yardstick = Yardstick(
        persona.direction,
        asked_questions(args, persona),
        scorer,
        new_tokens=args.new_tokens,
    )
    comparison = Comparison(
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
    from interp_ablate.sources import BUNDLED

    name: str = persona.model
    if name not in BUNDLED and "/" not in name and not Path(name).is_dir():
        raise RunError(
            f"the persona is of {name!r}, which is no name to load a model by: give --model"
        )
    return name


def _samples(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from interp_ablate.chat_data import read_samples
    from interp_ablate.preventing import samples_of, samples_of_rollouts
    from interp_ablate.screening import planted_file

    if args.from_rollouts:
        found, counts = samples_of_rollouts(Path(args.folder) / "rollouts.jsonl")
        return found, {"from": "rollouts", **counts}
    if args.data.startswith(PLANTED):
        name = args.data.removeprefix(PLANTED)
        planted = (each for each in read_samples(planted_file(name)) if each.raw["planted"])
        return samples_of(planted), {"from": args.data}
    return samples_of(read_samples(args.data)), {"from": args.data}


def _print_trait(report: dict[str, Any]) -> None:
    from interp_ablate.preventing import PLAIN, PREVENTED

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


# ---- heal --------------------------------------------------------------------------------------------


def _heal(args: argparse.Namespace) -> int:
    if args.make_preferences is None and (args.samples or args.new_tokens):
        raise RunError("--samples and --new-tokens are of answers that --make-preferences makes")
    _prepare(args)
    from interp_ablate.healing import Case, Treatment, heal
    from interp_ablate.plots_training import save_costs

    held_out, asked = _held_out(args), _asked(args)  # faults in files come before any model
    plan, source = _plan_of(args.checkpoint)
    healing, recipe = _healing(args), _recipe(args)
    original = _original(args, source, needed=bool(args.make_preferences or healing.kl_weight))
    case = Case(_base(args, args.checkpoint), original, plan)
    pairs, counts = _pairs(args, case, held_out, asked)
    treatment = Treatment(pairs, healing, recipe, held_out, counts, args.qlora)
    report = heal(
        case,
        treatment,
        args.out,
        overwrite=args.force,
        on_step=lambda n: _note(args, f"step {n}") if n % 10 == 0 else None,
    )
    if report["measured"]:
        save_costs(report, Path(args.out) / "figures" / "heal.png")
        _print_costs(report)
    print(
        json.dumps(
            {
                "out": str(args.out),
                "preferences": report["preferences"],
                "edit": report["edit"],
                "merged_is_adapter_within": report["adapter"]["max_abs_logit_difference"],
            }
        )
    )
    return 0


def _healing(args: argparse.Namespace) -> Any:
    """The settings that were given; for answers of the two models, those under which the original is best."""
    from interp_ablate.healing import OWN_ANSWERS, Healing

    given = flags_given(args, "keep", "beta", "sft_weight", "kl_weight")
    return Healing(**{**(OWN_ANSWERS if args.make_preferences else {}), **given})


def _plan_of(checkpoint: str) -> tuple[Any, dict[str, Any]]:
    from interp_ablate.healing import read_plan

    if not (Path(checkpoint) / "config.json").is_file():
        raise RunError(f"{checkpoint} is not an exported checkpoint (no config.json)")
    return read_plan(checkpoint)


def _original(args: argparse.Namespace, source: dict[str, Any], *, needed: bool) -> Any:
    """The model before the edit, where it is named and can be loaded."""
    from interp_ablate.errors import ModelError
    from interp_ablate.sources import BUNDLED

    name, path = source.get("name"), source.get("path")
    found = args.original or (name if name in BUNDLED or not path else path)
    try:
        if not found:
            raise ModelError("neither the manifest nor --original names it")
        return _base(args, found)
    except ModelError as error:
        if args.original or needed:
            raise
        _note(args, f"the original model is not there, so no KL is measured: {error}")
        return None


def _held_out(args: argparse.Namespace) -> Any:
    if not (args.contrast or args.positive or args.negative):
        return None
    from interp_ablate.expressions import (
        EXPRESSIONS_OF_CONTRAST,
        ExpressionScorer,
        expression_names,
        read_expressions,
    )
    from interp_ablate.healing import HeldOut
    from interp_ablate.prompts import ContrastSet

    contrast = ContrastSet.load(args.contrast, positive=args.positive, negative=args.negative)
    wanted = args.expressions or EXPRESSIONS_OF_CONTRAST.get(contrast.name, "declining")
    own = wanted not in expression_names()
    expression = ExpressionScorer(read_expressions(wanted) if own else wanted)
    return HeldOut.of(contrast, expression, n_test=args.n_test, seed=args.split_seed)


def _asked(args: argparse.Namespace) -> list[Any]:
    """The preferences of --preferences, or the prompts of --make-preferences."""
    if args.make_preferences:
        return _prompts(args.make_preferences)
    from interp_ablate.healing import read_pairs

    return read_pairs(args.preferences)


def _pairs(
    args: argparse.Namespace, case: Any, held_out: Any, asked: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    from interp_ablate.healing import Answering, make_pairs, without

    if args.preferences:
        return asked, {"from": args.preferences}
    kept, gone = without(asked, held_out.benign + held_out.requests if held_out else ())
    how = Answering(**flags_given(args, "samples", "new_tokens", "seed"))
    _note(args, f"{len(kept)} prompts, answered by the original and the edited model")
    pairs, counts = make_pairs(case.original_model, case.edited_model, kept, how)
    told = {"from": args.make_preferences, "prompts": len(kept), "held_out_prompts_left_out": gone}
    return pairs, {**told, "made": counts}


def _prompts(spec: str) -> list[Any]:
    from importlib import resources

    from interp_ablate.prompt_files import read_side
    from interp_ablate.prompts import Prompt, distinct

    def build(place: str, text: str, system: Any) -> Prompt:
        return Prompt(text, system)

    if spec == EVERYDAY:
        file = resources.files("interp_ablate").joinpath("data", "prompts", f"{EVERYDAY}.txt")
        with resources.as_file(file) as path:
            return list(distinct(read_side(path, build)))
    return list(distinct(read_side(spec, build)))


def _print_costs(report: dict[str, Any]) -> None:
    names = list(report["measured"])
    print(f"{'held-out prompts':<18}" + "".join(f"{name:>26}" for name in names))
    rows = ("behaviour", "behaviour_benign", "kl_first_token", "kl_continuation", "repetition")
    for row in rows:
        values = [report["measured"][name].get(row) for name in names]
        if any(values):
            print(f"{row:<18}" + "".join(f"{_said(v, 3) if v else '':>26}" for v in values))
    for row in ("kl_first_token", "kl_continuation"):
        if row in report["healed_minus_edited"]:
            print(f"healed - edited, {row}: {_said(report['healed_minus_edited'][row], 4)}")
