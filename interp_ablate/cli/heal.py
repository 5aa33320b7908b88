"""`heal`: an edited checkpoint trained on preferences until it is close to the original.

Knows: flags and what is printed. Does not know: how a model is trained or measured.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import (
    TrainingSettings,
    estimate_text,
    load_trainable,
    prepare,
    tell,
)
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import ModelError, RunError
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text
from interp_ablate.training.recipe import OWN_ANSWERS, AnswerConfig, HealingConfig, LoraRecipe

EVERYDAY = "everyday"  # the bundled prompts


@dataclass(frozen=True)
class Heal(TrainingSettings):
    """What is healed, from which preferences, and on which prompts it is measured."""

    checkpoint: str = setting(help="exported folder", positional=True)
    preferences: str | None = setting(None, "prompt, chosen, rejected: JSONL, ...", metavar="DATA")
    make_preferences: str | None = setting(
        None,
        "prefer the original's answers to the edited model's: a file of prompts (text, JSONL, CSV), or "
        f"'{EVERYDAY}' (120 bundled ones)",
        metavar="PROMPTS",
    )
    original: str | None = setting(None, "model before the edit (default: what the manifest names)")
    contrast: str | None = setting(
        None, "measure on its test split: behaviour (positive), KL (negative)"
    )
    positive: str | None = setting(None, "the same from files: requests")
    negative: str | None = setting(None, "answerable prompts")
    expressions: str | None = setting(None, "how the behaviour looks: a bundled list or a file")
    n_test: int | None = setting(None, "prompts a side (default: as many as a run tests on)")
    split_seed: int = setting(0, "of the split: the run's --seed")
    qlora: bool = setting(False, "axolotl.yaml loads the checkpoint in 4 bits")


add = adding(Heal, HealingConfig, AnswerConfig, LoraRecipe, FigureSettings)


def run(args: Namespace) -> int:
    """Train, measure, write the healed checkpoint, and print what it cost before and after."""
    settings, figures = settings_from(args, Heal), figure_settings(args)
    if (settings.preferences is None) == (settings.make_preferences is None):
        raise RunError("give --preferences DATA or --make-preferences PROMPTS: one of them")
    if settings.make_preferences is None and {"samples", "max_new_tokens"} & set(vars(args)):
        raise RunError(
            "--samples and --max-new-tokens are of answers that --make-preferences makes"
        )
    prepare(settings)
    from interp_ablate.plots.evaluation import save_costs
    from interp_ablate.training.healing.case import EditedCheckpoint, HealingRun, read_plan
    from interp_ablate.training.healing.healing_run import heal

    # faults in files come before any model is loaded
    held_out, rows = _held_out(settings), _rows(settings)
    if not (Path(settings.checkpoint) / "config.json").is_file():
        raise RunError(f"{settings.checkpoint} is not an exported checkpoint (no config.json)")
    plan, source = read_plan(settings.checkpoint)
    # for answers of the two models, the settings under which the original itself is best
    under = OWN_ANSWERS if settings.make_preferences else {}
    healing, recipe = (
        settings_from(args, HealingConfig, under=under),
        settings_from(args, LoraRecipe),
    )
    needed = bool(settings.make_preferences or healing.kl_weight)
    edited = load_trainable(settings, settings.checkpoint)
    edited.release()  # it can be read; the original is needed first
    original = _original(args, settings, source, needed=needed)
    case = EditedCheckpoint(edited, original, plan)
    pairs, counts = _pairs(args, settings, case, held_out, rows)
    report = heal(
        case,
        HealingRun(pairs, healing, recipe, held_out, counts, settings.qlora),
        settings.out,
        overwrite=settings.force,
        on_step=lambda n: tell(args, f"step {n}") if n % 10 == 0 else None,
    )
    if report["measured"]:
        path = Path(settings.out) / "figures" / figures.named("heal.png")
        save_costs(report, path, dpi=figures.dpi)
        _print_costs(report)
    within = report["adapter"]["max_abs_logit_difference"]
    results = {name: report[name] for name in ("preferences", "adapted", "edit")}
    print(json_text({"out": settings.out, **results, "merged_is_adapter_within": within}))
    return 0


def _original(args: Namespace, settings: Heal, source: dict[str, Any], *, needed: bool) -> Any:
    """The model before the edit, where it is named and can be loaded."""
    from interp_ablate.models.sources import BUNDLED

    name, path = source.get("name"), source.get("path")
    original = settings.original or (name if name in BUNDLED or not path else path)
    try:
        if not original:
            raise ModelError("neither the manifest nor --original names it")
        return load_trainable(settings, original)
    except ModelError as error:
        if settings.original or needed:
            raise
        tell(args, f"the original model is not there, so no KL is measured: {error}")
        return None


def _held_out(settings: Heal) -> Any:
    if not (settings.contrast or settings.positive or settings.negative):
        return None
    from interp_ablate.prompts.contrast_set import ContrastSet
    from interp_ablate.scoring.expressions import expression_scorer
    from interp_ablate.training.healing.case import HeldOut

    contrast = ContrastSet.load(
        settings.contrast, positive=settings.positive, negative=settings.negative
    )
    expression = expression_scorer(settings.expressions, contrast=contrast.name)
    return HeldOut.of(contrast, expression, n_test=settings.n_test, seed=settings.split_seed)


def _rows(settings: Heal) -> list[Any]:
    """The preferences of --preferences, or the prompts of --make-preferences."""
    if settings.make_preferences:
        return read_prompts(settings.make_preferences)
    from interp_ablate.training.healing.preferences import read_pairs

    return read_pairs(str(settings.preferences))


def _pairs(
    args: Namespace, settings: Heal, case: Any, held_out: Any, rows: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    from interp_ablate.training.healing.preferences import exclude_held_out, make_pairs

    if settings.preferences:
        return rows, {"from": settings.preferences}
    prompts, gone = exclude_held_out(rows, held_out.benign + held_out.requests if held_out else ())
    tell(args, f"{len(prompts)} prompts, answered by the original and the edited model")
    how = settings_from(args, AnswerConfig)
    pairs, made = make_pairs(case.needed_original, case.edited, prompts, how)
    counts = {"prompts": len(prompts), "held_out_prompts_left_out": gone, "made": made}
    return pairs, {"from": settings.make_preferences, **counts}


def read_prompts(spec: str) -> list[Any]:
    """The prompts of a file, each once; `everyday` is a bundled one."""
    from interp_ablate.prompts.prompt import distinct
    from interp_ablate.prompts.readers import read_side
    from interp_ablate.storage.bundled_data import bundled

    path = str(bundled("prompts", f"{EVERYDAY}.txt")) if spec == EVERYDAY else spec
    return list(distinct(read_side(path)))


def _print_costs(report: dict[str, Any]) -> None:
    names = list(report["measured"])
    print(f"{'held-out prompts':<18}" + "".join(f"{name:>26}" for name in names))
    rows = ("behaviour", "behaviour_benign", "kl_first_token", "kl_continuation", "repetition")
    for row in rows:
        values = [report["measured"][name].get(row) for name in names]
        if any(values):
            cells = [estimate_text(value, 3) if value else "" for value in values]
            print(f"{row:<18}" + "".join(f"{cell:>26}" for cell in cells))
    for row in ("kl_first_token", "kl_continuation"):
        if row in report["healed_minus_edited"]:
            change = estimate_text(report["healed_minus_edited"][row], 4)
            print(f"healed - edited, {row}: {change}")
