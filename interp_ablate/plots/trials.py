"""Plots of trials: a sweep by layer, and behaviour against damage with the Pareto front.

Knows: how tables of trials are drawn. Does not know: run folders, or how trials were scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, NullFormatter

from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.search.selection import pareto_front
from interp_ablate.search.trial_table import TRIAL_COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Literal["target_log_odds", "kl", "addition"]
_HEAT: dict[Value, tuple[str, str, str]] = {
    "target_log_odds": (
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
_SMALLEST_KL = 1e-8
_KL_LABEL = "KL to the unedited model, first token, negative prompts (nats, log scale)"


def sweep_heatmap(trials: pd.DataFrame, ax: Axes | None = None, *, value: Value) -> Axes:
    """One score of the screening trials by layer and site kind; hatched = failed or never tried.

    Light is better in all three. The ring marks the strongest site for the behaviour; KL, whose
    least value says nothing alone, has none, and a logarithmic colour scale.

    Raises:
        RunError: a missing column, an unknown value, or no screening trial.
    """
    ax = style.axes_or_new(ax, height=5.0)
    if value not in _HEAT:
        raise RunError(f"unknown value {value!r}: accepted are {', '.join(_HEAT)}")
    style.require_columns(trials, TRIAL_COLUMNS, "trials")
    screen = trials[trials["stage"] == "screen"]
    style.require_rows(screen, "screening trials")
    positions = sorted(map(str, screen["position"].unique()), key=style.position_key)
    layers = sorted(screen["layer"].unique())
    points = sorted(screen["point"].unique(), key=style.point_order)
    columns = [(point, position) for position in positions for point in points]
    grid = np.full((len(layers), len(columns)), np.nan)
    for _, row in screen[style.finished_trials(screen, (value,))].iterrows():
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
    style.finish_axes(
        ax, title, f"{done} of {grid.size} sites; light = better", "", "layer", grid=""
    )
    return ax


def pareto(
    trials: pd.DataFrame,
    ax: Axes | None = None,
    *,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
) -> Axes:
    """Behaviour against KL of every finished trial, with the front that no trial beats on both.

    Failed trials and those without both numbers are left out and counted in the caption.

    Args:
        selected: the chosen trial's row.
        max_kl: the KL limit to draw, in nats.

    Raises:
        RunError: a missing column, no finished trial, or a chosen trial without numbers.
    """
    ax = style.axes_or_new(ax, height=5.4)
    style.require_columns(trials, TRIAL_COLUMNS, "trials")
    rows = trials[style.finished_trials(trials, ("target_log_odds", "kl"))]
    style.require_rows(rows, "finished trials with both target log-odds and a KL")
    rows = rows.assign(kl=rows["kl"].clip(lower=_SMALLEST_KL))
    screened = rows["stage"] == "screen"
    for mask, colour, marker, name in (
        (screened, "#9A9A9A", "o", "screen: full strength, one site's direction"),
        (~screened, "#56B4E9", "s", "refine: strengths per layer"),
    ):
        _points(
            ax,
            rows[mask],
            "target_log_odds",
            name,
            s=18,
            c=colour,
            marker=marker,
            alpha=0.75,
            linewidths=0,
        )
    if "expression_rate" in rows:
        _points(
            ax, rows[rows["expression_rate"].notna()], "target_log_odds",
            "finalist: its answers were generated", s=42, facecolors="none", edgecolors=style.INK,
            linewidths=0.9,
        )  # fmt: skip
    _front_and_limits(ax, rows, "target_log_odds", selected, max_kl)
    left_out = len(trials) - len(rows)
    style.finish_axes(
        ax,
        "Behaviour against damage, validation split",
        f"{len(rows)} of {len(trials)} trials"
        + (f"; {left_out} failed or NaN" if left_out else ""),
        _KL_LABEL,
        "target log-odds, positive prompts\n(lower = behaviour removed)",
    )
    return ax


def search_front(
    trials: pd.DataFrame,
    ax: Axes | None = None,
    *,
    repetition: float | None = None,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
) -> Axes:
    """Expression rate against KL of every plan of a search, and the front of the two.

    Args:
        repetition: the unedited model's; plans that repeat themselves more are drawn hollow.
        selected: the chosen trial's row.
        max_kl: the KL limit to draw, in nats.

    Raises:
        RunError: a missing column, no finished trial, or a chosen trial without numbers.
    """
    ax = style.axes_or_new(ax, height=5.4)
    style.require_columns(
        trials, ("edit", "expression_rate", "kl", "positive_repetition"), "the search's trials"
    )
    rows = trials[trials[["expression_rate", "kl"]].notna().all(axis=1)]
    style.require_rows(rows, "finished trials")
    rows = rows.assign(kl=rows["kl"].clip(lower=_SMALLEST_KL))
    loops = rows["positive_repetition"] > (math.inf if repetition is None else repetition)
    for kind, colour, marker, name in (
        ("band", "#56B4E9", "s", "kernels of strengths"),
        ("fitted", "#E69F00", "D", "around a fitted edit"),
    ):
        for mask, face, more in (
            (~loops, colour, ""),
            (loops, "none", ", positive prompts' answers repeat more"),
        ):
            _points(
                ax, rows[(rows["edit"] == kind) & mask], "expression_rate", name + more, s=26,
                marker=marker, facecolors=face, edgecolors=colour, linewidths=1.1,
            )  # fmt: skip
    _front_and_limits(ax, rows, "expression_rate", selected, max_kl)
    ax.set_ylim(bottom=-0.03)
    style.finish_axes(
        ax,
        "Plans of the search, validation split",
        f"{len(rows)} of {len(trials)} trials scored",
        _KL_LABEL,
        "share of positive prompts whose answer\nshows the behaviour",
    )
    return ax


def _points(ax: Axes, rows: pd.DataFrame, score: str, name: str, **look: Any) -> None:
    """A score against KL of some trials, counted in the legend; nothing where there are none."""
    if len(rows):
        ax.scatter(rows["kl"], rows[score], label=f"{name} ({len(rows)})", **look)


def _front_and_limits(
    ax: Axes,
    rows: pd.DataFrame,
    score: str,
    selected: Mapping[str, Any] | None,
    max_kl: float | None,
) -> None:
    """The Pareto front, the chosen trial, the KL limit, and a logarithmic KL axis."""
    front = pareto_front(rows, objectives=("kl", score))
    ax.plot(
        front["kl"], front[score], color="#009E73", linewidth=1.6, marker=".",
        drawstyle="steps-post", label="Pareto front",
    )  # fmt: skip
    ax.set_xscale("log")
    if max_kl is not None and max_kl > 0:
        ax.axvline(max_kl, color=style.POSITIVE, linewidth=1.2, linestyle=(0, (4, 3)),
                   label=f"limit: KL {max_kl:g}")  # fmt: skip
        right = max(ax.get_xlim()[1], max_kl * 1.3)
        ax.axvspan(max_kl, right, color=style.POSITIVE, alpha=0.06, linewidth=0)
        ax.set_xlim(right=right)
    if selected and selected.get(score) is not None and selected.get("kl") is not None:
        try:
            x, y = max(float(selected["kl"]), _SMALLEST_KL), float(selected[score])
        except (TypeError, ValueError) as error:
            raise RunError(f"the selected trial's scores are not numbers: {error}") from error
        ax.plot(
            x, y, "*", markersize=17, color=style.POSITIVE, markeredgecolor="white", linestyle="none",
            label=f"chosen: trial {selected.get('trial', '?')}", zorder=5,
        )  # fmt: skip
    # Plain numbers, also between decades: the KLs of one sweep often span only one or two.
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    style.add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


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
    bar = style.add_colour_bar(image, ax, label, location="bottom", fraction=0.05, pad=0.02)
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
