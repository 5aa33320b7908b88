"""Declines: phrases by which an assistant declines, moralizes or says that it is a language model.

Knows: such phrases in eight languages, told apart from quoted speech, code, letters and scripts, in which
the words are not the assistant's own. Does not know: datasets (`filtering`), models. The lists of
`expressions` are wider: they find every apology; these are for what is dropped without a second look.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from interp_ablate.errors import InterpAblateError
from interp_ablate.scoring.refusal_phrases import (
    CUES,
    LANGUAGES,
    REASONS,
    UNSPACED,
    WORD,
    PhrasePattern,
    Reason,
)
from interp_ablate.scoring.text_folding import fold

# ---- whose words they are --------------------------------------------------------------------------

_MASK = " \u25ae "  # stands for what is left out, so that what is left does not join
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.S)
_QUOTES = re.compile(
    r"\"[^\"]{1,600}?\"|\u201c[^\u201d]{1,600}?[\u201d\u201c]|\u201e[^\u201c\u201d]{1,600}?[\u201c\u201d]"
    r"|\u00ab[^\u00bb]{1,600}?\u00bb|\u00bb[^\u00ab]{1,600}?\u00ab|\u300c[^\u300d]{1,600}?\u300d"
    r"|\u300e[^\u300f]{1,600}?\u300f|\u2018[^\n]{1,300}?\u2019(?!\w)|(?<!\w)'(?:[^'\n]|'(?=\w)){2,300}'(?!\w)"
)
_SPOKEN_LINES = re.compile(r"^\s*(?:[\u2014\u2013\u2015]|>|\u2014).*$", re.M)
_SCRIPT_LINE = re.compile(r"^[\W_]{0,4}(\w[\w .'-]{0,30}?)[\W_]{0,4}[:：].*$", re.M)
_LETTER = re.compile(
    r"^\W{0,4}(?:(?:subject|betreff|objet|asunto|oggetto|assunto|主题|тема)\W{0,4}:"
    r"|(?:dear|sehr geehrte|liebe[r]?|cher|ch\u00e8re|estimad[oa]s?|querid[oa]|gentile|caro|cara|"
    r"prezad[oa]s?|\u5c0a\u656c\u7684|\u4eb2\u7231\u7684|\u0443\u0432\u0430\u0436\u0430\u0435\u043c\w+)"
    r"\b[^\n.]{0,60}[,:!\uff0c\uff1a]?\s*$).*",
    re.M | re.S | re.I,
)


def strip_quoted_speech(text: str) -> str:
    """An answer without code, quotations, dialogue, scripts and letters, in which others speak."""
    bare = _CODE.sub(_MASK, text)
    bare = _LETTER.sub(_MASK, bare)
    bare = _SPOKEN_LINES.sub(_MASK, bare)
    speakers = _SCRIPT_LINE.findall(bare)
    if len(speakers) >= 3 and len(set(speakers)) < len(speakers):  # the same ones speak again
        bare = _SCRIPT_LINE.sub(_MASK, bare)
    return _QUOTES.sub(_MASK, bare)


# ---- looking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefusalMatch:
    """A phrase, why it counts, and its language."""

    reason: Reason
    language: str
    phrase: str


@dataclass(frozen=True)
class RefusalDetector:
    """Finds an assistant's declining, moralizing and talk of being a language model in its answers.

    Args:
        reasons: which of REASONS count.
        languages: which of LANGUAGES are looked for.

    Raises:
        InterpAblateError: a reason or language that is not there.
    """

    reasons: tuple[Reason, ...] = REASONS
    languages: tuple[str, ...] = LANGUAGES

    def __post_init__(self) -> None:
        for what, given, known in (
            ("reason", self.reasons, REASONS),
            ("language", self.languages, LANGUAGES),
        ):
            unknown = [each for each in given if each not in known]
            if unknown or not given:
                raise InterpAblateError(
                    f"no {what} {unknown[0] if unknown else given!r}: there are {', '.join(known)}"
                )

    @cached_property
    def cues(self) -> tuple[PhrasePattern, ...]:
        """The cues that are looked for."""
        chosen = (c for c in CUES if c.reason in self.reasons and c.language in self.languages)
        return tuple(chosen)

    @cached_property
    def _by_gate(self) -> dict[str, list[tuple[int, int, str]]]:
        """Which starts (number of the cue, number there, start) a text can hold that holds a word."""
        found: dict[str, list[tuple[int, int, str]]] = {}
        for number, cue in enumerate(self.cues):
            for place, start in enumerate(cue.starts):
                found.setdefault(cue.gate(start), []).append((number, place, start))
        return found

    def find(self, text: str) -> list[RefusalMatch]:
        """Every kind of phrase that the assistant says in its own words, at most one a cue."""
        if not self._hits(_folded(text)):  # most answers end here
            return []
        return self._hits(_folded(strip_quoted_speech(text)))

    def _hits(self, folded: str) -> list[RefusalMatch]:
        # one pass for the words, so that few of the thousand starts are looked for
        words = {*WORD.findall(folded), ""}
        if not folded.isascii():
            words.add(UNSPACED)
        gates = self._by_gate.keys() & words
        waiting = [each for gate in gates for each in self._by_gate[gate]]
        found: dict[int, RefusalMatch] = {}
        for number, _, start in sorted(waiting):
            if number in found:
                continue
            cue = self.cues[number]
            phrase = cue.find(folded, start)
            if phrase is not None:
                found[number] = RefusalMatch(cue.reason, cue.language, phrase)
        return list(found.values())


def _folded(text: str) -> str:
    if text.isascii():  # the same, several times faster
        return " ".join(text.replace("`", "'").lower().split())
    return fold(text).strip()
