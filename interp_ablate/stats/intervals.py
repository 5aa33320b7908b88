"""Means and differences with bootstrap intervals.

Knows: resampling. Does not know: what the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interp_ablate.errors import RunError

FEWEST = 5  # an interval from fewer units would say nothing
RESAMPLES = 2000


# ---- estimates -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; the interval is None where there are too few units for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_list(self) -> list[float | None]:
        return [self.value, self.low, self.high]


def mean_estimate(values: Sequence[float] | np.ndarray, *, proportion: bool = False) -> Estimate:
    """A mean over units with its bootstrap interval (`selection.bootstrap_interval`)."""
    array = np.asarray(values, float)
    value = float(array.mean())
    if array.size < FEWEST:
        return Estimate(value)
    low, high = bootstrap_interval(array, resamples=RESAMPLES, proportion=proportion)
    return Estimate(value, low, high)


def difference_estimate(
    before: Sequence[float], after: Sequence[float], *, proportion: bool = False
) -> Estimate:
    """The mean of after - before over pairs, with a paired bootstrap interval.

    Of a rate where every pair changed alike (no pair of n changed, say) the bootstrap says nothing; the
    exact bound on the share of pairs that change takes its place, on both sides of 0 for no change.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    if not proportion or change.size < FEWEST or change.min() < change.max():
        return mean_estimate(change)
    low, high = bootstrap_interval(np.abs(change), proportion=True)
    if change[0] == 0:
        return Estimate(0.0, -high, high)
    ends = sorted((float(change[0]) * low, float(change[0]) * high))
    return Estimate(float(change[0]), *ends)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    proportion: bool = False,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts.

    Args:
        proportion: the values are 0 or 1 a prompt and their mean is a rate. Where all are equal (0 of n
            declined) the bootstrap says nothing, and the exact Clopper-Pearson bound takes its place.

    Raises:
        RunError: no values, or NaN among them.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise RunError("an interval needs at least one finite value a prompt")
    if proportion and array.min() == array.max() and array[0] in (0.0, 1.0):
        edge = (1 - level) / 2
        bound = edge ** (1 / array.size)
        return (bound, 1.0) if array[0] == 1.0 else (0.0, 1 - bound)
    draws = np.random.default_rng(seed).integers(0, array.size, (resamples, array.size))
    low, high = np.quantile(array[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
