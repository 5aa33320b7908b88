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
from interp_ablate.search.objectives import Objective
from interp_ablate.search.selection import pareto_front
from interp_ablate.search.trial_table import TRIAL_COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Literal["target_log_odds", "kl", "addition"]
_HEAT: dict[Value, tuple[str, str, str]] = {
    "target_log_odds": (
        "Behaviour, ablated",
        "change of target log-odds,\npositive prompts (0: unedited)",
        "PuOr_r",
    ),
    "kl": (
        "Damage, ablated",
        "KL in nats, negative prompts\n(unedited: 0; log scale)",
        "magma_r",
    ),
    "addition": (
        "Behaviour, added",
        "change of target log-odds,\nnegative prompts (0: unedited)",
        "PuOr_r",
    ),
}
_SMALLEST_KL = 1e-8
RATE = Objective("expressions", "expressions")
_KL_LABEL = "KL to the unedited model, first token, negative prompts (nats, log scale)"
_HATCHES = ("", "///", "xxx")  # from the most prompts to the fewest


def change_from_unedited(trials: pd.DataFrame, value: str) -> pd.Series:
    """A score of each trial minus the unedited model's on the same prompts; a KL, which is 0 there, as it is.

    Trials of few prompts and of all are comparable so, and their scores alone are not.

    Raises:
        RunError: the table has no scores of the unedited model.
    """
    if value == "kl":
        return trials[value]
    style.require_columns(trials, (value, f"{value}_baseline"), "trials")
    return trials[value] - trials[f"{value}_baseline"]


def is_comparable(trials: pd.DataFrame) -> bool:
    """Whether a table says what the unedited model scored, which those of 0.1.0 do not."""
    return {"target_log_odds_baseline", "addition_baseline"} <= set(trials.columns)


def prompts_of(trials: pd.DataFrame) -> pd.Series:
    """On how many prompts a side each trial was scored; infinity: on all."""
    if "prompts" not in trials:
        return pd.Series(math.inf, trials.index)
    return pd.to_numeric(trials["prompts"], errors="coerce").fillna(math.inf)


def counted(count: float, every: int | None = None) -> str:
    """A number of `prompts_of` as text; `every`: how many all are."""
    return str(every or "all") if math.isinf(count) else f"{count:g}"


