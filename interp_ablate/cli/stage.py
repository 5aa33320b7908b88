"""`collect`, and what it shares with other commands of one stage: the stage, with those it needs.

Knows: flags and what is printed. Does not know: how a stage works.
"""

from __future__ import annotations

from argparse import Namespace

from interp_ablate.cli.options import tell
from interp_ablate.cli.run import ExecutorSettings, RunFolder, open_run
from interp_ablate.cli.settings import adding
from interp_ablate.runs.configuration import Configuration

add = adding(Configuration, RunFolder)


def run(args: Namespace, executor: ExecutorSettings | None = None) -> int:
    """Do the stage that the command is named after."""
    from interp_ablate.runs.stages import do_stage

    opened = open_run(args, executor)
    if not do_stage(opened, args.command):
        tell(args, f"{opened.out}: {args.command} was done already")
    return 0
