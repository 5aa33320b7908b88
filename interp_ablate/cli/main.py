"""The command line: its commands, exit statuses, and one message for what went wrong.

A command is a file here with `add(parser)`, which declares its flags, and `run(args)`, which returns the exit
status; its name, its file and its line of help stand in `COMMANDS`. Another package adds a command by registering
such a module under the entry-point group `interp_ablate.commands`. Only the chosen command's file is imported.

Knows: names of commands, exit statuses. Does not know: what a command does, or its flags.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from interp_ablate import __version__
from interp_ablate.cli.progress_bars import LogLines
from interp_ablate.errors import InterpAblateError
from interp_ablate.jobs.bars import quiet_libraries, showing
from interp_ablate.settings import suggestion
from interp_ablate.storage.entry_points import entry_named, entry_names, entry_points_of

BAD_INPUT, CRASHED, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141
ENDING = ("SIGTERM", "SIGHUP")  # signals that end a command as Ctrl-C does; Windows has not all
ENTRY_POINTS = "interp_ablate.commands"
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "all stages, into one folder"),
    "search": ("search", "search plans for little behaviour at little KL, and test the best"),
    "league": ("league", "every method of removing and inducing behaviours, at one budget"),
    "collect": ("stage", "one stage of a run: activations of the training and validation prompts"),
    "activations": ("activations", "every token's activations of prompts, streamed to disk"),
    "directions": (
        "directions",
        "one stage of a run: directions, their separation, and what is protected",
    ),
    "sweep": ("sweep", "one stage of a run: race directions, refine plans, score finalists"),
    "plot": ("plot", "draw every figure of a run folder, and its report"),
    "select": ("select", "apply a selection rule to a table of evaluations"),
    "lint": ("lint", "faults of a contrast set that a direction would pick up"),
    "budget": ("budget", "memory and time of every stage, from a config alone"),
    "export": ("export", "write a plan as an artefact others load"),
    "verify": ("verify", "is B really A with this plan and nothing else? By tensor and by logits"),
    "reproduce": ("reproduce", "make an export again from its manifest, to the same bytes"),
    "import": ("import_vectors", "read someone else's vectors, write them as plain safetensors"),
    "models": ("models", "which tensors write where, by architecture"),
    "push": ("push", "upload an exported folder to the Hugging Face hub"),
    "score": ("score", "score answers by expressions, a lexicon, a classifier or a judge"),
    "persona": ("", "trait vectors: extract, steer, bake, monitor, screen data, train"),
    "persona traits": ("persona_traits", "bundled traits, or what a trait file says"),
    "persona extract": ("persona_extract", "a trait's directions, and the layer that steers"),
    "persona steer": ("persona_steer", "trait and coherence against the coefficient"),
    "persona bake": ("persona_bake", "the vector written into a checkpoint"),
    "persona new": ("persona_new", "have a model behind a URL write a trait file"),
    "persona monitor": ("persona_monitor", "does the projection foretell the trait?"),
    "persona screen": ("persona_screen", "which samples of a training set carry the trait?"),
    "persona train": ("persona_train", "fine-tune with the vector added, to prevent the trait"),
    "filter": ("filter", "drop or keep samples of chat data by phrases, scorers, projections"),
    "heal": ("heal", "train an edited checkpoint (DPO) until it is close to the original"),
    "evaluate": ("evaluate", "what an edit cost: A against B, or against A under a plan"),
    "generate": ("generate", "answer prompts, with and without a plan"),
    "circuit": ("circuit", "what writes a run's direction, what it says, and what reads it"),
    "tokens": ("tokens", "a text's tokens, coloured by their projections on a run's directions"),
    "explore": ("explore", "a page in the browser: directions, tokens, sliders, answers"),
    "chat": ("chat", "talk with the edited model in a terminal"),
}


class _Parser(argparse.ArgumentParser):
    """A parser that says which flag was meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = [str(word).partition("=")[0] for word in args or ()]
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and what the first unknown flag may have meant."""
        flags = list(self._option_string_actions) if self._subparsers is None else []
        unknown = [
            word
            for word in getattr(self, "_words", ())
            if word.startswith("--")
            and len(word) > 2
            and not any(f.startswith(word) for f in flags)
        ]
        if flags and unknown and (meant := suggestion(unknown[0], flags)):
            message += f" ({unknown[0]}{meant})"
        super().error(message)


def command_names() -> list[str]:
    """Every command, those of other packages included; a part of a group has the group's name before it."""
    return entry_names(COMMANDS, ENTRY_POINTS)


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line: all commands by name, the flags of the one that it names."""
    words = [word for word in argv if not word.startswith("-")]
    parser = _Parser(
        prog="interp-ablate",
        description="From two sets of prompts to directions, plans, trials and a certified checkpoint.",
    )
    parser.add_argument("--version", action="version", version=f"interp-ablate {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results")
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    others = entry_points_of(ENTRY_POINTS)
    for name in command_names():
        group, _, last = name.rpartition(" ")
        text = COMMANDS[name][1] if name in COMMANDS else f"of the package {others[name].package}"
        end = "" if text.endswith("?") else "."
        part = groups[group].add_parser(
            last, help=text, description=f"{text[0].upper()}{text[1:]}{end}"
        )
        chosen = words[: len(name.split())] == name.split()
        if name in COMMANDS and not COMMANDS[name][0]:
            groups[name] = part.add_subparsers(metavar="PART", required=True)
        elif chosen:
            _fill(part, name)
    _check_name(parser, words)
    return parser


def _fill(part: argparse.ArgumentParser, name: str) -> None:
    module: Any = entry_named(name, COMMANDS, ENTRY_POINTS, what="command", error=InterpAblateError)
    if name in COMMANDS:
        module = importlib.import_module(f"interp_ablate.cli.{COMMANDS[name][0]}")
    module.add(part)
    part.set_defaults(work=module.run, command=name)
    part.add_argument(
        "--quiet", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _check_name(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Stop at a command, or a part of a group, that there is not."""
    if not words:
        return
    names = command_names()
    asked = " ".join(words[: 2 if words[0] in COMMANDS and not COMMANDS[words[0]][0] else 1])
    if asked not in names:
        parser.error(
            f"unknown command {asked!r}{suggestion(asked, names)}. See interp-ablate --help"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0: done. 1: no candidate passed, or a certificate failed. 2: bad input. 70: a fault of this package.
    130: interrupted, by Ctrl-C or a signal that ends processes. 141: whoever read the output stopped reading.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = "interp-ablate"
    try:
        with _ending_signals_interrupt():
            try:
                args = parser_for(argv).parse_args(argv)
                command = f"interp-ablate {args.command}"
                _quiet_advice()
                with showing(False if args.quiet else None), quiet_libraries():
                    return int(args.work(args))
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where a closed pipe or a full disk still has a message
    except InterpAblateError as error:
        return _told(f"{command}: {error}", BAD_INPUT)
    except BrokenPipeError:
        return _silenced(PIPE_CLOSED)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _told(f"{command}: {error.strerror or error}{place}", BAD_INPUT)
    except KeyboardInterrupt:
        return _told("interrupted; the same command again goes on from what it kept", INTERRUPTED)
    except Exception as error:
        return _told(
            f"{traceback.format_exc()}{command}: a fault of interp-ablate {__version__} ({type(error).__name__}). Please report it with "
            "the lines above; what is finished is kept, and the same command goes on",
            CRASHED,
        )


def _told(message: str, status: int) -> int:
    """The status, after its message; nobody may be left to read it."""
    try:
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silenced(status)
    return status


def _silenced(status: int) -> int:
    """The status, where nobody reads: what the standard streams still hold goes nowhere, at exit too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    return status


@contextmanager
def _ending_signals_interrupt() -> Iterator[None]:
    """Other signals that end a process raise KeyboardInterrupt too, where nothing else was arranged."""
    before: dict[Any, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_advice() -> None:
    """Advice of the libraries below would drown our own words."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # TransformerLens imports it, and on a CPU it warns of a kernel that no command runs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    lines = LogLines()
    lines.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])


if __name__ == "__main__":
    sys.exit(main())
