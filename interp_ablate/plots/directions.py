"""Plots of directions by layer: projections, separation, cosines.

Knows: how they are drawn. Does not know: run folders, or how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from interp_ablate.directions.direction import as_directions, cosine_similarities
from interp_ablate.directions.estimators import CONTROL_COLUMNS
from interp_ablate.errors import RunError
from interp_ablate.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_ablate.directions.direction import Direction

Measure = Literal["d_prime", "auc"]

PROJECTION_COLUMNS = ("layer", "point", "split", "label", "prompt", "projection")
_NEEDED = tuple(column for column in PROJECTION_COLUMNS if column != "split")
SIDES = ("negative", "positive")
BESIDE_COLUMNS = ("first", "second", "cosine", "null_low", "null_high")
_MOST_PAIRS = 40
MOST_DOTS = 40  # prompts a side and layer; a density of fewer would be mostly its bandwidth


def held_out_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of validation prompts; all where there are none."""
    rows = frame[frame["split"] == "validation"]
    return rows if len(rows) else frame


def projections(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Both labels' projections at every layer of one point: a dot a prompt, the quartiles, and the median as a bar.

    More than 40 prompts a side are drawn as half violins instead. The stream grows with depth, so each layer's values are centred between the two label means and
    divided by that layer's pooled standard deviation within the labels: a pair's gap is its d'.
    The validation split is drawn; where a frame has none, whatever split it has, and the caption
    says which. Non-finite values are left out. Of tokens (rows with a part) all positions are drawn together.

    Raises:
        RunError: a missing column, no rows, or rows of several points, positions or methods.
    """
    ax = style.axes_or_new(ax, height=3.6)
    style.require_columns(frame, _NEEDED, "projections")
    if "split" not in frame:
        frame = frame.assign(split="")
    for column in ("point", *(() if "part" in frame else ("position",)), "method"):
        if column in frame and frame[column].nunique() > 1:
            raise RunError(
                f"projections() draws one {column}, and these rows hold "
                f"{sorted(map(str, frame[column].unique()))}: pass one {column}'s rows"
            )
    rows = held_out_rows(frame)
    rows = rows[np.isfinite(rows["projection"].astype(float))]
    style.require_rows(rows, "projections with finite values")
    style.require_whole(rows, ("layer",), "projections")
    layers = sorted(rows["layer"].unique())
    half_width = 0.46 * min(np.diff(layers), default=1)
    everything = []
    for layer in layers:
        groups = standardised_projections(rows[rows["layer"] == layer])
        for values, colour, side in zip(groups, (style.NEGATIVE, style.POSITIVE), (-1, 1)):
            few = len(values) <= MOST_DOTS
            (_dots if few else _half_violin)(ax, float(layer), values, colour, side * half_width)
        everything += list(groups)
    cut = _limit_outliers(ax, np.concatenate(everything))
    caption = _caption_of_projections(rows[rows["layer"] == layers[0]])
    style.finish_axes(
        ax,
        f"Projections at {rows['point'].iloc[0]}",
        caption + (f"; {cut} values beyond the frame" if cut else ""),
        "layer",
        "projection\n(pooled SDs of its layer)",
    )
    style.set_layer_axis(ax, layers)
    ax.axhline(0, color=style.FAINT, linewidth=0.8, zorder=0)
    handles = [
        style.colour_patch(style.POSITIVE, "positive"),
        style.colour_patch(style.NEGATIVE, "negative"),
    ]
    style.add_legend(
        ax,
        handles,
        loc="upper right",  # beside the name of the axis: above stand title and caption
        bbox_to_anchor=(1.0, 0.0),
        ncols=2,
        borderaxespad=2.0,
    )
    return ax


def _caption_of_projections(rows: pd.DataFrame) -> str:
    """Split and n of one layer's rows, and what is shaded."""
    splits = " + ".join(sorted(map(str, rows["split"].unique())))
    split = f"{splits} split, " if splits else ""
    counts = [int((rows["label"] == name).sum()) for name in SIDES]
    shaded = "" if max(counts) > MOST_DOTS else "; shaded: quartiles"
    what = "tokens" if "part" in rows else "prompts"
    n = f"n = {counts[1]} positive + {counts[0]} negative {what} a layer"
    return f"each layer on its own direction, centred; {split}{n}{shaded}"


def _of_one_method(directions: Iterable[Direction], what: str) -> list[Direction]:
    """The directions as a list.

    Raises:
        RunError: they are of several estimators, which one line or cell a site cannot show.
    """
    items = as_directions(directions)
    methods = sorted({item.method for item in items})
    if len(methods) > 1:
        raise RunError(
            f"{what} shows one estimator, and these directions are of {', '.join(methods)}: pass "
            f"directions.of({methods[0]!r})"
        )
    return items


def distinct_directions(directions: Iterable[Direction]) -> list[Direction]:
    """The directions without those at resid_pre of a layer that have their like at resid_post of the layer before."""
    items = as_directions(directions)
    drawn = style.drawn_places((d.site.layer, d.site.point, d.position) for d in items)
    return [d for d in items if drawn[d.site.layer, d.site.point, d.position] is not None]


def separation_by_layer(
    directions: Iterable[Direction],
    ax: Axes | None = None,
    *,
    measure: Measure = "d_prime",
    controls: pd.DataFrame | None = None,
) -> Axes:
    """Separation of held-out prompts by each site's direction, by layer, one line a site kind.

    resid_pre of a layer, which is resid_post of the layer before, is drawn as that, once. Several positions differ
    by the line's dashes. Directions without a separation, or with an infinite one, leave a gap.

    Args:
        controls: the separations by directions of shuffled labels (`CONTROL_COLUMNS`): a band from their lowest to
            their highest at each layer, over all that is drawn of it.

    Raises:
        RunError: no direction has a separation, an unknown measure, or directions of several estimators.
    """
    ax = style.axes_or_new(ax, height=3.6)
    if measure not in get_args(Measure):
        raise RunError(f"unknown measure {measure!r}: accepted are {', '.join(get_args(Measure))}")
    items = _of_one_method(directions, "separation_by_layer()")
    lines = _lines(items, measure)
    layers = {layer for line in lines.values() for layer in line}
    caption = f"{sum(map(len, lines.values()))} directions"
    if controls is None or controls.empty:
        caption = f"n = {caption}"
    else:
        caption += _control_band(ax, controls, measure, layers)
    if len(distinct_directions(items)) < len(items):
        caption += "; a layer's resid_pre is the resid_post before it"
    positions = sorted({position for _, position in lines}, key=style.position_key)
    for point, position in sorted(lines, key=lambda key: (style.point_order(key[0]), key[1])):
        line = sorted(lines[point, position].items())
        colour, marker = style.POINT_STYLE[point]
        ax.plot(
            *zip(*line),
            linestyle=style.LINE_STYLES[positions.index(position) % len(style.LINE_STYLES)],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            label=point if len(positions) == 1 else f"{point} at {position}",
        )
    chance, ylabel = {
        "d_prime": (0.0, "d′ (gap of the means\nin pooled SDs)"),
        "auc": (0.5, "AUC (share of pairs,\nchance = 0.5)"),
    }[measure]
    ax.axhline(chance, color=style.CONTROL, linewidth=0.9, linestyle=(0, (4, 3)))
    style.finish_axes(
        ax,
        f"Separation of held-out prompts by layer ({'AUC' if measure == 'auc' else 'd′'})",
        f"{caption}; dashed line: no separation",
        "layer",
        ylabel,
    )
    style.set_layer_axis(ax, layers)
    style.add_legend(ax, loc="best", ncols=1 if len(lines) <= 3 else 2)
    return ax


def _lines(
    directions: list[Direction], measure: Measure
) -> dict[tuple[str, str], dict[int, float]]:
    """For each point and position the separation by layer, each place of the stream once.

    Raises:
        RunError: no direction has a separation.
    """
    measured = {
        (item.site.layer, item.site.point, item.position): getattr(item.separation, measure)
        for item in directions
        if item.separation is not None
    }
    if not measured:
        raise RunError(
            "no direction has a separation: run `interp-ablate directions` with held-out prompts"
        )
    drawn = style.drawn_places(measured)
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for key, value in measured.items():
        if (place := drawn[key]) is not None:
            line = lines.setdefault(place[1:], {})
            line[place[0]] = value if np.isfinite(value) else np.nan
    return lines


def control_ends(controls: pd.DataFrame, measure: Measure, layers: Iterable[int]) -> pd.DataFrame:
    """The lowest (`min`) and highest (`max`) value of the controls at each of these layers.

    Raises:
        RunError: a missing column.
    """
    style.require_columns(controls, CONTROL_COLUMNS, "controls of the separation")
    rows = style.distinct_rows(controls)
    rows = rows[rows["layer"].isin(set(layers)) & np.isfinite(rows[measure])]
    return rows.groupby("layer")[measure].agg(["min", "max"])


def _control_band(ax: Axes, controls: pd.DataFrame, measure: Measure, layers: set[int]) -> str:
    """The controls' lowest and highest value at each layer; what the caption says of them."""
    ends = control_ends(controls, measure, layers)
    count = controls["control"].nunique()
    ax.fill_between(
        ends.index, ends["min"], ends["max"], color=style.CONTROL, alpha=0.22, linewidth=0,
        label=f"{count} shuffles of the labels",
    )  # fmt: skip
    style.require_whole(controls, ("positive", "negative"), "controls of the separation")
    sides = [int(controls[name].max()) for name in ("positive", "negative")]
    return (
        f" on n = {sides[0]} positive + {sides[1]} negative prompts; grey: {count} directions of shuffled labels, "
        "lowest to highest"
    )


def cosine_similarity(directions: Iterable[Direction], ax: Axes | None = None) -> Axes:
    """Cosine of every pair of directions, sites in forward order; several positions make blocks.

    resid_pre of a layer, which is resid_post of the layer before, is left out where that is there.

    Raises:
        RunError: no directions, or those of several estimators.
    """
    ax = style.axes_or_new(ax, height=6.6)
    items = distinct_directions(_of_one_method(directions, "cosine_similarity()"))
    items.sort(key=lambda item: (style.position_key(item.position), item.site.order))
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
            ax.axhline(index - 0.5, color=style.INK, linewidth=0.8)
            ax.axvline(index - 0.5, color=style.INK, linewidth=0.8)
    points = sorted({item.site.point for item in items}, key=style.point_order)
    positions = sorted({item.position for item in items}, key=style.position_key)
    order = ", ".join(points) + (f"; positions {', '.join(positions)}" if positions[1:] else "")
    style.finish_axes(
        ax,
        "Cosine similarity of the directions",
        f"n = {len(items)} sites in forward order; within a layer: {order}",
        "layer",
        "layer",
        grid="",
    )
    style.add_colour_bar(image, ax, "cosine", fraction=0.046, pad=0.03)
    return ax


def cosines_beside(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Cosines of directions with others and the band of shuffled labels, a row a pair (`cosine_table`).

    Filled points have left their band. The farthest from it come first where there are more than forty.

    Raises:
        RunError: a missing column, or no rows.
    """
    style.require_columns(frame, BESIDE_COLUMNS, "cosines")
    style.require_rows(frame, "pairs of directions")
    middle, half = (
        (frame["null_low"] + frame["null_high"]) / 2,
        (frame["null_high"] - frame["null_low"]) / 2,
    )
    far = ((frame["cosine"] - middle.fillna(0)).abs() - half.fillna(0)).sort_values(ascending=False)
    rows = frame.loc[sorted(far.index[:_MOST_PAIRS])]
    ax = style.axes_or_new(ax, height=1.6 + 0.24 * len(rows))
    one = rows["first"].nunique() == 1
    for row, pair in enumerate(rows.itertuples()):
        low, high, cosine = float(pair.null_low), float(pair.null_high), float(pair.cosine)
        banded = np.isfinite([low, high]).all()
        if banded:
            ax.plot([low, high], [row, row], color=style.FAINT, linewidth=7, solid_capstyle="butt")
        inside = banded and low <= cosine <= high
        colour = style.CONTROL if inside else style.POSITIVE
        fill = "none" if inside else colour
        ax.plot(cosine, row, "o", color=colour, markerfacecolor=fill, markersize=5)
    style.set_row_axis(
        ax, [_short(p.second if one else f"{p.first} | {p.second}") for p in rows.itertuples()]
    )
    ax.axvline(0, color=style.INK, linewidth=0.8)
    ax.set_xlim(-1.05, 1.05)
    shown = f"{len(rows)} of {len(frame)} pairs" if len(rows) < len(frame) else f"{len(rows)} pairs"
    bands = "grey: the middle 95% with shuffled labels" if half.notna().any() else "no band"
    what = f"cosine with\n{_short(rows['first'].iloc[0])}" if one else "cosine"
    style.finish_axes(
        ax, "Directions beside directions", f"n = {shown}; {bands}", what, "", grid="x"
    )
    return ax


def _short(name: object) -> str:  # of a direction: 15.resid_mid for its site
    return re.sub(r"blocks\.(\d+)\.hook_", r"\1.", str(name))


def standardised_projections(rows: pd.DataFrame) -> list[np.ndarray]:
    """Negative and positive values, centred between the means, over the spread within labels."""
    groups = [rows["projection"][rows["label"] == name].to_numpy(float) for name in SIDES]
    filled = [group for group in groups if len(group)]
    if not filled:
        raise RunError(
            f"unknown labels {sorted(map(str, rows['label'].unique()))[:4]} in the projections: "
            f"accepted are {' and '.join(SIDES)}"
        )
    centre = float(np.mean([group.mean() for group in filled]))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in filled)
    spread = np.sqrt(squares / max(sum(map(len, filled)) - len(filled), 1))
    # Constant within each label: one unit apart is all that can be said.
    scale = spread or max(abs(group.mean() - centre) for group in filled) or 1.0
    return [(group - centre) / scale for group in groups]


def _dots(ax: Axes, x: float, values: np.ndarray, colour: str, width: float) -> None:
    """Each value to one side of x, spread so that neighbours are told apart; quartiles shaded, the median as a bar."""
    if not len(values):
        return
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    ax.fill_between([x, x + width], low, high, color=colour, alpha=0.22, linewidth=0)
    spread = 0.1 + 0.8 * (np.arange(len(values)) * 0.618034 % 1)  # evenly, whatever their number
    ax.scatter(
        x + width * spread[np.argsort(np.argsort(values))],
        values,
        s=5,
        color=colour,
        alpha=0.6,
        linewidths=0,
    )
    ax.plot([x, x + width], [median, median], color=colour, linewidth=1.8, solid_capstyle="butt")


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
    """Keep a few far values from flattening the rest; returns how many are beyond the frame."""
    bulk = 2.5 * float(np.percentile(np.abs(values), 98))
    if bulk <= 0 or np.abs(values).max() <= bulk:
        return 0
    ax.set_ylim(-bulk, bulk)
    return int((np.abs(values) > bulk).sum())
