"""Pearson's r with its interval: over independent points, over points in groups, within and across groups.

Knows: Fisher's z and a bootstrap over groups. Does not know: what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from interp_ablate.errors import RunError


@dataclass(frozen=True)
class Correlation:
    """Pearson's r with its 95% interval."""

    r: float | None
    """None where one of the two does not vary, or there are too few points."""
    low: float | None
    high: float | None
    n: int
    """Number of points."""
    interval: str
    """The method that made the interval."""
    why: str = ""
    """The reason why there is no r, or no interval."""

    def __str__(self) -> str:
        if self.r is None:
            return f"undefined (n = {self.n}): {self.why}"
        if self.low is None or self.high is None:
            return f"{self.r:.2f} (n = {self.n}, no interval: {self.why})"
        return f"{self.r:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n}, {self.interval})"


def pearson(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    lost: int = 0,
) -> Correlation:
    """Pearson's r with Fisher's z interval.

    Args:
        lost: degrees of freedom that were spent before (means subtracted beyond the first).

    Raises:
        RunError: different lengths, or NaN among them.
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite([a, b]).all():
        raise RunError("a correlation needs two finite numbers a point")
    method = "Fisher z" + (f", {lost} degrees of freedom spent on means" if lost else "")
    r = _r(a, b)
    if r is None:
        return Correlation(None, None, None, len(a), method, _why_not(a, b))
    freedom = len(a) - 3 - lost
    if freedom < 1:
        return Correlation(r, None, None, len(a), method, "too few points for an interval")
    half = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(freedom)
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    return Correlation(r, math.tanh(z - half), math.tanh(z + half), len(a), method)


def _r(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None for fewer than two points, or where one of the two does not vary beyond rounding."""
    if len(a) < 2 or _why_not(a, b):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / math.sqrt((a @ a) * (b @ b)), -1, 1))


def _why_not(a: np.ndarray, b: np.ndarray) -> str:
    if len(a) < 2:
        return "fewer than two points"
    for values, name in ((a, "projections"), (b, "scores")):
        if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
            return f"all {name} are the same"
    return ""


def overall(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    kind: str = "system prompt",
) -> Correlation:
    """Pearson's r over all points, with a percentile bootstrap over the groups as its interval.

    Points of one group are not independent, so whole groups are drawn. Resamples in which a side does not
    vary are left out.

    Args:
        kind: what a group is, for the description of the interval.
    """
    points = pearson(x, y)
    names = np.unique(groups)
    method = f"bootstrap over {len(names)} {kind}s"
    if points.r is None or len(names) < 2:
        why = points.why or f"one {kind}"
        return replace(points, low=None, high=None, interval=method, why=why)
    members = [np.flatnonzero(groups == name) for name in names]
    random, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in random.integers(0, len(names), len(names))])
        r = _r(x[rows], y[rows])
        if r is not None:
            drawn.append(r)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(points.r, float(low), float(high), points.n, method)


def within(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Correlation:
    """Pearson's r after each group's own mean is subtracted: do points of one group differ as foretold?"""
    names = np.unique(groups)
    a, b = x.astype(float).copy(), y.astype(float).copy()
    for name in names:
        rows = groups == name
        a[rows] -= a[rows].mean()
        b[rows] -= b[rows].mean()
    return pearson(a, b, lost=len(names) - 1)


def across(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Correlation:
    """Pearson's r of the groups' means: do the groups differ as foretold?"""
    names = np.unique(groups)
    means = [[values[groups == name].mean() for name in names] for values in (x, y)]
    return pearson(*means)
