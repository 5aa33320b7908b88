"""The types of chat data: messages, samples, preference pairs, and the key layouts that name them.

Knows: roles and layouts. Does not know: files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.storage.json_rows import RowFileError
from interp_ablate.storage.row_writers import as_json

Role = Literal["system", "user", "assistant", "tool"]
Turns = Literal["any", "last", "first"]

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


@dataclass(frozen=True)
class Conversation:
    """A layout in which one key holds a list of messages, each with a key for its role and its text."""

    name: str
    role: str
    text: str
    lists: tuple[str, ...] = ("conversations", "conversation", "messages")


@dataclass(frozen=True)
class PreferenceLayout:
    """A layout in which one key holds the prompt (`more`: text that follows it) and another the answer."""

    name: str
    prompt: str
    answer: str
    more: str | None = None
    absent: tuple[str, ...] = ()  # keys that make it another layout


CONVERSATIONS = (
    Conversation("sharegpt", "from", "value"),
    Conversation("messages", "role", "content"),
)
PAIRS = (
    PreferenceLayout("alpaca", "instruction", "output", "input"),
    PreferenceLayout("instruction/response", "instruction", "response", "context"),
    PreferenceLayout("prompt/completion", "prompt", "completion"),
    PreferenceLayout("prompt/response", "prompt", "response"),
    PreferenceLayout("question/answer", "question", "answer"),
    PreferenceLayout("question/response", "question", "response"),
    PreferenceLayout("query/response", "query", "response"),
    PreferenceLayout("input/output", "input", "output", absent=("instruction",)),
)
LAYOUTS = tuple(layout.name for layout in (*CONVERSATIONS, *PAIRS))
SYSTEM_KEYS = ("system", "system_prompt")
PREFERENCE_PROMPTS = ("prompt", "question", "instruction")
LIST_KEYS = tuple(dict.fromkeys(name for layout in CONVERSATIONS for name in layout.lists))
TEXT_PART_TYPES = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Message:
    """Who said what: `role` is system, user, assistant or tool."""

    role: Role
    content: str


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant: the message it is (from 0), and what the user had said before it."""

    index: int
    prompt: str | None
    system: str | None
    answer: str

    @property
    def exchange(self) -> PromptResponse:
        """As scorers take it. Earlier rounds are not in it.

        Raises:
            RowFileError: nobody asked anything before this answer.
        """
        if self.prompt is None or not self.prompt.strip():
            raise RowFileError(f"the answer {self.answer[:60]!r} has no prompt before it")
        return PromptResponse(Prompt(self.prompt, self.system), self.answer)


@dataclass(frozen=True)
class Sample:
    """One conversation: its number in its file (from 1), its messages, and the row as it came.

    `line` is the row's own bytes, where it came from JSON and is unchanged.
    """

    number: int
    messages: tuple[Message, ...]
    raw: Mapping[str, Any] = field(repr=False)
    layout: str
    line: bytes | None = field(default=None, repr=False)

    @property
    def system(self) -> str | None:
        """What the first system message says."""
        return next((m.content for m in self.messages if m.role == "system"), None)

    def turns(self, which: Turns = "any") -> tuple[Turn, ...]:
        """The assistant's answers: all of them, the last or the first."""
        found, prompt, system = [], None, self.system
        for index, message in enumerate(self.messages):
            if message.role == "user":
                prompt = message.content
            elif message.role == "assistant":
                found.append(Turn(index, prompt, system, message.content))
        chosen = {"any": slice(None), "last": slice(-1, None), "first": slice(1)}[which]
        return tuple(found[chosen])

    @property
    def exchange(self) -> PromptResponse:
        """The last answer and the user's message before it; the system prompt is kept.

        Raises:
            RowFileError: there is no answer, or no prompt before it.
        """
        turns = self.turns("last")
        if not turns:
            raise RowFileError(f"sample {self.number} has no answer of the assistant")
        return turns[0].exchange

    @property
    def as_dicts(self) -> list[dict[str, str]]:
        """Messages as chat templates and trainers take them."""
        return [{"role": m.role, "content": m.content} for m in self.messages]

    def without(self, indices: Iterable[int]) -> Sample | None:
        """The sample without the rounds of some messages; None where no answer is left.

        A round is what begins with the user's message (or messages) and ends before the next one's;
        system messages stay.
        """
        rounds = list(_rounds(self.messages))
        gone = {rounds[index] for index in indices}
        kept = [
            i for i, m in enumerate(self.messages) if m.role == "system" or rounds[i] not in gone
        ]
        if len(kept) == len(self.messages):
            return self
        if not any(self.messages[i].role == "assistant" for i in kept):
            return None
        key = next((name for name in LIST_KEYS if isinstance(self.raw.get(name), list)), None)
        if key is None:  # a prompt and its answer: there is no other round
            return None
        before = len(self.messages) - len(
            self.raw[key]
        )  # 1 where the system prompt has its own key
        entries = [self.raw[key][i - before] for i in kept if i >= before]
        raw = {**self.raw, key: entries}
        line = None
        if self.line is not None:
            line = as_json(raw, like=self.line) + self.line[len(self.line.rstrip()) :]
        return replace(self, messages=tuple(self.messages[i] for i in kept), raw=raw, line=line)


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer to prefer and the one not to, as DPO takes them."""

    number: int
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    raw: Mapping[str, Any] = field(repr=False)
    line: bytes | None = field(default=None, repr=False)

    @property
    def as_dict(self) -> dict[str, list[dict[str, str]]]:
        """A row as TRL takes it: three lists of messages."""
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return {
            name: [{"role": m.role, "content": m.content} for m in messages]
            for name, messages in parts.items()
        }


def _rounds(messages: tuple[Message, ...]) -> Iterator[int]:
    """The round of each message; it goes up where the user speaks after someone else."""
    number, before = 0, "user"
    for message in messages:
        if message.role == "user" and before != "user":
            number += 1
        if message.role != "system":
            before = message.role
        yield number
