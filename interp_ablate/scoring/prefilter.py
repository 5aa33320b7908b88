"""A quick look at many texts: which of them certainly hold none of some phrases, and match no expression.

Patterns are in the syntax of RE2, which pyarrow brings: one pass over a text, however many there are. Each is made
so that it is found wherever the expression that it stands for is; it may be found elsewhere too.

Knows: the way from phrases and Python's regular expressions to such patterns. Does not know: what a match means.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from interp_ablate.scoring.text_folding import fold_but_spaces

if sys.version_info >= (3, 11):
    import re._constants as codes
    import re._parser as parser
else:
    import sre_constants as codes
    import sre_parse as parser

_SPACE = r"[ \t\n\v\f\r\x1c-\x1f]"
_VISIBLE = r"[^ \t\n\v\f\r\x1c-\x1f]"
_ANY = f"(?:{_VISIBLE}|{_SPACE}+)"  # a character of folded text, in which white space is one
_LARGEST = 10_000  # characters of all phrases: beyond, the automaton of RE2 does not fit its memory
_FEW = 4  # repetitions that are counted: more are any number
_PHRASE = range(6, 60)  # characters of a phrase that are looked for

_REPEATS = (
    codes.MAX_REPEAT,
    codes.MIN_REPEAT,
    getattr(codes, "POSSESSIVE_REPEAT", codes.MAX_REPEAT),
)


def phrase_patterns(phrases: Iterable[str], *, at_word: bool = False) -> tuple[str, ...]:
    """Patterns of which one is found wherever a text, folded, holds one of some folded phrases.

    Where they are many, only their beginnings are looked for.

    Args:
        at_word: a phrase that begins with a letter counts only where none of ASCII stands before it.
    """
    found = dict.fromkeys(phrases)
    longest = min(max(_LARGEST // max(1, len(found)), _PHRASE[0]), _PHRASE[-1])
    starts: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for phrase in found:
        word = at_word and phrase[:1].isascii() and phrase[:1].isalnum()
        starts[word]["".join(map(_literal, phrase[:longest]))] = None
    words = (r"(?:^|[^0-9a-z])(?:" + "|".join(starts[True]) + ")",) if starts[True] else ()
    return (*words, *starts[False])


def expression_superset(expression: str, longest: int = 60, *, least: int = 3) -> str | None:
    """A pattern that is found wherever a regular expression matches in folded text.

    Assertions are left out, and so is what follows the first `longest` characters: more is found, never less.
    None where it would be shorter than `least` characters, and so be found nearly everywhere.
    """
    try:
        if re.compile(expression).flags & ~re.UNICODE:
            return None
        pattern, fewest, _ = _sequence(list(parser.parse(expression)), longest)
    except (re.error, RecursionError, OverflowError):
        return None
    return pattern if fewest >= least else None


def _literal(char: str) -> str:
    """A character of folded text: in the text, which is not quite folded, a space may be a run of white space."""
    if char.isspace():
        return _SPACE + "+"
    return rf"\x{{{ord(char):x}}}" if ord(char) < 128 else char


def _sequence(items: Sequence[Any], room: int) -> tuple[str, int, bool]:
    """The pattern of a sequence, its fewest characters, and whether it is whole (else nothing may follow it)."""
    pattern, least = "", 0
    for number, item in enumerate(items, 1):
        if room <= 0:
            return pattern, least, False
        part, fewest, whole = _item(item[0], item[1], room)
        if not whole and item[0] in _REPEATS and item[1][0] == 0:  # it is there, or what follows is
            rest, fewest_left, _ = _sequence(items[number:], room)
            return f"{pattern}(?:{part}|{rest})", least + min(fewest, fewest_left), False
        pattern, least, room = pattern + part, least + fewest, room - max(fewest, 1)
        if not whole:
            return pattern, least, False
    return pattern, least, True


def _item(code: Any, value: Any, room: int) -> tuple[str, int, bool]:
    if code is codes.LITERAL:
        return _literal(chr(value)), 1, True
    if code in (codes.NOT_LITERAL, codes.ANY):
        return _ANY, 1, True
    if code is codes.IN:
        return _class(value), 1, True
    if code is codes.SUBPATTERN:
        _, added, removed, inner = value
        return _sequence(list(inner), room) if not added and not removed else ("", 0, False)
    if code is codes.BRANCH:
        parts = [_sequence(list(branch), room) for branch in value[1]]
        pattern = "(?:" + "|".join(part for part, _, _ in parts) + ")"
        return pattern, min(fewest for _, fewest, _ in parts), all(whole for _, _, whole in parts)
    if code in _REPEATS:
        low, high, inner = value
        return _repeated(low, high, inner, room)
    if code in (codes.AT, codes.ASSERT, codes.ASSERT_NOT):
        return "", 0, True
    return "", 0, False  # groups that are asked for again, and whatever Python adds


def _repeated(low: int, high: int, inner: Any, room: int) -> tuple[str, int, bool]:
    pattern, fewest, whole = _sequence(list(inner), room)
    if not whole:  # once, as far as it goes
        return pattern, fewest, False
    if high <= _FEW:
        return f"(?:{pattern}){{{low},{high}}}", low * fewest, True
    if low > _FEW:
        return f"(?:{pattern})+", fewest, True
    return (f"(?:{pattern}){{{low},}}" if low else f"(?:{pattern})*"), low * fewest, True


def _class(members: Sequence[Any]) -> str:
    """A pattern that is found where a class of characters matches: white space, or all but it, or anything."""
    kinds = set()
    for code, value in members:
        if code is codes.LITERAL:
            kinds.add("space" if chr(value).isspace() else "visible")
        elif code is codes.CATEGORY and value in (codes.CATEGORY_WORD, codes.CATEGORY_DIGIT):
            kinds.add("visible")
        else:
            kinds |= {"space", "visible"}
    if all(
        code is codes.LITERAL and value < 128 and not chr(value).isspace()
        for code, value in members
    ):
        return "[" + "".join(_literal(chr(value)) for _, value in members) + "]"
    return _VISIBLE if kinds == {"visible"} else _ANY


class Prefilter:
    """Tells texts that certainly hold nothing of what is looked for, many at a time.

    Args:
        patterns: made by `phrase_patterns` or `expression_superset`.

    Raises:
        ValueError: patterns that RE2 cannot take.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        import pyarrow.compute

        self.pattern = "|".join(dict.fromkeys(patterns))
        # compiled once a call by pyarrow: patterns that are refused are refused here
        pyarrow.compute.match_substring_regex(pyarrow.array(["a"]), self.pattern)

    def may_match(self, texts: Sequence[str]) -> list[bool]:
        """For each text False where nothing is in it; True where something may be."""
        import pyarrow
        import pyarrow.compute

        try:
            array = pyarrow.array([fold_but_spaces(text) for text in texts], pyarrow.large_string())
        except UnicodeEncodeError:  # half a character
            return [True] * len(texts)
        return pyarrow.compute.match_substring_regex(array, self.pattern).to_pylist()
