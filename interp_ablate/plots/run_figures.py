"""The table of a run folder's figures: from its files to PNG.

A figure is a function `(folder) -> {file name: figure}` and a line in `RUN_FIGURES`; it draws with the functions
`(data, ax) -> ax` of this folder. Another package registers one under the entry-point group `interp_ablate.plots`.

Knows: which files of a run folder a figure needs. Does not know: how anything is drawn or was measured.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pandas as pd
from matplotlib.figure import Figure

from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.plots.attribution import attribution_bars, attribution_map
from interp_ablate.plots.directions import (
    Measure,
    cosine_similarity,
    cosines_beside,
    projections,
    separation_by_layer,
)
from interp_ablate.plots.evaluation import before_after, rate_rows
from interp_ablate.plots.layers import layer_effects
from interp_ablate.plots.run_tables import (
    read_attribution,
    read_beside,
    read_choice,
    read_comparable_trials,
    read_controls,
    read_directions,
    read_layer_effects,
    read_projections,
    read_tokens,
)
from interp_ablate.plots.tokens import token_heatmap
from interp_ablate.plots.trials import RATE, Value, pareto, search_front, sweep_heatmap
from interp_ablate.storage.entry_points import entry_named, entry_names
from interp_ablate.storage.tables import read_json

logger = logging.getLogger(__name__)
GROUP = "interp_ablate.plots"


def save_figures(
    folder: str | Path, *, formats: Sequence[str] = ("png",), dpi: int | None = None
) -> list[Path]:
    """Draw every figure that the run folder has data for, in `folder/figures`.

    A figure without data yet is skipped and logged. Each file is written beside its place and
    renamed when whole.

    Args:
        formats: of png, svg and pdf; each figure is written in every one.
        dpi: pixels an inch, of a PNG.

    Raises:
        RunError: an unknown format; the folder is not there, cannot be written, or holds a corrupt file.
        DirectionError: corrupt directions.
        InterpAblateError: the package that registers a figure fails to load.
    """
    folder = Path(folder)
    for form in formats:
        style.check_format(form, dpi)
    if not folder.is_dir():
        raise RunError(
            f"no run folder at {folder}: make one with `interp-ablate run --out {folder}`"
        )
    names = entry_names(RUN_FIGURES, GROUP)
    drawers = {
        name: entry_named(name, RUN_FIGURES, GROUP, what="figure", error=RunError) for name in names
    }
    written = []
    for name, draw in drawers.items():
        figures = draw(folder)
        if not figures:
            logger.info("skipped %s: no data yet in %s", name, folder)
        for file, figure in figures.items():
            for form in formats:
                path = (folder / "figures" / file).with_suffix(f".{form}")
                written.append(style.save_figure(figure, path, dpi=dpi))
    return written


def _draw_projections(folder: Path) -> dict[str, Figure]:
    frame = read_projections(folder)
    if frame is None:
        return {}
    if "position" not in frame:
        frame = frame.assign(position="-1")
    frame = style.distinct_rows(frame)
    figures = {}
    for place, position in enumerate(sorted(frame["position"].unique(), key=style.position_key)):
        rows = frame[frame["position"] == position]
        points = sorted(rows["point"].unique(), key=style.point_order)
        figure = style.new_figure(height=0.3 + 2.75 * len(points))
        for index, point in enumerate(points):
            ax = figure.add_subplot(len(points), 1, index + 1)
            projections(rows[rows["point"] == point], ax)
            style.set_layer_axis(
                ax, rows["layer"]
            )  # the same layers at the same place in every panel
        suffix = re.sub(r"[^\w.-]", "_", f"_at_{position}") if place else ""
        figures[f"projections{suffix}.png"] = figure
    return figures


def _draw_separation(folder: Path) -> dict[str, Figure]:
    items = [item for item in read_directions(folder) if item.separation is not None]
    if not items:
        return {}
    figure = style.new_figure(height=6.2)
    measures: tuple[Measure, ...] = get_args(Measure)
    controls = read_controls(folder)
    for index, measure in enumerate(measures):
        ax = figure.add_subplot(2, 1, index + 1)
        separation_by_layer(items, ax, measure=measure, controls=controls)
    return {"separation.png": figure}


def _draw_cosine(folder: Path) -> dict[str, Figure]:
    items = read_directions(folder)
    if not items:
        return {}
    figure = style.new_figure(height=6.6)
    cosine_similarity(items, figure.add_subplot())
    return {"cosine_similarity.png": figure}


def _draw_beside(folder: Path) -> dict[str, Figure]:
    frame = read_beside(folder)
    if frame is None:
        return {}
    figure = style.new_figure(height=1.6 + 0.24 * min(len(frame), 40))
    cosines_beside(frame, figure.add_subplot())
    return {"beside.png": figure}


def _draw_sweep(folder: Path) -> dict[str, Figure]:
    trials = read_comparable_trials(folder)
    if trials is None or not (trials["stage"] == "screen").any():
        return {}
    figure = style.new_figure(height=3.0 + 0.14 * max(trials["layer"].nunique(), 8))
    values: tuple[Value, ...] = get_args(Value)
    chosen = read_choice(folder).trial
    for index, value in enumerate(values):
        ax = figure.add_subplot(1, 3, index + 1)
        sweep_heatmap(trials, ax, value=value, selected=chosen)
    return {"sweep.png": figure}


def _draw_pareto(folder: Path) -> dict[str, Figure]:
    trials = read_comparable_trials(folder)
    if trials is None or not style.finished_trials(trials, ("target_log_odds", "kl")).any():
        return {}
    trials = trials[trials["stage"] != "search"]  # which have no target log-odds
    choice, figure = read_choice(folder), style.new_figure(height=5.4)
    ax = figure.add_subplot()
    pareto(trials, ax, selected=choice.trial, max_kl=choice.max_kl, n=choice.n)
    return {"pareto.png": figure}


def _draw_search(folder: Path) -> dict[str, Figure]:
    trials = read_comparable_trials(folder)
    if trials is None:
        return {}
    trials = trials[(trials["stage"] == "search") & (trials["status"] == "ok")]
    if trials.empty:
        return {}
    choice = read_choice(folder)
    shown = [each for each in choice.objectives if each.column in trials] or [RATE]
    figure = style.new_figure(height=5.4 * len(shown))
    unedited = choice.selected.get("validation_baseline") or {}
    for place, objective in enumerate(shown, 1):
        search_front(
            trials,
            figure.add_subplot(len(shown), 1, place),
            repetition=unedited.get("positive_repetition"),
            selected=choice.selected.get("trial"),
            max_kl=choice.max_kl,
            unedited=unedited.get(objective.column),
            n=choice.n,
            objective=objective,
        )
    return {"search.png": figure}


def _draw_before_after(folder: Path) -> dict[str, Figure]:
    test = (read_json(folder / "selected.json") or {}).get("test")
    if not test or not rate_rows(test):
        return {}
    figure = style.new_figure(height=1.4 + 0.36 * len(rate_rows(test)))
    before_after(test, figure.add_subplot())
    return {"before_after.png": figure}


def _draw_attribution(folder: Path) -> dict[str, Figure]:
    frame = read_attribution(folder)
    if frame is None:
        return {}
    bars = style.new_figure(height=1.4 + 0.24 * min(len(frame), 20))
    attribution_bars(frame, bars.add_subplot())
    heads = style.new_figure(height=2.4 + 0.13 * frame["layer"].max())
    attribution_map(frame, heads.add_subplot())
    return {"attribution.png": bars, "attribution_map.png": heads}


def _draw_layer_effects(folder: Path) -> dict[str, Figure]:
    frame = read_layer_effects(folder)
    if frame is None:
        return {}
    panels = list(frame.groupby(["score", "edit"], sort=False).groups)
    figure = style.new_figure(height=0.4 + 3.1 * len(panels))
    for place, (score, edit) in enumerate(panels):
        ax = figure.add_subplot(len(panels), 1, place + 1)
        layer_effects(frame, ax, score=score, edit=edit)
    return {"layer_effects.png": figure}


def _draw_tokens(folder: Path) -> dict[str, Figure]:
    frame = read_tokens(folder)
    return {} if frame is None else {"tokens.png": tokens_figure(frame)}


def tokens_figure(frame: pd.DataFrame) -> Figure:
    """The heat map of token projections as a figure of its own."""
    n_tokens, n_layers = frame["index"].nunique(), frame["layer"].nunique()
    width = min(max(5.0, 2.6 + 0.16 * n_tokens), 16.0)
    figure = style.new_figure(height=2.4 + 0.13 * n_layers, width=width)
    token_heatmap(frame, figure.add_subplot())
    return figure


Drawer = Callable[[Path], dict[str, Figure]]
# Name -> the function that reads a run folder and draws, by file name; empty where there is no data yet.
RUN_FIGURES: dict[str, Drawer] = {
    "projections": _draw_projections,
    "separation": _draw_separation,
    "cosine": _draw_cosine,
    "beside": _draw_beside,
    "sweep": _draw_sweep,
    "pareto": _draw_pareto,
    "search": _draw_search,
    "before_after": _draw_before_after,
    "tokens": _draw_tokens,
    "attribution": _draw_attribution,
    "layer_effects": _draw_layer_effects,
}
