"""The report's charts, and for every figure a sentence of what is seen in it.

Knows: which files of a run folder they are made of. Does not know: the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.directions.direction import Direction, cosine_similarities
from interp_ablate.directions.direction_set import Directions
from interp_ablate.plots.directions import PROJECTION_COLUMNS
from interp_ablate.plots.run_charts import (
    centre_and_spread,
    held_out,
    projections_chart,
    separation_chart,
    trials_chart,
)
from interp_ablate.plots.style import finished_trials
from interp_ablate.runs.report_claims import number, part_of, rate
from interp_ablate.search.trial_table import read_trials
from interp_ablate.storage.tables import read_json, read_table


def read_projections(folder: Path) -> pd.DataFrame | None:
    """projections.csv of a run folder; None where there is none, or no row in it."""
    path = folder / "projections.csv"
    if not path.exists():
        return None
    frame = read_table(path, PROJECTION_COLUMNS, numbers=("layer", "projection"), complete=True)
    return frame if len(frame) else None


def read_directions(folder: Path) -> list[Direction]:
    """The plain estimates of a run folder's directions; all where there are none of that method."""
    path = folder / "directions.safetensors"
    if not path.exists():
        return []
    directions = Directions.load(path)
    return list(directions.of("difference_in_means") or directions)


def report_charts(folder: Path) -> list[dict[str, Any]]:
    """Headings and charts of what the folder holds."""
    charts = []
    frame, directions = read_projections(folder), read_directions(folder)
    if frame is not None:
        rows = held_out(frame)
        heading = f"Projections at {rows['point'].iloc[0]}, prompt by prompt"
        charts.append({"heading": heading, "svg": projections_chart(rows)})
    if any(each.separation for each in directions):
        charts.append({"heading": "Separation by layer", "svg": separation_chart(directions)})
    trials = _trials(folder)
    if trials is not None:
        chosen = part_of(read_json(folder / "selected.json"), "trial").get("trial")
        svg = trials_chart(trials, chosen)
        charts.append({"heading": "Behaviour against damage, trial by trial", "svg": svg})
    return charts


def alt_texts(folder: Path) -> dict[str, str]:
    """For a figure's name what is seen in it, from the numbers that it is drawn of."""
    test = part_of(read_json(folder / "selected.json"), "test")
    alts = {"before_after": _before_after(test)} if test else {}
    frame, directions, trials = read_projections(folder), read_directions(folder), _trials(folder)
    if frame is not None:
        alts["projections"] = _projections(frame)
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
    if trials is not None:
        alts |= _of_trials(trials, part_of(read_json(folder / "selected.json"), "trial"))
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
    for (layer, point), rows in held_out_points(frame):
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


def held_out_points(frame: pd.DataFrame) -> Any:
    """The rows of each layer and point, of held-out prompts where there are any, at the first position."""
    rows = frame[frame["split"] == "validation"]
    rows = rows if len(rows) else frame
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
