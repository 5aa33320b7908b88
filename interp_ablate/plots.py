"""Plots: a run's pictures, each a function `(data, ax) -> ax`, and `save_figures` for a folder.

Knows: how projections, separation, cosines, trials and a test report are drawn so that they read at
a README's size, and how the files of a run folder are read (`read_table`, `read_json`, ...).
Does not know: any model, how a number was measured, or what the HTML report says about a picture.
It keeps away from pyplot: no window, no global state, no open figures; any backend may be in use.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from interp_ablate.errors import RunError
from interp_ablate.files import replacing
from interp_ablate.sites import POINTS, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_ablate.directions import Direction

logger = logging.getLogger(__name__)

Value = Literal["behaviour", "kl", "addition"]
Measure = Literal["d_prime", "auc"]

PROJECTION_COLUMNS = ("layer", "point", "split", "label", "prompt", "projection")
TRIAL_COLUMNS = (
    "trial", "stage", "layer", "point", "position", "behaviour", "addition", "kl", "status",
)  # fmt: skip

# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
POSITIVE, NEGATIVE, CONTROL, INK, FAINT = "#D55E00", "#0072B2", "#7A7A7A", "#222222", "#D9D9D9"
_POINT_STYLE: dict[str, tuple[str, str]] = {
    "embed": ("#000000", "X"),
    "resid_pre": ("#0072B2", "o"),
    "attn_out": ("#CC79A7", "v"),
    "resid_mid": ("#E69F00", "s"),
    "mlp_out": ("#7A7A7A", "D"),
    "resid_post": ("#009E73", "^"),
}
_WHOLE = ("layer", "trial")  # whole numbers of a table
_LINE_STYLES = ("-", "--", ":", "-.")
_HEAT: dict[Value, tuple[str, str, str]] = {
    "behaviour": (
        "Behaviour, ablated",
        "target log-odds, positive prompts\nlow = removed",
        "viridis_r",
    ),
    "kl": (
        "Damage, ablated",
        "KL in nats, negative prompts\nlow = unharmed (log scale)",
        "magma_r",
    ),
    "addition": (
        "Behaviour, added",
        "target log-odds, negative prompts\nhigh = induced",
        "viridis",
    ),
}
_RATES: tuple[tuple[str, str, str], ...] = (
    ("behaviour_before", "positive prompts, unedited", POSITIVE),
    ("behaviour_after", "positive prompts, ablated", POSITIVE),
    ("negative_before", "negative prompts, unedited", NEGATIVE),
    ("negative_after", "negative prompts, ablated", NEGATIVE),
    ("addition_after", "negative prompts, added", NEGATIVE),
)
_DPI, _WIDTH = 150, 7.8
_SMALLEST_KL = 1e-8


# Data functions ------------------------------------------------------------------------------


def projections(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Both labels' projections at every layer of one point, as pairs of half violins with medians.

    The stream grows with depth, so each layer's values are centred between the two label means and
    divided by that layer's pooled standard deviation within the labels: a pair's gap is its d'.
    The validation split is drawn; where a frame has none, whatever split it has, and the caption
    says which. Non-finite values are left out.

    Raises:
        RunError: a missing column, no rows, or rows of several points or positions.
    """
    _require(frame, PROJECTION_COLUMNS, "projections")
    for column in ("point", "position"):
        if column in frame and frame[column].nunique() > 1:
            raise RunError(
                f"projections() draws one {column}, and these rows hold "
                f"{sorted(map(str, frame[column].unique()))}: pass one {column}'s rows"
            )
    held_out = frame[frame["split"] == "validation"]
    rows = held_out if len(held_out) else frame
    rows = rows[np.isfinite(rows["projection"].astype(float))]
    _need_rows(rows, "projections with finite values")
    layers = sorted(rows["layer"].unique())
    half_width = 0.46 * min(np.diff(layers), default=1)
    everything = []
    for layer in layers:
        groups = _standardised(rows[rows["layer"] == layer])
        for values, colour, side in zip(groups, (NEGATIVE, POSITIVE), (-1, 1)):
            _half_violin(ax, float(layer), values, colour, side * half_width)
        everything += list(groups)
    cut = _limit_outliers(ax, np.concatenate(everything))
    counts = [int((rows[rows["layer"] == layers[0]]["label"] == name).sum()) for name in _LABELS]
    splits = " + ".join(sorted(map(str, rows["split"].unique())))
    caption = f"{splits} split, {counts[1]} positive + {counts[0]} negative prompts a layer"
    _finish(
        ax,
        f"Projections at {rows['point'].iloc[0]}, on each layer's own direction",
        caption + (f"; {cut} values beyond the frame" if cut else ""),
        "layer",
        "projection\n(pooled SDs of its layer)",
    )
    _layer_axis(ax, layers)
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    handles = [_patch(POSITIVE, "positive"), _patch(NEGATIVE, "negative")]
    _legend(ax, handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0.1)
    return ax


