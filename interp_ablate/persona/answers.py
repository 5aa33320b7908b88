"""Rollouts and their requests, and the file that holds them.

Knows: answers, verdicts and their lines. Does not know: how answers are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PromptError, RunError
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse

FORMAT = "interp_ablate.rollouts/1"


@dataclass(frozen=True)
class RolloutRequest:
    """One answer to be written."""

    key: dict[str, Any]
    """The purpose of the answer, as plain data: its condition or side, the question's number, ..."""
    prompt: Prompt
    plan: Plan | None = None


@dataclass(frozen=True)
class Rollout:
    """The answer to a request."""

    key: dict[str, Any]
    prompt: Prompt
    tokens: tuple[int, ...]
    """Without the end token."""
    text: str
    finished: bool
    score: float | None = None
    """0 to 100; None where there is no verdict, as for every empty answer."""
    coherence: float | None = None
    """0 to 100; None where there is no verdict, and 0 for an empty answer."""

    @property
    def exchange(self) -> PromptResponse:
        return PromptResponse(self.prompt, self.text)


def with_verdicts(answer: Rollout, score: float | None, coherence: float | None) -> Rollout:
    return replace(answer, score=score, coherence=coherence if answer.text.strip() else 0.0)


def verdict_key(what: str, identity: Mapping[str, Any]) -> str:
    """The name of a scorer in the lines of its verdicts: `what` and a hash of the scorer's identity."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return f"{what}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# Raised by `take_line` for a line that is neither an answer nor verdicts.
BROKEN_LINE = (KeyError, IndexError, TypeError, ValueError, PromptError)


def take_line(
    line: dict[str, Any],
    written: dict[int, Rollout],
    verdicts: dict[tuple[str, int], float | None],
) -> int | None:
    """Add a line's answer, whose number is returned, to `written`, or its verdicts to `verdicts`."""
    if "answer" not in line:
        for number, value in zip(line["scored"], line["values"], strict=True):
            verdicts[line["by"], number] = value
        return None
    number = int(line["answer"])
    prompt, tokens = Prompt(line["question"], line["system"]), tuple(line["tokens"])
    written[number] = Rollout(line["key"], prompt, tokens, line["text"], line["finished"])
    return number


def read_answers(
    path: str | Path, *, scorer: Mapping[str, Any], coherence: Mapping[str, Any]
) -> list[Rollout]:
    """Read the answers of a file, with the verdicts of the scorers of these identities.

    A last line that was never finished is left out; nothing is written.

    Raises:
        RunError: no such file, a corrupt line (its number), no verdict of one of the scorers.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(
            f"cannot read rollouts from {path}: {error.strerror}. `interp-ablate persona extract` "
            "writes them"
        ) from error
    written: dict[int, Rollout] = {}
    verdicts: dict[tuple[str, int], float | None] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if number > 1:
                take_line(line, written, verdicts)
            elif line["format"] != FORMAT:
                raise ValueError(f"the format is {line['format']!r}; accepted is {FORMAT!r}")
        except BROKEN_LINE as error:
            raise RunError(f"{path}, line {number}: not a line of rollouts ({error!r})") from error
    by = verdict_key("score", scorer), verdict_key("coherence", coherence)
    lacking = set(by) - {name for name, _ in verdicts}
    if lacking and any(answer.text.strip() for answer in written.values()):
        raise RunError(
            f"{path} holds no verdicts of the scorers that are asked for ({', '.join(sorted(lacking))}): "
            "it is of another persona, or its scoring was never finished; extract the persona again"
        )
    return [
        with_verdicts(answer, *(verdicts.get((name, number)) for name in by))
        for number, answer in sorted(written.items())
    ]
