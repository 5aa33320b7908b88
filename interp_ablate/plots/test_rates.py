"""Rates on the test split, before and after.

Knows: one plot. Does not know: runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_ablate.errors import RunError
from interp_ablate.plots.style import CONTROL, INK, NEGATIVE, POSITIVE, finish_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATES: tuple[tuple[str, str, str], ...] = (
    ("behaviour_before", "positive prompts, unedited", POSITIVE),
    ("behaviour_after", "positive prompts, ablated", POSITIVE),
    ("negative_before", "negative prompts, unedited", NEGATIVE),
    ("negative_after", "negative prompts, ablated", NEGATIVE),
    ("addition_after", "negative prompts, added", NEGATIVE),
)


def before_after(test: Mapping[str, Any], ax: Axes) -> Axes:
    """Expression rates of the test report before and after, beside its controls, with intervals.

    Raises:
        RunError: `test` holds none of the rates, or a rate or interval is not a number.
    """
    rows = rate_rows(test)
    if not rows:
        raise RunError(
            "the test report holds no rate to draw: expected some of "
            f"{', '.join(key for key, _, _ in _RATES)}; came {sorted(test)[:8]}"
        )
    for place, (_, value, interval, colour) in enumerate(rows):
        if interval is not None:
            ax.plot(interval, [place, place], color=colour, linewidth=2.2, alpha=0.55)
            for end in interval:
                ax.plot([end, end], [place - 0.13, place + 0.13], color=colour, linewidth=1.4)
        ax.plot(value, place, "o", color=colour, markersize=8, markeredgecolor="white")
        right = max([value, *(interval or [])])
        ax.annotate(
            f"{value:.2f}", (right, place), (9, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)))
    ax.set_yticklabels([name for name, *_ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(-0.03, 1.09)
    ax.set_xticks(np.linspace(0, 1, 6))
    drawn = any(interval for _, _, interval, _ in rows)
    finish_axes(
        ax,
        "How often answers express the behaviour",
        "test split" + ("; whiskers: bootstrap intervals" if drawn else "; no intervals given"),
        "share of generated answers",
        "",
    )
    ax.grid(visible=False, axis="y")
    return ax


def rate_rows(test: Mapping[str, Any]) -> list[tuple[str, float, list[float] | None, str]]:
    """(name, rate, interval, colour) of each rate the report has; controls follow the ablation."""
    intervals = test.get("intervals") or {}
    found: list[tuple[str, float, list[float] | None, str]] = []
    try:
        for key, name, colour in _RATES:
            if test.get(key) is not None and np.isfinite(float(test[key])):
                found.append((name, float(test[key]), _interval(intervals.get(key)), colour))
            if key == "behaviour_after":
                found += [
                    (f"control: {control.get('name', '?')}, ablated",
                     float(control["behaviour_after"]), _interval(control.get("interval")), CONTROL)
                    for control in test.get("controls") or []
                    if control.get("behaviour_after") is not None
                ]  # fmt: skip
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the test report holds something that is not a rate: {error}") from error
    return found


def _interval(found: Any) -> list[float] | None:
    if found is None or any(end is None for end in found):
        return None
    low, high = (float(end) for end in found)
    return [low, high]
