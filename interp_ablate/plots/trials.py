"""Sweeps, Pareto fronts and searches.

Knows: three plots. Does not know: runs.
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
from interp_ablate.plots.style import (
    INK,
    POSITIVE,
    add_colour_bar,
    add_legend,
    finish_axes,
    finished_trials,
    point_order,
    position_key,
    require_columns,
    require_rows,
)
from interp_ablate.search.trial_table import TRIAL_COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Literal["behaviour", "kl", "addition"]
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
_SMALLEST_KL = 1e-8


def sweep_heatmap(trials: pd.DataFrame, ax: Axes, *, value: Value) -> Axes:
    """One score of the screening trials by layer and site kind; hatched = failed or never tried.

    Light is better in all three. The ring marks the strongest site for the behaviour; KL, whose
    least value says nothing alone, has none, and a logarithmic colour scale.

    Raises:
        RunError: a missing column, an unknown value, or no screening trial.
    """
    if value not in _HEAT:
        raise RunError(f"unknown value {value!r}: accepted are {', '.join(_HEAT)}")
    require_columns(trials, TRIAL_COLUMNS, "trials")
    screen = trials[trials["stage"] == "screen"]
    require_rows(screen, "screening trials")
    positions = sorted(map(str, screen["position"].unique()), key=position_key)
    layers = sorted(screen["layer"].unique())
    points = sorted(screen["point"].unique(), key=point_order)
    columns = [(point, position) for position in positions for point in points]
    grid = np.full((len(layers), len(columns)), np.nan)
    for _, row in screen[finished_trials(screen, (value,))].iterrows():
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
    finish_axes(ax, title, f"{done} of {grid.size} sites; light = better", "", "layer", grid=False)
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
    require_columns(trials, TRIAL_COLUMNS, "trials")
    rows = trials[finished_trials(trials, ("behaviour", "kl"))]
    require_rows(rows, "finished trials with both a behaviour and a KL")
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
    finish_axes(
        ax,
        "Behaviour against damage, validation split",
        f"{len(rows)} of {len(trials)} trials"
        + (f"; {left_out} failed or NaN" if left_out else ""),
        "KL to the unedited model, first token, negative prompts (nats, log scale)",
        "target log-odds, positive prompts\n(lower = behaviour removed)",
    )
    add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
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
    require_columns(trials, ("edit", "expression_rate", "kl", "repetition"), "the search's trials")
    rows = trials[trials[["expression_rate", "kl"]].notna().all(axis=1)]
    require_rows(rows, "finished trials")
    damage, rate = rows["kl"].clip(lower=_SMALLEST_KL), rows["expression_rate"]
    loops = rows["repetition"] > (math.inf if repetition is None else repetition)
    for kind, colour, marker, name in (
        ("band", "#56B4E9", "s", "kernels of strengths"),
        ("fitted", "#E69F00", "D", "around a fitted edit"),
    ):
        for mask, face, more in (
            ((rows["edit"] == kind) & ~loops, colour, ""),
            ((rows["edit"] == kind) & loops, "none", ", positive prompts' answers repeat more"),
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
    finish_axes(
        ax,
        "Plans of the search, validation split",
        f"{len(rows)} of {len(trials)} trials scored",
        "KL to the unedited model, first token, negative prompts (nats, log scale)",
        "share of positive prompts whose answer\nshows the behaviour",
    )
    add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return ax


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
    bar = add_colour_bar(image, ax, location="bottom", fraction=0.05, pad=0.02)
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
