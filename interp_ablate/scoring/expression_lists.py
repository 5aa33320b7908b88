"""Lists of expressions, bundled or from a file.

Knows: list formats, languages, the pattern of an expression. Does not know: where a text is searched.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from interp_ablate.errors import InterpAblateError
from interp_ablate.scoring.text_folding import (
    SPACED_WORD,
    UNSPACED_CHARACTER,
    fold,
    without_spaces,
)
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.incoming_files import incoming_text, parse_json

Scope = Literal["whole", "first_sentence"]
_FOLDER = bundled("expressions")
DEFAULT_EXPRESSIONS = "declining"
_FIRST = ("declining", "positive_sentiment", "french")  # the order in which messages name the lists


@dataclass(frozen=True)
class Expression:
    """A phrase, or a regular expression for folded text."""

    text: str
    weight: float = 1.0
    """Adds to a text's strength, once however often the phrase occurs; below 0 it speaks against."""
    language: str = ""
    """Decides which words negate it; "" is read as English."""
    regex: bool = False


def _phrase_pattern(phrase: str) -> re.Pattern[str]:
    folded = fold(phrase).strip()
    word = SPACED_WORD if UNSPACED_CHARACTER.search(folded) else r"\w"
    left = rf"(?<!{word})" if folded[0].isalnum() and not without_spaces(folded[0]) else ""
    right = rf"(?!{word})" if folded[-1].isalnum() and not without_spaces(folded[-1]) else ""
    return re.compile(left + re.escape(folded) + right)


def expression_pattern(expression: Expression) -> re.Pattern[str]:
    """Compile an expression for folded text.

    Raises:
        InterpAblateError: a weight that cannot be, a malformed regular expression.
    """
    if not math.isfinite(expression.weight) or expression.weight == 0:
        raise InterpAblateError(
            f"the weight of {expression.text!r} is {expression.weight}: give a number other than 0"
        )
    if not expression.regex:
        return _phrase_pattern(expression.text)
    try:
        return re.compile(expression.text)
    except re.error as error:
        raise InterpAblateError(
            f"malformed regular expression {expression.text!r}: {error}"
        ) from error


def expression_names() -> tuple[str, ...]:
    """The names of the bundled lists."""
    names = sorted(path.stem for path in _FOLDER.glob("*.json"))
    return (*_FIRST, *(name for name in names if name not in _FIRST))


def languages_of(name: str) -> tuple[str, ...]:
    """The languages of a bundled list, its default first.

    Raises:
        InterpAblateError: no such list.
    """
    data = _bundled(name)
    return (data["default"], *(code for code in data["languages"] if code != data["default"]))


@cache
def _bundled(name: str) -> dict[str, Any]:
    if name not in expression_names():
        raise InterpAblateError(
            f"no built-in expression list {name!r}: there are {', '.join(expression_names())}; "
            "own phrases are given as a tuple"
        )
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def bundled_expressions(name: str, languages: Sequence[str] = ()) -> tuple[Expression, ...]:
    """A bundled list in its default language, in those named, or in all of them ("all").

    Raises:
        InterpAblateError: no such list, or a language that it lacks.
    """
    available = languages_of(name)
    wanted = chosen_languages(languages, available, f"the list {name!r}") or available[:1]
    entries = _bundled(name)["languages"]
    return tuple(
        _entry(each, f"the list {name!r}", code) for code in wanted for each in entries[code]
    )


def chosen_languages(
    languages: Sequence[str], available: Sequence[str], what: str
) -> tuple[str, ...]:
    """The languages that were asked for, ("all",) being every one that is available.

    Raises:
        InterpAblateError: one that is not available.
    """
    if isinstance(languages, str):
        raise InterpAblateError(f"languages are a tuple such as ('en', 'es'); got {languages!r}")
    wanted = tuple(code for code in languages if code)
    if "all" in wanted:
        return tuple(available)
    lacking = [code for code in wanted if code not in available]
    if lacking:
        raise InterpAblateError(
            f"{what} has nothing in {', '.join(lacking)}: there are {', '.join(available) or 'none'}, or all"
        )
    return wanted


