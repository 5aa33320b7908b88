"""Chats as token rows with a loss mask.

Knows: templates and masks. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt
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
    template: str | None = None
    max_length: int = LoraRecipe.max_length

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the messages before an answer, open for it.

        Raises:
            PromptError: what the template cannot render.
        """
        roles = [message["role"] for message in messages]
        if roles in (["user"], ["system", "user"]):
            system = messages[0]["content"] if len(messages) == 2 else None
            prompt = Prompt(messages[-1]["content"], system)
            return encode(prompt, self.tokenizer, template=self.template)
        text = self._rendered(messages, open_ended=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(
        self, messages: Sequence[Mapping[str, str]], answer: str, *, finished: bool = True
    ) -> TrainingRow | None:
        """The tokens of a prompt and its answer; None where the prompt alone fills `max_length`.

        An answer that is not `finished` (a limit of new tokens cut it) gets no end of turn: a model trained
        on one would learn to stop there.
        """
        before = self.prompt(messages)
        room = self.max_length - len(before)
        if room < 1:
            return None
        after = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        after += [self.end_of_turn] if finished else []
        return TrainingRow(tuple(before), tuple(after[:room]), cut=len(after) > room)

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer: what the template writes there, else the end of sequence.

        Raises:
            PromptError: the tokenizer has neither.
        """
        if self.template != "none" and (self.template or self.tokenizer.chat_template):
            mark = "interp ablate"
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
            text = self._rendered(turns, open_ended=False).rpartition(mark)[2]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids[0] in self.tokenizer.all_special_ids:
                return int(ids[0])
        if self.tokenizer.eos_token_id is None:
            raise PromptError(
                "the tokenizer has no end-of-sequence token, and the chat template writes none: a "
                "trained model would never end its answers"
            )
        return int(self.tokenizer.eos_token_id)

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, open_ended: bool) -> str:
        from jinja2.exceptions import TemplateError

        if self.template == "none" or not (self.template or self.tokenizer.chat_template):
            raise PromptError(
                "a conversation of several turns needs a chat template, and the model has none: "
                "give --template, or rows of one prompt and one answer"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_ended,
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template cannot render a conversation of "
                f"{', '.join(m['role'] for m in messages)}: {error}. Change those rows, or the template"
            ) from error
        return str(text)
