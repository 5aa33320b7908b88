"""Command line, filter.

Knows: the flags of this command and what it prints. Does not know: how anything is computed. Heavy imports
happen inside the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import load, model_flags, rubric_of
from interp_ablate.errors import RunError

_EVERY = 2.0  # seconds between two lines of progress


def add_commands(commands: Any) -> None:
    """Adds the commands of this file to the parser's."""
    parser = commands.add_parser(
        "filter",
        help="drop or keep samples of a chat data set by phrases, scorers or projections",
        description="Without rules: drops samples in which an answer of the assistant declines, moralizes "
        "or says that it is a language model. With rules, those alone count.",
    )
    parser.add_argument(
        "data",
        help=".jsonl, .json (also .gz, .zst), .parquet or datasets folder; or planted:declines, a bundled mixture with labels",
    )
    parser.add_argument("--out", required=True, help="folder of the result")
    _rule_flags(parser)
    _choice_flags(parser)
    _file_flags(parser)
    model_flags(parser)
    parser.set_defaults(work=_filter)


def _rule_flags(parser: argparse.ArgumentParser) -> None:
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--expressions", nargs="+", action="extend", metavar="NAME_OR_FILE",
        help="declines, moralizes, says_it_is_an_ai (own words only); a bundled list; a file",
    )  # fmt: skip
    rules.add_argument(
        "--language", metavar="CODES", help="of the expressions, such as en,de (default: all)"
    )
    for flag, text in (
        ("--scorer", "lexicon:, classifier:, judge: or expressions: scorer, 0 to 100"),
        (
            "--direction",
            "persona folder (its direction for reading text) or FILE[#SITE]: mean projection of the answer, with --model",
        ),
    ):
        rules.add_argument(flag, action=_Test, dest="tests", metavar="SPEC", help=text)
    for flag in ("--above", "--below"):
        rules.add_argument(
            flag, action=_Test, dest="tests", type=float, metavar="X",
            help=f"the --scorer or --direction before it matches {flag[2:]} X",
        )  # fmt: skip
    rules.add_argument("--rubric", help="of a judge: its text, or a file (@FILE)")
    rules.add_argument("--min-characters", type=int, metavar="N", help="shorter answers match")
    rules.add_argument("--max-characters", type=int, metavar="N", help="longer answers match")


def _choice_flags(parser: argparse.ArgumentParser) -> None:
    both = parser.add_mutually_exclusive_group()
    both.add_argument(
        "--drop", dest="action", action="store_const", const="drop", default="drop",
        help="drop samples that match (default)",
    )  # fmt: skip
    both.add_argument(
        "--keep", dest="action", action="store_const", const="keep", help="keep only those"
    )
    parser.add_argument(
        "--combine", choices=("any", "all"), default="any", help="of several rules (default any)"
    )
    parser.add_argument(
        "--turns", choices=("any", "last", "first"), default="any",
        help="which answers of a conversation are looked at (default any)",
    )  # fmt: skip
    parser.add_argument(
        "--scope", choices=("sample", "round"), default="sample",
        help="what is dropped: the sample (default), or the question and the answer that matches",
    )  # fmt: skip
    parser.add_argument(
        "--no-verdict", choices=("keep", "drop"),
        help="samples of which it is not known whether they match (default: as if they did not)",
    )  # fmt: skip


def _file_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", help="of DATA, where its keys fit several")
    parser.add_argument(
        "--skip-malformed", action="store_true",
        help="rows that cannot be used go to malformed.jsonl; default: the first one is an error",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="FIELD",
        help="true or false in every row, whether it ought to match: precision and recall",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=20, help="of each outcome on samples.html (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples' choice")
    parser.add_argument("--force", action="store_true", help="replace another filter's result")
    parser.add_argument("--json", action="store_true", help="the manifest, to standard output")


