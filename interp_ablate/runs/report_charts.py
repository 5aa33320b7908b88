"""The report's charts, and for every figure a sentence of what is seen in it.

Knows: which files of a run folder they are made of. Does not know: the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.directions.direction import Direction, cosine_similarities
from interp_ablate.plots.directions import held_out_rows
from interp_ablate.plots.run_charts import (
    centre_and_spread,
    held_out,
    projections_chart,
    separation_chart,
    trials_chart,
)
from interp_ablate.plots.run_tables import read_directions, read_projections
from interp_ablate.plots.style import finished_trials
from interp_ablate.runs.report_claims import number, part_of, rate
from interp_ablate.search.trial_table import read_trials
from interp_ablate.storage.tables import read_json


@dataclass(frozen=True)
class RunTables:
    """The tables of a run folder that its report is drawn of, each read once."""

    projections: pd.DataFrame | None
    directions: Sequence[Direction]
    trials: pd.DataFrame | None
    """The trials, where some have a log-odds and a KL."""
    selected: Mapping[str, Any]
    """selected.json; empty where there is none."""

    @classmethod
    def read(cls, folder: Path) -> RunTables:
        """The tables that are there."""
        selected = read_json(folder / "selected.json") or {}
        return cls(read_projections(folder), read_directions(folder), _trials(folder), selected)


def report_charts(tables: RunTables) -> list[dict[str, Any]]:
    """Headings and charts of what the folder holds."""
    charts = []
    if tables.projections is not None:
        rows = held_out(tables.projections)
        heading = f"Projections at {rows['point'].iloc[0]}, prompt by prompt"
        charts.append({"heading": heading, "svg": projections_chart(rows)})
    if any(each.separation for each in tables.directions):
        svg = separation_chart(tables.directions)
        charts.append({"heading": "Separation by layer", "svg": svg})
    if tables.trials is not None:
        svg = trials_chart(tables.trials, part_of(tables.selected, "trial").get("trial"))
        charts.append({"heading": "Behaviour against damage, trial by trial", "svg": svg})
    return charts


def alt_texts(tables: RunTables) -> dict[str, str]:
    """For a figure's name what is seen in it, from the numbers that it is drawn of."""
    test, directions = part_of(tables.selected, "test"), tables.directions
    alts = {"before_after": _before_after(test)} if test else {}
    if tables.projections is not None:
        alts["projections"] = _projections(tables.projections)
    d_primes = {each.site: each.separation.d_prime for each in directions if each.separation}
    d_primes = {site: value for site, value in d_primes.items() if np.isfinite(value)}
    if d_primes:
        low, high = min(d_primes, key=d_primes.__getitem__), max(d_primes, key=d_primes.__getitem__)
        alts["separation"] = (
            f"Lines of d′ and AUC by layer: d′ from {number(d_primes[low])} at {low} to {number(d_primes[high])} at {high}."
        )
    if len(directions) > 1:
        cosines = cosine_similarities(sorted(directions, key=lambda each: each.site.order))
        alts["cosine_similarity"] = (
            f"Heat map of the cosines of {len(directions)} directions: neighbours "
            f"{float(cosines.diagonal(1).mean()):.2f} on average, the first and the last {float(cosines[0, -1]):.2f}."
        )
    if tables.trials is not None:
        alts |= _of_trials(tables.trials, part_of(tables.selected, "trial"))
    return alts


def _trials(folder: Path) -> pd.DataFrame | None:
    """The trials with a log-odds and a KL; None where there are none."""
    if not (folder / "trials.csv").exists():
        return None
    trials = read_trials(folder / "trials.csv")
    return trials if finished_trials(trials, ("target_log_odds", "kl")).any() else None


def _before_after(test: Mapping[str, Any]) -> str:
    controls = [rate(each.get("behaviour_after")) for each in test.get("controls") or ()]
    beside = f"; controls: {', '.join(controls)}" if controls else ""
    return (
        f"Rates with intervals: positive prompts express the behaviour in {rate(test.get('behaviour_before'))} of "
        f"answers before and {rate(test.get('behaviour_after'))} after the edit{beside}."
    )


def _projections(frame: pd.DataFrame) -> str:
    gaps = {}
    for (layer, point), rows in _held_out_points(frame):
        positive = (rows["label"] == "positive").to_numpy()
        values = rows["projection"].to_numpy(float)
        if positive.any() and not positive.all():
            gap = float(values[positive].mean() - values[~positive].mean())
            gaps[layer, point] = gap / centre_and_spread(values, positive)[1]
    if not gaps:
        return "Violins of one set only."
    (layer, point), gap = max(gaps.items(), key=lambda item: item[1])
    return (
        f"A pair of half violins a layer, positive and negative prompts. They are furthest apart at layer {layer}, "
        f"{point}: {gap:.1f} standard deviations."
    )


def _held_out_points(frame: pd.DataFrame) -> Any:
    """The rows of each layer and point, of held-out prompts where there are any, at the first position."""
    rows = held_out_rows(frame)
    if "position" in rows:
        rows = rows[rows["position"] == rows["position"].iloc[0]]
    return rows.groupby(["layer", "point"])


def _of_trials(trials: pd.DataFrame, chosen: Mapping[str, Any]) -> dict[str, str]:
    rows = trials[finished_trials(trials, ("target_log_odds", "kl"))]
    best = rows.loc[rows["target_log_odds"].idxmin()]
    place = f"{best['layer']:g}.{best['point']}"
    picked = (
        f" The chosen one has a KL of {number(chosen.get('kl'))} and log-odds of {number(chosen.get('target_log_odds'))}."
        if chosen
        else ""
    )
    return {
        "sweep": f"Heat maps by layer and point; the lowest log-odds of any trial are {number(best['target_log_odds'])}, at {place}.",
        "pareto": f"{len(rows)} trials by KL and behaviour, and their front.{picked}",
    }
