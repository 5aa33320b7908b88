"""Intervals: one arithmetic for means, differences, rates and areas under the curve; how often each covers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import beta, binom

from interp_ablate.errors import RunError
from interp_ablate.stats.intervals import (
    AT_LEAST_0,
    BOOTSTRAPPED,
    SCORE,
    SHARE,
    UNBOUNDED,
    Bounds,
    auc,
    auc_interval,
    clopper_pearson,
    difference_estimate,
    mean_estimate,
    mean_interval,
    mean_with_interval,
    paired_difference,
    rate,
    upper_bound,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]
SIMULATIONS = 150

# name -> a sample of n values, their true mean, what they can be, how often at least an interval covers at 8 and 32
MEANS: dict[str, tuple[Draw, float, Bounds, float, float]] = {
    "normal": (lambda g, n: g.normal(1, 2, n), 1.0, UNBOUNDED, 0.91, 0.91),
    "exponential": (lambda g, n: g.exponential(1, n), 1.0, AT_LEAST_0, 0.88, 0.91),
    "log-normal": (lambda g, n: g.lognormal(0, 1, n), math.exp(0.5), AT_LEAST_0, 0.84, 0.89),
    "share": (lambda g, n: g.beta(0.5, 2, n), 0.2, SHARE, 0.91, 0.91),
    "rarely repeated": (
        lambda g, n: g.random(n) * (g.random(n) < 0.1), 0.05, SHARE, 0.95, 0.94),
    "score": (lambda g, n: 100 * (g.random(n) < 0.1), 10.0, SCORE, 0.95, 0.95),
    "change of a rate": (
        lambda g, n: g.choice([-1, 0, 1], n, p=[0.15, 0.82, 0.03]), -0.12, (-1, 1), 0.91, 0.91),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANS)
def test_intervals_of_means_cover(name: str) -> None:
    """Percentiles of the bootstrap cover 71% to 88% of skewed or rare values at n = 8."""
    draw, truth, bounds, few, many = MEANS[name]
    for n, least in ((8, few), (32, many)):
        generator, covered = np.random.default_rng(n), 0
        for _ in range(SIMULATIONS):
            interval = mean_interval(draw(generator, n), bounds=bounds)
            low, high = interval or (-math.inf, math.inf)
            covered += low <= truth <= high
        assert covered >= least * SIMULATIONS, (name, n, covered / SIMULATIONS)


# name -> KLs, their mean, how often at least the bound covers at 8, 16, 32 and 64 prompts
KLS: dict[str, tuple[Draw, float, tuple[float, ...]]] = {
    "normal": (lambda g, n: g.normal(5, 1, n), 5.0, (0.95, 0.97, 0.98, 0.98)),
    "exponential": (lambda g, n: g.exponential(1, n), 1.0, (0.9, 0.93, 0.95, 0.95)),
    "gamma of shape 0.5": (lambda g, n: g.gamma(0.5, 1, n), 0.5, (0.85, 0.9, 0.93, 0.95)),
    "log-normal, sigma 1": (lambda g, n: g.lognormal(0, 1, n), math.exp(0.5), (0.83, 0.88, 0.9, 0.93)),
    "log-normal, sigma 1.5": (lambda g, n: g.lognormal(0, 1.5, n), math.exp(1.125), (0.7, 0.78, 0.8, 0.84)),
}  # fmt: skip


@pytest.mark.parametrize("name", KLS)
def test_the_upper_bound_of_a_kl_covers(name: str) -> None:
    """The bootstrap's 90% percentile covers 60% to 85% of the skewed ones."""
    draw, truth, least = KLS[name]
    for n, share in zip((8, 16, 32, 64), least, strict=True):
        generator = np.random.default_rng(n)
        covered = sum((upper_bound(draw(generator, n)) or 0) >= truth for _ in range(1000))
        assert covered >= share * 1000, (name, n, covered / 1000)


def test_the_bound_is_three_standard_errors_above_and_needs_a_spread() -> None:
    values = np.random.default_rng(0).exponential(size=32)
    error = values.std(ddof=1) / math.sqrt(32)
    assert upper_bound(values) == pytest.approx(values.mean() + 3 * error)
    assert upper_bound([0.2]) is None and upper_bound([0.0] * 32) is None


