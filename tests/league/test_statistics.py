"""Areas, intervals, ranks and conclusions of a league, each against numbers worked out another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from interp_ablate.league.conclusions import conclusions, losing_everywhere
from interp_ablate.league.journal import Record
from interp_ablate.league.page import page
from interp_ablate.league.results import COLUMNS, Records
from interp_ablate.league.statistics import (
    Sample,
    area_gained,
    half_width,
    mean_auc,
    mean_of,
    rank_ranges,
)
from interp_ablate.plots.league import league_figure, method_order
from interp_ablate.stats.intervals import Estimate


@pytest.mark.parametrize(
    ("kls", "rates", "limit", "area"),
    [
        ([0.1], [0.0], 0.1, -0.5),  # straight down from 1: half of it on the way
        ([0.05], [0.0], 0.1, -0.75),  # half of that, then flat
        ([0.2], [0.0], 0.1, -0.25),  # only the first half of the way is within the limit
        ([0.3, 0.05], [1.0, 0.5], 0.05, -0.25),  # points in any order
        ([0.05, 0.1], [1.0, 1.0], 0.1, 0.0),
    ],
)
def test_the_area_under_a_curve(
    kls: list[float], rates: list[float], limit: float, area: float
) -> None:
    assert area_gained(kls, rates, 1.0, limit) == pytest.approx(area)


def test_the_area_is_that_of_a_fine_sum() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        kls, rates = random.uniform(0.01, 0.3, 5), random.uniform(0, 1, 5)
        base, limit = random.uniform(0, 1), random.uniform(0.05, 0.4)
        order = np.argsort(kls)
        fine = (np.arange(200_000) + 0.5) / 200_000 * limit
        y = np.interp(fine, [0, *kls[order]], [base, *rates[order]])
        want = float((y - base).mean())
        assert area_gained(list(kls), list(rates), base, limit) == pytest.approx(want, abs=1e-5)


def samples(values: np.ndarray, behaviour: str = "b") -> list[Sample]:
    """A row a seed, a column a prompt; every seed has the same prompts."""
    return [
        Sample(behaviour, seed, f"{behaviour} {prompt}", float(value))
        for seed, row in enumerate(values)
        for prompt, value in enumerate(row)
    ]


def test_with_one_seed_the_interval_is_students() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, (1, 12))
    found = mean_of(samples(values), (-1.0, 1.0))
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values[0]))
    assert found.to_list() == pytest.approx([values.mean(), low, high])


def test_seeds_that_differ_make_the_interval_wide_and_seeds_that_agree_do_not() -> None:
    prompts = np.random.default_rng(2).normal(0.3, 0.1, 12)
    agree = mean_of(samples(np.stack([prompts] * 3)), (-1.0, 1.0))
    alone = mean_of(samples(prompts[None]), (-1.0, 1.0))
    assert agree.to_list() == pytest.approx(alone.to_list(), abs=1e-9)
    apart = mean_of(samples(np.stack([prompts - 0.3, prompts, prompts + 0.3])), (-1.0, 1.0))
    assert apart.high is not None and alone.high is not None
    assert apart.high - apart.value > 3 * (alone.high - alone.value)


def test_intervals_over_prompts_and_seeds_cover() -> None:
    """Rates with a part of the prompt and a part of the seed: 95% intervals hold the truth at least that often."""
    random, hits = np.random.default_rng(3), 0
    for _ in range(300):
        truth = random.normal(0, 0.1, (3, 1)) + random.normal(0, 0.3, 16) + 0.2
        found = mean_of(samples(truth + random.normal(0, 0.2, (3, 16))), (-9.0, 9.0))
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.2 <= found.high
    assert hits / 300 > 0.92


def test_behaviours_weigh_the_same_whatever_their_prompts() -> None:
    few, many = samples(np.full((1, 3), 0.9), "few"), samples(np.full((1, 30), 0.1), "many")
    assert mean_of(few + many, (0.0, 1.0)).value == pytest.approx(0.5)


def test_what_never_varies_has_the_interval_of_bounded_values() -> None:
    found = mean_of(samples(np.ones((3, 10))), (0.0, 1.0))
    low, _ = stats.binomtest(10, 10).proportion_ci()
    assert found.to_list() == pytest.approx([1.0, low, 1.0])
    assert half_width(lambda kept: 1.0, [list(range(5))]) is None


def test_the_auc_is_the_mean_of_seeds_and_its_interval_holds_chance() -> None:
    random = np.random.default_rng(4)

    def scored(gap: float) -> list[Sample]:
        return [
            Sample("b", seed, f"b {pair}", float(random.normal(gap * label, 1)), label)
            for seed in range(3)
            for pair in range(20)
            for label in (True, False)
        ]

    nothing, much = mean_auc(scored(0.0)), mean_auc(scored(1.5))
    assert nothing.low is not None and nothing.high is not None and much.low is not None
    assert nothing.low < 0.5 < nothing.high and much.low > 0.6
    perfect = mean_auc([Sample("b", 0, f"b {i % 8}", float(i < 8), i < 8) for i in range(16)])
    assert perfect.to_list() == pytest.approx([1.0, 0.025 ** (1 / 8), 1.0])


def test_ranks_are_decided_by_intervals_that_part_alone() -> None:
    ranks = rank_ranges(
        {
            "first": Estimate(0.9, 0.8, 1.0),
            "second": Estimate(0.5, 0.4, 0.6),
            "like the second": Estimate(0.45, 0.35, 0.55),
            "last": Estimate(0.1, 0.0, 0.2),
        }
    )
    assert ranks == {"first": (1, 1), "second": (2, 3), "like the second": (2, 3), "last": (4, 4)}


def results(**overall: Any) -> dict[str, Any]:
    """Results of made-up methods: name to (removal, induction), each an estimate or None."""
    methods = {}
    for name, (removal, induction) in overall.items():
        numbers: dict[str, Any] = dict.fromkeys(COLUMNS)
        numbers |= {"detection": [0.9, 0.8, 1.0], "removal": removal, "induction": induction}
        methods[name] = {
            "exactness": "weights",
            "source": "nowhere",
            "control": name == "noise",
            "failed": {"b": "it can't"} if removal is None else {},
            "ranks": {},
            "plans": [4, 1] if name == "half" else [4, 0],
            "failed_plans": {"b": ["too large"]} if name == "half" else {},
            "seconds": 1.0,
            "by_behaviour": {"b": numbers},
            "overall": numbers,
            "curves": {
                side: {"b": [[0.0, 1.0], [0.1, 0.5]] if part else None}
                for side, part in (("removal", removal), ("induction", induction))
            },
        }
    return {
        "model": "tiny",
        "command": "interp-ablate league --out runs/league",
        "n_sites": 5,
        "settings": {
            "seconds": 30.0, "n_train": 8, "n_validation": 4, "n_test": 4, "max_kl": 0.1,
            "max_kl_induction": 2.0, "max_new_tokens": 5,
        },
        "seeds": [0],
        "behaviours": {"b": {"rates": [0.8, 0.1], "failed": ""}},
        "shared_seconds": 3.0,
        "methods": methods,
    }  # fmt: skip


MADE_UP = results(
    good=([0.6, 0.5, 0.7], [0.5, 0.4, 0.6]),
    like_it=([0.55, 0.45, 0.65], None),
    worse=([0.2, 0.1, 0.3], [0.1, 0.0, 0.2]),
    half=([0.2, 0.1, 0.3], [0.5, 0.4, 0.6]),
    absent=(None, None),
    noise=([0.1, 0.0, 0.15], [0.0, -0.1, 0.1]),
)


def test_conclusions_are_drawn_only_where_intervals_part() -> None:
    found = {each.column: each for each in conclusions(MADE_UP)}
    removal = found["removal"]
    assert removal.best == "good" and removal.like_the_best == ("like_it",)
    assert set(removal.below_the_best) == {"worse", "half"}
    assert set(removal.like_a_control) == {"worse", "half"}  # 0.1 to 0.3 beside 0 to 0.15
    assert found["induction"].below_the_best == ("worse",)
    assert not found["detection"].below_the_best
    assert losing_everywhere(MADE_UP) == ["worse"]


def test_the_page_says_what_the_results_say() -> None:
    text = page(MADE_UP, figure="league.png")
    assert "The highest value is that of `good`. These can't be told from it: `like_it`." in text
    assert "Below the best in all that they do: `worse`." in text
    assert "`absent` has no numbers: it can't." in text and "One seed says nothing" in text
    assert "1 of 4" in text and "Plans of `half` failed: too large." in text
    assert "0.600 [0.500, 0.700]" in text and "*noise* (control)" in text
    assert text.index("| `good`") < text.index("| `worse`") < text.index("| *noise*")
    figure = league_figure(MADE_UP)
    assert len(figure.axes) == 6 and method_order(MADE_UP)[-1] == "noise"


def test_a_run_of_concepts_alone_says_what_it_does_not_judge() -> None:
    text = page(results(good=(None, None), noise=(None, None)), figure="league.png")
    assert "Removal and induction are not judged in this run" in text
    assert "Below the best in all" not in text and "| KL along answers" not in text


def test_records_of_other_prompts_or_seeds_are_not_counted() -> None:
    def fit(fingerprint: str, seed: str, failed: str = "") -> Record:
        return Record(("fit", "b", fingerprint, seed, "m"), {}, 1.0, failed)

    done = {
        record.key: record
        for record in (fit("new", "0"), fit("old", "0", "no"), fit("new", "7", "no"))
    }
    records = Records(done, {"b": "new"}, [0], {"removal": 0.1, "induction": 2.0})
    assert list(records.fits("m")) == [("b", 0)] and records.failures("m") == {}
