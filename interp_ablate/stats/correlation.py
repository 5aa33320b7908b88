"""Pearson's r with its interval: over independent points, over points in clusters, within and across groups.

Knows: Fisher's z and a jackknife over clusters. Does not know: what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from interp_ablate.errors import RunError
from interp_ablate.stats.jackknife import jackknife_half_width


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
) -> Correlation:
    """Pearson's r of independent points, with Fisher's z interval.

    Raises:
        RunError: different lengths, or NaN among them.
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite([a, b]).all():
        raise RunError("a correlation needs two finite numbers a point")
    method, r = "Fisher z", _r(a, b)
    if r is None or abs(r) == 1 or len(a) < 4:
        why = _why_not(a, b) or ("too few points for an interval" if len(a) < 4 else "all points lie on a line")  # fmt: skip
        return Correlation(r, None, None, len(a), method, why)
    half = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(len(a) - 3)
    z = math.atanh(r)
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
    x: np.ndarray, y: np.ndarray, clusters: Mapping[str, np.ndarray], *, level: float = 0.95
) -> Correlation:
    """Pearson's r over all points, with an interval that allows for points that belong together.

    A jackknife over the clusters, on Fisher's scale (`jackknife_half_width`).

    Args:
        clusters: of each kind, by its name ("question"), the cluster of every point.
    """
    return _clustered(x, y, clusters, None, level)


def within(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    clusters: Mapping[str, np.ndarray],
    *,
    level: float = 0.95,
) -> Correlation:
    """Pearson's r after each group's own mean is subtracted: do points of one group differ as foretold?

    Its interval is that of `overall`: points of several groups may belong together, such as the answers to a
    question under several system prompts.
    """
    return _clustered(x, y, clusters, groups, level)


def _clustered(
    x: np.ndarray,
    y: np.ndarray,
    clusters: Mapping[str, np.ndarray],
    groups: np.ndarray | None,
    level: float,
) -> Correlation:
    def centred(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = x[kept].astype(float), y[kept].astype(float)
        if groups is None:
            return a, b
        return centred_by(a, groups[kept]), centred_by(b, groups[kept])

    def on_fishers_scale(kept: np.ndarray) -> float | None:
        r = _r(*centred(kept))
        return None if r is None or abs(r) == 1 else math.atanh(r)

    a, b = centred(np.ones(len(x), bool))
    r, why = _r(a, b), _why_not(a, b)
    counts = [f"{len(np.unique(names))} {kind}s" for kind, names in clusters.items()]
    method = f"jackknife over {' and '.join(counts)}"
    half = None if r is None else jackknife_half_width(on_fishers_scale, list(clusters.values()), level=level)  # fmt: skip
    if r is None or half is None or abs(r) == 1:
        why = why or f"{' and '.join(counts)} tell none"
        return Correlation(r, None, None, len(a), method, why)
    z = math.atanh(r)
    return Correlation(r, math.tanh(z - half), math.tanh(z + half), len(a), method)


def centred_by(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The values without the mean of their group."""
    numbers = np.unique(groups, return_inverse=True)[1]
    means = np.bincount(numbers, values) / np.bincount(numbers)
    return values - means[numbers]


def across(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Correlation:
    """Pearson's r of the groups' means: do the groups differ as foretold?"""
    names = np.unique(groups)
    means = [[values[groups == name].mean() for name in names] for values in (x, y)]
    return pearson(*means)
