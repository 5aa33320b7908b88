"""Intervals: one arithmetic for means, differences and rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from interp_ablate.stats.intervals import (
    BOOTSTRAPPED,
    bootstrap_interval,
    clopper_pearson,
    mean_estimate,
    mean_with_interval,
    paired_difference,
)


def test_many_values_have_the_normal_interval_and_it_is_the_bootstraps() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, BOOTSTRAPPED + 1)
    few, many = bootstrap_interval(values[:-1]), bootstrap_interval(values)
    half = 1.959964 * values.std(ddof=1) / np.sqrt(len(values))
    assert many == pytest.approx((values.mean() - half, values.mean() + half))
    assert few == pytest.approx(many, abs=0.004)


def test_the_summaries_agree() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    estimate = mean_estimate(values)
    summary = mean_with_interval([*values, None])
    assert summary == {"mean": estimate.value, "interval": [estimate.low, estimate.high], "n": 6, "no_value": 1}  # fmt: skip
    assert paired_difference([*values, None], [0.0] * 7) == summary
    assert mean_estimate(values[:4]).low is None and mean_estimate(values[:4], fewest=1).low == 0.0
    assert mean_with_interval([None]) == {"mean": None, "interval": None, "n": 0, "no_value": 1}


def test_intervals_of_rates_cover() -> None:
    """At every rate, and 1 of 32 reaches higher than 0 of 32 (the bootstrap: 0.094 and 0.109; it covers 86%)."""
    n = 32
    intervals = [bootstrap_interval([1] * k + [0] * (n - k), proportion=True) for k in range(n + 1)]
    assert intervals[0] == pytest.approx((0.0, 0.1089), abs=1e-4)
    assert intervals[1] == pytest.approx((0.0008, 0.1622), abs=1e-4)
    assert intervals == [clopper_pearson(k, n) for k in range(n + 1)]
    for rate in np.linspace(0.01, 0.99, 50):
        chances = binom.pmf(np.arange(n + 1), n, rate)
        covers = [low <= rate <= high for low, high in intervals]
        assert chances[covers].sum() >= 0.95
    assert bootstrap_interval([0.5, 0, 1] * 4, proportion=True)[1] < 1  # no counts: the bootstrap
