"""A race of directions on growing subsets of prompts.

Knows: rungs and merit. Does not know: plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import pandas as pd

from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.errors import RunError
from interp_ablate.search.edit_space import DirectionKey
from interp_ablate.search.trial_table import to_frame
from interp_ablate.search.trials import Trial
from interp_ablate.sites import Site

Score: TypeAlias = Callable[[str, Sequence[Trial]], list[Trial]]
"""Scores trials, whose step has a name; returns them finished, in order."""

# Fits: how many directions, and how many layers apart they are at least.
N_FITS, FIT_DISTANCE = 1, 3
# Prompts a side and candidates of each rung of the screening, which ranks directions and selects no plan.
# With 60 candidates and 32 prompts that is 0.23 of all on all.
RUNGS = ((3, 10**9), (12, 14), (32, 3))


def distinct(directions: Iterable[Direction]) -> list[Direction]:
    """Directions without repeats: resid_pre of a layer is resid_post of the layer before.

    One is a repeat of another of its position and method.
    """
    every = as_directions(directions)
    known = {(item.site, item.position, item.method) for item in every}

    def is_repeat(item: Direction) -> bool:
        if item.site.point != "resid_pre" or not item.site.layer:
            return False
        before = Site(item.site.layer - 1, "resid_post")
        return (before, item.position, item.method) in known

    return [item for item in every if not is_repeat(item)]


def screening_trials(directions: Iterable[Direction]) -> list[Trial]:
    """One trial for each distinct direction: full ablation everywhere (and addition at its own site)."""
    return [
        Trial(
            {
                "edit": "ablate",
                "method": item.method,
                "layer": item.site.layer,
                "point": item.site.point,
                "position": item.position,
            }
        )
        for item in distinct(directions)
    ]


def removal_per_kl(rows: pd.DataFrame) -> pd.Series:
    """How much of the behaviour a screened plan removes for the KL it costs; higher is better."""
    gain = (rows["unedited_answer_logprob_baseline"] - rows["unedited_answer_logprob"]).clip(
        lower=0
    )
    return gain / (0.1 + rows["kl"])


def race_directions(
    n_prompts: int,
    candidates: Sequence[Trial],
    score: Score,
    *,
    rungs: Sequence[tuple[int, int]] = RUNGS,
) -> pd.DataFrame:
    """Race the candidates: all on a few prompts a side, the best of them on more, and so on.

    Args:
        n_prompts: that there are, on the larger side.
        rungs: (prompts a side, how many candidates go on to it); the first takes them all. One that has
            no more prompts than the one before it is left out.

    Returns one row a candidate, of the last rung that it reached; those of the last rung come first.
    The idea is that of successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943).
    """
    alive = list(candidates)
    tables: list[pd.DataFrame] = []
    for prompts, most in usable_rungs(rungs, n_prompts):
        if not alive:
            break
        trials = score(
            f"screen, {prompts} prompts", [replace(c, prompts=prompts) for c in alive[:most]]
        )
        table = to_frame(trials)
        out = [] if not tables else tables[-1].iloc[len(trials) :]
        order = removal_per_kl(table).where(table["status"] == "ok", -math.inf)
        places = order.sort_values(ascending=False, kind="stable").index
        tables.append(
            pd.concat([table.loc[places], *([out] if len(out) else [])], ignore_index=True)
        )
        ok = [trials[i] for i in places if trials[i].status == "ok"]
        alive = [Trial(trial.params) for trial in ok]
    return tables[-1]


def usable_rungs(rungs: Sequence[tuple[int, int]], n_prompts: int) -> list[tuple[int, int]]:
    """The rungs that have more prompts than the one before, of the prompts that there are."""
    usable: list[tuple[int, int]] = []
    for prompts, most in rungs:
        here = min(prompts, n_prompts)
        if not usable or here > usable[-1][0]:
            usable.append((here, most))
    return usable


def rank_directions(screened: pd.DataFrame, *, n: int = 8) -> list[DirectionKey]:
    """The (layer, point, position) of the screened directions worth refining, the best first.

    The ones that lower the behaviour most for the KL they cost, among those whose addition raises the
    target log-odds of negative prompts above the unedited model's.

    Raises:
        RunError: every screened trial failed.
    """
    rows = screened[screened["status"] == "ok"]
    if rows.empty:
        reasons = [reason for reason in screened["reason"] if reason]
        raise RunError(
            f"none of the {len(screened)} screened directions could be scored"
            + (f"; the first failed with: {reasons[0]}" if reasons else "")
        )
    raised = rows[rows["addition"] > rows["addition_baseline"]]
    rows = raised if len(raised) else rows
    # what few prompts say is not compared with what more prompts say of those that went on
    rungs = rows["prompts"].fillna(math.inf)
    order = (
        rows.assign(merit=removal_per_kl(rows), rung=rungs)
        .sort_values(["rung", "merit"], ascending=False, kind="stable")
        .index[:n]
    )
    return [
        (int(r["layer"]), str(r["point"]), str(r["position"]))
        for _, r in rows.loc[order].iterrows()
    ]


def layers_apart(sources: Sequence[DirectionKey]) -> list[DirectionKey]:
    """The first few sources that are some layers apart: neighbours hold nearly the same direction."""
    chosen: list[DirectionKey] = []
    for source in sources:
        if all(abs(source[0] - other[0]) >= FIT_DISTANCE for other in chosen):
            chosen.append(source)
    return chosen[:N_FITS]
