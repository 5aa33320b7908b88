"""`chat`: a conversation with the edited model in a terminal.

Knows: the commands of the conversation and what is printed. Does not know: how an answer is made.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import ModelSettings, load, loading_of_run, tell
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.settings import setting

HELP = """\
/plan NAME     answer under that plan: of the run (chosen, added, or one in plans/), or a file
/plan          which plans there are
/strength X    the plan's strengths and coefficients times X
/unedited      answer without a plan; /plan NAME goes back
/clear         forget what was said
/help          these lines
/quit          end (so does Ctrl-D)"""


@dataclass(frozen=True)
class Chat(ModelSettings):
    """With which model, under which plan."""

    run: str | None = setting(
        None, "run folder: its model, and its chosen plan to begin with", positional=True
    )
    plan: str | None = setting(None, "plan to begin with: a name in the run folder, or plan JSON")
    system: str | None = setting(None, "system prompt", empty=True)
    max_new_tokens: int = setting(256, "tokens of an answer, at most", least=1)
    temperature: float = setting(0.0, "0 answers greedily; above, tokens are sampled", least=0)
    seed: int = setting(0, "of the sampling")


add = adding(Chat)


def run(args: Namespace) -> int:
    """Read lines from standard input, and print answers until it ends."""
    from interp_ablate.models.conversation import Conversation
    from interp_ablate.models.rendering import require_room
    from interp_ablate.prompts.prompt import Prompt
    from interp_ablate.runs.kept_plans import plan_names

    settings = settings_from(args, Chat)
    if settings.run:
        settings = settings_from(args, Chat, under=settings_of_run(settings.run))
    elif not settings.model:
        raise RunError("give a run folder; or --model, with or without --plan")
    names = plan_names(settings.run) if settings.run else []
    first = settings.plan or ("chosen" if "chosen" in names else None)
    plan = named_plan(settings.run, first) if first else None
    model = load(settings, settings.model)
    require_room(model, Prompt("Hi", settings.system), settings.max_new_tokens)
    conversation = Conversation(
        model, settings.system, settings.max_new_tokens, settings.temperature, settings.seed
    )
    talk = _Talk(conversation, settings.run, names, first, plan)
    tell(args, f"{talk.state}. /help lists the commands")
    talk.until_the_end(prompted=sys.stdin.isatty())
    return 0


def settings_of_run(folder: str) -> dict[str, Any]:
    """How a run's model is loaded.

    Raises:
        RunError: no run folder.
    """
    from interp_ablate.runs.run_folder import read_run

    saved = read_run(folder)
    if saved is None:
        raise RunError(f"{folder} holds no run.json: it is not a run folder")
    return loading_of_run(saved)


def named_plan(folder: str | None, name: str) -> Any:
    """A plan by its name in the run folder, or in a file of its own.

    Raises:
        RunError: neither is there.
        PlanError: a file that is no plan.
    """
    from interp_ablate.edits.plan import Plan
    from interp_ablate.runs.kept_plans import plan_named, plan_names

    if folder and (name in plan_names(folder) or not Path(name).is_file()):
        return plan_named(folder, name)
    return Plan.load(name)


@dataclass
class _Talk:
    """A conversation with the plan in force; `/` begins a command."""

    conversation: Any
    folder: str | None
    names: list[str]
    name: str | None
    plan: Any
    strength: float = 1.0
    edited: bool = field(default=True)

    @property
    def state(self) -> str:
        """Which plan is in force, in words."""
        if self.plan is None or not self.edited:
            return "unedited"
        return f"plan {self.name}" + (f" times {self.strength:g}" if self.strength != 1 else "")

    @property
    def in_force(self) -> Any:
        """The plan that the next answer is under, or None."""
        if self.plan is None or not self.edited:
            return None
        return self.plan if self.strength == 1 else self.plan.times(self.strength)

    def until_the_end(self, *, prompted: bool) -> None:
        """Answer line after line; what is wrong with one is said in one line, and the next is read."""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a prompt with such a byte is refused
        while True:
            if prompted:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or line.strip() in ("/quit", "/exit"):
                return
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    print(self.command(line.strip()), flush=True)
                else:
                    self.answer(line.rstrip("\r\n"))
            except InterpAblateError as error:
                print(f"{error}", file=sys.stderr, flush=True)

    def answer(self, text: str) -> None:
        """Print the answer as it is made; Ctrl-C drops it and the question."""
        try:
            for piece in self.conversation.say(text, self.in_force):
                print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(stopped: this turn is forgotten)", flush=True)

    def command(self, line: str) -> str:
        """Do what a line with `/` asks for; what to print.

        Raises:
            RunError: no such command, no such plan, no number.
        """
        word, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "plan": self._take_plan,
            "strength": self._take_strength,
            "unedited": self._take_none,
            "clear": self._clear,
            "help": lambda _: HELP,
        }
        if word not in commands:
            raise RunError(f"no command /{word}: there are /{', /'.join(commands)} and /quit")
        return commands[word](rest.strip())

    def _take_plan(self, name: str) -> str:
        if not name:
            listed = ", ".join(self.names) or "none by name: give a file"
            return f"{self.state}; plans: {listed}"
        plan = named_plan(self.folder, name)
        self.plan, self.name, self.strength, self.edited = plan, name, 1.0, True
        return self.state

    def _take_strength(self, text: str) -> str:
        try:
            strength = float(text)
        except ValueError as error:
            raise RunError(
                f"/strength takes a number, such as /strength 0.5; got {text!r}"
            ) from error
        if self.plan is None:
            raise RunError("there is no plan: /plan NAME takes one")
        self.plan.times(strength)  # refused here, where it is asked for
        self.strength, self.edited = strength, True
        return self.state

    def _take_none(self, _: str) -> str:
        self.edited = False
        return self.state

    def _clear(self, _: str) -> str:
        self.conversation.turns.clear()
        return "what was said is forgotten"
