"""Numbers of the league with intervals over prompts and seeds, and ranks that say what cannot be told apart.

Knows: areas under curves, jackknives, ranks. Does not know: records, methods or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_ablate.stats.intervals import Bounds, Estimate, auc, mean_interval
from interp_ablate.stats.jackknife import MOST_PARTS, Statistic, jackknife_half_width


@dataclass(frozen=True)
class Sample:
    """One number of one prompt under one seed."""

    behaviour: str
    seed: int
    prompt: str
    value: float
    label: bool = True
    """Of a detector's score: whether the prompt is positive."""


def area_gained(kls: Sequence[float], rates: Sequence[float], base: float, limit: float) -> float:
    """The mean difference of a rate from `base` over KLs from 0 to `limit`, along straight lines between points.

    The curve begins at KL 0 with `base`; behind its last point it stays as it is there.
    """
    order = np.argsort(kls, kind="stable")
    x = np.concatenate([[0.0], np.asarray(kls, float)[order]])
    y = np.concatenate([[0.0], np.asarray(rates, float)[order] - base])
    at = np.unique(np.clip(np.append(x, limit), 0.0, limit))
    values = np.interp(at, x, y)
    widths = np.diff(at)
    return float((widths * (values[1:] + values[:-1]) / 2).sum() / limit)


def mean_of(samples: Sequence[Sample], bounds: Bounds) -> Estimate:
    """The mean over behaviours, each with the same weight, and its 95% interval over prompts and seeds.

    A jackknife by prompt and, where there are several, by seed (`half_width`). Where nothing varies, the interval is
    that of bounded values (`mean_interval`).
    """
    values = np.array([sample.value for sample in samples])
    names = np.array([sample.behaviour for sample in samples])

    def statistic(kept: np.ndarray) -> float | None:
        parts = [values[kept & (names == name)] for name in np.unique(names)]
        return (
            None
            if any(part.size == 0 for part in parts)
            else float(np.mean([part.mean() for part in parts]))
        )

    value = statistic(np.ones(len(values), bool))
    assert value is not None
    half = half_width(statistic, _clusters(samples))
    if half is None:
        return Estimate(value, *(mean_interval(_by_prompt(samples), bounds=bounds) or ()))
    return Estimate(value, max(bounds[0], value - half), min(bounds[1], value + half))


def mean_auc(samples: Sequence[Sample]) -> Estimate:
    """The AUC of detectors' scores, the mean over behaviours and seeds, with its interval as in `mean_of`.

    Where every pair is ordered alike the interval is the exact one for as many pairs.
    """
    values = np.array([sample.value for sample in samples])
    labels = np.array([sample.label for sample in samples])
    groups = np.unique([f"{s.behaviour} {s.seed}" for s in samples], return_inverse=True)[1]

    def statistic(kept: np.ndarray) -> float | None:
        parts = [kept & (groups == group) for group in np.unique(groups[kept])]
        if any(labels[part].all() or not labels[part].any() for part in parts):
            return None
        return float(np.mean([auc(values[part], labels[part]) for part in parts]))

    value = statistic(np.ones(len(values), bool))
    assert value is not None
    half = half_width(statistic, _clusters(samples))
    if half is None:
        pairs = len({sample.prompt for sample in samples})
        edge = 0.025 ** (1 / pairs)
        return Estimate(
            value, *((edge, 1.0) if value == 1 else (0.0, 1 - edge if value == 0 else 1.0))
        )
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def half_width(statistic: Statistic, clusters: Sequence[Sequence[Any]]) -> float | None:
    """Half of a 95% interval from jackknives over several kinds of clusters, whose variances add.

    The quantile is Student's, with Satterthwaite's degrees of freedom (1946, https://doi.org/10.2307/3002019): few
    seeds make an interval wide where seeds differ, and not where they agree. None where nothing varies.
    """
    from scipy.stats import t

    parts = []
    for kind in clusters:
        degrees = min(len(set(kind)), MOST_PARTS) - 1
        half = jackknife_half_width(statistic, [kind]) if degrees else None
        if half is not None:
            parts.append((float((half / t.ppf(0.975, degrees)) ** 2), degrees))
    if not parts:
        return None
    variance = sum(part for part, _ in parts)
    together = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(t.ppf(0.975, together)) * float(variance**0.5)


def _clusters(samples: Sequence[Sample]) -> list[list[Any]]:
    """What samples have in common: a prompt, and a seed where there are several."""
    prompts, seeds = [s.prompt for s in samples], [s.seed for s in samples]
    return [prompts, seeds] if len(set(seeds)) > 1 else [prompts]


def _by_prompt(samples: Sequence[Sample]) -> list[float]:
    found: dict[str, list[float]] = {}
    for sample in samples:
        found.setdefault(sample.prompt, []).append(sample.value)
    return [float(np.mean(values)) for values in found.values()]


def rank_ranges(estimates: dict[str, Estimate]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank that each could have, the highest value being 1: only intervals that part decide.

    An estimate without an interval counts as its value alone.
    """
    ends = {
        name: (
            e.value if e.low is None else e.low,
            e.value if e.high is None else e.high,
        )
        for name, e in estimates.items()
    }
    ranks = {}
    for name, (low, high) in ends.items():
        above = sum(other_low > high for other_low, _ in ends.values())
        below = sum(other_high < low for _, other_high in ends.values())
        ranks[name] = (1 + above, len(ends) - below)
    return ranks
