"""Rules of choice by name, their properties, and the optimism of a choice by half-splits, on data whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from interp_ablate.errors import RunError
from interp_ablate.search.optimism import Judged, optimism
from interp_ablate.search.rules import RULES, RuleInput, rate_bound
from interp_ablate.search.selection import choose_plan
from interp_ablate.settings import DEFAULT_RULE, RULE_NAMES


def plans(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def chosen(frame: pd.DataFrame, rule: str, **by: Any) -> Any:
    return RULES[rule](frame, RuleInput(**by))


def test_every_rule_has_a_name_in_the_settings() -> None:
    assert tuple(RULES) == RULE_NAMES and DEFAULT_RULE in RULES
    with pytest.raises(RunError, match="did you mean knee"):
        choose_plan(plans(expression_rate=[0.0], kl=[0.0]), "kne")


def test_each_rule_by_hand() -> None:
    frame = plans(
        expression_rate=[0.0, 0.0, 2 / 32, 3 / 32, 0.5], kl=[0.09, 0.06, 0.02, 0.01, 0.001]
    )
    assert chosen(frame, "strongest", n=32) == 1
    assert chosen(frame, "cheapest", n=32) == 2  # 0 of 32 is at most 0.069 with 90%
    assert chosen(frame, "cheapest") == 1  # no number of prompts: equal rates only
    assert chosen(frame, "knee", unedited=0.72) == 3
    soft = frame.assign(unedited_answer_logprob=[-9.0, -1.0, -2.0, -3.0, -4.0])
    assert chosen(soft, "strongest", n=32) == 0
    wanted = plans(good=[0.9, 0.88, 0.2], kl=[0.05, 0.01, 0.0])
    for rule in ("cheapest", "knee"):
        assert chosen(wanted, rule, column="good", maximize=True, n=32, unedited=0.1) == 1
    assert chosen(wanted, "strongest", column="good", maximize=True, n=32) == 0


@pytest.mark.parametrize("hits, n", [(0, 32), (3, 32), (31, 32), (32, 32), (5, 9)])
def test_the_bound_against_the_binomial(hits: int, n: int) -> None:
    """At the bound, so few hits or fewer come up one time in ten."""
    bound = rate_bound(hits / n, n)
    assert bound == 1.0 if hits == n else binom.cdf(hits, n, bound) == pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_no_rule_takes_a_plan_that_another_beats(rule: str, seed: int) -> None:
    """Nothing chosen is beaten in effect and KL at once by more than half a prompt; order does not matter."""
    rng = np.random.default_rng(seed)
    frame = plans(
        expression_rate=list(rng.integers(0, 33, 60) / 32), kl=list(rng.exponential(0.02, 60))
    )
    by = RuleInput(n=32, unedited=0.8)
    i = RULES[rule](frame, by)
    rate, kl = frame["expression_rate"][i], frame["kl"][i]
    better = (frame["expression_rate"] < rate - 0.5 / 32) & (frame["kl"] < kl)
    assert not better.any()
    assert RULES[rule](frame.sample(frac=1, random_state=seed), by) == i


def drawn(rates: np.ndarray, kls: np.ndarray, n: int, rng: np.random.Generator) -> list[Any]:
    return [
        {"expression_rate": (rng.random(n) < rate).astype(float).tolist(),
         "kl": (kl * rng.lognormal(-0.125, 0.5, n)).tolist()}
        for rate, kl in zip(rates, kls)
    ]  # fmt: skip


def judged(rule: str = "strongest", **by: Any) -> Judged:
    return Judged(rule, RuleInput(**by), 1.0, {})


def test_the_optimism_of_equal_plans_is_what_the_binomial_says() -> None:
    """200 plans of the same true rate: the best of them on a half is far below it, on the other half at it."""
    rng = np.random.default_rng(0)
    found = optimism(drawn(np.full(200, 0.3), np.full(200, 0.01), 32, rng), judged(), seed=1)
    assert found is not None and found["plans"] == 200 and found["splits"] == 200
    # the least of 200 draws of Binomial(16, 0.3) / 16, by its distribution
    below = 1 - binom.cdf(np.arange(17), 16, 0.3)
    least = float((below**200).sum()) / 16
    assert found["chosen_half"] == pytest.approx(least, abs=0.04)
    assert found["other_half"] == pytest.approx(0.3, abs=0.08)
    assert found["optimism"] == pytest.approx(found["other_half"] - found["chosen_half"])


def test_one_plan_has_no_optimism_and_a_large_effect_is_its_mirror() -> None:
    rng = np.random.default_rng(1)
    one = optimism(drawn(np.array([0.3]), np.array([0.01]), 32, rng), judged())
    assert one is not None and one["optimism"] == pytest.approx(0, abs=1e-12)
    many = drawn(np.full(50, 0.7), np.full(50, 0.01), 32, rng)
    found = optimism(many, judged(maximize=True))
    mirror = [
        {**plan, "expression_rate": [1 - x for x in plan["expression_rate"]]} for plan in many
    ]
    other = optimism(mirror, judged())
    assert found is not None and other is not None
    assert found["optimism"] == pytest.approx(other["optimism"]) and found["optimism"] > 0.1


def test_limits_hold_on_the_half_that_chooses() -> None:
    rng = np.random.default_rng(2)
    some = drawn(np.array([0.0, 0.5]), np.array([5.0, 0.01]), 16, rng)
    found = optimism(some, judged())
    assert found is not None and found["chosen_half"] > 0.2 and found["kl_over_limit"] == 0
    assert optimism(some[:1], judged()) is None  # nothing ever passes
    assert optimism(drawn(np.array([0.1]), np.array([0.1]), 7, rng), judged()) is None
    assert optimism([], judged()) is None
    loops = [{**plan, "positive_repetition": [0.9] * 16} for plan in some]
    assert (
        optimism(loops, Judged("strongest", RuleInput(), 1.0, {"positive_repetition": 0.1})) is None
    )


def test_no_name_of_an_objective_changes_the_optimism() -> None:
    """Names that the tables once used for themselves are an objective's like any other."""
    rng = np.random.default_rng(5)
    plans = drawn(np.linspace(0, 0.9, 12), np.linspace(0.02, 0.2, 12), 32, rng)
    found = []
    for name in ("polite", "strength", "_left", "soft"):
        own = [{name: plan["expression_rate"], "kl": plan["kl"]} for plan in plans]
        told = optimism(own, Judged("strongest", RuleInput(name, True, 32), 1.0, {}))
        assert told is not None and told.pop("column") == name
        found.append(told)
    assert found[1:] == found[:1] * 3
