"""`evaluate`: what an edit cost, as one table.

Knows: flags and what is printed. Does not know: how anything is measured.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from interp_ablate.cli.figures import FigureSettings, figure_settings
from interp_ablate.cli.options import (
    PLAN,
    RUBRIC,
    JudgeSettings,
    judge_settings,
    load,
    rubric_of,
    tell,
    tell_spent,
)
from interp_ablate.cli.settings import flags_from, given_flags, settings_from
from interp_ablate.errors import RunError
from interp_ablate.evaluation.measures import EvaluationConfig, read_prompts
from interp_ablate.models.loading import LoadingOptions
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Evaluate(LoadingOptions):
    """What is compared, by which prompts, scorers and tasks."""

    before: str = setting(
        help="alias, HF folder, .gguf file or hub name", positional=True, metavar="A"
    )
    after: str | None = setting(
        None, "the same; default: A, under --plan", positional=True, metavar="B"
    )
    plan: str | None = setting(None, f"{PLAN}, applied to B as hooks")
    text: tuple[str, ...] = setting(
        (),
        ".txt (documents between lines of ---) or .jsonl with \"text\"; 'none'; default: bundled",
        nargs="+",
        metavar="FILE",
    )
    prompts: str = setting(
        "declining",
        "bundled set (its test part), contrast set, or a file with a prompt a line; 'none'",
    )
    split_seed: int = setting(
        0, "of a bundled set's split: the --seed of the run that made the edit"
    )
    expressions: tuple[str, ...] = setting(
        (), "comma-separated built-in lists or files (default: declining)"
    )
    scorer: tuple[str, ...] = setting(
        (), "another scorer of the answers, such as lexicon:sentiment", repeat=True, metavar="SPEC"
    )
    rubric: str | None = setting(None, RUBRIC)
    tasks: tuple[str, ...] | None = setting(
        None,
        "comma-separated tasks of lm-evaluation-harness, or 'none' (default: the bundled "
        "interp_ablate_basics, where lm_eval is installed)",
    )
    out: str = setting(help="folder; what it has already is kept")


def add(parser: ArgumentParser) -> None:
    """Declare the flags."""
    parser.description = (
        "Perplexity of text, KL, scores of answers and lm-evaluation-harness tasks, before and after, with "
        "intervals of the paired differences."
    )
    flags_from(parser, Evaluate, EvaluationConfig, JudgeSettings, FigureSettings)


def run(args: Namespace) -> int:
    """Measure what is not measured yet, and print the table."""
    from interp_ablate.edits.plan import Plan
    from interp_ablate.evaluation.compare import evaluate
    from interp_ablate.evaluation.results import as_text
    from interp_ablate.plots.evaluation import save_evaluation
    from interp_ablate.storage.atomic_files import check_folder

    settings, plan = settings_from(args, Evaluate), None
    figures = figure_settings(args)
    if settings.after is None and settings.plan is None:
        raise RunError("nothing to compare: give a second model B, or --plan")
    if settings.plan:
        plan = Plan.load(settings.plan)
    check_folder(Path(settings.out))
    measures = _measures(args, settings)
    both = [partial(load, settings, name) for name in (settings.before, settings.after)]
    same = settings.after in (None, settings.before)
    before, after = (both[0](),) * 2 if same else both
    began = time.perf_counter()
    results = evaluate(
        before,
        after,
        plan=plan,
        measures=measures,
        out=settings.out,
        on_part=lambda part: tell(args, f"{time.perf_counter() - began:6.1f} s  {part}"),
    )
    tell_spent(args, *measures.scorers)
    figure = save_evaluation(settings.out, dpi=figures.dpi)  # the page shows the PNG
    if figures.format != "png":
        figure = save_evaluation(settings.out, form=figures.format)
    print(as_text(results))
    print(f"\n{Path(settings.out) / 'evaluation.md'}, evaluation.csv, items.csv; {figure}")
    return 0


def _measures(args: Namespace, settings: Evaluate) -> Any:
    """What the flags ask for; everything that can be wrong in them is found before a model is loaded."""
    from interp_ablate.evaluation.harness import BUNDLED_TASK, Tasks, is_installed
    from interp_ablate.evaluation.perplexity import read_corpus, windows

    numbers = given_flags(args, EvaluationConfig)
    windows(2, **{k: numbers.get(k, getattr(EvaluationConfig, k)) for k in ("context", "stride")})
    tasks = [name for name in settings.tasks or () if settings.tasks != ("none",)]
    if settings.tasks is None:
        tasks = [BUNDLED_TASK] if is_installed() else []
        if not tasks:
            print("no tasks: pip install 'interp-ablate[evaluate]' for them", file=sys.stderr)
    elif tasks:
        available = Tasks(numbers.get("task_folders", ()))
        for name in tasks:
            available.identity(name)
    no_text, no_prompts = settings.text == ("none",), settings.prompts == "none"
    return settings_from(
        args,
        EvaluationConfig,
        under={
            "text": None if no_text else read_corpus(*settings.text),
            "prompts": {}
            if no_prompts
            else read_prompts(settings.prompts, seed=settings.split_seed),
            "scorers": () if no_prompts else tuple(_scorers(args, settings)),
            "tasks": tuple(tasks),
        },
    ).limited()


def _scorers(args: Namespace, settings: Evaluate) -> list[Any]:
    from interp_ablate.scoring.expression_lists import DEFAULT_EXPRESSIONS
    from interp_ablate.scoring.registry import make_scorer

    lists = () if settings.expressions == ("none",) else settings.expressions
    names = lists if settings.expressions else (DEFAULT_EXPRESSIONS,)
    cache, endpoint = Path(settings.out) / "judge.jsonl", judge_settings(args)
    options: dict[str, Any] = {"rubric": rubric_of(settings.rubric), "cache": cache}
    specs = [*(f"expressions:{name}" for name in names), *settings.scorer]
    return [make_scorer(spec, endpoint=endpoint, **options) for spec in specs]
