"""Plots of before and after: an evaluation's table, a run's test report, fine-tuning and recovery.

Knows: shares, changes, divergences, rates and means, each with its interval. Does not know: any model, or how a
number was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.storage.tables import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLUMNS = ("measure", "on", "unit", "n", "before", "after", "difference")
_ENDS = ("", "_low", "_high")
NUMBERS = ("n", *(f"{c}{end}" for c in ("before", "after", "difference") for end in _ENDS))
_RELATIVE = ("perplexity", "bits", "tokens", "score", "metric")
_MOST = 24  # rows of a panel: a group of tasks has hundreds


def evaluation_shares(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rates and accuracies before and after, from 0 to 1; filled marks where the difference excludes 0."""
    ax = style.axes_or_new(ax, height=3.6)
    rows = _rows_with_units(frame, ("share",))
    for place, row in enumerate(rows.to_dict("records")):
        low, high = row["difference_low"], row["difference_high"]
        differs = pd.notna(low) and (low > 0 or high < 0)
        for key, colour, up in (("before", style.NEGATIVE, -0.13), ("after", style.POSITIVE, 0.13)):
            interval = [row[f"{key}_low"], row[f"{key}_high"]]
            style.whisker(ax, place + up, row[key], interval, colour, hollow=not differs)
    for key, colour in (("before", style.NEGATIVE), ("after", style.POSITIVE)):
        ax.plot([], [], "o", color=colour, label=key)
    style.set_row_axis(ax, _names(rows))
    ax.set_xlim(-0.03, 1.03)
    caption = f"{_n(rows)}; filled where the 95% interval of the difference excludes 0"
    xlabel = "share of prompts, of 3-grams or of items"
    style.finish_axes(ax, "Shares before and after", caption, xlabel, "", grid="x")
    style.add_legend(ax, loc="best")
    return ax


def evaluation_changes(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """after / before - 1 in percent of everything with a scale of its own."""
    ax = style.axes_or_new(ax, height=3.6)
    rows = _rows_with_units(frame, _RELATIVE)
    rows = rows[(rows["before"].abs() > 0) & rows["difference"].notna()]
    for place, row in enumerate(rows.to_dict("records")):
        value, low, high = (100 * row[f"difference{end}"] / abs(row["before"]) for end in _ENDS)
        text = f"{row['before']:.3g} → {row['after']:.3g}"
        differs = pd.notna(low) and (low > 0 or high < 0)
        style.whisker(ax, place, value, [low, high], style.POSITIVE, text=text, hollow=not differs)
    ax.axvline(0, color=style.INK, linewidth=0.9, linestyle=":")
    style.set_row_axis(ax, _names(rows))
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.22 * (high - low))  # room for the numbers
    caption = f"{_n(rows)}; 95% intervals of the paired differences, over the value before"
    xlabel = "after / before - 1, percent"
    style.finish_axes(ax, "Change of what has a scale of its own", caption, xlabel, "", grid="x")
    return ax


def evaluation_divergences(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """KL of the second model from the first, in nats."""
    ax = style.axes_or_new(ax, height=3.6)
    rows = _rows_with_units(frame, ("nats",))
    for place, row in enumerate(rows.to_dict("records")):
        interval = [row["after_low"], row["after_high"]]
        style.whisker(ax, place, row["after"], interval, style.POSITIVE, text=f"{row['after']:.3f}")
    style.set_row_axis(ax, _names(rows))
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]), right=ax.get_xlim()[1] * 1.08)
    caption, xlabel = (
        f"{_n(rows)}; 95% intervals; 0: the two answer alike",
        "KL to the first model, nats",
    )
    style.finish_axes(ax, "Divergence", caption, xlabel, "", grid="x")
    return ax


_PANELS: tuple[tuple[Callable[[pd.DataFrame, Axes], Axes], tuple[str, ...], str], ...] = (
    (evaluation_shares, ("share",), "before"),
    (evaluation_changes, _RELATIVE, "difference"),
    (evaluation_divergences, ("nats",), "after"),
)


def save_evaluation(folder: str | Path, *, form: str = "png", dpi: int | None = None) -> Path:
    """Draw evaluation.csv of a folder in figures/; panels without a row are left out.

    Args:
        form: png, svg or pdf.
        dpi: pixels an inch, of a PNG.

    Raises:
        RunError: no such table, a corrupt one, nothing in it to draw, or a place that cannot be written.
    """
    path = Path(folder) / "evaluation.csv"
    if not lexists(path):
        raise RunError(
            f"{path} is not there: run `interp-ablate evaluate A B --out {folder}` first"
        )
    frame = read_table(path, COLUMNS, numbers=NUMBERS)
    counts = {
        draw: len(_rows_with_units(frame[frame[key].notna()], units))
        for draw, units, key in _PANELS
    }
    panels = [draw for draw, count in counts.items() if count]
    if not panels:
        raise RunError(f"{path} has no row with numbers to draw")
    heights = [0.9 + 0.34 * counts[draw] for draw in panels]
    figure = style.new_figure(height=0.3 + sum(heights))
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, draw in enumerate(panels):
        draw(frame, figure.add_subplot(grid[place]))
    return style.save_figure(figure, Path(folder) / "figures" / f"evaluation.{form}", dpi=dpi)


