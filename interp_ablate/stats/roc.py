"""Area under the ROC curve, with an interval.

Knows: ranks. Does not know: what the scores are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from interp_ablate.errors import RunError


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
