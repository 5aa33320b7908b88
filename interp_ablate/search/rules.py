"""Rules of choice by name: which of the plans within the limits is kept.

A rule is a function from a table of plans within the limits to one row's index, and a line in `RULES` and in `settings.RULE_NAMES`.

Knows: the rules. Does not know: limits (`selection`), models, or how plans were scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.stats.intervals import clopper_pearson

LEVEL = 0.9  # of the upper bound that `cheapest` allows


@dataclass(frozen=True)
class RuleInput:
    """What a rule compares plans by."""

    column: str = "expression_rate"
    """The effect: a share from 0 to 1, small where `maximize` is false."""
    maximize: bool = False
    """Whether a large effect is wanted."""
    n: int | None = None
    """Prompts that the effect is a mean over; None compares it as it is, to the last digit."""
    unedited: float | None = None
    """The unedited model's effect, from which `knee` starts; None takes the weakest plan's."""

    soft: str | None = "unedited_answer_logprob"
    """The column that decides between equal effects, small first, where the table has it."""

    def left(self, frame: pd.DataFrame) -> np.ndarray:
        """What is left to gain, for each row; small is good."""
        values = frame[self.column].to_numpy(float)
        return 1 - values if self.maximize else values


def strongest(frame: pd.DataFrame, by: RuleInput) -> Any:
    """The largest effect. Effects less than half a prompt apart are equal: then the soft score decides, then the KL.

    The soft score is that of `RuleInput.soft`: small is strong.
    """
    left = by.left(frame)
    equal = frame[left <= left.min() + (0.5 / by.n if by.n else 0.0)]
    order = [name for name in (by.soft, "kl") if name in frame]
    return equal.sort_values(order, kind="stable").index[0]


def cheapest(frame: pd.DataFrame, by: RuleInput) -> Any:
    """The least KL among the plans whose effect is within the upper bound of the best one's.

    The bound is one-sided, at 90%, of a rate on as many prompts (Clopper and Pearson): with 32 prompts, and none
    that shows the behaviour under the best plan, up to 2. So a rule of one standard error does (Breiman et al. 1984,
    Classification and Regression Trees, section 3.4.3), for a rate.
    """
    left = by.left(frame)
    bound = rate_bound(float(left.min()), by.n)
    return frame[left <= bound].sort_values(["kl", by.column], kind="stable").index[0]


def knee(frame: pd.DataFrame, by: RuleInput) -> Any:
    """The bend of the front of effect and KL: the plan furthest below the line from the unedited model to the strongest.

    Both are scaled to 0 to 1 before, by these two ends. Source: Das 1999, https://doi.org/10.1007/s001580050111.
    """
    kl, left = frame["kl"].to_numpy(float), by.left(frame)
    best = np.lexsort((kl, left))[0]
    weakest = left.max()
    if by.unedited is not None:
        weakest = max(1 - by.unedited if by.maximize else by.unedited, left[best])
    if weakest <= left[best] or kl[best] <= 0:
        return frame.index[best]
    below = 1 - (left - left[best]) / (weakest - left[best]) - kl / kl[best]
    below[kl > kl[best]] = -math.inf
    return frame.index[np.lexsort((kl, -below))[0]]


def rate_bound(rate: float, n: int | None, *, level: float = LEVEL) -> float:
    """One-sided upper bound of a rate on `n` prompts (Clopper and Pearson); the rate itself where n is None."""
    return rate if n is None or rate >= 1 else clopper_pearson(rate * n, n, level=2 * level - 1)[1]


Rule = Callable[[pd.DataFrame, RuleInput], Any]
RULES: dict[str, Rule] = {"strongest": strongest, "cheapest": cheapest, "knee": knee}
"""Every rule by its name. Each gets a table with at least one row, the column `kl` and that of the effect."""
