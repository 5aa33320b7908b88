"""Plots of training: a trait before and after fine-tuning, and what an edit cost before and after recovery.

Knows: how the reports of `preventing` and `healing` are drawn, in the look of `plots`. Does not know: models,
or how a number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import RunError
from interp_ablate.plots.style import (
    CONTROL,
    INK,
    NEGATIVE,
    POSITIVE,
    finish_axes,
    new_figure,
    save_figure,
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
WhiskerRow = tuple[str, Mapping[str, Any], str]


def whiskers(rows: Sequence[WhiskerRow], ax: Axes, *, digits: int = 2) -> Axes:
    """A dot and its interval a row, from the top: (label, {"mean", "interval"}, colour).

    Raises:
        RunError: no row has a mean.
    """
    known = [(label, value, colour) for label, value, colour in rows if value["mean"] is not None]
    if not known:
        raise RunError("there is no mean to draw: every value is missing")
    for place, (_, value, colour) in enumerate(known):
        low, high = value["interval"]
        ax.plot([low, high], [place, place], color=colour, linewidth=2.2, alpha=0.55)
        ax.plot(value["mean"], place, "o", color=colour, markersize=8, markeredgecolor="white")
        ax.annotate(
            f"{value['mean']:.{digits}f}", (high, place), (7, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(known)))
    ax.set_yticklabels([label for label, *_ in known])
    ax.set_ylim(len(known) - 0.5, -0.6)
    ax.margins(x=0.22)
    return ax


def trait(report: Mapping[str, Any], ax: Axes, *, measure: str = "score") -> Axes:
    """One measure of the trait before, after plain and after preventative fine-tuning, with intervals.

    Raises:
        RunError: an unknown measure, or one without a value.
    """
    if measure not in _TRAIT:
        raise RunError(f"unknown measure {measure!r}: accepted are {', '.join(_TRAIT)}")
    found = report["conditions"]
    rows = [
        (label, found[name][measure], colour)
        for name, (label, colour) in _CONDITIONS.items()
        if name in found
    ]
    whiskers(rows, ax, digits=0 if measure == "score" else 2)
    title, xlabel = _TRAIT[measure]
    n = max(value["n"] for _, value, _ in rows)
    finish_axes(ax, title, f"{n} held-out questions, 95% intervals", xlabel, "")
    ax.grid(visible=False, axis="y")
    return ax


def cost(report: Mapping[str, Any], ax: Axes, *, measure: str = "kl_continuation") -> Axes:
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
    whiskers(rows, ax, digits=2 if measure == "behaviour" else 3)
    title, xlabel = _COSTS[measure]
    finish_axes(ax, title, f"{rows[0][1]['n']} prompts, 95% intervals", xlabel, "")
    if measure == "behaviour":
        ax.set_xlim(-0.05, 1.12)
    else:
        ax.set_xlim(left=0)
    ax.grid(visible=False, axis="y")
    return ax


def save_trait(report: Mapping[str, Any], path: str | Path) -> Path:
    """Score and projections side by side, as PNG.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    figure = new_figure(height=2.9)
    figure.set_size_inches(10.4, 2.9)
    axes = figure.subplots(1, 2)
    for ax, measure in zip(axes, ("score", "projection"), strict=True):
        trait(report, ax, measure=measure)
    axes[1].set_yticklabels([])
    return save_figure(figure, Path(path))


def save_costs(report: Mapping[str, Any], path: str | Path) -> Path:
    """Behaviour and the two KLs side by side, as PNG; None of a report is drawn that it does not have.

    Raises:
        RunError: nothing to draw, or a place that cannot be written.
    """
    measured = report.get("measured") or {}
    names = [name for name in _COSTS if any(name in values for values in measured.values())]
    if not names:
        raise RunError("the report holds no measurements: heal with --contrast")
    figure = new_figure(height=2.5)
    figure.set_size_inches(3.6 * len(names), 2.5)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cost(report, ax, measure=name)
    return save_figure(figure, Path(path))
