"""`sweep`: the stage of a run that scores trials, here or in workers.

Knows: its flags. Does not know: how trials are scored.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from interp_ablate.cli import stage
from interp_ablate.cli.run import ExecutorSettings
from interp_ablate.cli.settings import flags_from, settings_from


def add(parser: ArgumentParser) -> None:
    """Declare the flags."""
    stage.add(parser)
    flags_from(parser, ExecutorSettings)


def run(args: Namespace) -> int:
    """Score the trials that are not scored yet."""
    return stage.run(args, settings_from(args, ExecutorSettings))
