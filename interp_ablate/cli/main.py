"""Command line: subcommands over run folders and files; the only file that prints.

Knows: flags, progress bars, exit statuses. Does not know: how anything is computed. Heavy imports happen
inside the commands, so that `--help` and wrong flags answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from interp_ablate import __version__
from interp_ablate.cli import evaluate as cli_evaluate
from interp_ablate.cli import export as cli_artefacts
from interp_ablate.cli import filter as cli_filter
from interp_ablate.cli import heal as cli_training
from interp_ablate.cli import persona as cli_persona
from interp_ablate.cli import score as cli_scores
from interp_ablate.cli.prompts import _generate_command, _lint_command, _select_command
from interp_ablate.cli.run import (
    STAGE_COMMANDS,
    _executor_flags,
    _plot_command,
    _run,
    _run_flags,
    _search_command,
    _stage,
)
from interp_ablate.errors import InterpAblateError

BAD_INPUT = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="interp-ablate",
        description="From two sets of prompts to directions, plans, trials and a certified checkpoint.",
    )
    parser.add_argument("--version", action="version", version=f"interp-ablate {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="all stages, into one folder")
    _run_flags(run)
    _executor_flags(run)
    run.set_defaults(work=_run)
    _search_command(commands)
    for name, text in STAGE_COMMANDS.items():
        stage = commands.add_parser(name, help=f"one stage of a run: {text}")
        _run_flags(stage)
        _executor_flags(stage)
        stage.set_defaults(work=_stage)
    _plot_command(commands)
    _select_command(commands)
    _lint_command(commands)
    cli_artefacts.add_commands(commands)
    for more in (cli_scores, cli_persona, cli_filter, cli_training, cli_evaluate):
        more.add_commands(commands)
    _generate_command(commands)
    return parser


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would drown our own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 no candidate passed or a certificate failed, 2 bad input."""
    args = _parser().parse_args(argv)
    _quiet_libraries()
    try:
        return args.work(args)
    except InterpAblateError as error:
        print(f"interp-ablate {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"interp-ablate {args.command}: {error.strerror or error}{place}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
