"""Refusals: phrases by which an assistant declines, moralizes or says that it is a language model.

Knows: phrases in eight languages, said in the assistant's own words. Does not know: what becomes of the text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from interp_ablate.errors import InterpAblateError
from interp_ablate.scoring.text_folding import fold, strip_quoted_speech
from interp_ablate.storage.bundled_data import bundled

Reason = Literal["declines", "moralizes", "says_it_is_an_ai"]

REASONS: tuple[Reason, ...] = ("declines", "moralizes", "says_it_is_an_ai")
LANGUAGES = ("en", "es", "de", "fr", "it", "pt", "zh", "ru")
OPENING = 240  # folded characters in which an answer's opening is looked for
WORD = re.compile(r"[^\W_]+")
_BETWEEN_WORDS = {code: " " for code in range(128) if not WORD.match(chr(code))}
UNSPACED = " "  # stands for a word of a language that puts no spaces between words


@dataclass(frozen=True)
class PhrasePattern:
    """Phrases with a common ending: one of `starts`, not inside a word, then what `then` matches."""

    reason: Reason
    language: str
    starts: tuple[str, ...]
    """Beginnings of the phrase, as folded text."""
    then: str = r"(?!\w)"
    """Regular expression for the folded text behind a start."""
    opening: bool = False
    """The phrase counts in an answer's first OPENING characters alone."""

    @property
    def _stems(self) -> bool:
        """True where a start may be the beginning of a word."""
        return not self.then or self.then.startswith("(?:e |") or self.language == "zh"

    @cached_property
    def _then(self) -> re.Pattern[str]:
        return re.compile(self.then if self._stems else rf"(?![^\W_]){self.then}")

    def words(self, start: str) -> list[str]:
        """The words that every text with this start holds, as `WORD` reads them, the longest first.

        UNSPACED for a language without spaces between words.
        """
        if self.language == "zh":
            return [UNSPACED]
        words = WORD.findall(start)[: -1 if self._stems else None]
        return sorted(words, key=len, reverse=True)

    def find(self, text: str, start: str) -> str | None:
        """The first phrase with this start in a folded text, or None."""
        limit = OPENING if self.opening else len(text)
        at = text.find(start, 0, limit)
        while at >= 0:
            if at == 0 or self.language == "zh" or not text[at - 1].isalnum():
                match = self._then.match(text, at + len(start))
                if match:
                    return text[at : match.end()].strip()
            at = text.find(start, at + 1, limit)
        return None


@cache
def phrase_patterns() -> tuple[PhrasePattern, ...]:
    """The patterns of `data/refusals/`, language by language, in the order of the files."""
    return tuple(
        PhrasePattern(
            entry["reason"],
            language,
            tuple(entry["starts"]),
            "".join(entry["then"]),
            entry.get("opening", False),
        )
        for language in LANGUAGES
        for entry in json.loads(bundled("refusals", f"{language}.json").read_text(encoding="utf-8"))
    )


@dataclass(frozen=True)
class RefusalMatch:
    """A phrase that was found, why it counts, and its language."""

    reason: Reason
    language: str
    phrase: str


@dataclass(frozen=True)
class RefusalDetector:
    """Finds an assistant's declining, moralizing and talk of being a language model in its answers.

    It looks at the whole answer, at the assistant's own words alone, and for what such an answer does, not
    for apologies: it is for dropping training samples. The expression list `declining` is wider; it scores
    short answers.

    Raises:
        InterpAblateError: a reason or language that is not there.
    """

    reasons: tuple[Reason, ...] = REASONS
    languages: tuple[str, ...] = LANGUAGES

    def __post_init__(self) -> None:
        for what, chosen, accepted in (
            ("reason", self.reasons, REASONS),
            ("language", self.languages, LANGUAGES),
        ):
            unknown = [each for each in chosen if each not in accepted]
            if unknown or not chosen:
                raise InterpAblateError(
                    f"no {what} {unknown[0] if unknown else chosen!r}: there are {', '.join(accepted)}"
                )

    @cached_property
    def patterns(self) -> tuple[PhrasePattern, ...]:
        """The patterns of the chosen reasons and languages."""
        return tuple(
            pattern
            for pattern in phrase_patterns()
            if pattern.reason in self.reasons and pattern.language in self.languages
        )

    @cached_property
    def _by_word(self) -> dict[str, list[tuple[int, int, str, frozenset[str]]]]:
        """Index from a rare word to the starts that hold it: (number of the pattern, of the start, start, words)."""
        index: dict[str, list[tuple[int, int, str, frozenset[str]]]] = {}
        for number, pattern in enumerate(self.patterns):
            for place, start in enumerate(pattern.starts):
                words = pattern.words(start) or [""]
                entry = (number, place, start, frozenset(words))
                index.setdefault(words[0], []).append(entry)  # the longest is likely the rarest
        return index

    def find(self, text: str) -> list[RefusalMatch]:
        """The phrases that the assistant says in its own words, at most one a pattern."""
        if not self._matches(_folded(text)):  # most answers end here
            return []
        return self._matches(_folded(strip_quoted_speech(text)))

    def _matches(self, folded: str) -> list[RefusalMatch]:
        # one pass for the words, so that few of the thousand starts are looked for
        if folded.isascii():  # the same words, several times faster
            words = {*folded.translate(_BETWEEN_WORDS).split(), ""}
        else:
            words = {*WORD.findall(folded), "", UNSPACED}
        index = self._by_word
        candidates = [e for word in index.keys() & words for e in index[word] if e[3] <= words]
        matches: dict[int, RefusalMatch] = {}
        for number, _, start, _ in sorted(candidates):
            if number in matches:
                continue
            pattern = self.patterns[number]
            phrase = pattern.find(folded, start)
            if phrase is not None:
                matches[number] = RefusalMatch(pattern.reason, pattern.language, phrase)
        return list(matches.values())


def _folded(text: str) -> str:
    if text.isascii():  # the same, several times faster
        return " ".join(text.replace("`", "'").lower().split())
    return fold(text).strip()
