"""Plots: a run's pictures, each a function `(data, ax) -> ax`, and `save_figures` for a folder.

Knows: how projections, separation, cosines, trials and a test report are drawn so that they read at
a README's size, and how the files of a run folder are read (`read_table`, `read_json`, ...).
Does not know: any model, how a number was measured, or what the HTML report says about a picture.
It keeps away from pyplot: no window, no global state, no open figures; any backend may be in use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pandas as pd
from matplotlib.figure import Figure

from interp_ablate.errors import RunError
from interp_ablate.plots.directions import (
    PROJECTION_COLUMNS,
    Measure,
    cosine_similarity,
    projections,
    separation_by_layer,
)
from interp_ablate.plots.style import (
    finished_trials,
    new_figure,
    point_order,
    position_key,
    save_figure,
    set_layer_axis,
)
from interp_ablate.plots.test_rates import before_after, rate_rows
from interp_ablate.plots.trials import Value, pareto, search_front, sweep_heatmap
from interp_ablate.search.trial_table import read_trials
from interp_ablate.storage.tables import read_json, read_table

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction

logger = logging.getLogger(__name__)


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
            written.append(save_figure(figure, folder / "figures" / name))
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
    positions = sorted(frame["position"].unique(), key=position_key)
    for place, position in enumerate(positions):
        rows = frame[frame["position"] == position]
        points = sorted(rows["point"].unique(), key=point_order)
        figure = new_figure(height=0.3 + 2.75 * len(points))
        for index, point in enumerate(points):
            ax = figure.add_subplot(len(points), 1, index + 1)
            projections(rows[rows["point"] == point], ax)
            set_layer_axis(ax, rows["layer"])  # the same layers at the same place in every panel
        suffix = re.sub(r"[^\w.-]", "_", f"_at_{position}") if place else ""
        figures[f"projections{suffix}.png"] = figure
    return figures


def _directions(folder: Path) -> list[Direction]:
    from interp_ablate.directions.direction_set import Directions

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
    figure = new_figure(height=6.2)
    measures: tuple[Measure, ...] = get_args(Measure)
    for index, measure in enumerate(measures):
        separation_by_layer(items, figure.add_subplot(2, 1, index + 1), measure=measure)
    return {"separation.png": figure}


def _draw_cosine(folder: Path) -> dict[str, Figure]:
    items = _directions(folder)
    if not items:
        return {}
    figure = new_figure(height=6.6)
    cosine_similarity(items, figure.add_subplot())
    return {"cosine_similarity.png": figure}


def _draw_sweep(folder: Path) -> dict[str, Figure]:
    trials = _trials(folder)
    if trials is None or not (trials["stage"] == "screen").any():
        return {}
    figure = new_figure(height=2.8 + 0.14 * max(trials["layer"].nunique(), 8))
    values: tuple[Value, ...] = get_args(Value)
    for index, value in enumerate(values):
        sweep_heatmap(trials, figure.add_subplot(1, 3, index + 1), value=value)
    return {"sweep.png": figure}


def _draw_pareto(folder: Path) -> dict[str, Figure]:
    trials = _trials(folder)
    if trials is None or not finished_trials(trials, ("behaviour", "kl")).any():
        return {}
    selected = read_json(folder / "selected.json") or {}
    configuration = (read_json(folder / "run.json") or {}).get("configuration") or {}
    chosen = selected.get("trial") if selected.get("plan") else None
    figure = new_figure(height=5.4)
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
    figure = new_figure(height=5.4)
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
    if not test or not rate_rows(test):
        return {}
    figure = new_figure(height=1.4 + 0.36 * len(rate_rows(test)))
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


def _trials(folder: Path) -> pd.DataFrame | None:
    return read_trials(folder / "trials.csv") if (folder / "trials.csv").exists() else None
