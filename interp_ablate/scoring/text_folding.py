"""Text made comparable: case, accents, apostrophes, spaces; sentences; others' words blanked out.

Knows: folding and the way back to the original, how quoted speech is marked. Does not know: expressions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# ---- folding -------------------------------------------------------------------------------------

_APOSTROPHES = "\u2018\u2019\u201b\u02bc\u00b4`"
# What normalization makes of each, whatever stands beside it: nothing composes with these.
_BY_THEMSELVES = {
    **dict.fromkeys(_APOSTROPHES, "'"),
    **dict.fromkeys("\u201c\u201d\u201e", '"'),
    **{
        c: unicodedata.normalize("NFKC", c)
        for c in "\u2026\u00a0\uff0c\uff01\uff1f\uff1a\uff1b\uff08\uff09"
    },
}
_OTHER_SPACES = "\x85\u1680\u2028\u2029"
"""White space outside ASCII that normalization leaves as it is."""


def fold(text: str) -> str:
    """Lower case, compatibility forms, straight apostrophes and quotes, single spaces."""
    return re.sub(r"\s+", " ", _compatible(text)).casefold()


def fold_but_spaces(text: str) -> str:
    """`fold(text)`, but for runs of white space, which stay as they are, in ASCII characters."""
    if text.isascii():
        return text.replace("`", "'").lower()
    text = _compatible(text)
    for space in _OTHER_SPACES:
        text = text.replace(space, " ")
    return text.casefold()


def _compatible(text: str) -> str:
    if text.isascii():
        return text.replace("`", "'")
    for char, form in _BY_THEMSELVES.items():
        text = text.replace(char, form)
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", text)
        for char in _APOSTROPHES:  # compatibility forms of apostrophes
            text = text.replace(char, "'")
        for char in "\u201c\u201d\u201e":
            text = text.replace(char, '"')
    return text


def fold_with_places(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`fold(text)`, and for each of its characters the place in the original: (start, end)."""
    folded: list[str] = []
    places: list[tuple[int, int]] = []
    for start, end in _clusters(text):
        for char in _compatible(text[start:end]):
            if char.isspace():
                if folded and folded[-1] == " ":  # one of a run: the run grows
                    places[-1] = (places[-1][0], end)
                    continue
                char = " "
            lower = char.casefold()
            folded += lower
            places += [(start, end)] * len(lower)
    return "".join(folded), places


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Pieces that normalize by themselves: a character with what composes with it."""
    start = 0
    for i in range(1, len(text) + 1):
        if i < len(text) and not text[i].isascii():
            apart = _compatible(text[start:i]) + _compatible(text[i])
            if unicodedata.combining(text[i]) or _compatible(text[start : i + 1]) != apart:
                continue
        if start < i:
            yield start, i
            start = i


# ---- scripts and sentences -----------------------------------------------------------------------

# Scripts that put no spaces between words: a phrase may stand anywhere in them.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese syllables
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f\u3005-\u3007"  # Chinese characters
)
UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
SPACED_WORD = rf"[^\W{_UNSPACED}]"


def without_spaces(character: str) -> bool:
    """True for a character of a script that puts no spaces between words (Chinese, Japanese, Thai, ...)."""
    return bool(UNSPACED_CHARACTER.fullmatch(character))


_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019\u00bb)\]*_]*(?=\s|$)|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09]*|\n")  # fmt: skip
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:\w|mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|u\.s|z\.b|d\.h|bzw|ca|nr|sra|srta|sr|ud|mme|mlle|"
    r"sig|approx|fig|al|jr|inc|ltd)\.$",
    re.IGNORECASE,
)


_LIST_NUMBER = re.compile(r"\W*\d{1,3}\.")


def _sentence_ends(text: str) -> Iterator[int]:
    """Ends of sentences, at punctuation or the end of a line; not at abbreviations and numbers of lists."""
    for end in _SENTENCE_END.finditer(text):
        if end[0] == "." and end.end() < len(text) and text[end.end()] != "\n":
            after = text[end.end() :].lstrip()[:1]
            if after.islower() or _ABBREVIATION.search(text[max(0, end.end() - 12) : end.end()]):
                continue
            if _LIST_NUMBER.fullmatch(text[: end.end()].rpartition("\n")[2]):
                continue
        yield end.end()
    yield len(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the blank ones; at least the text itself."""
    pieces, start = [], 0
    for end in _sentence_ends(text):
        piece = text[start:end].strip()
        if any(map(str.isalnum, piece)):
            pieces.append(piece)
            start = end
    return pieces or [text]


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence that has a letter or a digit."""
    ends = (end for end in _sentence_ends(text) if any(map(str.isalnum, text[:end])))
    return text[: next(ends, len(text))]


_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.S)
_QUOTED = re.compile(
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
    """An answer in which code, quotations, dialogue, scripts and letters are blanked out.

    A mark and spaces stand in their place, so that what is left does not join. The text keeps its length.
    """
    for pattern in (_CODE, _LETTER, _SPOKEN_LINES):
        text = pattern.sub(_blank, text)
    speakers = _SCRIPT_LINE.findall(text)
    if len(speakers) >= 3 and len(set(speakers)) < len(speakers):  # the same ones speak again
        text = _SCRIPT_LINE.sub(_blank, text)
    return _QUOTED.sub(_blank, text)


def _blank(others: re.Match[str]) -> str:
    length = others.end() - others.start()
    return " \u25ae ".ljust(length) if length > 2 else "\u25ae" * length
