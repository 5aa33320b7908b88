"""Command line, evaluate.

Knows: the flags of these commands and what they print. Does not know: how anything is computed. Heavy
imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import load, loading_flags, rubric_of
from interp_ablate.errors import RunError


def add_commands(commands: Any) -> None:
    """Adds `evaluate` to the parser's commands."""
    parser = commands.add_parser(
        "evaluate",
        help="what an edit cost: A against B, or against A under a plan, as one table",
        description="Perplexity of text, KL, scores of answers and lm-evaluation-harness tasks, before "
        "and after, with intervals of the paired differences.",
    )
    parser.add_argument("before", metavar="A", help="alias, HF folder, .gguf file or hub name")
    parser.add_argument("after", metavar="B", nargs="?", help="the same; default: A, under --plan")
    loading_flags(parser)
    parser.add_argument("--plan", help="plan JSON (or selected.json), applied to B as hooks")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE",
        help=".txt (documents between lines of ---) or .jsonl with \"text\"; 'none'; default: bundled",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--stride", type=int, default=256, help="between windows (default 256)")
    parser.add_argument(
        "--prompts", default="declining",
        help="bundled set (its test part), contrast set, or a file with a prompt a line; 'none'",
    )  # fmt: skip
    parser.add_argument(
        "--split-seed", type=int, default=0,
        help="of a bundled set's split: the --seed of the run that made the edit (default 0)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument(
        "--expressions", help="comma-separated built-in lists or files; default: declining"
    )
    parser.add_argument(
        "--scorer", action="append", default=[], metavar="SPEC",
        help="another scorer of the answers, such as lexicon:sentiment; may be given again",
    )  # fmt: skip
    parser.add_argument("--rubric", help="of a judge: its text, or a file (@FILE)")
    _task_flags(parser)
    parser.add_argument("--limit", type=int, help="documents, prompts a list, items a task at most")
    parser.add_argument("--out", required=True, help="folder; what it has already is kept")
    parser.set_defaults(work=_evaluate)


def _task_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        help="comma-separated tasks of lm-evaluation-harness, or 'none' (default: the bundled "
        "interp_ablate_basics, where lm_eval is installed)",
    )
    parser.add_argument(
        "--tasks-folder", action="append", default=[], metavar="DIR",
        help="where tasks are looked for first; tasks are code: give folders that you trust",
    )  # fmt: skip
    parser.add_argument(
        "--tasks-chat", action="store_true", help="items go through the chat template"
    )


def _evaluate(args: argparse.Namespace) -> int:
    from interp_ablate.evaluation.compare import evaluate
    from interp_ablate.evaluation.results import as_text

    if args.after is None and args.plan is None:
        raise RunError("nothing to compare: give a second model B, or --plan")
    plan = None
    if args.plan:
        from interp_ablate.edits.plan import Plan

        plan = Plan.load(args.plan)
    measures = _measures(args)
    before = load(args, args.before)
    after = before if args.after in (None, args.before) else load(args, args.after)
    began = time.perf_counter()
    found = evaluate(
        before, after, plan=plan, measures=measures, out=args.out, on_part=_teller(args, began)
    )
    from interp_ablate.plots.evaluation import save_evaluation

    figure = save_evaluation(args.out)
    print(as_text(found))
    print(f"\n{Path(args.out) / 'evaluation.md'}, evaluation.csv, items.csv; {figure}")
    return 0


def _measures(args: argparse.Namespace) -> Any:
    """What the flags ask for; everything that can be wrong in them is found before a model is loaded."""
    from interp_ablate.evaluation.harness import BUNDLED_TASK, Tasks, is_installed
    from interp_ablate.evaluation.measures import EvaluationConfig, read_prompts
    from interp_ablate.evaluation.perplexity import read_corpus, windows

    windows(2, context=args.context, stride=args.stride)
    tasks = _listed(args.tasks)
    if args.tasks is None:
        tasks = [BUNDLED_TASK] if is_installed() else []
        if not tasks:
            print("no tasks: pip install 'interp-ablate[evaluate]' for them", file=sys.stderr)
    elif tasks:
        found = Tasks(args.tasks_folder)
        for name in tasks:
            found.identity(name)
    no_text, no_prompts = args.text == ["none"], args.prompts == "none"
    return EvaluationConfig(
        text=None if no_text else read_corpus(*(args.text or ())),
        prompts={} if no_prompts else read_prompts(args.prompts, seed=args.split_seed),
        scorers=() if no_prompts else tuple(_scorers(args)),
        tasks=tuple(tasks),
        task_folders=tuple(args.tasks_folder),
        max_new_tokens=args.max_new_tokens,
        context=args.context,
        stride=args.stride,
        limit=args.limit,
        chat=args.tasks_chat,
    ).limited()


def _listed(text: str | None) -> list[str]:
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    return [] if names == ["none"] else names


def _scorers(args: argparse.Namespace) -> list[Any]:
    from interp_ablate.scoring.expression_lists import DEFAULT_EXPRESSIONS
    from interp_ablate.scoring.registry import make_scorer

    names = _listed(args.expressions or DEFAULT_EXPRESSIONS)
    rubric = rubric_of(args.rubric)
    cache = Path(args.out) / "judge.jsonl"
    specs = [*(f"expressions:{name}" for name in names), *args.scorer]
    return [make_scorer(spec, rubric=rubric, cache=cache) for spec in specs]


def _teller(args: argparse.Namespace, began: float) -> Any:
    def tell(part: str) -> None:
        if not args.quiet:
            seconds = time.perf_counter() - began
            print(f"{seconds:6.1f} s  {part}", file=sys.stderr, flush=True)

    return tell
