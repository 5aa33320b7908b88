"""`search`: plans searched for little behaviour at little KL.

Knows: flags and what is printed. Does not know: how plans are drawn or scored.
"""

from __future__ import annotations

from argparse import Namespace

from interp_ablate.cli.options import NO_PLAN, JudgeSettings
from interp_ablate.cli.run import (
    ExecutorSettings,
    RunFolder,
    open_run,
    print_test,
    selection_of,
    telling_spent,
)
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.search_settings import SearchSettings

add = adding(Configuration, RunFolder, ExecutorSettings, SearchSettings, JudgeSettings)


def run(args: Namespace) -> int:
    """Search, and print the chosen plan's numbers."""
    from interp_ablate.runs.search_run import run_search, summary

    settings = settings_from(args, SearchSettings)
    opened = open_run(args, settings_from(args, ExecutorSettings))
    with telling_spent(args, opened):
        run_search(opened, settings)
    print(summary(opened))
    selected = selection_of(opened)
    if selected["plan"] is None:
        return NO_PLAN
    print(f"chosen: trial {int(selected['trial']['trial'])}; on the test split:")
    print_test(selected["test"])
    print(
        f"plans of the finalists: {opened.out / 'plans'}; export: interp-ablate export {opened.out}"
    )
    return 0
