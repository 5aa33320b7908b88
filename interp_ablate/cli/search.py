"""`search`: plans searched for little behaviour at little KL.

Knows: flags and what is printed. Does not know: how plans are drawn or scored.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from interp_ablate.cli.options import NO_PLAN, JudgeSettings, rubric_of, tell_spent
from interp_ablate.cli.run import (
    ExecutorSettings,
    RunFolder,
    open_run,
    print_test,
    selection_of,
    telling_spent,
)
from interp_ablate.cli.settings import adding, given_flags, settings_from
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.search_settings import SearchSettings

add = adding(Configuration, RunFolder, ExecutorSettings, SearchSettings, JudgeSettings)


def run(args: Namespace) -> int:
    """Search, and print the chosen plan's numbers."""
    from interp_ablate.runs.search_objectives import objective_scores
    from interp_ablate.runs.search_run import run_search, summary

    settings = settings_from(args, SearchSettings)
    rubrics = given_flags(args, SearchSettings).get("objective_rubric", ())
    settings = replace(settings, objective_rubric=tuple(map(_rubric, rubrics)))
    opened = open_run(args, settings_from(args, ExecutorSettings))
    objectives = objective_scores(opened, settings, own_code=True)
    try:
        with telling_spent(args, opened):
            run_search(opened, settings, objectives)
    finally:
        tell_spent(args, *objectives.scorers.values())
    print(summary(opened))
    print(_ended(opened.state["search_end"]))
    selected = selection_of(opened)
    if selected["plan"] is None:
        return NO_PLAN
    print(f"chosen: trial {int(selected['trial']['trial'])}; on the test split:")
    print_test(selected["test"])
    print(
        f"plans of the finalists: {opened.out / 'plans'}; export: interp-ablate export {opened.out}"
    )
    return 0


def _rubric(text: str) -> str:
    """A rubric with the text of the file that it names, as NAME=TEXT; the name is empty where it has none."""
    name, mark, rest = text.partition("=")
    named = bool(mark) and (not name or name.isidentifier())
    return f"{name}={rubric_of(rest)}" if named else f"={rubric_of(text)}"


def _ended(end: Mapping[str, Any]) -> str:
    """Why the search ended, and how it goes on."""
    if end["by"] == "stop_at":
        first, *more = end["met_by"]
        others = f" (and {len(more)} more)" if more else ""
        return f"ended after {end['trials']} trials: number {first}{others} meets {end['stop_at']}"
    limit = f"its {end['minutes']:g} minutes" if end["by"] == "minutes" else "its number of trials"
    return f"ended after {end['trials']} trials, by {limit}; more --trials or --minutes go on from here"
