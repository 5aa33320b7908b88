"""Plots, monitoring and screening: projections against scores, tokens by projection, a data set's histogram.

Knows: how a monitoring table, a generated text and a screened file are drawn at a README's size.
Does not know: any model, or how a number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize

from interp_ablate.errors import RunError
from interp_ablate.plots.style import (
    FAINT,
    INK,
    NEGATIVE,
    POSITIVE,
    add_legend,
    finish_axes,
    new_figure,
    require_columns,
    require_rows,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_ablate.models.generation import MonitoredToken
    from interp_ablate.persona.monitoring import Monitoring
    from interp_ablate.stats.correlation import Correlation

MonitoredAnswer = tuple["MonitoredToken", float]
_WIDTH_IN_CHARACTERS, _CHARACTER = 92, 0.602  # of a monospaced line; its width in units of its size
_SAID = (0.48, 0.2)  # what the numbers in a corner take of the axes: width, height
_AXES_POINTS = 545  # width of the only axes of a figure
# From the one label's colour through grey to the other's.
GRADES = LinearSegmentedColormap.from_list("grades", (NEGATIVE, "#E4E4E4", POSITIVE))


def monitoring_scatter(found: Monitoring, ax: Axes) -> Axes:
    """Answers' scores against the projections of their prompts' last tokens, coloured by system prompt.

    Large points are the system prompts' means; the line is the least-squares fit over all answers. Answers
    without a score are left out and counted.

    Raises:
        RunError: no answer has a score.
    """
    require_columns(found.table, ("level", "projection", "score"), "answers")
    rows = found.table[found.table["score"].notna()]
    require_rows(rows, "answers with a score")
    x, y = rows["projection"].to_numpy(float), rows["score"].to_numpy(float)
    levels = sorted(found.table["level"].unique())
    colours = {level: GRADES(i / max(1, len(levels) - 1)) for i, level in enumerate(levels)}
    ax.scatter(
        x, y, s=16, c=[colours[level] for level in rows["level"]], edgecolors=INK, linewidths=0.3,
        alpha=0.8, zorder=2,
    )  # fmt: skip
    for level, group in rows.groupby("level"):
        means = group["projection"].mean(), group["score"].mean()
        ax.plot(
            *means, marker="o", markersize=11, color=colours[level], markeredgecolor=INK,
            markeredgewidth=1.2, zorder=4,
        )  # fmt: skip
    if found.overall.r is not None:
        ends = np.array([x.min(), x.max()])
        ax.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=INK, linewidth=1.2, zorder=3)
    missing = f"; {found.no_verdict} without a score left out" if found.no_verdict else ""
    trait = found.details.get("trait", "trait")
    finish_axes(
        ax,
        f"Before the first word: projection on '{trait}' against the answer's score",
        f"{len(rows)} answers under {len(levels)} system prompts (large: their means){missing}",
        f"projection of the last prompt token at {found.details.get('site', 'the site')}",
        "score of the answer (0 to 100)",
    )
    _say(ax, "\n".join(_lines(found)), x, y)
    handles = [_dot(colours[levels[i]], name) for i, name in ((0, "against"), (-1, "towards"))]
    add_legend(ax, handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0.1)
    return ax


def _lines(found: Monitoring) -> list[str]:
    lines = [
        f"{name:<8} {_short(getattr(found, name))}, random {_number(found.control.get(name))}"
        for name in ("overall", "within", "across")
    ]
    return [*lines, "(random: 95% of random directions have |r| below)"]


def _short(found: Correlation) -> str:
    if found.r is None:
        return "r undefined"
    if found.low is None or found.high is None:
        return f"r = {found.r:.2f}"
    return f"r = {found.r:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _say(ax: Axes, text: str, x: np.ndarray, y: np.ndarray) -> None:
    """A few lines of numbers in the corner with the fewest points."""
    ax.get_xlim(), ax.get_ylim()  # limits are settled when they are asked for, transData is not
    at = ax.transAxes.inverted().transform(ax.transData.transform(np.column_stack([x, y])))
    corners = [(left, top) for top in (True, False) for left in (True, False)]

    def hidden(corner: tuple[bool, bool]) -> int:
        left, top = corner
        across = at[:, 0] < _SAID[0] if left else at[:, 0] > 1 - _SAID[0]
        along = at[:, 1] > 1 - _SAID[1] if top else at[:, 1] < _SAID[1]
        return int((across & along).sum())

    left, top = min(corners, key=hidden)
    box = {"facecolor": "white", "edgecolor": FAINT, "alpha": 0.9, "boxstyle": "round,pad=0.4"}
    ax.text(
        0.015 if left else 0.985, 0.97 if top else 0.035, text, transform=ax.transAxes,
        va="top" if top else "bottom", ha="left" if left else "right", fontsize=8, color=INK,
        family="monospace", bbox=box, zorder=6, multialignment="left",
    )  # fmt: skip


def _dot(colour: Any, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        marker="o",
        linestyle="",
        color=colour,
        markeredgecolor=INK,
        markersize=7,
        label=name,
    )


# ---- tokens -------------------------------------------------------------------------------------------


def token_strip(readings: Sequence[MonitoredAnswer], ax: Axes, *, title: str, limit: float) -> Axes:
    """A generated text, each token on a ground coloured by its projection (`Model.monitor`).

    Args:
        limit: the projection, either way, at which the colour is full.

    Raises:
        RunError: no tokens, or no positive limit.
    """
    if not readings or not limit > 0:
        raise RunError(f"a strip needs tokens and a limit above 0; got {len(readings)} and {limit}")
    from matplotlib.patches import Rectangle

    scale, size = Normalize(-limit, limit), _AXES_POINTS / _WIDTH_IN_CHARACTERS / _CHARACTER
    line = column = 0
    for piece, projection in readings:
        for i, part in enumerate(piece.text.split("\n")):
            text = _drawable(part)
            if i or column + len(text) > _WIDTH_IN_CHARACTERS:
                line, column = line + 1, 0
                text = text.lstrip(" ")
            if not text:
                continue
            ground = Rectangle((column, -line - 0.5), len(text), 1, color=GRADES(scale(projection)))
            ax.add_patch(ground)
            ax.text(column, -line, text, family="monospace", fontsize=size, va="center", color=INK)
            column += len(text)
    ax.set_xlim(0, _WIDTH_IN_CHARACTERS)
    ax.set_ylim(-line - 0.6, 0.6)
    values = np.array([projection for _, projection in readings])
    caption = f"{len(values)} tokens, mean projection {values.mean():+.2f}"
    finish_axes(ax, title, caption, "", "", grid=False)
    ax.set_axis_off()
    return ax


def _drawable(text: str) -> str:
    """The text with a box for every character that the monospaced font lacks."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("monospace")).get_charmap()
    return "".join(
        c if c.isprintable() and ord(c) in known else "\u25a1" for c in text.replace("\t", " ")
    )


def tokens_figure(answers: Mapping[str, Sequence[MonitoredAnswer]], path: str | Path) -> Path:
    """Several generated texts, one below the other, on one scale of colours; the file.

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
    figure = new_figure(height=0.9 + sum(0.55 + 0.22 * n for n in lines))
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[n + 1 for n in lines])[:, 0]
    for ax, (name, readings) in zip(axes, shown.items()):
        token_strip(readings, ax, title=name, limit=limit)
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(Normalize(-limit, limit), GRADES)
    bar = figure.colorbar(
        mappable, ax=list(axes), orientation="horizontal", aspect=60, pad=0.02, fraction=0.05
    )
    bar.set_label("projection of the token on the direction", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return save_figure(figure, Path(path))


# ---- files --------------------------------------------------------------------------------------------


def save_monitoring(found: Monitoring, path: str | Path) -> Path:
    """The scatter plot as PNG.

    Raises:
        RunError: see `monitoring_scatter`; a place that cannot be written.
    """
    figure = new_figure(height=5.0)
    monitoring_scatter(found, figure.add_subplot())
    return save_figure(figure, Path(path))