def separation_by_layer(
    directions: Iterable[Direction], ax: Axes, *, measure: Measure = "d_prime"
) -> Axes:
    """How well each site's direction tells held-out prompts apart, by layer, one line a site kind.

    Several positions are told apart by the line's dashes. Directions without a separation, or with
    an infinite one, leave a gap.

    Raises:
        RunError: no direction has a separation, or an unknown measure.
    """
    if measure not in get_args(Measure):
        raise RunError(f"unknown measure {measure!r}: accepted are {', '.join(get_args(Measure))}")
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for item in directions:
        if item.separation is not None:
            line = lines.setdefault((item.site.point, item.position), {})
            value = getattr(item.separation, measure)
            line[item.site.layer] = value if np.isfinite(value) else np.nan
    if not lines:
        raise RunError(
            "no direction has a separation: run `interp-ablate directions` with held-out prompts"
        )
    positions = sorted({position for _, position in lines}, key=_position_key)
    for point, position in sorted(lines, key=lambda key: (_point_order(key[0]), key[1])):
        line = lines[point, position]
        colour, marker = _POINT_STYLE[point]
        ax.plot(
            sorted(line),
            [line[layer] for layer in sorted(line)],
            linestyle=_LINE_STYLES[positions.index(position) % len(_LINE_STYLES)],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            label=point if len(positions) == 1 else f"{point} at {position}",
        )
    chance, ylabel = {
        "d_prime": (0.0, "d′ (gap of the means\nin pooled SDs)"),
        "auc": (0.5, "AUC (chance = 0.5)"),
    }[measure]
    ax.axhline(chance, color=CONTROL, linewidth=0.9, linestyle=(0, (4, 3)))
    count = sum(len(line) for line in lines.values())
    _finish(
        ax,
        f"Separation of held-out prompts by layer ({'AUC' if measure == 'auc' else 'd′'})",
        f"{count} directions; dashed line: no separation",
        "layer",
        ylabel,
    )
    _layer_axis(ax, [layer for line in lines.values() for layer in line])
    _legend(ax, loc="best", ncols=1 if len(lines) <= 3 else 2)
    return ax