def read_expressions(path: str | Path) -> tuple[Expression, ...]:
    """Read a list of one's own.

    - Text: a phrase a line, or a regular expression between slashes; behind tabs, its weight and its
      language: `no puedo<TAB>1<TAB>es`, `/\\bsorry\\b/<TAB>0.5`.
    - JSON: a list of phrases and of objects {"text" or "regex", "weight", "language"}; or an object with
      such a list under "expressions", or with one a language under "languages", as the bundled ones.

    Raises:
        InterpAblateError: a file that cannot be read, an entry that is none (its number), nothing in it.
    """
    path = Path(path)
    try:
        text = incoming_text(path)
        data = parse_json(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise InterpAblateError(
            f"cannot read expressions from {path}: {error}. Give a built-in list "
            f"({', '.join(expression_names())}), a text file with a phrase a line, or JSON"
        ) from error
    expressions = tuple(_of_lines(text, path) if data is None else _of_json(data, path))
    if not expressions:
        raise InterpAblateError(f"{path} holds no expression")
    return expressions


def _of_lines(text: str, path: Path) -> Iterator[Expression]:
    for number, line in enumerate(text.splitlines(), 1):
        phrase, *more = (part.strip() for part in line.split("\t"))
        if not phrase:
            continue
        entry: dict[str, Any] = {"text": phrase}
        if len(phrase) > 2 and phrase[0] == phrase[-1] == "/":
            entry = {"regex": phrase[1:-1]}
        if more and more[0]:
            try:
                entry["weight"] = float(more[0])
            except ValueError as error:
                raise InterpAblateError(
                    f"{path}, line {number}: the weight behind the tab is a number; got {more[0]!r}"
                ) from error
        yield _entry(entry, f"{path}, line {number}", more[1] if len(more) > 1 else "")


def _of_json(data: Any, path: Path) -> Iterator[Expression]:
    by_language: Any = {"": data}
    if isinstance(data, dict):
        by_language = data.get("languages", {"": data.get("expressions")})
    if not isinstance(by_language, dict) or not all(
        isinstance(v, list) for v in by_language.values()
    ):
        raise InterpAblateError(
            f'{path}: expected a list of phrases, or an object with "expressions": [...] or '
            f'"languages": {{"en": [...]}}'
        )
    for code, entries in by_language.items():
        for number, entry in enumerate(entries, 1):
            where = f"{path}, entry {number}{f' of {code!r}' if code else ''}"
            yield _entry(entry, where, code)


def _entry(entry: Any, where: str, language: str) -> Expression:
    """Read one expression of a file."""
    fields = {"text": entry} if isinstance(entry, str) else entry
    kinds = {"text": str, "regex": str, "weight": (int, float), "language": str}
    usable = isinstance(fields, dict) and set(fields) <= set(kinds)
    if not usable or len(set(fields) & {"text", "regex"}) != 1:
        raise InterpAblateError(
            f'{where}: expected a phrase or {{"text" or "regex": ..., "weight": 1, "language": "en"}}; '
            f"got {entry!r:.200}"
        )
    for name, value in fields.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise InterpAblateError(f"{where}: {name} is {value!r:.80}, of the wrong kind")
    return Expression(
        fields.get("text", fields.get("regex", "")),
        float(fields.get("weight", 1.0)),
        fields.get("language", language),
        "regex" in fields,
    )


EXPRESSIONS_OF_CONTRAST = {
    "code": "code",
    "declining": "declining",
    "sentiment": "positive_sentiment",
    "language": "french",
}
"""The list that shows a bundled contrast set's behaviour in the model's answers; other sets are of a concept that is
in the prompts alone."""
