"""Thoughts in what a model writes: where they begin and end in tokens, and what of it is read.

Knows: the tags of a chat format, prompts that open a thought, budgets of tokens. Does not know: decoding, or scores.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from interp_ablate.display import html_table, shortened
from interp_ablate.errors import PromptError
from interp_ablate.prompts.chat_format import ChatFormat, ReadPart
from interp_ablate.prompts.chat_template import (
    encode,
    has_template,
    suffix_length,
    template_text,
    thought_form,
)
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.thoughts import KNOWN_TAGS, Tags, is_open, thought_places

_END_WITHIN = 32  # tokens in which an end tag, and what was cut before it, have room


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt, as its thought and its answer."""

    tokens: tuple[int, ...]
    """The tokens of `text`, without the end-of-sequence token."""
    text: str
    """The part that is read: the answer, or the thought where the chat format says so."""
    finished: bool
    """True where the answer ended by itself, False where the limit of new tokens cut it."""
    thought: str = ""
    """What was thought before the answer, without its tags."""
    lead: tuple[int, ...] = ()
    """The tokens between the prompt and `tokens`: the thought with its tags."""
    answer: str | None = ""
    """The answer's text; None where a thought was begun and never ended, which is no answer."""

    def __repr__(self) -> str:
        end = "finished" if self.finished else "cut"
        thought = f", after a thought of {len(self.lead)} tokens" if self.lead else ""
        none = ", no answer" if self.answer is None else ""
        return f"Generation({shortened(self.text, 80)!r}, {len(self.tokens)} tokens, {end}{thought}{none})"

    def _repr_html_(self) -> str:
        end = "by itself" if self.finished else "at the limit of tokens"
        if not self.thought:
            return html_table(("answer", "tokens", "ended"), [(self.text, len(self.tokens), end)])
        row = (self.thought, self.answer or "none", len(self.tokens), end)
        return html_table(("thought", "answer", "tokens", "ended"), [row])


def has_thought(generation: Generation) -> bool:
    """True where a model thought before its answer, or instead of one."""
    return bool(generation.lead) or generation.answer is None


