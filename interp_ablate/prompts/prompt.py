"""One prompt with its system message and the turns before it, and text helpers.

Knows: texts as they are compared, and chats as prompts. Does not know: contrast sets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.chat_format import check_args
from interp_ablate.prompts.messages import Message, is_chat, message_of

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # control, zero-width and space characters
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
    history: tuple[Message, ...] = ()
    """The turns of the chat between the system prompt and the text."""
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the chat template for this prompt, before those of the model's chat format."""
    response_prefix: str | None = None
    """Text that the answer starts with; None: that of the model's chat format."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.system, (str, type(None))):
            raise PromptError(
                f"a prompt is text with an optional system text, got {self.text!r} "
                f"({type(self.text).__name__}) and {self.system!r}: pass strings"
            )
        if is_blank(self.text):
            raise PromptError(
                f"an empty prompt ({self.text!r}): every prompt needs some text that can be seen; remove "
                "the blank one"
            )
        check_args(self.template_args)
        try:
            "".join((str(self.system), self.text, *(m.content for m in self.history))).encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {quote(self)} is not valid Unicode ({error.reason}): "
                "remove the lone surrogate, most often half of an emoji"
            ) from error

    @property
    def parts(self) -> list[Any]:
        """Plain data that tells prompts apart: text, system prompt, the turns before, and how it is rendered."""
        own = {"template_args": dict(self.template_args), "response_prefix": self.response_prefix}
        rendered = [own] if self.template_args or self.response_prefix is not None else []
        return [self.text, self.system, *(m.as_dict for m in self.history), *rendered]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole prompt as chat templates take it."""
        system = [] if self.system is None else [Message("system", self.system)]
        return [m.as_dict for m in (*system, *self.history, Message("user", self.text))]

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """A chat that is open for an answer: a list of {"role": ..., "content": ...}.

        A system message in front is the prompt's own; the user's last message is its text.

        Raises:
            PromptError: no message, an unknown role, something else than text; a chat that does not end
                with the user.
        """
        if not is_chat(messages):
            raise PromptError(
                f"a chat is a list of messages, each with 'role' and 'content'; got {messages!r:.120}"
            )
        chat = [message_of(entry, f"messages[{i}]") for i, entry in enumerate(messages)]
        *before, last = chat
        if last.role != "user":
            raise PromptError(
                f"the chat ends with the {last.role}'s message: a prompt ends with the user's, and the "
                "answer is left out"
            )
        system = before.pop(0).content if before and before[0].role == "system" else None
        return cls(last.content, system, tuple(before))


def is_blank(text: str) -> bool:
    """True for a text of which nothing can be seen: spaces, control and zero-width characters."""
    return all(unicodedata.category(c) in _UNSEEN for c in text)


def normalised(prompt: Prompt) -> str:
    """The key under which two prompts are the same: case, Unicode form and white space folded."""
    before = (part for m in prompt.history for part in (m.role, m.content))
    rendered = map(str, prompt.parts[2 + len(prompt.history) :])
    parts = (prompt.system or "", *before, prompt.text, *rendered)
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


PromptLike = Prompt | str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A prompt: its text, a `Prompt`, a chat (a list of messages), or token ids."""


def as_prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """A list of prompts; one text, `Prompt` or chat is one prompt, not a list of its parts."""
    one = isinstance(prompts, (str, Prompt)) or is_chat(prompts)
    return [prompts] if one else list(prompts)  # type: ignore[arg-type, list-item]


def as_prompt(prompt: PromptLike, system: str | None = None) -> Prompt:
    """A text, `Prompt` or chat as a `Prompt`; `system` is for those without their own.

    Raises:
        PromptError: see `Prompt`.
    """
    if is_chat(prompt):
        prompt = Prompt.from_messages(prompt)  # type: ignore[arg-type]
    if isinstance(prompt, Prompt):
        return replace(prompt, system=system) if prompt.system is None else prompt
    return Prompt(prompt, system)  # type: ignore[arg-type]


def text_of_prompt(prompt: PromptLike) -> str:
    """A prompt as a reader sees it: its text, or its token ids."""
    if isinstance(prompt, (str, Prompt)) or is_chat(prompt):
        return as_prompt(prompt).text
    return f"tokens {' '.join(map(str, prompt))}"
