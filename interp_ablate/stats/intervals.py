"""Means, shares, paired differences and areas under the ROC curve, each with a 95% interval; upper bounds of a mean.

Knows: the studentized bootstrap, bounds of bounded values, the jackknife, ranks. Does not know: what the numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from interp_ablate.errors import RunError
from interp_ablate.stats.jackknife import jackknife_half_width

FEWEST = 5  # fewer values tell too little of their own spread
RESAMPLES = 2000
BOOTSTRAPPED = 5_000  # values up to which an interval is a bootstrap's; beyond it, the normal one
Bounds = tuple[float, float]  # what values can be at least and at most
UNBOUNDED: Bounds = (-math.inf, math.inf)
AT_LEAST_0: Bounds = (0.0, math.inf)
SHARE: Bounds = (0.0, 1.0)
SCORE: Bounds = (0.0, 100.0)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float | None = None
    """Lower end; None where the values tell no interval."""
    high: float | None = None
    """Upper end; None where the values tell no interval."""

    def to_list(self) -> list[float | None]:
        return [self.value, self.low, self.high]


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    bounds: Bounds = UNBOUNDED,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of the mean of independent values; None where they tell none.

    Each end is the studentized bootstrap's (Hall 1988, https://doi.org/10.1214/aos/1176350933), which covers
    skewed means better than percentiles do. An end within `bounds` is never wider than Gaffke's, which holds for
    any values between them (Learned-Miller and Thomas 2020, https://arxiv.org/abs/1905.06208): the only end for fewer
    than FEWEST values, or where all are equal. Of rates, all of whose values are at a bound, it is the exact
    interval of Clopper and Pearson. Values without bounds that are few or equal say nothing of what others may be.
    More than BOOTSTRAPPED values have the normal interval.

    Raises:
        RunError: no values, or NaN among them.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise RunError("an interval needs at least one finite value a prompt")
    least, most = min(bounds[0], array.min()), max(bounds[1], array.max())  # rounding may pass them
    n, edge = array.size, (1 - level) / 2
    if math.isfinite(most - least) and np.isin(array, bounds).all():
        low, high = clopper_pearson(int((array == most).sum()), n, level=level)
        return least + (most - least) * low, least + (most - least) * high
    if not _spread(array):
        share, value = 1 - edge ** (1 / n), float(array.mean())
        low, high = value - share * (value - least), value + share * (most - value)
    elif n > BOOTSTRAPPED:
        half = NormalDist().inv_cdf(1 - edge) * _spread(array) / math.sqrt(n)
        low, high = array.mean() - half, array.mean() + half
    else:
        random = np.random.default_rng(seed)
        low, high = _studentized(array, edge, random) if n >= FEWEST else UNBOUNDED
        weights = random.standard_exponential((RESAMPLES, n + 1))
        weights /= weights.sum(1, keepdims=True)
        order = np.sort(array)
        if math.isfinite(least):
            low = max(low, np.quantile(weights @ np.append(least, order), edge))
        if math.isfinite(most):
            high = min(high, np.quantile(weights @ np.append(order, most), 1 - edge))
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def _spread(array: np.ndarray) -> float:
    """The standard deviation; 0 where values differ by rounding only, or there is one."""
    if np.ptp(array) <= 1e-12 * float(np.abs(array).max()):
        return 0.0
    return float(array.std(ddof=1))


def _studentized(
    array: np.ndarray, edge: float, random: np.random.Generator
) -> tuple[float, float]:
    """Both ends of the studentized bootstrap; infinite where too many resamples are of equal values."""
    drawn = array[random.integers(0, array.size, (RESAMPLES, array.size))]
    away = drawn.mean(1) - array.mean()
    spreads = drawn.std(1, ddof=1)
    flat = np.ptp(drawn, axis=1) <= 1e-12 * np.abs(array).max()
    ratios = np.where(flat, np.copysign(np.inf, away), away / np.where(flat, 1.0, spreads))
    ratios.sort()
    place = math.ceil(edge * RESAMPLES) - 1
    scale = _spread(array)
    return array.mean() - ratios[-1 - place] * scale, array.mean() - ratios[place] * scale


def clopper_pearson(hits: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate of `hits` in `n` independent trials: it covers in at least `level` of cases.

    Source: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404.
    """
    from scipy.stats import beta

    edge = (1 - level) / 2
    low = float(beta.ppf(edge, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - edge, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def upper_bound(values: Sequence[float] | np.ndarray, *, level: float = 0.9) -> float | None:
    """One-sided upper bound of the mean of skewed values: Cantelli's inequality with their own spread.

    At the level 0.9 it is the mean and three standard errors. No bound holds for all skewed values (Bahadur and
    Savage 1956, https://doi.org/10.1214/aoms/1177728077). This one covers log-normal values of sigma 1 and exponential
    ones in 87% to 98% of cases from 8 values on; percentiles of the bootstrap do in 69% to 85%.
    None for fewer than two values, and for equal ones.
    """
    array = np.asarray(values, dtype=float)
    if array.size < 2 or not _spread(array):
        return None
    return float(array.mean() + bound_errors(level) * _spread(array) / array.size**0.5)


def bound_errors(level: float = 0.9) -> float:
    """How many standard errors `upper_bound` lies above the mean."""
    return math.sqrt(level / (1 - level))


def mean_estimate(values: Sequence[float] | np.ndarray, *, bounds: Bounds = UNBOUNDED) -> Estimate:
    """The mean with its `mean_interval`, if there is one."""
    return Estimate(float(np.mean(values)), *(mean_interval(values, bounds=bounds) or ()))


def difference_estimate(
    before: Sequence[float], after: Sequence[float], *, bounds: Bounds = UNBOUNDED
) -> Estimate:
    """The mean of after - before over pairs of values within `bounds`, with its interval."""
    change = np.asarray(after, float) - np.asarray(before, float)
    return mean_estimate(change, bounds=_bounds_of_difference(bounds))


def difference_of_means(
    some: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray
) -> Estimate:
    """The mean of `some` minus the mean of `others`, two independent samples, with Welch's interval.

    No interval for fewer than two values on a side, or for equal values on both. Source: Welch 1947,
    https://doi.org/10.1093/biomet/34.1-2.28.
    """
    from scipy.stats import t

    a, b = np.asarray(some, float), np.asarray(others, float)
    gap = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2 or not (_spread(a) or _spread(b)):
        return Estimate(gap)
    parts = np.array([_spread(a) ** 2 / a.size, _spread(b) ** 2 / b.size])
    degrees = parts.sum() ** 2 / (parts**2 / np.array([a.size - 1, b.size - 1])).sum()
    half = float(t.ppf(0.975, degrees) * math.sqrt(parts.sum()))
    return Estimate(gap, gap - half, gap + half)


def _bounds_of_difference(bounds: Bounds) -> Bounds:
    return bounds[0] - bounds[1], bounds[1] - bounds[0]


def mean_with_interval(
    values: Sequence[float | None], *, bounds: Bounds = UNBOUNDED
) -> dict[str, Any]:
    """Mean and interval of the values that are there, how many these are, and how many are None."""
    numbers = [value for value in values if value is not None]
    summary: dict[str, Any] = {"mean": None, "interval": None, "n": len(numbers)}
    if numbers:
        interval = mean_interval(numbers, bounds=bounds)
        summary |= {"mean": float(np.mean(numbers)), "interval": interval and list(interval)}
    return {**summary, "no_value": len(values) - len(numbers)}


def paired_difference(
    some: Sequence[float | None], others: Sequence[float | None], *, bounds: Bounds = UNBOUNDED
) -> dict[str, Any]:
    """`mean_with_interval` of `some` minus `others`, within `bounds` each, over the pairs that have both."""
    pairs = zip(some, others, strict=True)
    differences = [None if a is None or b is None else a - b for a, b in pairs]
    return mean_with_interval(differences, bounds=_bounds_of_difference(bounds))


def rate(part: int, whole: int) -> dict[str, Any]:
    """A share of a count with its 95% interval (`clopper_pearson`); None where the count is 0."""
    if not whole:
        return {"value": None, "low": None, "high": None, "of": 0}
    low, high = clopper_pearson(part, whole)
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
) -> tuple[float, float]:
    """Interval of `auc` over groups of samples that belong together (such as one prompt's).

    A jackknife over groups on the scale of log-odds. Where every pair is ordered alike (an AUC of 0 or 1), it says
    nothing, and the exact bound for as many independent pairs as there are of the rarer kind (or groups, if
    fewer) takes its place. Where a single group decides, the interval is 0 to 1.

    Raises:
        RunError: as `auc`.
    """
    weighted_auc = _weighted_auc(scores, labels)
    whole, positive = auc(scores, labels), np.asarray(labels, bool)
    names: Sequence[Any] = range(len(positive)) if groups is None else groups
    if whole in (0.0, 1.0):
        pairs = min(int(positive.sum()), int((~positive).sum()), len(set(names)))
        edge = ((1 - level) / 2) ** (1 / pairs)
        return (edge, 1.0) if whole == 1.0 else (0.0, 1 - edge)
    half = jackknife_half_width(
        lambda chosen: float(weighted_auc(chosen[None])[0]), [names], level=level
    )
    if half is None:
        return 0.0, 1.0
    odds, factor = whole / (1 - whole), math.exp(min(half / (whole * (1 - whole)), 700.0))
    return odds / (odds + factor), odds * factor / (1 + odds * factor)


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
