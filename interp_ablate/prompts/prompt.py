"""One prompt with its system message, and text helpers.

Knows: texts as they are compared. Does not know: contrast sets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from interp_ablate.errors import PromptError

_SHOWN = 3  # how many offending prompts a message quotes


@dataclass(frozen=True)
class Prompt:
    """One instruction, and the system prompt that goes with it.

    `system=None` leaves the system turn to the chat template (which may insert its own default);
    `system=""` is an explicit, empty system turn.

    Raises:
        PromptError: the text is not a string, is blank, or cannot be encoded as UTF-8.
    """

    text: str
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.system, (str, type(None))):
            raise PromptError(
                f"a prompt is text with an optional system text, got {self.text!r} "
                f"({type(self.text).__name__}) and {self.system!r}: pass strings"
            )
        if not self.text.strip():
            raise PromptError("an empty prompt: every prompt needs some text; remove the blank one")
        try:
            f"{self.system}{self.text}".encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {quote(self)} is not valid Unicode ({error.reason}): "
                "remove the lone surrogate, most often half of an emoji"
            ) from error


def normalised(prompt: Prompt) -> str:
    """The key under which two prompts are the same: case, Unicode form and white space folded."""
    parts = (prompt.system or "", prompt.text)
    return "\x1f".join(
        " ".join(unicodedata.normalize("NFC", part).casefold().split()) for part in parts
    )


def quote(*prompts: Prompt) -> str:
    """A few prompts, shortened, for a message."""
    shown = [repr(p.text if len(p.text) <= 80 else p.text[:77] + "...") for p in prompts]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


def distinct(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The prompts without repeats (normalised), each at its first place."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(normalised(prompt), prompt)
    return tuple(first.values())


def repeated(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """What `distinct` leaves out."""
    seen: set[str] = set()
    again = []
    for prompt in prompts:
        key = normalised(prompt)
        if key in seen:
            again.append(prompt)
        seen.add(key)
    return tuple(again)


PromptLike = Prompt | str | Sequence[int]


def as_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """A list of prompts; one text or Prompt is one prompt, not a list of its characters."""
    return [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)  # type: ignore[arg-type]