def test_few_or_equal_values_have_the_bound_of_what_they_can_be_or_none() -> None:
    """With n values alike, others differ in at most the share p with (1 - p)^n = 2.5%."""
    for n in (1, 2, 4, 9):
        share = 1 - 0.025 ** (1 / n)
        assert (
            mean_interval([0.3] * n) is None and mean_interval([0.3] * n, bounds=AT_LEAST_0) is None
        )
        low, high = mean_interval([0.3] * n, bounds=SHARE) or (0, 0)
        assert (low, high) == pytest.approx((0.3 - share * 0.3, 0.3 + share * 0.7))
    assert mean_interval([0.0] * 9, bounds=AT_LEAST_0) is None  # a KL of zero, not 0 of 9
    assert mean_interval([1.0, 2.0, 4.0]) is None
    low, high = mean_interval([20.0, 30.0, 50.0], bounds=SCORE) or (0, 0)
    assert 0 < low < 20 and 50 < high < 100
    rounding = [0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert mean_interval(rounding) is None
    assert (
        mean_interval([0.0] * 31 + [0.4]) is None
    )  # one of 32 says nothing of how large others are
    assert mean_interval([0.0] * 31 + [0.4], bounds=SHARE) is not None


@pytest.mark.parametrize("n", [1, 2, 8, 32, 100])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_none_and_all_have_the_exact_bound(n: int, level: float) -> None:
    """Clopper-Pearson at its ends: what share would still give 0 of n with the tail's probability."""
    tail = (1 - level) / 2
    low, high = mean_interval([0] * n, level=level, bounds=SHARE) or (1, 1)
    assert low == 0.0 and high == pytest.approx(beta.ppf(1 - tail, 1, n))
    assert (1 - high) ** n == pytest.approx(tail)
    low, high = mean_interval(np.ones(n), level=level, bounds=SHARE) or (0, 0)
    assert high == 1.0 and low == pytest.approx(beta.ppf(tail, n, 1))


def test_intervals_of_rates_cover() -> None:
    """At every rate, and 1 of 32 reaches higher than 0 of 32 (the bootstrap: 0.094 and 0.109; it covers 86%)."""
    n = 32
    intervals = [
        mean_interval([1] * k + [0] * (n - k), bounds=SHARE) or (1, 0) for k in range(n + 1)
    ]
    assert intervals[0] == pytest.approx((0.0, 0.1089), abs=1e-4)
    assert intervals[1] == pytest.approx((0.0008, 0.1622), abs=1e-4)
    for k, interval in enumerate(intervals):
        assert interval == clopper_pearson(k, n)
        assert interval == tuple(rate(k, n)[end] for end in ("low", "high"))
        hundredfold = mean_interval([100] * k + [0] * (n - k), bounds=SCORE)
        assert hundredfold == pytest.approx([100 * end for end in interval])
    for truth in np.linspace(0.01, 0.99, 50):
        chances = binom.pmf(np.arange(n + 1), n, truth)
        covers = [low <= truth <= high for low, high in intervals]
        assert chances[covers].sum() >= 0.95


def test_no_change_of_a_rate_is_no_certainty() -> None:
    found = difference_estimate([1.0] * 20, [1.0] * 20, bounds=SHARE)
    assert found.value == 0 and found.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert found.low == -found.high
    gone = difference_estimate([1.0] * 20, [0.0] * 20, bounds=SHARE)
    assert gone.value == gone.low == -1 and gone.high == pytest.approx(1 - 2 * 0.025 ** (1 / 20))


@pytest.mark.parametrize("seed", range(5))
def test_intervals_hold_the_mean_and_scale_with_the_values(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=40)
    low, high = mean_interval(values) or (0, 0)
    assert values.min() <= low < values.mean() < high <= values.max()
    wider = mean_interval(values, level=0.99) or (0, 0)
    assert wider[0] <= low and high <= wider[1]
    assert mean_interval(values) == (low, high)  # seeded
    assert mean_interval(values, seed=1) != (low, high)
    assert mean_interval(10 * values + 3) == pytest.approx((10 * low + 3, 10 * high + 3))


def test_many_values_have_the_normal_interval_and_it_is_the_bootstraps() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, BOOTSTRAPPED + 1)
    few, many = mean_interval(values[:-1]), mean_interval(values)
    half = 1.959964 * values.std(ddof=1) / np.sqrt(len(values))
    assert many == pytest.approx((values.mean() - half, values.mean() + half))
    assert few == pytest.approx(many, abs=0.006)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan], [math.inf, 0]])
def test_no_interval_without_numbers(values: list[float]) -> None:
    with pytest.raises(RunError, match="finite"):
        mean_interval(values)


def test_the_summaries_agree() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    estimate = mean_estimate(values, bounds=SHARE)
    summary = mean_with_interval([*values, None], bounds=SHARE)
    assert summary == {"mean": estimate.value, "interval": [estimate.low, estimate.high], "n": 6, "no_value": 1}  # fmt: skip
    difference = paired_difference([*values, None], [0.0] * 7, bounds=SHARE)
    assert difference["mean"] == estimate.value and difference["interval"][1] <= 1
    assert (
        mean_estimate(values[:4]).low is None and mean_with_interval(values[:4])["interval"] is None
    )
    assert mean_with_interval([None]) == {"mean": None, "interval": None, "n": 0, "no_value": 1}


# ---- the area under the ROC curve ----------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_intervals_of_an_auc_cover(distance: float) -> None:
    """Of samples in pairs that go together; the percentile bootstrap covers 88% near an AUC of 0.9."""
    n, truth = 12, 0.5 * math.erfc(-distance / 2)
    generator, covered = np.random.default_rng(0), 0
    labels, groups = np.repeat([True, False], n), list(range(n)) * 2
    for _ in range(SIMULATIONS):
        shared = generator.normal(size=n)
        sides = [math.sqrt(0.5) * (shared + generator.normal(size=n)) for _ in range(2)]
        low, high = auc_interval(np.append(sides[0] + distance, sides[1]), labels, groups=groups)
        covered += low <= truth <= high
    assert covered >= 0.93 * SIMULATIONS


def test_an_auc_of_one_kind_of_group_or_of_perfect_order_has_a_bound() -> None:
    random = np.random.default_rng(1)
    labels = np.tile([True, False], 40)
    scores = random.normal(size=80) + 1.2 * labels
    low, high = auc_interval(scores, labels, groups=np.repeat(np.arange(40), 2).tolist())
    assert low < auc(scores, labels) < high and auc_interval(scores, labels) != (low, high)
    order = [False, False, True, True]
    assert auc_interval([1.0, 2, 3, 4], order) == (pytest.approx(0.025**0.5), 1.0)
    assert auc_interval([3.0, 4, 1, 2], order) == (0.0, pytest.approx(1 - 0.025**0.5))
    assert auc_interval([1.0, 1, 1, 1], order) == (0.0, 1.0)  # nothing moves it: no interval
    assert auc_interval([1.0, 2, 3, 1.5], [False, False, False, True]) == (0.0, 1.0)
