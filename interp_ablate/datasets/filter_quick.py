"""A quick look at rows: which of them certainly hold no phrase that a recipe looks for, without a decision on each.

Knows: rows so plain that their answers can be seen at once, and one pass over many answers. Does not know: what
becomes of a row, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from interp_ablate.prompts.thoughts import KNOWN_TAGS
from interp_ablate.scoring.prefilter import Prefilter, phrase_patterns
from interp_ablate.scoring.text_folding import fold
from interp_ablate.storage.json_rows import FileRow

_MOST_KEYS = 1000  # different sets of keys that are remembered
_OTHER_KEYS = frozenset((*KEPT_KEYS, *(role for role, _ in MESSAGE_KEYS)))


def prefilter_of(recipe: FilterRecipe) -> Prefilter | None:
    """What finds every answer that has another number than 0 by some rule; None for rules without such a thing."""
    if recipe.read != "answer":
        return None
    tags = phrase_patterns(fold(tag) for pair in KNOWN_TAGS for tag in pair)  # thoughts are cut off
    patterns = list(tags)
    for rule in recipe.rules:
        found = rule.patterns() if isinstance(rule, PhraseRule) else None
        if found is None:
            return None
        patterns += found
    try:
        return Prefilter(patterns)
    except ValueError:
        return None


class QuickLook:
    """Tells rows of a layout that match nothing: every answer has 0 by every rule, and none is empty."""

    def __init__(self, prefilter: Prefilter, layout: str) -> None:
        self.prefilter = prefilter
        every = (*CONVERSATIONS, *ANSWER_LAYOUTS)
        self.layout = next(each for each in every if each.name == layout)
        self._plain: dict[tuple[str, ...], str | None] = {}

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
            found = self.prefilter.may_match(texts)
            for place, something in zip(places, found):
                if something:
                    quiet[place] = False
            silent = {
                text
                for text, place, something in zip(texts, places, found)
                if not (something or quiet[place])
            }
        return quiet, silent

    def answers(self, row: FileRow) -> list[str] | None:
        """The answers of a plain row, none of them empty; None for a row that is not plain, or has no answer."""
        values, keys = row.values, tuple(row.values)
        if row.line is not None and (b"\\ud" in row.line or b"\\uD" in row.line):
            return None  # it may hold half a character
        if keys in self._plain:
            key = self._plain[keys]
        else:
            if len(self._plain) > _MOST_KEYS:
                self._plain.clear()
            key = self._plain[keys] = self._key(keys)
        if key is None:
            return None
        for name in SYSTEM_KEYS:
            if name in values and not (values[name] is None or type(values[name]) is str):
                return None
        if isinstance(self.layout, Conversation):
            answers = _said(values[key], self.layout)
        else:
            answers = _answer(values, self.layout)
        if answers is None or any(not text or text.isspace() for text in answers):
            return None
        return answers or None

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
    answers = []
    for entry in entries:
        if type(entry) is not dict:
            return None
        name, text = entry.get(layout.role), entry.get(layout.text)
        if type(name) is not str or type(text) is not str:
            return None
        if len(entry) != 2 and len(_OTHER_KEYS.intersection(entry)) != 1:  # its role
            return None
        role = ROLES.get(name)
        if role is None:
            return None
        if role == "assistant":
            answers.append(text)
    return answers


def _answer(values: dict[str, Any], layout: AnswerLayout) -> list[str] | None:
    answer = values[layout.answer]
    if type(values[layout.prompt]) is not str or type(answer) is not str or values.get("history"):
        return None
    more = values.get(layout.more) if layout.more else None
    return [answer] if more is None or type(more) is str else None