def cosine_similarity(directions: Iterable[Direction], ax: Axes) -> Axes:
    """Cosine of every pair of directions, sites in forward order; several positions make blocks.

    Raises:
        RunError: no directions.
    """
    from interp_ablate.directions import cosine_similarities

    items = sorted(directions, key=lambda item: (_position_key(item.position), item.site.order))
    if not items:
        raise RunError("no directions to compare: run `interp-ablate directions` first")
    matrix = cosine_similarities(items).numpy()
    image = ax.imshow(
        matrix, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest", origin="lower"
    )
    starts = [
        index
        for index, item in enumerate(items)
        if not index
        or (item.site.layer, item.position)
        != (items[index - 1].site.layer, items[index - 1].position)
    ]
    ticks = starts[:: max(1, -(-len(starts) // 12))]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([float(tick) for tick in ticks])
        axis.set_ticklabels([str(items[tick].site.layer) for tick in ticks])
    for index in range(1, len(items)):
        if items[index].position != items[index - 1].position:
            ax.axhline(index - 0.5, color=INK, linewidth=0.8)
            ax.axvline(index - 0.5, color=INK, linewidth=0.8)
    points = sorted({item.site.point for item in items}, key=_point_order)
    positions = sorted({item.position for item in items}, key=_position_key)
    order = ", ".join(points) + (f"; positions {', '.join(positions)}" if positions[1:] else "")
    _finish(
        ax,
        "Cosine similarity of the directions",
        f"{len(items)} sites in forward order; within a layer: {order}",
        "layer",
        "layer",
        grid=False,
    )
    bar = _colour_bar(image, ax, fraction=0.046, pad=0.03)
    bar.set_label("cosine", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return ax


def sweep_heatmap(trials: pd.DataFrame, ax: Axes, *, value: Value) -> Axes:
    """One score of the screening trials by layer and site kind; hatched = failed or never tried.

    Light is better in all three. The ring marks the strongest site for the behaviour; KL, whose
    least value says nothing alone, has none, and a logarithmic colour scale.

    Raises:
        RunError: a missing column, an unknown value, or no screening trial.
    """
    if value not in _HEAT:
        raise RunError(f"unknown value {value!r}: accepted are {', '.join(_HEAT)}")
    _require(trials, TRIAL_COLUMNS, "trials")
    screen = trials[trials["stage"] == "screen"]
    _need_rows(screen, "screening trials")
    positions = sorted(map(str, screen["position"].unique()), key=_position_key)
    layers = sorted(screen["layer"].unique())
    points = sorted(screen["point"].unique(), key=_point_order)
    columns = [(point, position) for position in positions for point in points]
    grid = np.full((len(layers), len(columns)), np.nan)
    for _, row in screen[_usable(screen, (value,))].iterrows():
        place = layers.index(row["layer"]), columns.index((row["point"], str(row["position"])))
        grid[place] = row[value]
    title, label, colours = _HEAT[value]
    ax.set_facecolor("#EFEFEF")
    ax.patch.set(hatch="////", edgecolor="#C0C0C0")
    _heat_cells(ax, grid, value, label, colours)
    ax.set_yticks(range(len(layers))[:: max(1, -(-len(layers) // 16))])
    ax.set_yticklabels([str(layers[int(tick)]) for tick in ax.get_yticks()])
    ax.set_xticks(range(len(columns)))
    names = [p if not positions[1:] else f"{p}\n{where}" for p, where in columns]
    ax.set_xticklabels(names, rotation=90 if len(columns) > 3 else 30, ha="center")
    done = int(np.isfinite(grid).sum())
    _finish(ax, title, f"{done} of {grid.size} sites; light = better", "", "layer", grid=False)
    return ax


def pareto(
    trials: pd.DataFrame,
    ax: Axes,
    *,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
) -> Axes:
    """Behaviour against KL of every finished trial, with the front that no trial beats on both.

    `selected` is the chosen trial's row; `max_kl` draws the limit. Failed trials and those without
    both numbers are left out and counted in the caption.

    Raises:
        RunError: a missing column, or no finished trial.
    """
    _require(trials, TRIAL_COLUMNS, "trials")
    rows = trials[_usable(trials, ("behaviour", "kl"))]
    _need_rows(rows, "finished trials with both a behaviour and a KL")
    damage = rows["kl"].clip(lower=_SMALLEST_KL)
    screened = (rows["stage"] == "screen").to_numpy()
    for mask, colour, marker, name in (
        (screened, "#9A9A9A", "o", "screen: full strength, one site's direction"),
        (~screened, "#56B4E9", "s", "refine: strengths per layer"),
    ):
        if mask.any():
            ax.scatter(
                damage[mask], rows["behaviour"][mask], s=18, c=colour, marker=marker,
                alpha=0.75, linewidths=0, label=f"{name} ({int(mask.sum())})",
            )  # fmt: skip
    if "expression_rate" in rows and (read := rows["expression_rate"].notna().to_numpy()).any():
        ax.scatter(
            damage[read], rows["behaviour"][read], s=42, facecolors="none", edgecolors=INK,
            linewidths=0.9, label=f"finalist: its answers were generated ({int(read.sum())})",
        )  # fmt: skip
    front = _front(damage.to_numpy(float), rows["behaviour"].to_numpy(float))
    ax.plot(*front, color="#009E73", linewidth=1.6, drawstyle="steps-post", label="Pareto front")
    ax.set_xscale("log")
    _mark_choice(ax, selected, max_kl)
    # Plain numbers, also between decades: the KLs of one sweep often span only one or two.
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    left_out = len(trials) - len(rows)
    _finish(
        ax,
        "Behaviour against damage, validation split",
        f"{len(rows)} of {len(trials)} trials"
        + (f"; {left_out} failed or NaN" if left_out else ""),
        "KL to the unedited model, first token, negative prompts (nats, log scale)",
        "target log-odds, positive prompts\n(lower = behaviour removed)",
    )
    _legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return ax


def search_front(
    trials: pd.DataFrame,
    ax: Axes,
    *,
    repetition: float | None = None,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
) -> Axes:
    """Expression rate against KL of every plan of a search, and the front of the two.

    Args:
        repetition: the unedited model's; plans that repeat themselves more are drawn hollow.
        selected: the chosen trial's row; `max_kl` draws the limit.

    Raises:
        RunError: a missing column, or no finished trial.
    """
    _require(trials, ("edit", "expression_rate", "kl", "repetition"), "the search's trials")
    rows = trials[trials[["expression_rate", "kl"]].notna().all(axis=1)]
    _need_rows(rows, "finished trials")
    damage, rate = rows["kl"].clip(lower=_SMALLEST_KL), rows["expression_rate"]
    loops = rows["repetition"] > (math.inf if repetition is None else repetition)
    for kind, colour, marker, name in (
        ("band", "#56B4E9", "s", "kernels of strengths"),
        ("fitted", "#E69F00", "D", "around a fitted edit"),
    ):
        for mask, face, more in (
            ((rows["edit"] == kind) & ~loops, colour, ""),
            (
                (rows["edit"] == kind) & loops,
                "none",
                ", positive prompts' answers repeat more",
            ),
        ):
            if mask.any():
                ax.scatter(
                    damage[mask], rate[mask], s=26, marker=marker, facecolors=face,
                    edgecolors=colour, linewidths=1.1, label=f"{name}{more} ({int(mask.sum())})",
                )  # fmt: skip
    front = _front(damage.to_numpy(float), rate.to_numpy(float))
    ax.plot(
        *front,
        color="#009E73",
        linewidth=1.6,
        marker=".",
        drawstyle="steps-post",
        label="Pareto front",
    )  # a front of one plan is a dot
    ax.set_xscale("log")
    ax.set_ylim(bottom=-0.03)
    if selected is not None:
        ax.scatter(
            max(selected["kl"], _SMALLEST_KL), selected["expression_rate"], s=130, marker="*",
            color="#D55E00", zorder=5, label="chosen",
        )  # fmt: skip
    if max_kl is not None:
        ax.axvline(max_kl, color=INK, linewidth=0.9, linestyle=":", label=f"KL limit {max_kl:g}")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    _finish(
        ax,
        "Plans of the search, validation split",
        f"{len(rows)} of {len(trials)} trials scored",
        "KL to the unedited model, first token, negative prompts (nats, log scale)",
        "share of positive prompts whose answer\nshows the behaviour",
    )
    _legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return ax


def before_after(test: Mapping[str, Any], ax: Axes) -> Axes:
    """Expression rates of the test report before and after, beside its controls, with intervals.

    Raises:
        RunError: `test` holds none of the rates, or a rate or interval is not a number.
    """
    rows = _rate_rows(test)
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
    _finish(
        ax,
        "How often answers express the behaviour",
        "test split" + ("; whiskers: bootstrap intervals" if drawn else "; no intervals given"),
        "share of generated answers",
        "",
    )
    ax.grid(visible=False, axis="y")
    return ax


# Drawing helpers -----------------------------------------------------------------------------

_LABELS = ("negative", "positive")


def _standardised(rows: pd.DataFrame) -> list[np.ndarray]:
    """Negative and positive values, centred between the means, over the spread within labels."""
    groups = [rows["projection"][rows["label"] == name].to_numpy(float) for name in _LABELS]
    filled = [group for group in groups if len(group)]
    if not filled:
        raise RunError(
            f"unknown labels {sorted(map(str, rows['label'].unique()))[:4]} in the projections: "
            f"accepted are {' and '.join(_LABELS)}"
        )
    centre = float(np.mean([group.mean() for group in filled]))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in filled)
    spread = np.sqrt(squares / max(sum(map(len, filled)) - len(filled), 1))
    # Constant within each label: one unit apart is all that can be said.
    scale = spread or max(abs(group.mean() - centre) for group in filled) or 1.0
    return [(group - centre) / scale for group in groups]


def _half_violin(ax: Axes, x: float, values: np.ndarray, colour: str, width: float) -> None:
    """Gaussian kernel density (Scott's bandwidth) to one side of x, with the median as a bar."""
    if not len(values):
        return
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    if spread > 1e-9:
        bandwidth = spread * len(values) ** -0.2
        span = np.linspace(values.min() - bandwidth, values.max() + bandwidth, 60)
        density = np.exp(-0.5 * ((span[:, None] - values) / bandwidth) ** 2).sum(1)
        edge = x + width * density / density.max()
        ax.fill_betweenx(span, x, edge, color=colour, alpha=0.55, linewidth=0)
    median = float(np.median(values))
    ax.plot([x, x + width], [median, median], color=colour, linewidth=1.8, solid_capstyle="butt")


def _limit_outliers(ax: Axes, values: np.ndarray) -> int:
    """Keep a few far values from flattening the rest; the number of those beyond the frame."""
    bulk = 2.5 * float(np.percentile(np.abs(values), 98))
    if bulk <= 0 or np.abs(values).max() <= bulk:
        return 0
    ax.set_ylim(-bulk, bulk)
    return int((np.abs(values) > bulk).sum())


def _heat_cells(ax: Axes, grid: np.ndarray, value: Value, label: str, colours: str) -> None:
    """The coloured cells, their colour bar, and a ring on the strongest one."""
    scale: dict[str, Any] = {}
    if value == "kl":
        grid = np.maximum(grid, _SMALLEST_KL)
        low, high = (np.nanmin(grid), np.nanmax(grid)) if np.isfinite(grid).any() else (0.1, 1.0)
        scale["norm"] = LogNorm(low, high if high > low else low * 10)
    image = ax.imshow(
        np.ma.masked_invalid(grid), cmap=colours, aspect="auto", origin="lower",
        interpolation="nearest", **scale,
    )  # fmt: skip
    bar = _colour_bar(image, ax, location="bottom", fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if value == "kl":
        low, high = image.get_clim()
        assert low is not None and high is not None  # set by the norm above
        steps = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
        ticks = [step * 10.0**power for power in range(-9, 4) for step in steps]
        bar.set_ticks([tick for tick in ticks if low <= tick <= high])
        bar.ax.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        return
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if np.isfinite(grid).any():
        best = np.nanargmax(grid) if value == "addition" else np.nanargmin(grid)
        row, column = np.unravel_index(best, grid.shape)
        for colour, size in (("black", 9), ("white", 7)):
            ax.plot(column, row, "o", markersize=size, markerfacecolor="none", color=colour)


def _colour_bar(image: Any, ax: Axes, **options: Any) -> Any:
    return ax.get_figure().colorbar(image, ax=ax, **options)  # type: ignore[union-attr]


def _front(damage: np.ndarray, behaviour: np.ndarray) -> tuple[list[float], list[float]]:
    """The points that no other beats on both numbers, by rising damage."""
    xs: list[float] = []
    ys: list[float] = []
    for index in np.lexsort((behaviour, damage)):
        if not ys or behaviour[index] < ys[-1]:
            xs.append(float(damage[index]))
            ys.append(float(behaviour[index]))
    return xs, ys


def _mark_choice(ax: Axes, selected: Mapping[str, Any] | None, max_kl: float | None) -> None:
    if max_kl is not None and max_kl > 0:
        ax.axvline(
            max_kl,
            color=POSITIVE,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label=f"limit: KL {max_kl:g}",
        )
        right = max(ax.get_xlim()[1], max_kl * 1.3)
        ax.axvspan(max_kl, right, color=POSITIVE, alpha=0.06, linewidth=0)
        ax.set_xlim(right=right)
    if selected and selected.get("behaviour") is not None and selected.get("kl") is not None:
        try:
            x, y = max(float(selected["kl"]), _SMALLEST_KL), float(selected["behaviour"])
        except (TypeError, ValueError) as error:
            raise RunError(f"the selected trial's scores are not numbers: {error}") from error
        ax.plot(
            x, y, "*", markersize=17, color=POSITIVE, markeredgecolor="white", linestyle="none",
            label=f"chosen: trial {selected.get('trial', '?')}", zorder=5,
        )  # fmt: skip


def _rate_rows(
    test: Mapping[str, Any],
) -> list[tuple[str, float, list[float] | None, str]]:
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


def _usable(trials: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Finished trials in which every given score is a finite number."""
    numbers = trials[list(columns)].apply(pd.to_numeric, errors="coerce")
    return (trials["status"] == "ok") & np.isfinite(numbers).all(axis=1)


def _point_order(point: str) -> int:
    order: tuple[Point, ...] = (
        "embed",
        "resid_pre",
        "attn_out",
        "resid_mid",
        "mlp_out",
        "resid_post",
    )
    if point not in order:
        raise RunError(f"unknown point {point!r}: accepted are {', '.join(POINTS)}")
    return order.index(point)  # type: ignore[arg-type]


def _position_key(position: str) -> tuple[int, str]:
    """The last position first, then backwards; named positions after the numbered ones."""
    text = str(position)
    return (-int(text), "") if re.fullmatch(r"-?\d+", text) else (10**9, text)


def _require(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise RunError(
            f"the {what} lack the column{'s' if missing[1:] else ''} {', '.join(missing)}: "
            f"expected {', '.join(columns)}; came {', '.join(map(str, frame.columns)) or 'none'}"
        )


def _need_rows(frame: pd.DataFrame, what: str) -> None:
    if not len(frame):
        raise RunError(f"there are no {what} to draw")


def _layer_axis(ax: Axes, layers: Iterable[int]) -> None:
    """Whole layer numbers, at most sixteen of them, with room at the ends."""
    found = sorted({int(layer) for layer in layers})
    ax.set_xticks(found[:: max(1, -(-len(found) // 16))])
    ax.set_xlim(found[0] - 0.7, found[-1] + 0.7)


def _patch(colour: str, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.7, label=name)


def _legend(ax: Axes, handles: list[Any] | None = None, **options: Any) -> None:
    shown = handles if handles is not None else ax.get_legend_handles_labels()[0]
    ax.legend(handles=shown, fontsize=8.5, framealpha=0.85, edgecolor="none", **options)


def _finish(
    ax: Axes, title: str, caption: str, xlabel: str, ylabel: str, *, grid: bool = True
) -> None:
    """The look that all figures share: what is seen on top, n below it in grey, labelled axes."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=19)
    ax.annotate(
        caption, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color="#555555", annotation_clip=False,
    )  # fmt: skip
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(which="both", labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(visible=True, color="#E8E8E8", linewidth=0.7)
        ax.set_axisbelow(True)


# The run folder ------------------------------------------------------------------------------


def save_figures(folder: str | Path) -> list[Path]:
    """Draw every figure that the run folder has data for, as PNG in `folder/figures`.

    A figure without data yet is skipped and logged. Each file is written beside its place and
    renamed when whole.

    Raises:
        RunError: the folder is not there, cannot be written, or holds a corrupt file.
        DirectionError: corrupt directions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"no run folder at {folder}: make one with `interp-ablate run --out {folder}`"
        )
    written = []
    for draw in _FIGURES:
        figures = draw(folder)
        if not figures:
            logger.info(
                "skipped %s: no data yet in %s", draw.__name__.removeprefix("_draw_"), folder
            )
        for name, figure in figures.items():
            written.append(_save(figure, folder / "figures" / name))
    return written


def _draw_projections(folder: Path) -> dict[str, Figure]:
    path = folder / "projections.csv"
    if not path.exists():
        return {}
    frame = read_table(path, PROJECTION_COLUMNS, numbers=("layer", "projection"), complete=True)
    if not len(frame):
        return {}
    if "position" not in frame:
        frame = frame.assign(position="-1")
    figures = {}
    positions = sorted(frame["position"].unique(), key=_position_key)
    for place, position in enumerate(positions):
        rows = frame[frame["position"] == position]
        points = sorted(rows["point"].unique(), key=_point_order)
        figure = _figure(height=0.3 + 2.75 * len(points))
        for index, point in enumerate(points):
            ax = figure.add_subplot(len(points), 1, index + 1)
            projections(rows[rows["point"] == point], ax)
            _layer_axis(ax, rows["layer"])  # the same layers at the same place in every panel
        suffix = re.sub(r"[^\w.-]", "_", f"_at_{position}") if place else ""
        figures[f"projections{suffix}.png"] = figure
    return figures


def _directions(folder: Path) -> list[Direction]:
    from interp_ablate.directions import Directions

    path = folder / "directions.safetensors"
    if not path.exists():
        return []
    found = Directions.load(path)
    # the plain estimates; beside each stands its variant orthogonalized to the negative mean
    return list(found.of("difference_in_means") or found)


def _draw_separation(folder: Path) -> dict[str, Figure]:
    items = [item for item in _directions(folder) if item.separation is not None]
    if not items:
        return {}
    figure = _figure(height=6.2)
    measures: tuple[Measure, ...] = get_args(Measure)
    for index, measure in enumerate(measures):
        separation_by_layer(items, figure.add_subplot(2, 1, index + 1), measure=measure)
    return {"separation.png": figure}


def _draw_cosine(folder: Path) -> dict[str, Figure]:
    items = _directions(folder)
    if not items:
        return {}
    figure = _figure(height=6.6)
    cosine_similarity(items, figure.add_subplot())
    return {"cosine_similarity.png": figure}


def _draw_sweep(folder: Path) -> dict[str, Figure]:
    trials = _trials(folder)
    if trials is None or not (trials["stage"] == "screen").any():
        return {}
    figure = _figure(height=2.8 + 0.14 * max(trials["layer"].nunique(), 8))
    values: tuple[Value, ...] = get_args(Value)
    for index, value in enumerate(values):
        sweep_heatmap(trials, figure.add_subplot(1, 3, index + 1), value=value)
    return {"sweep.png": figure}


def _draw_pareto(folder: Path) -> dict[str, Figure]:
    trials = _trials(folder)
    if trials is None or not _usable(trials, ("behaviour", "kl")).any():
        return {}
    selected = read_json(folder / "selected.json") or {}
    configuration = (read_json(folder / "run.json") or {}).get("configuration") or {}
    chosen = selected.get("trial") if selected.get("plan") else None
    figure = _figure(height=5.4)
    pareto(trials, figure.add_subplot(), selected=chosen, max_kl=configuration.get("max_kl"))
    return {"pareto.png": figure}


def _draw_search(folder: Path) -> dict[str, Figure]:
    if not (folder / "search.csv").exists():
        return {}
    trials = read_table(
        folder / "search.csv",
        ("number", "state", "edit"),
        numbers=("number", "expression_rate", "kl", "repetition"),
    )
    trials = trials[trials["state"] == "COMPLETE"]
    if trials.empty:
        return {}
    selected = read_json(folder / "selected.json") or {}
    run = read_json(folder / "run.json") or {}
    figure = _figure(height=5.4)
    search_front(
        trials,
        figure.add_subplot(),
        repetition=selected.get("validation_baseline", {}).get("repetition"),
        selected=selected.get("trial"),
        max_kl=run.get("configuration", {}).get("max_kl"),
    )
    return {"search.png": figure}


def _draw_before_after(folder: Path) -> dict[str, Figure]:
    test = (read_json(folder / "selected.json") or {}).get("test")
    if not test or not _rate_rows(test):
        return {}
    figure = _figure(height=1.4 + 0.36 * len(_rate_rows(test)))
    before_after(test, figure.add_subplot())
    return {"before_after.png": figure}


_FIGURES: tuple[Callable[[Path], dict[str, Figure]], ...] = (
    _draw_projections,
    _draw_separation,
    _draw_cosine,
    _draw_sweep,
    _draw_pareto,
    _draw_search,
    _draw_before_after,
)


def _figure(*, height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def _save(figure: Figure, path: Path) -> Path:
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Free space or choose another folder"
        ) from error
    logger.info("wrote %s", path)
    return path


def _trials(folder: Path) -> pd.DataFrame | None:
    return read_trials(folder / "trials.csv") if (folder / "trials.csv").exists() else None


def read_trials(path: str | Path) -> pd.DataFrame:
    """The trials of a sweep, with scores as numbers (NaN where a trial has none).

    Raises:
        RunError: a corrupt table, with its line.
    """
    numbers = (
        "trial", "layer", "behaviour", "own_words", "addition", "kl", "kl_high", "expression_rate",
        "repetition", "length", "attention_strength", "attention_layer", "mlp_strength",
        "mlp_layer", "width", "scale", "prompts", "seconds", "behaviour_baseline", "own_words_baseline",
        "addition_baseline",
    )  # fmt: skip
    frame = read_table(path, TRIAL_COLUMNS, numbers=numbers)
    unknown = ~frame["status"].isin(("ok", "failed"))
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise _corrupt(path, row, f"its status is {frame['status'].iloc[row]!r}, not ok or failed")
    return frame


def read_table(
    path: str | Path,
    columns: Sequence[str],
    *,
    numbers: Sequence[str] = (),
    complete: bool = False,
) -> pd.DataFrame:
    """A CSV of the run folder; `layer` and `trial` become integers, the columns of `numbers` floats.

    With `complete`, a row without a finite value in one of `numbers` is corrupt.

    Raises:
        RunError: not a CSV, missing columns, or a value that is not a number: with its line.
    """
    path = Path(path)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:  # ParserError and EmptyDataError are ValueErrors
        raise RunError(
            f"cannot read {path}: {str(error).strip()}. "
            "Delete it and run the stage that wrote it again"
        ) from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise RunError(
            f"{path} line 1 lacks the columns {', '.join(missing)}: expected {', '.join(columns)}; "
            "delete it and run the stage that wrote it again"
        )
    for name in [name for name in numbers if name in frame.columns]:
        text = frame[name].fillna("").str.strip()
        values = pd.to_numeric(text, errors="coerce").astype(float)
        absent = text.str.lower().isin(("", "nan", "none", "null"))
        needed = complete or name in _WHOLE
        bad = ~np.isfinite(values) if needed else values.isna() & ~absent
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise _corrupt(path, row, f"{name} is {text.iloc[row]!r}, not a number")
        frame[name] = values.astype(int) if name in _WHOLE else values
    return frame


def _corrupt(path: str | Path, row: int, fault: str) -> RunError:
    """An error naming the line of a CSV's data row (a quoted field may span lines)."""
    with open(path, newline="", encoding="utf-8") as stream:
        reader, seen, start = csv.reader(stream), -1, 1
        for record in reader:
            seen += bool(record)
            if seen == row + 1:
                break
            start = reader.line_num + 1
    return RunError(
        f"{path} is corrupt at line {start}: {fault}. "
        "Delete it and run the stage that wrote it again"
    )


def read_json(path: str | Path) -> dict[str, Any] | None:
    """A JSON object of the run folder; None where there is no such file.

    Raises:
        RunError: the file is not JSON, with its line, or not an object.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"cannot read {path}: {error}. Delete it and run the stage that wrote it again"
        ) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds a {type(found).__name__} where a JSON object is expected")
    return found


def read_lines(path: str | Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON-lines file; None where there is no such file.

    Raises:
        RunError: a line that is not a JSON object, with its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path} is corrupt at line {number}: {error}") from error
        if not isinstance(record, dict):
            raise RunError(f"{path} is corrupt at line {number}: expected a JSON object")
        found.append(record)
    return found
