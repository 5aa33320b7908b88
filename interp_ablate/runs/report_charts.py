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
from interp_ablate.display import shortened
from interp_ablate.plots.directions import held_out_rows
from interp_ablate.plots.run_charts import (
    centre_and_spread,
    held_out,
    projections_chart,
    separation_chart,
    trials_chart,
)
from interp_ablate.plots.run_tables import (
    Choice,
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
from interp_ablate.plots.style import distinct_rows, finished_trials, layer_name
from interp_ablate.plots.trials import change_from_unedited, prompts_of
from interp_ablate.runs.report_claims import number, part_of, rate


@dataclass(frozen=True)
class RunTables:
    """The tables of a run folder that its report is drawn of, each read once."""

    projections: pd.DataFrame | None
    directions: Sequence[Direction]
    trials: pd.DataFrame | None
    """The trials, where some have a log-odds and a KL."""
    choice: Choice
    controls: pd.DataFrame | None
    """Separations by directions of shuffled labels."""
    attribution: pd.DataFrame | None
    effects: pd.DataFrame | None
    """Next-token effects by layer."""
    tokens: pd.DataFrame | None
    beside: pd.DataFrame | None
    """Cosines with other directions."""

    @classmethod
    def read(cls, folder: Path) -> RunTables:
        """The tables that are there."""
        trials = read_comparable_trials(folder)
        some = trials is not None and finished_trials(trials, ("target_log_odds", "kl")).any()
        return cls(
            read_projections(folder),
            read_directions(folder),
            trials if some else None,
            read_choice(folder),
            read_controls(folder),
            read_attribution(folder),
            read_layer_effects(folder),
            read_tokens(folder),
            read_beside(folder),
        )


def report_charts(tables: RunTables) -> list[dict[str, Any]]:
    """Headings and charts of what the folder holds."""
    charts = []
    if tables.projections is not None:
        rows = held_out(tables.projections)
        heading = f"Projections at {rows['point'].iloc[0]}, prompt by prompt"
        charts.append({"heading": heading, "svg": projections_chart(rows)})
    if any(each.separation for each in tables.directions):
        svg = separation_chart(tables.directions, tables.controls)
        charts.append({"heading": "Separation by layer", "svg": svg})
    if tables.trials is not None:
        choice = tables.choice
        chosen = choice.trial.get("trial")
        svg = trials_chart(tables.trials, chosen, n=choice.n, max_kl=choice.max_kl)
        charts.append({"heading": "Behaviour against damage, trial by trial", "svg": svg})
    return charts


def alt_texts(tables: RunTables) -> dict[str, str]:
    """For a figure's name what is seen in it, from the numbers that it is drawn of."""
    test, directions = part_of(tables.choice.selected, "test"), tables.directions
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
        alts |= _of_trials(tables.trials, tables.choice.trial)
    return alts | _of_other_tables(tables)


def _of_other_tables(tables: RunTables) -> dict[str, str]:
    alts = {}
    if tables.attribution is not None:
        terms = tables.attribution
        most = terms.loc[terms["difference"].abs().idxmax()] if "difference" in terms else None
        alts["attribution"] = (
            f"Bars of the largest of {len(terms)} terms that write the direction."
            + (
                ""
                if most is None
                else f" The largest is {most['term']}, with {number(most['difference'])}."
            )
        )
        alts["attribution_map"] = "Heat map by layer and head of what writes the direction."
    effects = tables.effects
    if effects is not None and len(kl := effects[effects["score"] == "kl_first_token"]):
        row = kl.loc[kl["change"].idxmax()]
        alts["layer_effects"] = (
            f"Lines by layer of what each direction does to the next token. The largest KL, {number(row['change'])} "
            f"nats, is at layer {row['layer']:g}, {row['point']}, {row['edit']}."
        )
    if tables.beside is not None and len(tables.beside):
        pair = tables.beside.loc[tables.beside["cosine"].abs().idxmax()]
        alts["beside"] = (
            f"Cosines of {len(tables.beside)} pairs of directions and the band of shuffled labels. The largest is "
            f"{number(pair['cosine'])}, of {pair['first']} and {pair['second']}."
        )
    if tables.tokens is not None:
        text = "".join(tables.tokens.drop_duplicates("index").sort_values("index")["token"])
        alts["tokens"] = (
            f"Heat map, tokens by layers, of the projections of: {shortened(text, 120)}"
        )
    return alts


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
        return "Projections of one set only."
    (layer, point), gap = max(gaps.items(), key=lambda item: item[1])
    return (
        f"Projections by layer, positive beside negative prompts. They are furthest apart at layer {layer_name(layer)}, "
        f"{point}: {gap:.1f} standard deviations."
    )


def _held_out_points(frame: pd.DataFrame) -> Any:
    """The rows of each layer and point, of held-out prompts where there are any, at the first position."""
    rows = distinct_rows(held_out_rows(frame))
    if "position" in rows:
        rows = rows[rows["position"] == rows["position"].iloc[0]]
    return rows.groupby(["layer", "point"])


def _of_trials(trials: pd.DataFrame, chosen: Mapping[str, Any]) -> dict[str, str]:
    rows = trials[finished_trials(trials, ("target_log_odds", "kl"))]
    changes = change_from_unedited(rows, "target_log_odds")
    counts = prompts_of(rows)
    least = f"{counts.min():g}" if np.isfinite(counts.min()) else "all"
    picked = (
        f" The chosen one has a KL of {number(chosen.get('kl'))} and log-odds of {number(chosen.get('target_log_odds'))}."
        if chosen
        else ""
    )
    span = f"from {number(changes.min())} to {number(changes.max())}"
    place = (
        f" A star marks layer {number(chosen.get('layer'))}, along which the chosen plan edits."
        if chosen
        else ""
    )
    return {
        "sweep": f"Heat maps by layer and point, as changes from the unedited model; cells of few prompts are hatched.{place}",
        "search": f"{len(trials)} plans by KL and expression rate, and their front.{picked}",
        "pareto": (
            f"{len(rows)} trials by KL and change of the log-odds ({span}), on {least} prompts a side or more, beside the "
            f"unedited model, with their front.{picked}"
        ),
    }
