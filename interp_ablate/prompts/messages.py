"""Messages of a chat: roles by their many names, text out of content parts.

Knows: one message. Does not know: files, conversations, or chat templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from interp_ablate.errors import PromptError

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"
    ),
}  # type: ignore[dict-item]
TEXT_PART_TYPES = ("text", "input_text", "output_text")
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
"""The keys of a message's role and text, in the layouts that chat files have."""


@dataclass(frozen=True)
class Message:
    """One message: who says it, and what."""

    role: Role
    content: str
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What chat templates read besides (KEPT_KEYS), such as `tool_calls`."""

    @property
    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates and trainers take it."""
        return {"role": self.role, "content": self.content, **self.more}

    @property
    def thought(self) -> str:
        """What was thought before the answer, where it has a key of its own (THOUGHT_KEYS)."""
        own = (self.more.get(key) for key in THOUGHT_KEYS)
        return next((text for text in own if isinstance(text, str)), "")

    @property
    def calls_tools(self) -> bool:
        """True for a message that calls tools, whatever it says besides."""
        return "tool_calls" in self.more


THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
KEPT_KEYS = (*THOUGHT_KEYS, "tool_calls", "tool_call_id", "name")


def is_message(entry: Any) -> bool:
    """True for a mapping with a role, under one of MESSAGE_KEYS."""
    return isinstance(entry, Mapping) and any(role in entry for role, _ in MESSAGE_KEYS)


def is_chat(value: Any) -> bool:
    """True for a list of messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(map(is_message, value))
    )


def role_of(name: Any, place: str) -> Role:
    """The role that a name stands for.

    Raises:
        PromptError: none.
    """
    role = ROLES.get(name.casefold()) if isinstance(name, str) else None
    if role is None:
        raise PromptError(
            f"{place}: the role {name!r:.60} is not known; known are {', '.join(ROLES)}"
        )
    return role


def text_of(content: Any, place: str) -> str:
    """The text of a message's content: itself, or its text parts, a line each.

    Raises:
        PromptError: anything else, such as an image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(
            f"{place} is {content!r:.60}: text, or a list of text parts, belongs there"
        )
    parts = []
    for i, part in enumerate(content):
        if isinstance(part, dict) and part.get("type", "text") in TEXT_PART_TYPES:
            part = part.get("text")
        if not isinstance(part, str):
            raise PromptError(f"{place}[{i}] is {part!r:.60}: only text parts are read")
        parts.append(part)
    return "\n".join(parts)


def message_of(entry: Any, place: str) -> Message:
    """A message of a list of messages.

    Raises:
        PromptError: no message, an unknown role, no text.
    """
    keys = next((keys for keys in MESSAGE_KEYS if is_message(entry) and keys[0] in entry), None)
    if keys is None:
        came = (
            f"has the keys {', '.join(entry)}" if isinstance(entry, dict) else f"is {entry!r:.60}"
        )
        raise PromptError(f"{place} {came}: a message has 'role' and 'content'")
    role, text = keys
    content = entry.get(text)
    more = {key: entry[key] for key in KEPT_KEYS if entry.get(key) not in (None, "", [])}
    if content is None and "tool_calls" in more:
        content = ""  # its words are in the calls
    return Message(role_of(entry[role], place), text_of(content, f"{place}.{text}"), more)
