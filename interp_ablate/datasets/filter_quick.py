"""A quick look at rows: which of them certainly hold no phrase that a recipe looks for, without a decision on each.

Knows: rows so plain that their answers can be seen at once, and one pass over many answers. Does not know: what
becomes of a row, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from interp_ablate.datasets.conversations import (
    ANSWER_LAYOUTS,
    CONVERSATIONS,
    LIST_KEYS,
    SYSTEM_KEYS,
    AnswerLayout,
    Conversation,
    Sample,
    Turn,
)
from interp_ablate.datasets.filter_recipe import Ask, FilterRecipe
from interp_ablate.datasets.filter_rules import PhraseRule, Rule, RuleValue
from interp_ablate.prompts.messages import KEPT_KEYS, MESSAGE_KEYS, ROLES
from interp_ablate.prompts.thoughts import KNOWN_TAGS, split_thought
from interp_ablate.scoring.prefilter import Prefilter, phrase_patterns
from interp_ablate.scoring.text_folding import fold
from interp_ablate.storage.json_rows import FileRow

_MOST_KEYS = 1000  # different sets of keys that are remembered
_MANY = 200  # thoughts in a batch that make a second look at their answers worth its preparation
_TAGS = tuple(tag for pair in KNOWN_TAGS for tag in pair)
_OTHER_KEYS = frozenset((*KEPT_KEYS, *(role for role, _ in MESSAGE_KEYS)))


class AnswerFilters(NamedTuple):
    """Two looks at the assistant's messages, in which a thought may stand before the answer."""

    message: Prefilter
    """Finds every message whose answer has another number than 0 by some rule, or that may hold a thought."""
    answer: Prefilter
    """Finds every answer that has another number than 0 by some rule."""


def prefilter_of(recipe: FilterRecipe) -> AnswerFilters | None:
    """The looks for a recipe; None where some rule is not about phrases."""
    if recipe.read != "answer":
        return None
    patterns: list[str] = []
    for rule in recipe.rules:
        found = rule.patterns() if isinstance(rule, PhraseRule) else None
        if found is None:
            return None
        patterns += found
    try:
        tags = phrase_patterns(map(fold, _TAGS))
        return AnswerFilters(Prefilter((*tags, *patterns)), Prefilter(patterns))
    except ValueError:
        return None


class QuickLook:
    """Tells rows of a layout that match nothing: every answer has 0 by every rule, and none is empty."""

    def __init__(self, filters: AnswerFilters, layout: str) -> None:
        self.filters = filters
        every = (*CONVERSATIONS, *ANSWER_LAYOUTS)
        self.layout = next(each for each in every if each.name == layout)
        self._plain: dict[tuple[str, ...], tuple[str, tuple[str, ...]] | None] = {}

    def quiet(self, rows: Sequence[FileRow]) -> tuple[list[bool], set[str]]:
        """For each row True where nothing matches, False where that is to be found out.

        Returns:
            That, and the answers of the other rows to which every rule gives 0 too.
        """
        quiet = [False] * len(rows)
        silent: set[str] = set()
        texts: list[str] = []
        places: list[int] = []
        for place, row in enumerate(rows):
            answers = self.answers(row)
            if answers is not None:
                quiet[place] = True
                texts += answers
                places += [place] * len(answers)
        if texts:
            found = self._found(texts)
            for place, something in zip(places, found):
                if something:
                    quiet[place] = False
            silent = {
                text
                for text, place, something in zip(texts, places, found)
                if not (something or quiet[place])
            }
        return quiet, silent

    def _found(self, texts: list[str]) -> list[bool]:
        """Whether an answer may have another number than 0, or may be empty.

        Where many texts hold thoughts, these are cut off in `texts`.
        """
        found = self.filters.message.may_match(texts)
        held = [i for i, may in enumerate(found) if may and any(t in texts[i] for t in _TAGS)]
        if len(held) < _MANY:
            return found
        for i in held:
            texts[i] = split_thought(texts[i])[1]
        for i, may in zip(held, self.filters.answer.may_match([texts[i] for i in held])):
            found[i] = may or not texts[i].strip()
        return found

    def answers(self, row: FileRow) -> list[str] | None:
        """The answers of a plain row, none of them empty; None for a row that is not plain, or has no answer."""
        values, keys = row.values, tuple(row.values)
        if keys not in self._plain:
            if len(self._plain) > _MOST_KEYS:
                self._plain.clear()
            key = self._key(keys)
            others = tuple(name for name in SYSTEM_KEYS if name in keys)
            self._plain[keys] = None if key is None else (key, others)
        if (found := self._plain[keys]) is None:
            return None
        key, others = found
        for name in others:
            if not (values[name] is None or _is_text(values[name])):
                return None
        if isinstance(self.layout, Conversation):
            answers = _said(values[key], self.layout)
        else:
            answers = _answer(values, self.layout)
        if not answers:
            return None
        for text in answers:
            if not text or text.isspace():
                return None
        return answers

    def _key(self, keys: tuple[str, ...]) -> str | None:
        """The key of the conversation or answer in rows with these keys; None where they may fit another layout."""
        lists = [key for key in keys if key in LIST_KEYS]
        pairs = [
            each
            for each in ANSWER_LAYOUTS
            if each.prompt in keys
            and each.answer in keys
            and not any(k in keys for k in each.absent)
        ]
        if isinstance(self.layout, AnswerLayout):
            return self.layout.answer if pairs == [self.layout] and not lists else None
        return lists[0] if len(lists) == 1 and not pairs else None


def asked_without(silent: set[str], ask: Ask) -> Ask:
    """`ask`, but for answers to which rules that look for phrases give 0, as is known."""

    def asking(rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
        if not isinstance(rule, PhraseRule):
            return ask(rule, asked)
        values = iter(ask(rule, [each for each in asked if each[1].answer not in silent]))
        return [RuleValue(0.0) if turn.answer in silent else next(values) for _, turn in asked]

    return asking


def _said(entries: Any, layout: Conversation) -> list[str] | None:
    if type(entries) is not list:
        return None
    role_key, text_key, answers = layout.role, layout.text, []
    for entry in entries:
        if type(entry) is not dict:
            return None
        name, text = entry.get(role_key), entry.get(text_key)
        if type(name) is not str or name not in ROLES or not _is_text(text):
            return None
        if len(entry) != 2 and len(_OTHER_KEYS.intersection(entry)) != 1:  # its role
            return None
        if ROLES[name] == "assistant":
            answers.append(text)
    return answers


def _answer(values: dict[str, Any], layout: AnswerLayout) -> list[str] | None:
    answer = values[layout.answer]
    if not (_is_text(values[layout.prompt]) and _is_text(answer)) or values.get("history"):
        return None
    more = values.get(layout.more) if layout.more else None
    return [answer] if more is None or _is_text(more) else None


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text, without half a character in it."""
    if type(value) is not str:
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