def sweep_heatmap(
    trials: pd.DataFrame,
    ax: Axes | None = None,
    *,
    value: Value,
    selected: Mapping[str, Any] | None = None,
) -> Axes:
    """One score of the screening trials by layer and site kind, as its change from the unedited model.

    Each change is from the unedited model's score on the same prompts. Cells of fewer prompts are hatched; grey
    ones failed or were never tried. KLs are on a logarithmic colour scale.

    Args:
        selected: the chosen trial's row: a star marks the place whose direction it edits along.

    Raises:
        RunError: a missing column, an unknown value, or no screening trial.
    """
    ax = style.axes_or_new(ax, height=5.0)
    if value not in _HEAT:
        raise RunError(f"unknown value {value!r}: accepted are {', '.join(_HEAT)}")
    style.require_columns(trials, TRIAL_COLUMNS, "trials")
    screen = trials[trials["stage"] == "screen"]
    style.require_rows(screen, "screening trials")
    screen = style.distinct_rows(screen)
    positions = sorted(map(str, screen["position"].unique()), key=style.position_key)
    layers = sorted(screen["layer"].unique())
    points = sorted(screen["point"].unique(), key=style.point_order)
    columns = [(point, position) for position in positions for point in points]
    grid, counts = np.full((2, len(layers), len(columns)), np.nan)
    done = screen[style.finished_trials(screen, (value,))]
    for place, change, count in zip(
        _places(done), change_from_unedited(done, value), prompts_of(done)
    ):
        cell = layers.index(place[0]), columns.index(place[1:])
        grid[cell], counts[cell] = change, count
    gaps = ", grey: none" if len(done) < grid.size else ""
    title, label, colours = _HEAT[value]
    ax.set_facecolor("#C4C4C4")  # no cell there
    _heat_cells(ax, grid, value, label, colours)
    said = _hatch_cells(ax, counts)
    if selected and all(selected.get(key) is not None for key in ("layer", "point", "position")):
        (place,) = _places(pd.DataFrame([selected]))
        layer, point, position = style.same_place(place) if "resid_post" in points else place
        if layer in layers and (point, position) in columns:
            x, y = columns.index((point, position)), layers.index(layer)
            _star(ax, x, y, "the chosen plan's direction")
    ax.set_yticks(range(len(layers))[:: max(1, -(-len(layers) // 16))])
    ax.set_yticklabels([style.layer_name(int(layers[int(tick)])) for tick in ax.get_yticks()])
    ax.set_xticks(range(len(columns)))
    names = [p if not positions[1:] else f"{p}\n{where}" for p, where in columns]
    ax.set_xticklabels(names, rotation=90 if len(columns) > 3 else 30, ha="center")
    style.finish_axes(
        ax, title, f"{said}; {len(done)} of {grid.size} sites{gaps}", "", "layer", grid=""
    )
    return ax


def _places(rows: pd.DataFrame) -> list[style.Place]:
    return [
        (int(layer), str(point), str(position))
        for layer, point, position in zip(rows["layer"], rows["point"], rows["position"])
    ]


def _star(ax: Axes, x: float, y: float, label: str) -> None:
    """What was chosen."""
    ax.plot(
        x, y, "*", markersize=17, color=style.POSITIVE, markeredgecolor="white", linestyle="none",
        label=label, zorder=5,
    )  # fmt: skip


def _hatch_cells(ax: Axes, counts: np.ndarray) -> str:
    """Hatches on the cells of fewer prompts than the most; what the caption says of them."""
    from matplotlib.patches import Rectangle

    numbers = sorted(set(counts[np.isfinite(counts) | np.isinf(counts)]), reverse=True)
    said = []
    for count, hatch in zip(numbers, (*_HATCHES, *[_HATCHES[-1]] * len(numbers))):
        said.append(f"{counted(count)} {hatch}".strip())
        for row, column in np.argwhere(counts == count) if hatch else ():
            ax.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5),
                    1,
                    1,
                    fill=False,
                    hatch=hatch,
                    edgecolor="#555555",
                    linewidth=0.0,
                )
            )
    return f"n = {', '.join(said)} prompts" if said else "n = 0"


def pareto(
    trials: pd.DataFrame,
    ax: Axes | None = None,
    *,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
    n: int | None = None,
) -> Axes:
    """Change of behaviour against KL of every finished trial, beside the unedited model, with the front.

    Each change is from the unedited model's score on the same prompts. The front joins the trials that no other
    beats on both, among those scored on the most prompts; beyond the limit it is dotted. Failed trials and those
    without both numbers are left out and counted in the caption.

    Args:
        selected: the chosen trial's row.
        max_kl: the KL limit to draw, in nats.
        n: validation prompts a side, where a trial was scored on all.

    Raises:
        RunError: a missing column, no finished trial, or a chosen trial without numbers.
    """
    ax = style.axes_or_new(ax, height=5.4)
    style.require_columns(trials, TRIAL_COLUMNS, "trials")
    score = "change"
    rows = trials[style.finished_trials(trials, ("target_log_odds", "kl"))]
    style.require_rows(rows, "finished trials with both target log-odds and a KL")
    rows = rows.assign(
        kl=rows["kl"].clip(lower=_SMALLEST_KL),
        change=change_from_unedited(rows, "target_log_odds"),
        count=prompts_of(rows),
    )
    _unedited(ax, 0.0)
    _trial_points(ax, rows, n)
    whole = rows[rows["count"] >= min(rows["count"].max(), n or math.inf)]
    chosen = None if not selected else {**selected, score: _chosen_change(selected)}
    _front_and_limits(ax, whole, score, chosen, max_kl)
    left_out = len(trials) - len(rows)
    style.finish_axes(
        ax,
        "Behaviour against damage, validation split",
        f"n = {counted(rows['count'].max(), n)} prompts a side, hollow: fewer; {len(rows)} of {len(trials)} trials"
        + (f"; {left_out} failed or NaN" if left_out else ""),
        _KL_LABEL,
        "change of target log-odds, positive prompts\n(below 0 = less of the behaviour than unedited)",
    )
    return ax


def _trial_points(ax: Axes, rows: pd.DataFrame, n: int | None) -> None:
    """A mark a trial: by stage and number of prompts, hollow and smaller where they are fewer; finalists ringed."""
    for stage, colour, marker, name in (
        ("screen", "#7A7A7A", "o", "one site's direction"),
        ("refine", "#56B4E9", "s", "strengths per layer"),
    ):
        of_stage = rows[(rows["stage"] == "screen") == (stage == "screen")]
        for count in sorted(of_stage["count"].unique(), reverse=True):
            few = count < rows["count"].max() and count < (n or math.inf)
            size = 18 if not few else 14 if count > of_stage["count"].min() else 7
            look = {"facecolors": "none" if few else colour, "edgecolors": colour}
            _points(
                ax, of_stage[of_stage["count"] == count], "change", f"{name}, n = {counted(count, n)}", s=size,
                marker=marker, alpha=0.75, linewidths=0.8, **look,
            )  # fmt: skip
    if "expression_rate" in rows:
        _points(
            ax, rows[rows["expression_rate"].notna()], "change", "finalist: its answers were generated",
            s=42, facecolors="none", edgecolors=style.INK, linewidths=0.9,
        )  # fmt: skip


def _chosen_change(selected: Mapping[str, Any]) -> float | None:
    """The chosen trial's change of the target log-odds; None where it has no number.

    Raises:
        RunError: something that is not a number.
    """
    values = [selected.get(key) for key in ("target_log_odds", "target_log_odds_baseline")]
    if any(value is None for value in values):
        return None
    try:
        after, before = (float(value) for value in values)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RunError(f"the selected trial's scores are not numbers: {error}") from error
    return after - before


def _unedited(ax: Axes, level: float) -> None:
    """The unedited model: a line at its score, and a mark at the left edge, for its KL is 0."""
    ax.axhline(level, color=style.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.plot(
        0, level, "D", color=style.INK, markersize=7, transform=ax.get_yaxis_transform(), clip_on=False,
        linestyle="none", label="unedited model (KL 0)", zorder=6,
    )  # fmt: skip


def search_front(
    trials: pd.DataFrame,
    ax: Axes | None = None,
    *,
    repetition: float | None = None,
    selected: Mapping[str, Any] | None = None,
    max_kl: float | None = None,
    unedited: float | None = None,
    n: int | None = None,
    objective: Objective = RATE,
) -> Axes:
    """One objective (by default the expression rate) against KL of every plan of a search, and the front of the two.

    Args:
        repetition: the unedited model's; plans that repeat themselves more are drawn hollow.
        unedited: the unedited model's number.
        n: validation prompts a side.
        selected: the chosen trial's row.
        max_kl: the KL limit to draw, in nats.

    Raises:
        RunError: a missing column, no finished trial, or a chosen trial without numbers.
    """
    ax, score = style.axes_or_new(ax, height=5.4), objective.column
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
                ax, rows[(rows["edit"] == kind) & mask], score, name + more, s=26,
                marker=marker, facecolors=face, edgecolors=colour, linewidths=1.1,
            )  # fmt: skip
    if unedited is not None:
        _unedited(ax, unedited)
    _front_and_limits(ax, rows, objective, selected, max_kl)
    ax.set_ylim(bottom=-0.03)
    style.finish_axes(
        ax,
        "Plans of the search, validation split",
        f"n = {n or 'all'} prompts a side; {len(rows)} of {len(trials)} trials scored",
        _KL_LABEL,
        objective.said + (" (large is better)" if objective.maximize else ""),
    )
    return ax


def _points(ax: Axes, rows: pd.DataFrame, score: str, name: str, **look: Any) -> None:
    """A score against KL of some trials, counted in the legend; nothing where there are none."""
    if len(rows):
        ax.scatter(rows["kl"], rows[score], label=f"{name} ({len(rows)})", **look)


def _front_and_limits(
    ax: Axes,
    rows: pd.DataFrame,
    objective: str | Objective,
    selected: Mapping[str, Any] | None,
    max_kl: float | None,
) -> None:
    """The Pareto front (dotted beyond the limit), the chosen trial, the KL limit, and a logarithmic KL axis."""
    score = objective if isinstance(objective, str) else objective.column
    front = pareto_front(rows, objectives=("kl", objective))
    inside = front["kl"] <= (max_kl or math.inf)
    for part, line, label in (
        (front[inside], "-", "Pareto front"),
        (front[~inside], ":", "Pareto front, over the limit"),
    ):
        if len(part):
            ax.plot(
                part["kl"], part[score], line, color="#009E73", linewidth=1.6, marker=".",
                drawstyle="steps-post", label=label,
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
        _star(ax, x, y, f"chosen: trial {selected.get('trial', '?')}")
    # Plain numbers, also between decades: the KLs of one sweep often span only one or two.
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    style.add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def _heat_cells(ax: Axes, grid: np.ndarray, value: Value, label: str, colours: str) -> None:
    """The coloured cells and their colour bar; changes around 0, which is the unedited model."""
    finite = grid[np.isfinite(grid)]
    scale: dict[str, Any] = {}
    if value == "kl":
        grid = np.maximum(grid, _SMALLEST_KL)
        low, high = (np.nanmin(grid), np.nanmax(grid)) if len(finite) else (0.1, 1.0)
        scale["norm"] = LogNorm(low, high if high > low else low * 10)
    else:
        limit = float(np.abs(finite).max(initial=0.0)) or 1.0
        scale = {"vmin": -limit, "vmax": limit}
    image = ax.imshow(
        np.ma.masked_invalid(grid), cmap=colours, aspect="auto", origin="lower",
        interpolation="nearest", **scale,
    )  # fmt: skip
    bar = style.add_colour_bar(image, ax, label, location="bottom", fraction=0.05, pad=0.02)
    if value != "kl":
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        return
    low, high = image.get_clim()
    assert low is not None and high is not None  # set by the norm above
    steps = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    ticks = [step * 10.0**power for power in range(-9, 4) for step in steps]
    bar.set_ticks([tick for tick in ticks if low <= tick <= high])
    bar.ax.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
