"""The optimism of a choice: how much better the chosen plan looks on the prompts that chose it than on others.

Knows: repeated half-splits of prompts. Does not know: models, or how a run is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.search.rules import RULES, RuleInput
from interp_ablate.stats.intervals import bound_errors

SPLITS = 200
FEWEST = 8  # prompts a side: less than four in a half tell nothing
Numbers = Mapping[str, Sequence[float]]
"""Of one plan: scores by name, a number a prompt. All plans have the same prompts."""


@dataclass(frozen=True)
class Judged:
    """A rule with its limits, as half of the prompts can be asked it."""

    rule: str
    by: RuleInput
    max_kl: float
    at_most: Mapping[str, float]
    """Limits of other scores that are made small."""
    negative: frozenset[str] = frozenset({"kl"})
    """Scores that are of negative prompts; the others are of positive ones."""


def optimism(
    plans: Sequence[Numbers], judged: Judged, *, n_splits: int = SPLITS, seed: int = 0
) -> dict[str, Any] | None:
    """Choose on one half of the prompts, look at the other half, many times; None where there is too little.

    Each split halves both sides at random, and each half chooses once. A half has half of the prompts, so that a
    choice on it is more optimistic than one on all: the estimate errs on the side of caution.

    Returns plain data: `plans`, `splits`, the `rule` and the `column` of the effect; the means over the choices of the effect and the KL on the
    half that chose (`chosen_half`, `kl_chosen_half`) and on the other (`other_half`, `kl_other_half`); their
    difference in the effect (`optimism`, above 0 where the choice flatters itself); the share of choices whose KL
    on the other half is beyond the limit (`kl_over_limit`); how many halves chose nothing (`no_choice`).
    """
    names = [judged.by.column, "kl", *judged.at_most]
    counts = {name: {len(plan.get(name, ())) for plan in plans} for name in names}
    if not plans or any(len(sizes) != 1 or min(sizes) < FEWEST for sizes in counts.values()):
        return None
    values = {name: np.array([plan[name] for plan in plans], float) for name in names}
    random = np.random.default_rng(seed)
    rows, no_choice = [], 0
    for _ in range(n_splits):
        halves = _halves(values, judged.negative, random)
        for here, there in (halves, halves[::-1]):
            chosen = _choice(values, here, judged)
            if chosen is None:
                no_choice += 1
                continue
            rows.append(
                [values[name][chosen, half[name]].mean()
                 for name in (judged.by.column, "kl") for half in (here, there)]
            )  # fmt: skip
    if not rows:
        return None
    table = np.array(rows)
    chosen_half, other_half, kl_here, kl_there = table.mean(0)
    sign = -1.0 if judged.by.maximize else 1.0
    return {
        "rule": judged.rule,
        "column": judged.by.column,
        "plans": len(plans),
        "splits": n_splits,
        "no_choice": no_choice,
        "chosen_half": float(chosen_half),
        "other_half": float(other_half),
        "optimism": float(sign * (other_half - chosen_half)),
        "kl_chosen_half": float(kl_here),
        "kl_other_half": float(kl_there),
        "kl_over_limit": float((table[:, 3] > judged.max_kl).mean()),
    }


Half = dict[str, np.ndarray]
"""Indices of a half's prompts, by the name of a score."""


def _halves(
    values: Mapping[str, np.ndarray], negative: frozenset[str], random: np.random.Generator
) -> tuple[Half, Half]:
    """Two halves of the prompts; scores of one side share them."""
    halves: tuple[Half, Half] = {}, {}
    orders: dict[tuple[bool, int], np.ndarray] = {}
    for name, array in values.items():
        side = name in negative, array.shape[1]
        if side not in orders:
            orders[side] = random.permutation(array.shape[1])
        middle = array.shape[1] // 2
        halves[0][name], halves[1][name] = orders[side][:middle], orders[side][middle:]
    return halves


def _choice(values: Mapping[str, np.ndarray], half: Half, judged: Judged) -> int | None:
    """The plan that the rule takes by the scores of one half."""
    table = pd.DataFrame({name: array[:, half[name]].mean(1) for name, array in values.items()})
    kl = values["kl"][:, half["kl"]]
    n = kl.shape[1]
    passes = table["kl"] + bound_errors() * kl.std(1, ddof=1) / math.sqrt(n) <= judged.max_kl
    for name, most in judged.at_most.items():
        passes &= table[name] <= most
    if not passes.any():
        return None
    # trials of a search have no soft score; among equals the plan of the highest KL stands for the strongest
    table[_SOFT] = -table["kl"]
    by = replace(judged.by, n=len(half[judged.by.column]), soft=_SOFT)
    chosen: int = RULES[judged.rule](table[passes], by)
    return chosen


_SOFT = "soft score"  # a column that no objective can be named
