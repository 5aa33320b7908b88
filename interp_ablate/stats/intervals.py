"""Means, shares, paired differences and areas under the ROC curve, each with a 95% interval.

Knows: the bootstrap, exact bounds where it says nothing, ranks. Does not know: what the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from interp_ablate.errors import RunError

FEWEST = 5  # an evaluation gives no interval for fewer units
RESAMPLES = 2000
BOOTSTRAPPED = 20_000  # values up to which an interval is a bootstrap's; beyond it, the normal one


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float | None = None
    """Lower end; None where there are too few units for an interval."""
    high: float | None = None
    """Upper end; None where there are too few units for an interval."""

    def to_list(self) -> list[float | None]:
        return [self.value, self.low, self.high]


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    proportion: bool = False,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the normal interval for more than BOOTSTRAPPED values.

    Args:
        proportion: where all values are 0 or 1 their mean is a rate, and the interval is the exact one of
            Clopper and Pearson (`clopper_pearson`): the bootstrap's covers too seldom.

    Raises:
        RunError: no values, or NaN among them.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise RunError("an interval needs at least one finite value a prompt")
    edge = (1 - level) / 2
    if proportion and np.isin(array, (0.0, 1.0)).all():
        return clopper_pearson(int(array.sum()), array.size, level=level)
    if array.size > BOOTSTRAPPED:
        mean, spread = float(array.mean()), float(array.std(ddof=1))
        half = NormalDist().inv_cdf(1 - edge) * spread / math.sqrt(array.size)
        return mean - half, mean + half
    draws = np.random.default_rng(seed).integers(0, array.size, (resamples, array.size))
    low, high = np.quantile(array[draws].mean(axis=1), [edge, 1 - edge])
    return float(low), float(high)


def clopper_pearson(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate of `hits` in `n` independent trials: it covers in at least `level` of cases.

    Source: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404.
    """
    from scipy.stats import beta

    edge = (1 - level) / 2
    low = float(beta.ppf(edge, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - edge, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def mean_estimate(
    values: Sequence[float] | np.ndarray, *, proportion: bool = False, fewest: int = FEWEST
) -> Estimate:
    """The mean with its `bootstrap_interval`; without an interval for fewer values than `fewest`."""
    array = np.asarray(values, float)
    value = float(array.mean())
    if array.size < fewest:
        return Estimate(value)
    return Estimate(value, *bootstrap_interval(array, proportion=proportion))


def difference_estimate(
    before: Sequence[float], after: Sequence[float], *, proportion: bool = False
) -> Estimate:
    """The mean of after - before over pairs, with a paired bootstrap interval.

    The bootstrap says nothing of a rate where every pair changed alike (none of n changed, say). The
    exact bound on the share of pairs that change then takes its place, on both sides of 0 for no change.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    if not proportion or change.size < FEWEST or change.min() < change.max():
        return mean_estimate(change)
    low, high = bootstrap_interval(np.abs(change), proportion=True)
    if change[0] == 0:
        return Estimate(0.0, -high, high)
    ends = sorted((float(change[0]) * low, float(change[0]) * high))
    return Estimate(float(change[0]), *ends)


def mean_with_interval(
    values: Sequence[float | None], *, proportion: bool = False
) -> dict[str, Any]:
    """Mean and interval of the values that are there, how many these are, and how many are None."""
    numbers = [value for value in values if value is not None]
    summary: dict[str, Any] = {"mean": None, "interval": None, "n": len(numbers)}
    if numbers:
        estimate = mean_estimate(numbers, proportion=proportion, fewest=1)
        summary |= {"mean": estimate.value, "interval": [estimate.low, estimate.high]}
    return {**summary, "no_value": len(values) - len(numbers)}


def paired_difference(
    some: Sequence[float | None], others: Sequence[float | None]
) -> dict[str, Any]:
    """`mean_with_interval` of `some` minus `others`, over the pairs in which both have a value."""
    pairs = zip(some, others, strict=True)
    return mean_with_interval([None if a is None or b is None else a - b for a, b in pairs])


def rate(part: int, whole: int) -> dict[str, Any]:
    """A share of a count with its 95% interval (Wilson 1927); None where the count is 0."""
    if not whole:
        return {"value": None, "low": None, "high": None, "of": 0}
    from scipy.stats import binomtest

    interval = binomtest(part, whole).proportion_ci(method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {"value": part / whole, "low": low, "high": high, "of": whole}


def auc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """The probability that a labelled sample scores higher than one that is not; ties count half.

    Raises:
        RunError: samples of one kind alone, or a score that is not finite.
    """
    return float(_weighted_auc(scores, labels)(np.ones((1, len(scores))))[0])


def auc_interval(
    scores: Sequence[float] | np.ndarray,
    labels: Sequence[bool] | np.ndarray,
    *,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of `auc` over groups of samples that belong together (such as one prompt's).

    Resamples of one kind alone are left out. Where every pair is ordered alike (an AUC of 0 or 1), the
    bootstrap says nothing, and the exact bound for as many independent pairs as there are of the rarer
    kind (or groups, if fewer) takes its place.

    Raises:
        RunError: as `auc`.
    """
    weighted_auc = _weighted_auc(scores, labels)
    whole, positive = auc(scores, labels), np.asarray(labels, bool)
    names: Sequence[Any] = range(len(positive)) if groups is None else groups
    number: dict[Any, int] = {}
    group = np.array([number.setdefault(name, len(number)) for name in names])
    if whole in (0.0, 1.0):
        pairs = min(int(positive.sum()), int((~positive).sum()), len(number))
        edge = ((1 - level) / 2) ** (1 / pairs)
        return (edge, 1.0) if whole == 1.0 else (0.0, 1 - edge)
    random, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        times = np.bincount(random.integers(0, len(number), len(number)), minlength=len(number))
        drawn.append(float(weighted_auc(times[group][None])[0]))
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weighted_auc(
    scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The AUC as a function of each sample's weight [resample, sample]; NaN where one kind has no weight."""
    values, positive = np.asarray(scores, float), np.asarray(labels, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m or not np.isfinite(values).all():
        raise RunError(
            f"an AUC needs finite scores of samples of both kinds; got {n} with the label and {m} without"
        )
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # the first of equal scores
    sign = positive[order]

    def weighted_auc(times: np.ndarray) -> np.ndarray:
        weights = times[:, order].astype(float)
        above = np.add.reduceat(weights * sign, starts, axis=1)
        below = np.add.reduceat(weights * ~sign, starts, axis=1)
        won = (above * (below.cumsum(1) - below / 2)).sum(1)
        pairs = above.sum(1) * below.sum(1)
        return np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0)

    return weighted_auc
