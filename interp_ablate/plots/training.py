"""Plots of training: a trait before and after fine-tuning, and an edit's cost before and after recovery.

Knows: how the reports of `training/preventative` and `training/healing` are drawn. Does not know: models, or how a
number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import RunError
from interp_ablate.plots.style import (
    CONTROL,
    NEGATIVE,
    POSITIVE,
    finish_axes,
    new_figure,
    save_figure,
    set_row_axis,
    whisker,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONDITIONS = {
    "before": ("before", CONTROL),
    "plain": ("fine-tuned, plain", POSITIVE),
    "preventative": ("fine-tuned, vector added\nwhile training", NEGATIVE),
    "random": ("the same, random vector", CONTROL),
}
_TRAIT = {
    "score": ("Trait score of the answers", "score (0 to 100)"),
    "projection": ("Projection of the answers", "on the trait's vector, in its own lengths"),
    "prompt_projection": (
        "Projection of the prompt's end",
        "on the trait's vector, in its lengths",
    ),
}
_MODELS = {"original": CONTROL, "edited": POSITIVE, "healed": NEGATIVE}
_COSTS = {
    "behaviour": ("Behaviour, held-out requests", "share of answers"),
    "kl_first_token": ("KL to the original, first token", "nats"),
    "kl_continuation": ("KL to the original, a token", "nats, over its own answers"),
}


def _whiskers(
    rows: Sequence[tuple[str, Mapping[str, Any], str]], ax: Axes, *, digits: int = 2
) -> None:
    """A dot and its interval a row, from the top: (label, {"mean", "interval"}, colour).

    Raises:
        RunError: no row has a mean.
    """
    rows = [row for row in rows if row[1]["mean"] is not None]
    if not rows:
        raise RunError("there is no mean to draw: every value is missing")
    for place, (_, value, colour) in enumerate(rows):
        text = f"{value['mean']:.{digits}f}"
        whisker(ax, place, value["mean"], value["interval"], colour, text=text)
    set_row_axis(ax, [label for label, *_ in rows])
    ax.margins(x=0.22)


def trait_after_training(report: Mapping[str, Any], ax: Axes, *, measure: str = "score") -> Axes:
    """One measure of the trait before, after plain and after preventative fine-tuning, with intervals.

    Raises:
        RunError: an unknown measure, or one without a value.
    """
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
    finish_axes(ax, title, f"{n} held-out questions, 95% intervals", xlabel, "", grid="x")
    return ax


def recovery_cost(report: Mapping[str, Any], ax: Axes, *, measure: str = "kl_continuation") -> Axes:
    """One number of the original, the edited and the healed model, with intervals.

    Raises:
        RunError: an unknown measure; a report without measurements.
    """
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
    _whiskers(rows, ax, digits=2 if measure == "behaviour" else 3)
    title, xlabel = _COSTS[measure]
    finish_axes(ax, title, f"{rows[0][1]['n']} prompts, 95% intervals", xlabel, "", grid="x")
    if measure == "behaviour":
        ax.set_xlim(-0.05, 1.12)
    else:
        ax.set_xlim(left=0)
    return ax


def save_trait(report: Mapping[str, Any], path: str | Path) -> Path:
    """Score and projections side by side, as PNG.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    figure = new_figure(height=2.9, width=10.4)
    axes = figure.subplots(1, 2)
    for ax, measure in zip(axes, ("score", "projection"), strict=True):
        trait_after_training(report, ax, measure=measure)
    axes[1].set_yticklabels([])
    return save_figure(figure, path)


def save_costs(report: Mapping[str, Any], path: str | Path) -> Path:
    """Behaviour and the two KLs side by side, as PNG; a measure that the report lacks is left out.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    measured = report.get("measured") or {}
    names = [name for name in _COSTS if any(name in values for values in measured.values())]
    if not names:
        raise RunError("the report holds no measurements: heal with --contrast")
    figure = new_figure(height=2.5, width=3.6 * len(names))
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        recovery_cost(report, ax, measure=name)
    return save_figure(figure, path)