class _Test(argparse.Action):
    """Collects rules with limits in the order in which they were written."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        tests = list(getattr(namespace, self.dest) or [])
        name = (option_string or "").lstrip("-")
        if name in ("scorer", "direction"):
            tests.append({"kind": name, "spec": values})
        elif not tests or name in tests[-1]:
            parser.error(f"{option_string} belongs behind a --scorer or --direction, once")
        else:
            tests[-1] = {**tests[-1], name: values}
        setattr(namespace, self.dest, tests)


# ---- what the command does -------------------------------------------------------------------------


def _filter(args: argparse.Namespace) -> int:
    from interp_ablate.datasets.filter_recipe import FilterRecipe
    from interp_ablate.datasets.filtering import FilterSettings, filter_file
    from interp_ablate.datasets.labelled_mixtures import data_and_label

    data, labels = data_and_label(args.data, args.labels)
    recipe = FilterRecipe(
        rules=tuple(_rules(args)),
        combine=args.combine,
        turns=args.turns,
        action=args.action,
        scope=args.scope,
        no_verdict=args.no_verdict,
    )
    if args.samples < 0:
        raise RunError(f"--samples {args.samples}: a number from 0")
    settings = FilterSettings(
        layout=args.layout,
        skip_malformed=args.skip_malformed,
        shown=args.samples,
        seed=args.seed,
        labels=labels,
        force=args.force,
    )
    manifest = filter_file(data, args.out, recipe, settings=settings, progress=_progress(args))
    if args.json:
        print((Path(args.out) / "manifest.json").read_text(encoding="utf-8"), end="")
    else:
        _print(manifest, args)
    return 0


def _rules(args: argparse.Namespace) -> list[Any]:
    from interp_ablate.datasets.filter_rules import LengthRule, decline_rule, expression_rule

    languages = _languages(args.language)
    rules: list[Any] = [expression_rule(name, languages) for name in args.expressions or ()]
    rules += [_limited(args, test) for test in args.tests or ()]
    lengths = (args.min_characters, args.max_characters)
    if lengths != (None, None):
        rules.append(LengthRule(below=lengths[0], above=lengths[1]))
    if not rules:
        return [decline_rule(languages=languages)]
    if languages and not args.expressions:
        raise RunError(
            "--language is about expressions: give --expressions with it, or no rule at all"
        )
    return rules


def _languages(text: str | None) -> Sequence[str]:
    return tuple(code.strip() for code in (text or "").split(",") if code.strip())


def _limited(args: argparse.Namespace, test: dict[str, Any]) -> Any:
    """The rule of a --scorer or --direction, with its limits."""
    from interp_ablate.datasets.filter_rules import ProjectionRule, direction_at, score_rule

    above, below = test.get("above"), test.get("below")
    if above is None and below is None:
        raise RunError(f"--{test['kind']} {test['spec']}: write --above X or --below X behind it")
    if test["kind"] == "direction":
        direction = direction_at(test["spec"])
        return ProjectionRule(
            model=load(args, args.model), direction=direction, above=above, below=below
        )
    rubric = rubric_of(args.rubric)
    cache = Path(args.out) / "replies.jsonl"
    return score_rule(test["spec"], rubric=rubric, cache=cache, above=above, below=below)


def _progress(args: argparse.Namespace) -> Callable[[int], None] | None:
    if args.quiet or not sys.stderr.isatty():
        return None
    began = last = time.monotonic()

    def told(rows: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            print(f"{rows} rows, {rows / (now - began):.0f} a second", file=sys.stderr)

    return told


def _print(manifest: dict[str, Any], args: argparse.Namespace) -> None:
    counts = manifest["counts"]
    rows = counts["rows"]
    print(
        f"{rows} rows of {manifest['layout']}: {counts['kept']} kept, {counts['dropped']} dropped",
        end="",
    )
    print(f", {counts['cut']} kept without a round" if counts["cut"] else "")
    for kind, number in manifest["why"].items():
        print(f"{number:>8}  {kind}")
    if counts["no_verdict"]:
        became = "kept" if manifest["recipe"]["no_verdict"] == "keep" else "dropped"
        print(
            f"{counts['no_verdict']} without a verdict were {became} (--no-verdict); see why.jsonl"
        )
    if counts["malformed"]:
        print(f"{counts['malformed']} malformed rows were left out: malformed.jsonl")
    for name, share in manifest.get("agreement", {}).items():
        if share["value"] is None:
            print(f"{name.replace('_', ' ')}: nothing to count")
            continue
        interval = f"[{share['low']:.3f}, {share['high']:.3f}]"
        print(f"{name.replace('_', ' '):<20} {share['value']:.3f}  {interval} of {share['of']}")
    print(f"result: {args.out} (a look: {Path(args.out) / 'samples.html'})")
