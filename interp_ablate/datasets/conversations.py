"""The types of chat data: messages, samples, preferences, and the layouts of keys that hold them.

Knows: roles and layouts. Does not know: files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from interp_ablate.prompts.chat_format import ReadPart
from interp_ablate.prompts.messages import Message
from interp_ablate.prompts.prompt import Prompt, is_blank
from interp_ablate.prompts.thoughts import split_thought
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.storage.json_rows import RowFileError
from interp_ablate.storage.row_files import as_json

Turns = Literal["any", "last", "first"]


@dataclass(frozen=True)
class Conversation:
    """A layout in which one key holds a list of messages, each with a key for its role and its text."""

    name: str
    role: str
    text: str
    lists: tuple[str, ...] = ("conversations", "conversation", "messages")


@dataclass(frozen=True)
class AnswerLayout:
    """A layout in which one key holds the prompt and another the answer."""

    name: str
    prompt: str
    answer: str
    more: str | None = None
    """Key of text that follows the prompt."""
    absent: tuple[str, ...] = ()
    """Keys that make it another layout."""


CONVERSATIONS = (
    Conversation("sharegpt", "from", "value"),
    Conversation("messages", "role", "content"),
)
ANSWER_LAYOUTS = (
    AnswerLayout("alpaca", "instruction", "output", "input"),
    AnswerLayout("instruction/response", "instruction", "response", "context"),
    AnswerLayout("prompt/completion", "prompt", "completion"),
    AnswerLayout("prompt/response", "prompt", "response"),
    AnswerLayout("question/answer", "question", "answer"),
    AnswerLayout("question/response", "question", "response"),
    AnswerLayout("query/response", "query", "response"),
    AnswerLayout("input/output", "input", "output", absent=("instruction",)),
)
LAYOUTS = tuple(layout.name for layout in (*CONVERSATIONS, *ANSWER_LAYOUTS))
SYSTEM_KEYS = ("system", "system_prompt")
PREFERENCE_PROMPTS = ("prompt", "question", "instruction")
MORE_KEYS = ("input", "context")
"""Keys of text that follows a preference's prompt."""
LIST_KEYS = tuple(dict.fromkeys(name for layout in CONVERSATIONS for name in layout.lists))


@dataclass(frozen=True)
class Turn:
    """One answer of the assistant."""

    index: int
    """Number of the message, from 0."""
    prompt: str | None
    """The user's message, or messages, before it."""
    system: str | None
    """The system message that was the last before it."""
    answer: str
    """Its words without the thought in front of them; or the thought, where that is read."""

    @property
    def is_asked(self) -> bool:
        """True if there is a prompt that can be seen."""
        return self.prompt is not None and not is_blank(self.prompt)

    @property
    def exchange(self) -> PromptResponse:
        """The prompt and the answer, as scorers take them. Earlier rounds are left out.

        Raises:
            RowFileError: nobody asked anything before this answer.
        """
        if not self.is_asked:
            raise RowFileError(f"the answer {self.answer[:60]!r} has no prompt before it")
        return PromptResponse(Prompt(str(self.prompt), self.system), self.answer)


@dataclass(frozen=True)
class Sample:
    """One conversation of a file."""

    number: int
    """Its line, entry or row in the file, from 1."""
    messages: tuple[Message, ...]
    raw: Mapping[str, Any] = field(repr=False)
    """The row as it came."""
    layout: str
    line: bytes | None = field(default=None, repr=False)
    """The row's own bytes, where it came from JSON and is unchanged."""

    @property
    def system(self) -> str | None:
        """The text of the first system message."""
        return next((m.content for m in self.messages if m.role == "system"), None)

    def turns(self, which: Turns = "any", *, read: ReadPart = "answer") -> tuple[Turn, ...]:
        """The assistant's answers: all of them, the last or the first. A message of tool calls is none.

        Args:
            read: "thought" gives the thought before each answer in the answer's place.
        """
        turns: list[Turn] = []
        asked: list[str] = []
        system, before = None, ""
        for index, message in enumerate(self.messages):
            if message.role == "user":
                asked = [*asked, message.content] if before == "user" else [message.content]
            elif message.role == "system":
                system = message.content
            elif message.role == "assistant" and (message.content or not message.calls_tools):
                prompt = "\n\n".join(asked) if asked else None
                thought, answer = split_thought(message.content)
                text = answer if read == "answer" else thought or message.thought
                turns.append(Turn(index, prompt, system, text))
            before = before if message.role == "system" else message.role
        chosen = {"any": slice(None), "last": slice(-1, None), "first": slice(1)}[which]
        return tuple(turns[chosen])

    @property
    def exchange(self) -> PromptResponse:
        """The last answer and the user's message before it; the system prompt is kept.

        Raises:
            RowFileError: there is no answer, or no prompt before it.
        """
        return self.last_turn().exchange

    def last_turn(self, *, read: ReadPart = "answer") -> Turn:
        """The last answer, or the thought before it.

        Raises:
            RowFileError: there is no answer.
        """
        turns = self.turns("last", read=read)
        if not turns:
            raise RowFileError(f"sample {self.number} has no answer of the assistant")
        return turns[0]

    @property
    def as_dicts(self) -> list[dict[str, Any]]:
        """Messages as chat templates and trainers take them."""
        return [message.as_dict for message in self.messages]

    def without(self, indices: Iterable[int]) -> Sample | None:
        """The sample without the rounds of some messages; None where no answer is left.

        A round begins with the user's message (or messages) and ends before the next one's; system
        messages stay.
        """
        rounds = list(_rounds(self.messages))
        gone = {rounds[index] for index in indices}
        left = [
            i for i, m in enumerate(self.messages) if m.role == "system" or rounds[i] not in gone
        ]
        if len(left) == len(self.messages):
            return self
        if not any(self.messages[i].role == "assistant" for i in left):
            return None
        key = next((name for name in LIST_KEYS if isinstance(self.raw.get(name), list)), None)
        if key is None:  # a prompt and its answer: there is no other round
            return None
        # 1 where the system prompt has its own key
        before = len(self.messages) - len(self.raw[key])
        entries = [self.raw[key][i - before] for i in left if i >= before]
        raw = {**self.raw, key: entries}
        line = None
        if self.line is not None:
            line = as_json(raw, like=self.line) + self.line[len(self.line.rstrip()) :]
        return replace(self, messages=tuple(self.messages[i] for i in left), raw=raw, line=line)


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
    def as_dict(self) -> dict[str, list[dict[str, Any]]]:
        """A row as TRL takes it: three lists of messages."""
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return {name: [m.as_dict for m in messages] for name, messages in parts.items()}


def _rounds(messages: tuple[Message, ...]) -> Iterator[int]:
    """The round of each message; it goes up where the user speaks after someone else."""
    number, before = 0, "user"
    for message in messages:
        if message.role == "user" and before != "user":
            number += 1
        if message.role != "system":
            before = message.role
        yield number
