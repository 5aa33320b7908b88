"""Chat data: samples of ShareGPT, messages, Alpaca and prompt/completion files, and preferences.

Knows: which keys make which layout. Does not know: file formats, what a good answer is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_ablate.datasets.conversations import (
    ANSWER_LAYOUTS,
    CONVERSATIONS,
    LAYOUTS,
    LIST_KEYS,
    MORE_KEYS,
    PREFERENCE_PROMPTS,
    SYSTEM_KEYS,
    AnswerLayout,
    Conversation,
    Preference,
    Sample,
)
from interp_ablate.errors import PromptError
from interp_ablate.prompts.messages import Message, Role, is_message, message_of, text_of
from interp_ablate.storage.json_rows import FileRow, MalformedRow, OnMalformed, RowFileError
from interp_ablate.storage.row_files import RowFile, as_json, writing_rows


def read_samples(
    path: str | Path, *, layout: str | None = None, malformed: OnMalformed | None = None
) -> Iterator[Sample]:
    """Read the samples of a file (see `RowFile`) in order, one in memory at a time.

    The first row's keys (or `layout`) say which of LAYOUTS the file has; every row has to have it.
    `malformed` is called with rows that cannot be used, which are then left out.

    Raises:
        RowFileError: a file or row that cannot be used: where it is, what came and what is accepted.
    """
    check_layout(layout)
    return _read(RowFile.at(path), SampleParser(layout), malformed)


def check_layout(layout: str | None) -> None:
    """Refuse the name of a layout that there is not.

    Raises:
        RowFileError: it names those that there are.
    """
    if layout is not None and layout not in LAYOUTS:
        raise RowFileError(f"no layout {layout!r}: there are {', '.join(LAYOUTS)}")


def read_preferences(
    path: str | Path, *, malformed: OnMalformed | None = None
) -> Iterator[Preference]:
    """Read the preferences of a file: a prompt (PREFERENCE_PROMPTS; text or messages), chosen and rejected.

    Chosen and rejected are texts, messages that go on from the prompt, or whole conversations that
    start alike; in the last case the prompt may be left out.

    Raises:
        RowFileError: as `read_samples`.
    """
    return _read(RowFile.at(path), _preference, malformed)


@contextmanager
def writing_samples(path: str | Path, like: str | Path) -> Iterator[Callable[[Sample], None]]:
    """A function that writes samples to `path` in the format of `like`; whole or not at all.

    An unchanged sample of a JSON file is written as the bytes that it came as. What a `datasets` folder
    held is written as parquet.

    Raises:
        RowFileError: `like` cannot be read, or `path` not be written.
    """
    with writing_rows(path, RowFile.at(like)) as write:
        yield lambda sample: write(dict(sample.raw), sample.line)


def _read(
    file: RowFile, parse: Callable[[FileRow], Any], malformed: OnMalformed | None
) -> Iterator[Any]:
    for row in file.rows(malformed):
        try:
            parsed = parse(row)
        except PromptError as error:
            if malformed is None:
                raise RowFileError(f"{file.place(row.number)}: {error}") from error
            line = as_json(row.values) if row.line is None else row.line
            malformed(MalformedRow(row.number, str(error), line))
            continue
        yield parsed


# ---- rows to samples -------------------------------------------------------------------------------


class SampleParser:
    """Makes rows to samples, all of one layout: the one asked for, or the first row's.

    Args:
        first: number of the row that has shown the layout; 0 where it was asked for, or none has.
    """

    def __init__(self, layout: str | None, first: int = 0) -> None:
        self.layout = layout
        self.first = first

    def __call__(self, row: FileRow) -> Sample:
        if any(row.values.get(key) == [] for key in LIST_KEYS):
            raise PromptError("a conversation without messages: remove the row")
        layouts = [name for name in _matching(row.values) if self.layout in (None, name)]
        if len(layouts) != 1:
            raise PromptError(self._why(row.values, layouts))
        [layout] = layouts
        messages = _BY_NAME[layout](row.values)
        if self.layout is None:
            self.layout, self.first = layout, row.number
        _check_unicode(row, messages)
        return Sample(row.number, messages, row.values, layout, row.line)

    def _why(self, values: dict[str, Any], layouts: list[str]) -> str:
        came = f"its keys are {', '.join(map(str, values)) or 'none'}"
        others = _matching(values)
        if len(layouts) > 1:
            return (
                f"{came}, which fits {' and '.join(layouts)}: say which it is by layout= (--layout)"
            )
        if self.layout is not None and others:
            first = f"row {self.first} is" if self.first else "the layout asked for is"
            return f"{came}: its layout is {others[0]}, but {first} {self.layout}: split the file"
        if "chosen" in values and "rejected" in values:
            return f"{came}: a preference, not a sample; read_preferences reads those"
        return f"{came}; accepted are {_ACCEPTED_KEYS}"


def _matching(values: dict[str, Any]) -> list[str]:
    """The layouts that a row's keys fit; for a conversation, also its entries' keys."""
    layouts = []
    for key in LIST_KEYS:
        entries = values.get(key)
        if isinstance(entries, list) and entries:
            first = entries[0]
            layouts += [
                c.name for c in CONVERSATIONS if isinstance(first, dict) and c.role in first
            ]
    for each in ANSWER_LAYOUTS:
        fits = each.prompt in values and each.answer in values
        if fits and not any(key in values for key in each.absent):
            layouts.append(each.name)
    return list(dict.fromkeys(layouts))


def _conversation(layout: Conversation, values: dict[str, Any]) -> tuple[Message, ...]:
    keys = [key for key in layout.lists if isinstance(values.get(key), list)]
    if len(keys) > 1:
        raise PromptError(f"both {' and '.join(keys)} hold a list: leave one")
    messages = _messages(values[keys[0]], keys[0])
    own = _system(values)
    if own is None or any(m.role == "system" for m in messages):
        return messages
    return (Message("system", own), *messages)


def _messages(entries: list[Any], key: str) -> tuple[Message, ...]:
    return tuple(message_of(entry, f"{key}[{i}]") for i, entry in enumerate(entries))


def _pair(layout: AnswerLayout, values: dict[str, Any]) -> tuple[Message, ...]:
    prompt = _side(values[layout.prompt], layout.prompt, "user")
    answer = _side(values[layout.answer], layout.answer, "assistant")
    more = values.get(layout.more) if layout.more else None
    if more not in (None, ""):
        text = "\n\n".join((prompt[-1].content, text_of(more, str(layout.more))))
        prompt = (*prompt[:-1], replace(prompt[-1], content=text))
    if values.get("history"):
        raise PromptError("a history of earlier rounds: write such rows in the messages layout")
    own = _system(values)
    system = () if own is None or prompt[0].role == "system" else (Message("system", own),)
    return (*system, *prompt, *answer)


def _side(value: Any, key: str, role: Role) -> tuple[Message, ...]:
    """A text as one message, or a list of messages as it is."""
    if isinstance(value, list) and value and is_message(value[0]):
        return _messages(value, key)
    return (Message(role, text_of(value, key)),)


def _system(values: dict[str, Any]) -> str | None:
    """The system prompt that a row holds under a key of its own; an empty one is none."""
    key = next((key for key in SYSTEM_KEYS if values.get(key) not in (None, "")), None)
    return None if key is None else text_of(values[key], key)


def _preference(row: FileRow) -> Preference:
    values = row.values
    missing = [key for key in ("chosen", "rejected") if values.get(key) is None]
    if missing:
        came = ", ".join(map(str, values)) or "none"
        raise PromptError(
            f"its keys are {came}: a preference has chosen and rejected, and a prompt "
            f"({', '.join(PREFERENCE_PROMPTS)})"
        )
    chosen = _side(values["chosen"], "chosen", "assistant")
    rejected = _side(values["rejected"], "rejected", "assistant")
    alike = 0
    while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
        alike += 1
    alike = min(alike, len(chosen) - 1, len(rejected) - 1)
    prompt = _prompt_of(values, chosen[:alike])
    own = _system(values)
    if own is not None and prompt[0].role != "system":
        prompt = (Message("system", own), *prompt)
    sides = (chosen[alike:], rejected[alike:])
    if any(side[0].role not in ("assistant", "tool") for side in sides):
        raise PromptError("chosen and rejected do not start with the same prompt")
    if sides[0] == sides[1]:
        raise PromptError("chosen and rejected say the same: remove the row")
    _check_unicode(row, (*prompt, *sides[0], *sides[1]))
    return Preference(row.number, prompt, *sides, values, row.line)


def _prompt_of(values: dict[str, Any], alike: tuple[Message, ...]) -> tuple[Message, ...]:
    """A preference's prompt: that under its own key, with its `input`, or what both answers begin with.

    Raises:
        PromptError: neither is there, or they say different things.
    """
    key = next((k for k in PREFERENCE_PROMPTS if values.get(k) not in (None, "", [])), None)
    if values.get("history"):
        raise PromptError(
            "a history of earlier rounds: write such rows with a list of messages as the prompt"
        )
    if key is None:
        if not alike:
            raise PromptError(f"no prompt: it belongs in {', '.join(PREFERENCE_PROMPTS)}")
        return alike
    prompt = _side(values[key], key, "user")
    more = [values[k] for k in MORE_KEYS if k != key and values.get(k) not in (None, "")]
    if more:
        text = "\n\n".join((prompt[-1].content, *(text_of(each, MORE_KEYS[0]) for each in more)))
        prompt = (*prompt[:-1], replace(prompt[-1], content=text))
    said = [message for message in alike if message.role != "system"]
    if not alike or list(prompt[-len(said) :]) == said:
        return prompt
    if prompt[-1].content.strip() in {message.content.strip() for message in said}:
        return alike
    raise PromptError(
        f"the prompt under {key!r} is not the one that chosen and rejected begin with: leave one of them"
    )


def _check_unicode(row: FileRow, messages: tuple[Message, ...]) -> None:
    if row.line is not None and b"\\ud" not in row.line and b"\\uD" not in row.line:
        return  # the bytes were UTF-8: only an escape can be half a character
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"half a character (a lone surrogate) at {error.start + 1} of the {message.role}'s text, "
                "most often half of an emoji: remove it"
            ) from error


def _parser(
    layout: Conversation | AnswerLayout,
) -> Callable[[dict[str, Any]], tuple[Message, ...]]:
    if isinstance(layout, Conversation):
        return lambda values: _conversation(layout, values)
    return lambda values: _pair(layout, values)


_BY_NAME = {layout.name: _parser(layout) for layout in (*CONVERSATIONS, *ANSWER_LAYOUTS)}
_ACCEPTED_KEYS = "; ".join(
    [f"{c.name}: {c.lists[0]} of {c.role}, {c.text}" for c in CONVERSATIONS]
    + [
        f"{p.name}: {p.prompt}, {p.answer}" + (f" (and {p.more})" if p.more else "")
        for p in ANSWER_LAYOUTS
    ]
)
