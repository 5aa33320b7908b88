"""Numbers as the report words them.

Knows: rounding, units, and how a part of a JSON file is read. Does not know: the report's parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: Any) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else ("yes" if value else "no")
    try:
        x = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(x):
        return "–"
    if x.is_integer() and abs(x) < 1e9:
        return f"{int(x)}"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def rate(value: Any) -> str:
    """A share as a percentage, with one decimal below 10% so that 1 of 64 does not read as 2%."""
    try:
        percent = 100 * float(value)
    except (TypeError, ValueError):
        return number(value)
    if not math.isfinite(percent):
        return "–"
    text = f"{percent:.1f}" if 0 < percent < 10 else f"{percent:.0f}"
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
    """The number under `key` and its interval, if it has one."""
    show = rate if as_rate else number
    interval = span_text(test, key, as_rate=as_rate)
    return show(test.get(key)) + (f" [{interval}]" if interval else "")


def span_text(test: Mapping[str, Any], key: str, *, as_rate: bool) -> str:
    """The interval of the number under `key`, empty where there is none."""
    ends = part_of(test, "intervals").get(key)
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return ""
    show = rate if as_rate else number
    return f"{show(ends[0])} to {show(ends[1])}"


def part_of(whole: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """The object under `key`, empty where there is none."""
    part = (whole or {}).get(key)
    return dict(part) if isinstance(part, Mapping) else {}


def objects(values: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list, empty where there is none."""
    return [dict(value) for value in values or [] if isinstance(value, Mapping)]
