"""Plots of projections of text: against scores, token by token, and over a screened data set.

Knows: how a monitoring table, a generated text and scores of samples are drawn. Does not know: any model, or how a
number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from interp_ablate.errors import RunError
from interp_ablate.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_ablate.models.generation import MonitoredToken
    from interp_ablate.persona.monitoring import Monitoring
    from interp_ablate.stats.correlation import Correlation


MonitoredAnswer = tuple["MonitoredToken", float]
_WIDTH_IN_CHARACTERS, _CHARACTER = 92, 0.602  # of a monospaced line; its width in units of its size
_NUMBERS = (0.48, 0.2)  # share of the axes that the numbers in a corner take: width, height
_AXES_POINTS = 545  # width of the only axes of a figure


def monitoring_scatter(monitoring: Monitoring, ax: Axes | None = None) -> Axes:
    """Answers' scores against the projections of their prompts' last tokens, coloured by system prompt.

    Large points are the system prompts' means; the line is the least-squares fit over all answers. Answers
    without a score are left out and counted.

    Raises:
        RunError: no answer has a score.
    """
    ax = style.axes_or_new(ax, height=5.0)
    style.require_columns(monitoring.table, ("level", "projection", "score"), "answers")
    rows = monitoring.table[monitoring.table["score"].notna()]
    style.require_rows(rows, "answers with a score")
    x, y = rows["projection"].to_numpy(float), rows["score"].to_numpy(float)
    levels = sorted(monitoring.table["level"].unique())
    colours = {level: style.GRADES(i / max(1, len(levels) - 1)) for i, level in enumerate(levels)}
    ax.scatter(
        x, y, s=16, c=[colours[level] for level in rows["level"]], edgecolors=style.INK, linewidths=0.3,
        alpha=0.8, zorder=2,
    )  # fmt: skip
    for level, group in rows.groupby("level"):
        means = group["projection"].mean(), group["score"].mean()
        ax.plot(
            *means, marker="o", markersize=11, color=colours[level], markeredgecolor=style.INK,
            markeredgewidth=1.2, zorder=4,
        )  # fmt: skip
    if monitoring.overall.r is not None:
        ends = np.array([x.min(), x.max()])
        ax.plot(
            ends, np.polyval(np.polyfit(x, y, 1), ends), color=style.INK, linewidth=1.2, zorder=3
        )
    missing = f"; {monitoring.no_verdict} without a score left out" if monitoring.no_verdict else ""
    trait = monitoring.details.get("trait", "trait")
    style.finish_axes(
        ax,
        f"Before the first word: projection on '{trait}' against the answer's score",
        f"n = {len(rows)} answers under {len(levels)} system prompts (large: their means){missing}",
        f"projection of the last prompt token at {monitoring.details.get('site', 'the site')}",
        "score of the answer (0 to 100)",
    )
    _add_numbers(ax, "\n".join(_lines(monitoring)), x, y)
    look: dict[str, Any] = {
        "marker": "o",
        "linestyle": "",
        "markeredgecolor": style.INK,
        "markersize": 7,
    }
    handles = [
        Line2D([], [], color=colours[levels[i]], label=name, **look)
        for i, name in ((0, "against"), (-1, "towards"))
    ]
    style.add_legend(
        ax, handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0.1
    )
    return ax


def _lines(monitoring: Monitoring) -> list[str]:
    lines = [
        f"{name:<8} {_short(getattr(monitoring, name))}, random "
        + ("undefined" if (limit := monitoring.control.get(name)) is None else f"{limit:.2f}")
        for name in ("overall", "within", "across")
    ]
    return [*lines, "(random: 95% of random directions have |r| below)"]


def _short(correlation: Correlation) -> str:
    if correlation.r is None:
        return "r undefined"
    if correlation.low is None or correlation.high is None:
        return f"r = {correlation.r:.2f}"
    return f"r = {correlation.r:.2f} [{correlation.low:.2f}, {correlation.high:.2f}]"


def _add_numbers(ax: Axes, text: str, x: np.ndarray, y: np.ndarray) -> None:
    """A few lines of numbers in the corner with the fewest points."""
    ax.get_xlim(), ax.get_ylim()  # limits are settled when they are asked for, transData is not
    at = ax.transAxes.inverted().transform(ax.transData.transform(np.column_stack([x, y])))
    corners = [(left, top) for top in (True, False) for left in (True, False)]

    def hidden(corner: tuple[bool, bool]) -> int:
        left, top = corner
        across = at[:, 0] < _NUMBERS[0] if left else at[:, 0] > 1 - _NUMBERS[0]
        along = at[:, 1] > 1 - _NUMBERS[1] if top else at[:, 1] < _NUMBERS[1]
        return int((across & along).sum())

    left, top = min(corners, key=hidden)
    box = {
        "facecolor": "white",
        "edgecolor": style.FAINT,
        "alpha": 0.9,
        "boxstyle": "round,pad=0.4",
    }
    ax.text(
        0.015 if left else 0.985, 0.97 if top else 0.035, text, transform=ax.transAxes,
        va="top" if top else "bottom", ha="left" if left else "right", fontsize=8, color=style.INK,
        family="monospace", bbox=box, zorder=6, multialignment="left",
    )  # fmt: skip


def token_strip(
    readings: Sequence[MonitoredAnswer], ax: Axes | None = None, *, title: str, limit: float
) -> Axes:
    """A generated text, each token on a ground coloured by its projection (`Model.monitor`).

    Args:
        limit: the projection, either way, at which the colour is full.

    Raises:
        RunError: no tokens, or no positive limit.
    """
    ax = style.axes_or_new(ax, height=3.6)
    if not readings or not limit > 0:
        raise RunError(f"a strip needs tokens and a limit above 0; got {len(readings)} and {limit}")
    scale, size = Normalize(-limit, limit), _AXES_POINTS / _WIDTH_IN_CHARACTERS / _CHARACTER
    line = column = 0
    for piece, projection in readings:
        for i, part in enumerate(piece.text.split("\n")):
            text = style.drawable(part)
            if i or column + len(text) > _WIDTH_IN_CHARACTERS:
                line, column = line + 1, 0
                text = text.lstrip(" ")
            if not text:
                continue
            ground = Rectangle(
                (column, -line - 0.5), len(text), 1, color=style.GRADES(scale(projection))
            )
            ax.add_patch(ground)
            ax.text(
                column, -line, text, family="monospace", fontsize=size, va="center", color=style.INK
            )
            column += len(text)
    ax.set_xlim(0, _WIDTH_IN_CHARACTERS)
    ax.set_ylim(-line - 0.6, 0.6)
    values = np.array([projection for _, projection in readings])
    caption = f"n = {len(values)} tokens, mean projection {values.mean():+.2f}"
    style.finish_axes(ax, title, caption, "", "", grid="")
    ax.set_axis_off()
    return ax


def tokens_figure(
    answers: Mapping[str, Sequence[MonitoredAnswer]], path: str | Path, *, dpi: int | None = None
) -> Path:
    """Several generated texts, one below the other, on one scale of colours; the file.

    The path's end is the format; `dpi` is pixels an inch of a PNG.

    Raises:
        RunError: nothing to draw; a place that cannot be written.
    """
    shown = {name: list(readings) for name, readings in answers.items() if readings}
    values = [abs(projection) for readings in shown.values() for _, projection in readings]
    if not values:
        raise RunError("there are no generated tokens to draw")
    limit = float(np.quantile(values, 0.98)) or 1.0
    lines = [
        1 + sum(len(piece.text) for piece, _ in readings) / _WIDTH_IN_CHARACTERS
        + sum(piece.text.count("\n") for piece, _ in readings)
        for readings in shown.values()
    ]  # fmt: skip
    figure = style.new_figure(height=0.9 + sum(0.55 + 0.22 * n for n in lines))
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[n + 1 for n in lines])[:, 0]
    for ax, (name, readings) in zip(axes, shown.items()):
        token_strip(readings, ax, title=name, limit=limit)
    mappable = ScalarMappable(Normalize(-limit, limit), style.GRADES)
    bar = figure.colorbar(
        mappable, ax=list(axes), orientation="horizontal", aspect=60, pad=0.02, fraction=0.05
    )
    bar.set_label("projection of the token on the direction", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return style.save_figure(figure, path, dpi=dpi)


def save_monitoring(monitoring: Monitoring, path: str | Path, *, dpi: int | None = None) -> Path:
    """The scatter plot in a file; the path's end is the format, `dpi` pixels an inch of a PNG.

    Raises:
        RunError: see `monitoring_scatter`; a place that cannot be written.
    """
    figure = style.new_figure(height=5.0)
    monitoring_scatter(monitoring, figure.add_subplot())
    return style.save_figure(figure, path, dpi=dpi)


def screening_histogram(
    values: Sequence[float] | np.ndarray,
    ax: Axes | None = None,
    *,
    threshold: float,
    by: str = "projection",
    trait: str = "",
    labels: Sequence[bool] | np.ndarray | None = None,
    reference: Sequence[float] | np.ndarray | None = None,
) -> Axes:
    """Samples by projection (or difference), with the threshold; those above it are flagged.

    Samples without a value are left out and counted.

    Args:
        labels: where they are known, they colour the bars instead.
        reference: values of a clean set, drawn as a line scaled to the same area.

    Raises:
        RunError: no sample has a value.
    """
    ax = style.axes_or_new(ax, height=3.6)
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    if not finite.any():
        raise RunError("there are no samples with a value to draw")
    array = array[finite]
    count = int(np.clip(np.sqrt(len(array)) * 2, 12, 80))
    bins = np.histogram_bin_edges(np.append(array, threshold), bins=count).tolist()
    if labels is None:
        orange, names = array > threshold, ("kept", "flagged")
    else:
        orange, names = np.asarray(labels, bool)[finite], ("not planted", "planted")
    for part, colour, name in zip(
        (array[~orange], array[orange]), (style.NEGATIVE, style.POSITIVE), names
    ):
        ax.hist(
            part, bins=bins, color=colour, alpha=0.65, label=f"{name} ({len(part)})",
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    if reference is not None:
        _outline(ax, np.asarray(reference, float), bins, len(array))
    ax.axvline(threshold, color=style.INK, linewidth=1.2, linestyle=(0, (4, 3)), label="threshold")
    lost, above = int((~finite).sum()), int((array > threshold).sum())
    style.finish_axes(
        ax,
        f"Training samples by {by if by != 'adjusted' else 'adjusted projection'}"
        + (f": {trait!r}" if trait else ""),
        f"n = {len(array)} samples, {above} of them above the threshold {threshold:.3g}"
        + (f"; {lost} without a value left out" if lost else ""),
        _MEASURES.get(by, by),
        "samples",
    )
    style.add_legend(ax, loc="best")
    return ax


_MEASURES = {
    "difference": "projection of the answer minus that of the model's own answer",
    "adjusted": "projection of the answer minus the part that the model's own answer explains",
    "projection": "projection of the answer (mean over its tokens)",
}


def _outline(ax: Axes, values: np.ndarray, bins: list[float], n: int) -> None:
    """A reference as a line, scaled to the area of n samples; what lies beyond the bins is not drawn."""
    clean = values[np.isfinite(values)]
    weights = np.full(len(clean), n / max(1, len(clean)))
    ax.hist(
        clean, bins=bins, weights=weights, histtype="step", color=style.CONTROL, linewidth=1.4,
        label=f"reference ({len(clean)}, scaled)",
    )  # fmt: skip


def save_screening(
    table: pd.DataFrame,
    path: str | Path,
    *,
    by: str,
    threshold: float,
    trait: str = "",
    labels: Sequence[bool] | None = None,
    reference: pd.DataFrame | None = None,
    dpi: int | None = None,
) -> Path:
    """The histogram of the column `by`; `labels` belong to the rows of `table` in their order.

    The path's end is the format; `dpi` is pixels an inch of a PNG.

    Raises:
        RunError: see `screening_histogram`; a place that cannot be written.
    """
    figure = style.new_figure(height=3.4)
    screening_histogram(
        table[by].to_numpy(float),
        figure.add_subplot(),
        threshold=threshold,
        by=by,
        trait=trait,
        labels=labels,
        reference=None if reference is None else reference[by].to_numpy(float),
    )
    return style.save_figure(figure, path, dpi=dpi)