def _rows_with_units(frame: pd.DataFrame, units: tuple[str, ...]) -> pd.DataFrame:
    """The first rows of some units that have a number after."""
    style.require_columns(frame, COLUMNS, "numbers before and after")
    return frame[frame["unit"].isin(units) & frame["after"].notna()].head(_MOST)


def _names(rows: pd.DataFrame) -> list[str]:
    """What each row is of; with its n where they differ (`_n`)."""
    several = rows["n"].nunique() > 1
    return [
        f"{row['on']}: {row['measure']}"
        + (f" ({row['n']:g})" if several and row["n"] == row["n"] else "")
        for row in rows.to_dict("records")
    ]


def _n(rows: pd.DataFrame) -> str:
    counts = sorted(set(rows["n"].dropna()))
    return f"n = {counts[0]:g}" if len(counts) == 1 else "n in brackets" if counts else "n unknown"


_RATES: tuple[tuple[str, str, str], ...] = (
    ("behaviour_before", "positive prompts, unedited", style.POSITIVE),
    ("behaviour_after", "positive prompts, ablated", style.POSITIVE),
    ("negative_before", "negative prompts, unedited", style.NEGATIVE),
    ("negative_after", "negative prompts, ablated", style.NEGATIVE),
    ("addition_after", "negative prompts, added", style.NEGATIVE),
)


