"""Thoughts: what thinking models write before an answer, and the tags around it.

Knows: tags that templates use, and the parts of a text. Does not know: tokens, or how a template is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence

Tags = tuple[str, str]
KNOWN_TAGS: tuple[Tags, ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
"""Tags by which thoughts are known in any text."""


def thought_places(
    text: str, tags: Sequence[Tags] = KNOWN_TAGS, *, opened: bool = False
) -> tuple[int, int, int | None] | None:
    """Where in a text the thought begins and ends, and the answer begins; None where nothing is thought.

    The first tag may be in the prompt: then everything before the second is the thought. A thought that never
    ends has no answer (None).

    Args:
        opened: the prompt has opened a thought: without a second tag the whole text is it.
    """
    first = len(text) - len(text.lstrip())
    for start, end in tags:
        if end not in text and not text.startswith(start, first):
            continue
        head, closed, tail = text.partition(end)
        lead = len(head) - len(head.lstrip())
        begins = head.startswith(start, lead)
        begin = lead + len(start) if begins else 0
        if closed and (begins or start not in head):
            return begin, len(head), len(text) - len(tail.lstrip())
        if begins and not closed:
            return begin, len(text), None
    return (0, len(text), None) if opened else None


def split_thought(
    text: str, tags: Sequence[Tags] = KNOWN_TAGS, *, opened: bool = False
) -> tuple[str, str]:
    """The thought in front of an answer, and the answer; see `thought_places`."""
    places = thought_places(text, tags, opened=opened)
    if places is None:
        return "", text
    begin, end, answer = places
    return text[begin:end].strip(), "" if answer is None else text[answer:]


def is_open(text: str, tags: Sequence[Tags]) -> bool:
    """True where a text opens a thought and does not close it."""
    return any(text.rfind(start) > text.rfind(end) for start, end in tags)
