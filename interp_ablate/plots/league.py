"""Figures of a league: methods with their intervals, and mean rates over KL.

Knows: what a league's results look like. Does not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from interp_ablate.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "detection": ("Detection", "AUC on test prompts", 0.5),
    "removal": ("Removal", "mean fall of the rate up to the KL limit", 0.0),
    "induction": ("Induction", "mean rise of the rate up to the KL limit", 0.0),
}
# Okabe and Ito's colours with four line styles: enough for 32 methods.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#B8860B")


def league_intervals(
    results: Mapping[str, Any], column: str, ax: Axes | None = None, *, named: bool = True
) -> Axes:
    """One row a method: the mean over behaviours with its interval; single behaviours as small marks.

    Args:
        column: detection, removal or induction.
        named: whether the rows have their names.
    """
    names = method_order(results)
    axes = style.axes_or_new(ax, height=1.2 + 0.3 * len(names))
    title, label, nothing = _TITLES[column]
    axes.axvline(nothing, color=style.CONTROL, linewidth=0.9, linestyle=":")
    for place, name in enumerate(names):
        row = results["methods"][name]
        colour = style.CONTROL if row["control"] else style.NEGATIVE
        singles = [each[column][0] for each in row["by_behaviour"].values() if each[column]]
        axes.plot(singles, [place] * len(singles), "|", color=style.INK, markersize=6, alpha=0.6)
        if row["overall"][column] is not None:
            value, *interval = row["overall"][column]
            ends = [end for end in interval if end is not None]
            style.whisker(axes, place, value, ends, colour)
    style.set_row_axis(axes, names if named else [""] * len(names))
    caption = "dots: means with 95% intervals; ticks: each behaviour"
    style.finish_axes(axes, title, caption if named else "", label, "", grid="x")
    return axes


def league_curves(results: Mapping[str, Any], side: str, ax: Axes | None = None) -> Axes:
    """Rates over KL, a line a method: the mean over behaviours of curves that all have; controls in grey."""
    axes = style.axes_or_new(ax, height=3.4)
    for number, name in enumerate(method_order(results)):
        row = results["methods"][name]
        curves = list(row["curves"][side].values())
        if not curves or any(curve is None for curve in curves):
            continue
        x, y = np.mean(np.array(curves, float), axis=0).T
        colour = style.CONTROL if row["control"] else _COLOURS[number % len(_COLOURS)]
        line = style.LINE_STYLES[(number // len(_COLOURS)) % len(style.LINE_STYLES)]
        if row["control"]:
            line = style.LINE_STYLES[number % 2 + 1]
        axes.plot(x, y, color=colour, linestyle=line, linewidth=1.6, label=name)
    axes.set_ylim(-0.03, 1.03)
    asked = "positive" if side == "removal" else "negative"
    style.finish_axes(
        axes,
        f"{side.capitalize()}: rate over KL",
        "",
        "first-token KL, nats",
        f"rate on {asked} prompts",
    )
    return axes


def league_figure(results: Mapping[str, Any]) -> Figure:
    """All of a league in one figure: columns of intervals, and two panels of curves under them.

    Where no answers were judged there is the column of detection alone.
    """
    n_methods, rows = len(results["methods"]), results["methods"].values()
    columns = [c for c in _TITLES if any(row["overall"][c] for row in rows)] or ["detection"]
    judged = len(columns) > 1
    high = 0.9 + 0.27 * n_methods
    if not judged:
        figure = style.new_figure(height=high + 0.5)
        league_intervals(results, columns[0], figure.add_subplot())
        return figure
    figure = style.new_figure(width=11.0, height=high + 4.4)
    grid = figure.add_gridspec(2, 6, height_ratios=[high, 3.4])
    for place, column in enumerate(columns):
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        league_intervals(results, column, axes, named=place == 0)
    curves = [figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:4])]
    for side, axes in zip(("removal", "induction"), curves, strict=True):
        league_curves(results, side, axes)
    handles = {line.get_label(): line for axes in curves for line in axes.get_lines()}
    space = figure.add_subplot(grid[1, 4:])
    space.axis("off")
    if handles:
        style.add_legend(space, list(handles.values()), loc="center left")
    return figure


def method_order(
    results: Mapping[str, Any], numbers: Callable[[Any], Any] = itemgetter("overall")
) -> list[str]:
    """The methods by removal, then by detection, the best first; controls last.

    `numbers`: from a method's row to the numbers that are compared.
    """

    def key(name: str) -> tuple[bool, float, float]:
        row = results["methods"][name]
        found = numbers(row)
        values = [found[c][0] if found[c] else -np.inf for c in ("removal", "detection")]
        return row["control"], -values[0], -values[1]

    return sorted(results["methods"], key=key)
