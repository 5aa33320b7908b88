"""Whose words they are: text without code, quotations, dialogue, scripts and letters.

Knows: how others' words are marked. Does not know: what is looked for.
"""

from __future__ import annotations

import re

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
    """An answer in which code, quotations, dialogue, scripts and letters are blanked out.

    A mark and spaces stand in their place, so that what is left does not join. The text keeps its length.
    """
    for pattern in (_CODE, _LETTER, _SPOKEN_LINES):
        text = pattern.sub(_blank, text)
    speakers = _SCRIPT_LINE.findall(text)
    if len(speakers) >= 3 and len(set(speakers)) < len(speakers):  # the same ones speak again
        text = _SCRIPT_LINE.sub(_blank, text)
    return _QUOTES.sub(_blank, text)


def _blank(others: re.Match[str]) -> str:
    length = others.end() - others.start()
    return " \u25ae ".ljust(length) if length > 2 else "\u25ae" * length