@dataclass(frozen=True)
class Thinking:
    """How thoughts are told from answers after a model's prompts.

    Args:
        tokenizer: None where the model has none: then nothing is a thought.
    """

    tokenizer: Any
    chat_format: ChatFormat

    @cached_property
    def own_tags(self) -> tuple[Tags, ...]:
        """The tags that the chat format or its template names; none for a model that does not think."""
        if self.chat_format.thought_tags is not None:
            return (self.chat_format.thought_tags,)
        if self.tokenizer is None or not has_template(self.tokenizer, self.chat_format):
            return ()
        text = template_text(self.tokenizer, self.chat_format)
        named = tuple(tags for tags in KNOWN_TAGS if tags[0] in text or tags[1] in text)
        if not named and re.search("reasoning|think", text):
            form = thought_form(self.tokenizer, self.chat_format)
            if form is not None and all(part.strip() for part in form):
                return ((form[0].strip(), form[1].strip()),)
        return named

    @property
    def tags(self) -> tuple[Tags, ...]:
        """The tags that are looked for."""
        return self.own_tags or KNOWN_TAGS

    @cached_property
    def suffix(self) -> tuple[int, ...]:
        """The tokens at the end of every prompt."""
        if not self.own_tags and not is_open(self.chat_format.response_prefix, KNOWN_TAGS):
            return ()
        length = suffix_length(self.tokenizer, template=self.chat_format)
        return tuple(encode(Prompt("Hi"), self.tokenizer, template=self.chat_format)[-length:])

    @cached_property
    def opens(self) -> bool:
        """True where every prompt ends inside a thought."""
        return is_open(self._raw(self.suffix), self.tags)

    @cached_property
    def thinks(self) -> bool:
        """True where the model may begin a thought: its format names tags, and its prompts do not close them."""
        text = self._raw(self.suffix)
        return self.opens or (bool(self.own_tags) and not any(end in text for _, end in self.tags))

    def is_opened(self, row: Sequence[int]) -> bool:
        """True where a prompt of these tokens ends inside a thought."""
        n = len(self.suffix)
        if not n or tuple(row[-n:]) == self.suffix:
            return bool(n) and self.opens
        text = self._raw(row[-_END_WITHIN:]).rstrip()
        return any(text.endswith(start) for start, _ in self.tags)

    def before(self, row: Sequence[int]) -> list[int]:
        """The tokens between a prompt and a text that is read after it, which a thought has no part in.

        An answer comes after the end of a thought that the prompt has opened, a thought after its first tag.
        """
        opened, text = self.is_opened(row), self._raw(row[-_END_WITHIN:])
        if opened == (self.chat_format.read == "thought"):
            return []
        if opened:
            end = next((end for start, end in self.tags if text.rfind(start) > text.rfind(end)), "")
            between = f"\n{end}\n\n"
        else:
            between = f"{self.tags[0][0]}\n"
        return list(self.tokenizer(between, add_special_tokens=False)["input_ids"])

    def generation(self, tokens: Sequence[int], finished: bool, *, opened: bool) -> Generation:
        """What was written after a prompt, in parts."""
        tokens = tuple(tokens)
        raw = self._raw(tokens)
        places = thought_places(raw, self.tags, opened=opened)
        if places is None:
            text = self._plain(tokens)
            if self.chat_format.read == "thought":
                return Generation((), "", finished, "", (), text)
            return Generation(tokens, text, finished, "", (), text)
        begin, end = (self._token_at(tokens, place) for place in places[:2])
        thought = self._plain(tokens[begin:end]).strip()
        answer: str | None = None
        after: tuple[int, ...] = ()
        if places[2] is not None:
            first = self._token_at(tokens, places[2])
            shared = self._raw(tokens[:first])[places[2] :]  # of a token that the tag ends in
            answer = shared + self._plain(tokens[first:])
            after = tokens[first - 1 :] if shared else tokens[first:]
        if self.chat_format.read == "thought":
            return Generation(
                tokens[begin:end],
                thought,
                finished or answer is not None,
                thought,
                tokens[:begin],
                answer,
            )
        lead = tokens[: len(tokens) - len(after)]
        return Generation(after, answer or "", finished, thought, lead, answer)

    def budget(
        self,
        opened: Sequence[bool],
        max_new_tokens: int,
        settled: Callable[[str], bool] | None = None,
    ) -> Budget:
        """Counts for rows of which some have a thought open.

        Args:
            settled: ends an answer whose text so far it is true of. Models that think are not asked: what is
                read of them is known at the end.
        """
        whole = any(opened) or self.thinks or self.chat_format.read == "thought"
        return Budget(self, tuple(opened), max_new_tokens, None if whole else settled)

    def no_answer_next(self, why: str) -> str:
        """The message where first-token scores are asked for and what comes next is a thought."""
        ways = ways_to_answer_at_once(self.tokenizer, self.chat_format)
        return (
            f"{why}: the first token after the prompt is one of the thought, not the answer's, and first-token "
            f"scores (target log-odds, KL) would be of the thought. Give {ways}"
        )

    def _token_at(self, tokens: Sequence[int], place: int) -> int:
        """The number of tokens whose text reaches a place in the whole text."""
        return bisect_left(range(len(tokens) + 1), place, key=lambda n: len(self._raw(tokens[:n])))

    def _raw(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones too."""
        return self.tokenizer.decode(list(tokens)) if self.tokenizer is not None and tokens else ""

    def _plain(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer else ""


class Budget:
    """Whether rows may go on: a thought has its own limit of tokens, an answer `max_new_tokens`."""

    def __init__(
        self,
        thinking: Thinking,
        opened: tuple[bool, ...],
        max_new_tokens: int,
        settled: Callable[[str], bool] | None = None,
    ) -> None:
        self._thinking, self._opened, self._most = thinking, opened, max_new_tokens
        self._settled = settled
        apart = any(opened) or thinking.thinks
        self._of_thought = thinking.chat_format.max_thought_tokens if apart else 0
        # the number of tokens before the answer; None while it is not begun
        self._answer: dict[int, int | None] = {} if apart else dict.fromkeys(range(len(opened)), 0)

    @property
    def most(self) -> int:
        """New tokens of a row, at most."""
        return self._most + self._of_thought

    def is_spent(self, row: int, tokens: Sequence[int]) -> bool:
        """True where a row that has these new tokens ends here."""
        start = self._answer.get(row)
        if start is None:
            start = self._begun(row, tokens)
        if start is None:
            return len(tokens) >= self._of_thought
        if self._settled is not None and self._settled(self._thinking._plain(tokens)):
            return True
        return len(tokens) - start >= self._most

    def part(self, row: int, tokens: Sequence[int]) -> ReadPart:
        """What the last of a row's new tokens is part of; asked after `is_spent`."""
        start = self._answer.get(row)
        return "thought" if start is None or len(tokens) <= start else "answer"

    def _begun(self, row: int, tokens: Sequence[int]) -> int | None:
        """The number of tokens before the answer; None inside a thought, or where there may be one yet."""
        text = self._thinking._raw(tokens[-_END_WITHIN:])
        for _, end in self._thinking.tags:
            _, closed, after = text.rpartition(end)
            if closed and not after.strip():
                return len(tokens)
            if closed:
                return self._answer.setdefault(row, len(tokens) - 1)
        if self._opened[row]:
            return None
        start = self._thinking._raw(tokens[:_END_WITHIN]).lstrip()
        if any(start.startswith(tag) or tag.startswith(start) for tag, _ in self._thinking.tags):
            return None
        return self._answer.setdefault(row, 0)


def ways_to_answer_at_once(tokenizer: Any, chat_format: ChatFormat) -> str:
    """The options, in words, with which prompts end where the answer begins."""
    tags = Thinking(tokenizer, chat_format)
    ways = []
    if has_template(tokenizer, chat_format):
        text = template_text(tokenizer, chat_format)
        for name in sorted(set(re.findall(r"\b\w*(?:think|reason)\w*\b", text))):
            args = {**chat_format.template_args, name: False}
            try:
                off = Thinking(tokenizer, replace(chat_format, template_args=args))
                if not off.thinks:
                    ways.append(
                        f"--template-arg {name}=false (the template then closes the thought)"
                    )
            except PromptError:
                continue
    start, end = tags.tags[0]
    prefix = end if end.startswith("<|channel|>") else f"\\n{end}\\n\\n"
    if not tags.opens and prefix != end:
        prefix = f"{start}\\n{prefix}"
    ways.append(f"--response-prefix '{prefix}' (an empty thought)")
    return ", or ".join(ways)