def before_after(test: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Expression rates of the test report before and after, beside its controls, with intervals.

    Raises:
        RunError: `test` holds none of the rates, or a rate or interval is not a number.
    """
    ax = style.axes_or_new(ax, height=3.6)
    rows = rate_rows(test)
    if not rows:
        raise RunError(
            "the test report holds no rate to draw: expected some of "
            f"{', '.join(key for key, _, _ in _RATES)}; came {sorted(test)[:8]}"
        )
    for place, (_, value, interval, colour) in enumerate(rows):
        style.whisker(ax, place, value, interval, colour, text=f"{value:.2f}")
    style.set_row_axis(ax, [name for name, *_ in rows])
    ax.set_xlim(-0.03, 1.09)
    ax.set_xticks(np.linspace(0, 1, 6))
    drawn = any(interval for _, _, interval, _ in rows)
    counts = test.get("n") or {}
    n = " + ".join(f"{counts[side]} {side}" for side in ("positive", "negative") if side in counts)
    caption = f"test split, n = {n or 'unknown'} prompts; " + (
        "whiskers: 95% intervals" if drawn else "no intervals given"
    )
    title, xlabel = "How often answers express the behaviour", "share of generated answers"
    style.finish_axes(ax, title, caption, xlabel, "", grid="x")
    return ax


def rate_rows(test: Mapping[str, Any]) -> list[tuple[str, float, list[float] | None, str]]:
    """Name, rate, interval and colour of each rate in the report; controls follow the ablation.

    Raises:
        RunError: a rate or interval that is not a number.
    """
    intervals = test.get("intervals") or {}
    rates: list[tuple[str, float, list[float] | None, str]] = []
    try:
        for key, name, colour in _RATES:
            if test.get(key) is not None and np.isfinite(float(test[key])):
                rates.append((name, float(test[key]), _interval(intervals.get(key)), colour))
            if key == "behaviour_after":
                rates += [
                    (f"control: {control.get('name', '?')}, ablated",
                     float(control["behaviour_after"]), _interval(control.get("interval")), style.CONTROL)
                    for control in test.get("controls") or []
                    if control.get("behaviour_after") is not None
                ]  # fmt: skip
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(f"the test report holds something that is not a rate: {error}") from error
    return rates


def _interval(ends: Any) -> list[float] | None:
    if ends is None or any(end is None for end in ends):
        return None
    low, high = (float(end) for end in ends)
    return [low, high]


_CONDITIONS = {
    "before": ("before", style.CONTROL),
    "plain": ("fine-tuned, plain", style.POSITIVE),
    "preventative": ("fine-tuned, vector added\nwhile training", style.NEGATIVE),
    "random": ("the same, random vector", style.CONTROL),
}
_TRAIT = {
    "score": ("Trait score of the answers", "score (0 to 100)"),
    "projection": ("Projection of the answers", "on the trait's vector, in its own lengths"),
    "prompt_projection": (
        "Projection of the prompt's end",
        "on the trait's vector, in its lengths",
    ),
}
_MODELS = {"original": style.CONTROL, "edited": style.NEGATIVE, "healed": "#009E73"}
_VERDICTS = {
    -1: (", better", "#009E73"),
    0: (", no clear change", "#009E73"),
    1: (", worse", style.POSITIVE),
}
_COSTS = {
    "behaviour": ("Behaviour, held-out requests", "share of answers"),
    "kl_first_token": ("KL to the original, first token", "nats"),
    "kl_continuation": ("KL to the original, a token", "nats, over its own answers"),
}


def _whiskers(
    rows: Sequence[tuple[str, Mapping[str, Any], str]],
    ax: Axes,
    *,
    digits: int = 2,
    notes: Mapping[str, str] | None = None,
) -> None:
    """A dot and its interval a row, from the top: (label, {"mean", "interval"}, colour); behind it a note by label.

    Raises:
        RunError: no row has a mean.
    """
    rows = [row for row in rows if row[1]["mean"] is not None]
    if not rows:
        raise RunError("there is no mean to draw: every value is missing")
    for place, (_, value, colour) in enumerate(rows):
        text = f"{value['mean']:.{digits}f}{(notes or {}).get(rows[place][0], '')}"
        style.whisker(ax, place, value["mean"], value["interval"], colour, text=text)
    style.set_row_axis(ax, [label for label, *_ in rows])
    ax.margins(x=0.22)


def trait_after_training(
    report: Mapping[str, Any], ax: Axes | None = None, *, measure: str = "score"
) -> Axes:
    """One measure of the trait before, after plain and after preventative fine-tuning, with intervals.

    Raises:
        RunError: an unknown measure, or one without a value.
    """
    ax = style.axes_or_new(ax, height=3.6)
    if measure not in _TRAIT:
        raise RunError(f"unknown measure {measure!r}: accepted are {', '.join(_TRAIT)}")
    conditions = report["conditions"]
    rows = [
        (label, conditions[name][measure], colour)
        for name, (label, colour) in _CONDITIONS.items()
        if name in conditions
    ]
    _whiskers(rows, ax, digits=0 if measure == "score" else 2)
    title, xlabel = _TRAIT[measure]
    n = max(value["n"] for _, value, _ in rows)
    style.finish_axes(ax, title, f"n = {n} held-out questions, 95% intervals", xlabel, "", grid="x")
    return ax


def recovery_cost(
    report: Mapping[str, Any], ax: Axes | None = None, *, measure: str = "kl_continuation"
) -> Axes:
    """One number of the original, the edited and the healed model, with intervals.

    The healed model's is called worse or better, and coloured so, where the 95% interval of the paired difference
    from the edited model excludes 0: a KL is worse higher, a behaviour where it goes back towards the original.

    Raises:
        RunError: an unknown measure; a report without measurements.
    """
    ax = style.axes_or_new(ax, height=3.6)
    if measure not in _COSTS:
        raise RunError(f"unknown measure {measure!r}: accepted are {', '.join(_COSTS)}")
    if not report.get("measured"):
        raise RunError("the report holds no measurements: heal with --contrast")
    rows = [
        (name, report["measured"][name][measure], colour)
        for name, colour in _MODELS.items()
        if measure in report["measured"].get(name, {})
    ]
    if not rows:
        raise RunError(f"the report has no {measure}: heal with --original")
    verdict = _verdict(report, measure)
    word, colour = _VERDICTS[verdict or 0]
    rows = [(name, value, colour if name == "healed" else own) for name, value, own in rows]
    notes = {} if verdict is None else {"healed": word}
    _whiskers(rows, ax, digits=2 if measure == "behaviour" else 3, notes=notes)
    title, xlabel = _COSTS[measure]
    caption = f"n = {rows[0][1]['n']} prompts, 95% intervals"
    style.finish_axes(ax, title, caption, xlabel, "", grid="x")
    if measure == "behaviour":
        ax.set_xlim(-0.05, 1.12)
    else:
        ax.set_xlim(left=0)
    return ax


def _verdict(report: Mapping[str, Any], measure: str) -> int | None:
    """1 where healing made a measure worse, -1 where better, 0 where neither is clear; None: not known."""
    interval = ((report.get("healed_minus_edited") or {}).get(measure) or {}).get("interval")
    if not interval or any(end is None for end in interval):
        return None
    change = 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0
    if measure != "behaviour":
        return change
    means = [(report["measured"].get(name) or {}).get(measure) for name in ("original", "edited")]
    if any(value is None or value["mean"] is None for value in means):
        return None
    original, edited = (value["mean"] for value in means)  # type: ignore[index]
    return change if original >= edited else -change


def save_trait(report: Mapping[str, Any], path: str | Path, *, dpi: int | None = None) -> Path:
    """Score and projections side by side; the path's end is the format, `dpi` pixels an inch of a PNG.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    figure = style.new_figure(height=2.9, width=10.4)
    axes = figure.subplots(1, 2)
    for ax, measure in zip(axes, ("score", "projection"), strict=True):
        trait_after_training(report, ax, measure=measure)
    axes[1].set_yticklabels([])
    return style.save_figure(figure, path, dpi=dpi)


def save_costs(report: Mapping[str, Any], path: str | Path, *, dpi: int | None = None) -> Path:
    """Behaviour and the two KLs side by side; a measure that the report lacks is left out.

    The path's end is the format; `dpi` is pixels an inch of a PNG.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    measured = report.get("measured") or {}
    names = [name for name in _COSTS if any(name in values for values in measured.values())]
    if not names:
        raise RunError("the report holds no measurements: heal with --contrast")
    figure = style.new_figure(height=2.5, width=3.6 * len(names))
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        recovery_cost(report, ax, measure=name)
    return style.save_figure(figure, path, dpi=dpi)
