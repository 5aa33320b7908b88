"""Chats as token rows with a loss mask.

Knows: templates and masks. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.chat_format import TemplateLike, as_chat_format
from interp_ablate.prompts.chat_template import (
    encode,
    has_template,
    probed,
    render_messages,
    thought_form,
)
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.thoughts import KNOWN_TAGS, split_thought
from interp_ablate.training.recipe import LoraRecipe


@dataclass(frozen=True)
class TrainingRow:
    """Tokens of a prompt and its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The tokens that the loss is on."""
    cut: bool = False
    """The answer was too long, and its end is missing."""


@dataclass(frozen=True, eq=False)
class RowTokenizer:
    """Makes rows: the prompt through the chat template, the answer as it is, the turn's end after it."""

    tokenizer: Any = field(repr=False)
    template: TemplateLike = None
    max_length: int = LoraRecipe.max_length

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages before an answer, open for it.

        Raises:
            PromptError: what the template cannot render.
        """
        return self._before(messages)[1]

    def row(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer: str,
        *,
        thought: str = "",
        finished: bool = True,
    ) -> TrainingRow | None:
        """The tokens of a prompt and its answer; None where the prompt alone fills `max_length`.

        A thought goes before the answer in the template's own form, or between think tags where it has none.
        An answer that is not `finished` (a limit of new tokens cut it) gets no end of turn: a model trained
        on one would learn to stop there.
        """
        text, before = self._before(messages)
        room = self.max_length - len(before)
        if room < 1:
            return None
        if (thought or split_thought(answer)[0]) and text.rstrip().endswith(_ENDS):
            raise PromptError(
                f"a sample has a thought ({(thought or answer)[:60]!r}), and the chat format ends thoughts before "
                "the answer: train without the variable or response prefix that does"
            )
        if thought:
            answer = thought.join(self.thought_form) + answer
        after = self._plain_ids(_after_opened_thought(text, answer))
        end = list(self.end_of_turn)
        while after[-len(end) :] == end:  # the data's own
            after = after[: -len(end)]
        after += end if finished else []
        return TrainingRow(tuple(before), tuple(after[:room]), cut=len(after) > room)

    @cached_property
    def end_of_turn(self) -> tuple[int, ...]:
        """The tokens that end an answer: what the template writes there, up to its first token of that kind.

        Where that is text only, or nothing, the tokenizer's end of sequence follows.

        Raises:
            PromptError: there is no such token.
        """
        ids = self._plain_ids(
            probed(self.tokenizer, self.template, {"content": _MARK}).rpartition(_MARK)[2].rstrip()
        )
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for place, token in enumerate(ids):
            if token in special:
                return tuple(ids[: place + 1])
        if self.tokenizer.eos_token_id is None:
            raise PromptError(
                "the tokenizer has no end-of-sequence token, and the chat template writes none: a "
                "trained model would never end its answers"
            )
        return (*ids, int(self.tokenizer.eos_token_id))

    @cached_property
    def thought_form(self) -> tuple[str, str]:
        """What stands before and after a thought, in front of an answer."""
        form = thought_form(self.tokenizer, self.template)
        return form or ("<think>\n", "\n</think>\n\n")

    def _before(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
        """The prompt as text ("" without a template) and as token ids."""
        if has_template(self.tokenizer, self.template):
            text = render_messages(messages, self.tokenizer, template=self.template)
            text += as_chat_format(self.template).response_prefix
            return text, self._plain_ids(text)
        return "", encode(Prompt.from_messages(messages), self.tokenizer, template=self.template)

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


_MARK = "interp ablate"
_ENDS = tuple(end for _, end in KNOWN_TAGS)


def _after_opened_thought(prompt: str, answer: str) -> str:
    """The answer after a prompt that has opened a thought already: the thought's rest, or its end first."""
    for start, end in KNOWN_TAGS:
        if prompt.rstrip().endswith(start):
            thought = answer.lstrip()
            if thought.startswith(start):
                return thought.removeprefix(start).lstrip("\n")
            return answer if end in answer else f"\n{end}\n\n{answer}"
    return answer
