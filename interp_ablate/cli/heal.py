"""Command line, training: persona train, heal.

Knows: the flags of these commands and what they print. Does not know: how anything is computed. Heavy
imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import flags_given
from interp_ablate.cli.persona_train import _said
from interp_ablate.cli.training_options import _base, _note, _prepare, _recipe, _recipe_flags
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
        "--preserve-edit",
        choices=("freeze-writers", "reproject", "none"),
        help="how the edit is kept: train what reads the stream only (freeze-writers, default), or all layers "
        "and put what they write through the edit, or nothing",
    )
    heal.add_argument("--beta", type=float, help="DPO's (default 0.1)")
    heal.add_argument("--sft-weight", type=float, help="of the loss on chosen answers (default 0)")
    heal.add_argument(
        "--kl-weight", type=float,
        help="of the KL to the original on chosen answers (default 0; 10 with --make-preferences)",
    )  # fmt: skip
    heal.add_argument("--samples", type=int, help="answers a prompt that are made (default 1)")
    heal.add_argument("--max-new-tokens", type=int, help="of made answers (default 40)")
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


# ---- heal --------------------------------------------------------------------------------------------


def _heal(args: argparse.Namespace) -> int:
    if args.make_preferences is None and (args.samples or args.max_new_tokens):
        raise RunError(
            "--samples and --max-new-tokens are of answers that --make-preferences makes"
        )
    _prepare(args)
    from interp_ablate.plots.training import save_costs
    from interp_ablate.training.healing.case import EditedCheckpoint, HealingRun
    from interp_ablate.training.healing.healing_run import heal

    held_out, asked = _held_out(args), _asked(args)  # faults in files come before any model
    plan, source = _plan_of(args.checkpoint)
    healing, recipe = _healing(args), _recipe(args)
    original = _original(args, source, needed=bool(args.make_preferences or healing.kl_weight))
    case = EditedCheckpoint(_base(args, args.checkpoint), original, plan)
    pairs, counts = _pairs(args, case, held_out, asked)
    treatment = HealingRun(pairs, healing, recipe, held_out, counts, args.qlora)
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
    from interp_ablate.training.healing.settings import OWN_ANSWERS, HealingConfig

    given = flags_given(args, "preserve_edit", "beta", "sft_weight", "kl_weight")
    return HealingConfig(**{**(OWN_ANSWERS if args.make_preferences else {}), **given})


def _plan_of(checkpoint: str) -> tuple[Any, dict[str, Any]]:
    from interp_ablate.training.healing.case import read_plan

    if not (Path(checkpoint) / "config.json").is_file():
        raise RunError(f"{checkpoint} is not an exported checkpoint (no config.json)")
    return read_plan(checkpoint)


def _original(args: argparse.Namespace, source: dict[str, Any], *, needed: bool) -> Any:
    """The model before the edit, where it is named and can be loaded."""
    from interp_ablate.errors import ModelError
    from interp_ablate.models.sources import BUNDLED

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
    from interp_ablate.prompts.contrast_set import ContrastSet
    from interp_ablate.scoring.expressions import expression_scorer
    from interp_ablate.training.healing.held_out import HeldOut

    contrast = ContrastSet.load(args.contrast, positive=args.positive, negative=args.negative)
    expression = expression_scorer(args.expressions, contrast=contrast.name)
    return HeldOut.of(contrast, expression, n_test=args.n_test, seed=args.split_seed)


def _asked(args: argparse.Namespace) -> list[Any]:
    """The preferences of --preferences, or the prompts of --make-preferences."""
    if args.make_preferences:
        return _prompts(args.make_preferences)
    from interp_ablate.training.healing.preferences import read_pairs

    return read_pairs(args.preferences)


def _pairs(
    args: argparse.Namespace, case: Any, held_out: Any, asked: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    from interp_ablate.training.healing.preferences import exclude_held_out, make_pairs
    from interp_ablate.training.healing.settings import AnswerConfig

    if args.preferences:
        return asked, {"from": args.preferences}
    kept, gone = exclude_held_out(asked, held_out.benign + held_out.requests if held_out else ())
    how = AnswerConfig(**flags_given(args, "samples", "max_new_tokens", "seed"))
    _note(args, f"{len(kept)} prompts, answered by the original and the edited model")
    pairs, counts = make_pairs(case.original_model, case.edited_model, kept, how)
    told = {"from": args.make_preferences, "prompts": len(kept), "held_out_prompts_left_out": gone}
    return pairs, {**told, "made": counts}


def _prompts(spec: str) -> list[Any]:
    from interp_ablate.prompts.prompt import Prompt, distinct
    from interp_ablate.prompts.readers import read_side
    from interp_ablate.storage.bundled_data import bundled

    def build(place: str, text: str, system: Any) -> Prompt:
        return Prompt(text, system)

    if spec == EVERYDAY:
        spec = str(bundled("prompts", f"{EVERYDAY}.txt"))
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
