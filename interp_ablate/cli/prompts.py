"""`lint`, `select` and `generate`.

Knows: flags and what is printed. Does not know: how anything is computed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import from_run, load, model_flags
from interp_ablate.cli.run import NO_PLAN
from interp_ablate.errors import RunError


def _select_command(commands: Any) -> None:
    select = commands.add_parser("select", help="apply a selection rule to a table of evaluations")
    select.add_argument(
        "evaluations", help="JSON (list of rows), JSONL or CSV; published names are known"
    )
    select.add_argument("--rule", choices=("arditi", "constrained", "pareto"), default="arditi")
    select.add_argument("--n-layers", type=int, help="layers of the model (rule arditi)")
    select.add_argument("--max-kl", type=float, default=0.1)
    select.set_defaults(work=_select)


def _lint_command(commands: Any) -> None:
    lint = commands.add_parser(
        "lint", help="faults of a contrast set that a direction would pick up"
    )
    lint.add_argument("contrast", nargs="?", help="bundled name, file, folder, or hf:NAME")
    lint.add_argument("--positive")
    lint.add_argument("--negative")
    lint.add_argument("--system")
    lint.add_argument("--json", action="store_true", help="the whole report as JSON")
    lint.set_defaults(work=_lint)


def _generate_command(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer prompts, with and without a plan")
    generate.add_argument("prompts", nargs="+", help="prompts, or @FILE with a prompt a line")
    generate.add_argument("--run", help="run folder: its model and chosen plan")
    model_flags(generate)
    generate.add_argument("--plan", help="plan JSON")
    generate.add_argument("--system")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--json", action="store_true")
    generate.set_defaults(work=_generate)


def _select(args: argparse.Namespace) -> int:
    from interp_ablate.search.selection import (
        arditi,
        least_behaviour_under_kl,
        pareto_front,
        read_evaluations,
    )

    frame = read_evaluations(args.evaluations)
    if args.rule == "pareto":
        for row in pareto_front(frame).to_dict("records"):
            print(json.dumps(row))
        return 0
    if args.rule == "arditi":
        if args.n_layers is None:
            raise RunError("--rule arditi needs --n-layers: how many layers the model has")
        choice = arditi(frame, n_layers=args.n_layers, max_kl=args.max_kl)
    else:
        choice = least_behaviour_under_kl(frame, max_kl=args.max_kl)
    row = choice.row or {}
    print(json.dumps({**row, "rule": choice.rule, **choice.limits()}))
    return 0 if choice.row is not None else NO_PLAN


def _lint(args: argparse.Namespace) -> int:
    from interp_ablate.prompts.contrast_set import ContrastSet
    from interp_ablate.prompts.linting import lint

    contrast = ContrastSet.load(
        args.contrast, positive=args.positive, negative=args.negative, system=args.system
    )
    report = lint(contrast)
    if args.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
        return 0
    print(
        f"{contrast.name}: {len(contrast.positive)} positive, {len(contrast.negative)} negative prompts"
    )
    print(f"bag of words alone separates them with AUC {report.bag_of_words_auc:.2f}")
    print(f"length alone separates them with AUC {report.length_auc:.2f}")
    for finding in report.findings:
        print(f"{finding.severity}: {finding.message}")
        for example in finding.examples:
            print(f"    {example}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from interp_ablate.edits.plan import Plan
    from interp_ablate.prompts.prompt import Prompt

    plan_path = args.plan
    if args.run:
        plan_path = plan_path or from_run(args, args.run)
    plan = Plan.load(plan_path) if plan_path else None
    prompts = [Prompt(text, args.system) for text in _prompt_texts(args.prompts)]
    model = load(args, args.model)
    conditions = {"baseline": model.generate(prompts, max_new_tokens=args.max_new_tokens)}
    if plan is not None:
        with model.applied(plan):
            conditions["edited"] = model.generate(prompts, max_new_tokens=args.max_new_tokens)
    for i, prompt in enumerate(prompts):
        texts = {name: found[i].text for name, found in conditions.items()}
        if args.json:
            print(json.dumps({"prompt": prompt.text, **texts}, ensure_ascii=False))
            continue
        print(f"> {prompt.text}")
        for name, text in texts.items():
            print(f"[{name}] {text}\n")
    return 0


def _prompt_texts(arguments: Sequence[str]) -> list[str]:
    found: list[str] = []
    for argument in arguments:
        if not argument.startswith("@"):
            found.append(argument)
            continue
        try:
            lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"cannot read prompts from {argument[1:]}: {error}") from error
        found += [line for line in lines if line.strip()]
    return found
