"""Plots of an evaluation: what was before and what is after, each a function `(frame, ax) -> ax`.

Knows: how the rows of evaluation.csv are drawn: shares side by side, relative changes, divergences, each
with its interval. Does not know: any model, how a number was measured, what else an evaluation's folder has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots.style import (
    INK,
    NEGATIVE,
    POSITIVE,
    add_legend,
    finish_axes,
    new_figure,
    save_figure,
)
from interp_ablate.storage.tables import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("measure", "on", "unit", "n", "before", "after", "difference")
_ENDS = ("", "_low", "_high")
NUMBERS = ("n", *(f"{c}{end}" for c in ("before", "after", "difference") for end in _ENDS))
_RELATIVE = ("perplexity", "bits", "tokens", "score", "metric")
# More lines than these are no picture: a group of tasks has hundreds.
_MOST = 24


def shares(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Rates and accuracies before and after, from 0 to 1; filled marks where the difference excludes 0."""
    rows = _kind(frame, ("share",))
    for place, row in enumerate(rows.to_dict("records")):
        sure = _excludes_zero(row)
        for key, colour, up in (("before", NEGATIVE, -0.13), ("after", POSITIVE, 0.13)):
            _whisker(ax, [row[f"{key}{end}"] for end in _ENDS], place + up, colour, filled=sure)
    for key, colour in (("before", NEGATIVE), ("after", POSITIVE)):
        ax.plot([], [], "o", color=colour, label=key)
    _names(ax, rows)
    ax.set_xlim(-0.03, 1.03)
    caption = "filled where the 95% interval of the difference excludes 0"
    finish_axes(
        ax, "Shares before and after", caption, "share of prompts, of 3-grams or of items", ""
    )
    add_legend(ax, loc="best")
    return ax


def changes(frame: pd.DataFrame, ax: Axes) -> Axes:
    """after / before - 1 in percent of everything with a scale of its own."""
    rows = _kind(frame, _RELATIVE)
    rows = rows[(rows["before"].abs() > 0) & rows["difference"].notna()]
    for place, row in enumerate(rows.to_dict("records")):
        scale = 100 / abs(row["before"])
        values = [row[f"difference{end}"] * scale for end in _ENDS]
        _whisker(ax, values, place, POSITIVE, filled=_excludes_zero(row))
        text = f"{row['before']:.3g} → {row['after']:.3g}"
        right = max(value for value in values if pd.notna(value))
        ax.annotate(
            text, (right, place), (8, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=INK, annotation_clip=False,
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=0.9, linestyle=":")
    _names(ax, rows)
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.22 * (high - low))  # room for the numbers
    caption = "intervals of the paired differences, over the value before"
    finish_axes(
        ax, "Change of what has a scale of its own", caption, "after / before - 1, percent", ""
    )
    return ax


def divergences(frame: pd.DataFrame, ax: Axes) -> Axes:
    """KL of the second model from the first, in nats."""
    rows = _kind(frame, ("nats",))
    for place, row in enumerate(rows.to_dict("records")):
        values = [row[f"after{end}"] for end in _ENDS]
        _whisker(ax, values, place, POSITIVE, filled=True)
        right = max(value for value in values if pd.notna(value))
        ax.annotate(
            f"{row['after']:.3f}", (right, place), (8, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK, annotation_clip=False,
        )  # fmt: skip
    _names(ax, rows)
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]), right=ax.get_xlim()[1] * 1.08)
    finish_axes(ax, "Divergence", "0: the two answer alike", "KL to the first model, nats", "")
    return ax


_PANELS: tuple[tuple[Callable[[pd.DataFrame, Axes], Axes], tuple[str, ...], str], ...] = (
    (shares, ("share",), "before"),
    (changes, _RELATIVE, "difference"),
    (divergences, ("nats",), "after"),
)


def save_evaluation(folder: str | Path) -> Path:
    """Draw evaluation.csv of a folder as figures/evaluation.png; panels without a row are left out.

    Raises:
        RunError: no such table, a corrupt one, nothing in it to draw, or a place that cannot be written.
    """
    path = Path(folder) / "evaluation.csv"
    if not path.exists():
        raise RunError(
            f"{path} is not there: run `interp-ablate evaluate A B --out {folder}` first"
        )
    frame = read_table(path, COLUMNS, numbers=NUMBERS)
    found = [(draw, len(_kind(frame[frame[key].notna()], units))) for draw, units, key in _PANELS]
    found = [(draw, count) for draw, count in found if count]
    if not found:
        raise RunError(f"{path} has no row with numbers to draw")
    heights = [0.9 + 0.34 * count for _, count in found]
    figure = new_figure(height=0.3 + sum(heights))
    grid = figure.add_gridspec(len(found), 1, height_ratios=heights)
    for place, (draw, _) in enumerate(found):
        draw(frame, figure.add_subplot(grid[place]))
    return save_figure(figure, Path(folder) / "figures" / "evaluation.png")


def _kind(frame: pd.DataFrame, units: tuple[str, ...]) -> pd.DataFrame:
    """The first rows of some units that have a number after."""
    return frame[frame["unit"].isin(units) & frame["after"].notna()].head(_MOST)


def _excludes_zero(row: dict) -> bool:
    low, high = row["difference_low"], row["difference_high"]
    return bool(pd.notna(low) and (low > 0 or high < 0))


def _whisker(ax: Axes, values: list[float], place: float, colour: str, *, filled: bool) -> None:
    value, low, high = values
    if pd.notna(low) and pd.notna(high):
        ax.plot([low, high], [place, place], color=colour, linewidth=2.2, alpha=0.55)
    face = colour if filled else "white"
    ax.plot(value, place, "o", color=colour, markersize=6.5, markerfacecolor=face)


def _names(ax: Axes, rows: pd.DataFrame) -> None:
    ax.set_yticks(range(len(rows)))
    ax.set_yticklabels([f"{row['on']}: {row['measure']}" for row in rows.to_dict("records")])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
