"""Intervals: one arithmetic for means, differences and rates."""

from __future__ import annotations

import numpy as np
import pytest

from interp_ablate.stats.intervals import (
    BOOTSTRAPPED,
    bootstrap_interval,
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
