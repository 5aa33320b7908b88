"""Short text and HTML of values: one line for a terminal, a table for a notebook, everything escaped.

Knows: lengths, escaping, tables, words that differ. Does not know: what is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape

_CONTROLS = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


class Html(str):
    """Text that is HTML already; `html_of` and Jinja leave it as it is."""

    def __html__(self) -> str:
        return str(self)


def html_of(value: object) -> Html:
    """A value as HTML: escaped, control characters as their symbols; a float with four digits."""
    if isinstance(value, Html):
        return value
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return Html(escape(text.translate(_CONTROLS)))


def shortened(text: object, most: int = 60) -> str:
    """A text in at most so many characters, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = ""
) -> Html:
    """A table with a caption that says what it shows; cells are escaped unless they are `Html`."""
    head = "".join(f'<th scope="col">{html_of(name)}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html_of(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    title = f"<caption>{html_of(caption)}</caption>" if caption else ""
    return Html(f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def marked_differences(before: str, after: str) -> Html:
    """The second text, its words that are not in the first at that place inside <mark>; escaped."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    parts = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = html_of("".join(new[start:end]))
        parts.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    return Html("".join(parts))
