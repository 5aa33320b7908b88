"""Numbers as the report words them.

Knows: rounding and units. Does not know: the report's parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Wording -------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else ("yes" if value else "no")
    try:
        found = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(found):
        return "–"
    if found.is_integer() and abs(found) < 1e9:
        return f"{int(found)}"
    return f"{found:.3g}" if abs(found) < 1000 else f"{found:.0f}"


def rate(value: Any) -> str:
    """A share as a percentage, with one decimal below 10% so that 1 of 64 does not read as 2%."""
    try:
        found = 100 * float(value)
    except (TypeError, ValueError):
        return number(value)
    if not math.isfinite(found):
        return "–"
    text = f"{found:.1f}" if 0 < found < 10 else f"{found:.0f}"
    return f"{text.removesuffix('.0')}%"


def duration(value: Any) -> str:
    """Seconds as a person says them."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return number(value)
    if seconds < 60 or not math.isfinite(seconds):
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def plain(value: Any) -> str:
    """A configuration value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "–" if value is None or value == "" else str(value)


def with_interval(test: Mapping[str, Any], key: str, *, as_rate: bool) -> str:
    show = rate if as_rate else number
    interval = span_text(test, key, as_rate=as_rate)
    return show(test.get(key)) + (f" [{interval}]" if interval else "")


def span_text(test: Mapping[str, Any], key: str, *, as_rate: bool) -> str:
    found = part_of(test, "intervals").get(key)
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        return ""
    show = rate if as_rate else number
    return f"{show(found[0])} to {show(found[1])}"


def part_of(whole: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The object under `key`, empty where there is none."""
    found = (whole or {}).get(key)
    return dict(found) if isinstance(found, Mapping) else {}
