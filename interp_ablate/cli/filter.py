"""`filter`: samples of chat data dropped or kept by phrases, scorers or projections.

Knows: flags and what is printed. Does not know: how a sample is judged.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import (
    REPLIES,
    RUBRIC,
    JudgeSettings,
    ModelSettings,
    judge_settings,
    load,
    rubric_of,
    tell_spent,
)
from interp_ablate.cli.settings import flags_from, settings_from
from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filtering import FilterSettings
from interp_ablate.errors import RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Filter(ModelSettings):
    """Which file is filtered, and by which rules."""

    data: str = setting(
        help=".jsonl, .json (also .gz, .zst), .parquet or datasets folder; or planted:declines, a bundled mixture",
        positional=True,
    )
    out: str = setting(help="folder of the result")
    expressions: tuple[str, ...] = setting(
        (),
        "declines, moralizes, says_it_is_an_ai (own words only); a bundled list; a file",
        nargs="+",
        repeat=True,
        metavar="NAME_OR_FILE",
    )
    language: tuple[str, ...] = setting(
        (), "of the expressions, such as en,de (default: all)", metavar="CODES"
    )
    rubric: str | None = setting(None, RUBRIC)
    min_characters: int | None = setting(None, "shorter answers match", metavar="N")
    max_characters: int | None = setting(None, "longer answers match", metavar="N")
    json: bool = setting(False, "the manifest, to standard output")


def add(parser: ArgumentParser) -> None:
    """Declare the flags; rules with limits (`--scorer S --above X`) are read in the order they are written."""
    parser.description = (
        "Without rules: drops samples in which an answer of the assistant declines, moralizes or says that it "
        "is a language model. With rules, those alone count."
    )
    parser.set_defaults(tests=[], action="drop")
    flags_from(parser, Filter, FilterRecipe, FilterSettings, JudgeSettings)
    rules = parser.add_argument_group("rules with limits")
    for flag, text in (
        ("--scorer", "lexicon:, classifier:, judge: or expressions: scorer, 0 to 100"),
        (
            "--direction",
            "persona folder (its direction for reading text) or FILE[#SITE]: mean projection of the answer, "
            "with --model",
        ),
    ):
        rules.add_argument(flag, action=_Test, dest="tests", metavar="SPEC", help=text)
    for flag in ("--above", "--below"):
        text = f"the --scorer or --direction before it matches {flag[2:]} X"
        rules.add_argument(flag, action=_Test, dest="tests", type=float, metavar="X", help=text)
    one = parser.add_mutually_exclusive_group()
    for action, text in (
        ("drop", "drop samples that match (default)"),
        ("keep", "keep only those"),
    ):
        one.add_argument(
            f"--{action}", dest="action", action="store_const", const=action, help=text
        )


class _Test(argparse.Action):
    """Collects rules with limits in the order in which they were written."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
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


def run(args: Namespace) -> int:
    """Filter the file, and print what was kept and why."""
    from interp_ablate.datasets.filtering import filter_file
    from interp_ablate.datasets.labelled_mixtures import data_and_label

    filtering = settings_from(args, Filter)
    data, label = data_and_label(filtering.data)
    rules = tuple(_rules(filtering, args.tests, judge_settings(args)))
    recipe = settings_from(args, FilterRecipe, under={"rules": rules, "action": args.action})
    settings = settings_from(args, FilterSettings, under={"labels": label})
    manifest = filter_file(data, filtering.out, recipe, settings=settings)
    tell_spent(args, *(rule.scorer for rule in rules if hasattr(rule, "scorer")))
    if filtering.json:
        print((Path(filtering.out) / "manifest.json").read_text(encoding="utf-8"), end="")
    else:
        _print(manifest, Path(filtering.out))
    return 0


def _rules(filtering: Filter, tests: list[dict[str, Any]], endpoint: dict[str, Any]) -> list[Any]:
    from interp_ablate.datasets.filter_rules import LengthRule, decline_rule, expression_rule

    languages = filtering.language
    rules: list[Any] = [expression_rule(name, languages) for name in filtering.expressions]
    rules += [_limited(filtering, test, endpoint) for test in tests]
    lengths = (filtering.min_characters, filtering.max_characters)
    if lengths != (None, None):
        rules.append(LengthRule(below=lengths[0], above=lengths[1]))
    if not rules:
        return [decline_rule(languages=languages)]
    if languages and not filtering.expressions:
        raise RunError(
            "--language is about expressions: give --expressions with it, or no rule at all"
        )
    return rules


def _limited(filtering: Filter, test: dict[str, Any], endpoint: dict[str, Any]) -> Any:
    """The rule of a --scorer or --direction, with its limits."""
    from interp_ablate.datasets.filter_rules import ProjectionRule, direction_at, score_rule

    limits: dict[str, Any] = {"above": test.get("above"), "below": test.get("below")}
    if limits == {"above": None, "below": None}:
        raise RunError(f"--{test['kind']} {test['spec']}: write --above X or --below X behind it")
    if test["kind"] == "direction":
        direction = direction_at(test["spec"])
        return ProjectionRule(model=load(filtering, filtering.model), direction=direction, **limits)
    cache = Path(filtering.out) / REPLIES
    asked: dict[str, Any] = {
        "rubric": rubric_of(filtering.rubric),
        "cache": cache,
        "endpoint": endpoint,
    }
    return score_rule(test["spec"], **asked, **limits)


def _print(manifest: dict[str, Any], out: Path) -> None:
    counts = manifest["counts"]
    print(
        f"{counts['rows']} rows of {manifest['layout']}: {counts['kept']} kept, {counts['dropped']} dropped"
        + (f", {counts['cut']} kept without a round" if counts["cut"] else "")
    )
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
    print(f"result: {out} (a look: {out / 'samples.html'})")
