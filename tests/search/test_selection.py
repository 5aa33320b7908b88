"""Selection: the published choices, the limits and what they removed, the front."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from interp_ablate.errors import RunError
from interp_ablate.search.objectives import parse_objectives
from interp_ablate.search.rules import RuleInput
from interp_ablate.search.selection import arditi, choose_plan, pareto_front

PUBLISHED = Path(__file__).parents[1] / "data" / "arditi"
N_LAYERS = {"gemma-2b-it": 18, "qwen-1_8b-chat": 24, "meta-llama-3-8b-instruct": 32}
SEEDS = range(5)


def published(model: str, name: str) -> Any:
    return json.loads((PUBLISHED / model / f"{name}.json").read_text())


def table(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame(columns)


# --------------------------------------------------------------------------------- the published rule


@pytest.mark.parametrize(("model", "n_layers"), N_LAYERS.items())
def test_the_published_choice(model: str, n_layers: int) -> None:
    rows = published(model, "direction_evaluations")
    kept = published(model, "direction_evaluations_filtered")
    chosen = published(model, "direction_metadata")
    choice = arditi(pd.DataFrame(rows), n_layers=n_layers)
    assert choice.row is not None
    assert (choice.row["position"], choice.row["layer"]) == (chosen["pos"], chosen["layer"])
    assert choice.considered == len(rows)
    assert choice.kept == len(kept) == len(rows) - sum(choice.removed.values())
    # the published filtered file is sorted: its first entry is the choice, number for number
    assert choice.row["target_log_odds"] == kept[0]["refusal_score"]
    assert choice.row["kl"] == kept[0]["kl_div_score"]
    assert choice.row["addition"] == kept[0]["steering_score"]
    json.dumps(choice.row, allow_nan=False)
    json.dumps(choice.limits(), allow_nan=False)


@pytest.mark.parametrize(("model", "n_layers"), N_LAYERS.items())
@pytest.mark.parametrize("seed", SEEDS)
def test_the_choice_depends_on_neither_order_nor_names(
    model: str, n_layers: int, seed: int
) -> None:
    frame = pd.DataFrame(published(model, "direction_evaluations"))
    expected = arditi(frame, n_layers=n_layers)
    renamed = frame.rename(
        columns={
            "refusal_score": "target_log_odds",
            "steering_score": "addition",
            "kl_div_score": "kl",
        }
    )
    found = arditi(renamed.sample(frac=1, random_state=seed), n_layers=n_layers)
    assert found == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rule_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "layer": rng.integers(0, 20, 80),
            "target_log_odds": rng.normal(size=80),
            "addition": rng.normal(size=80),
            "kl": rng.exponential(0.1, 80),
        }
    )
    frame.loc[rng.random(80) < 0.1, "target_log_odds"] = np.nan
    frame.loc[rng.random(80) < 0.1, "kl"] = np.inf
    best = None
    passed = 0
    for row in frame.itertuples():
        scores = (row.target_log_odds, row.addition, row.kl)
        if not all(math.isfinite(value) for value in scores):
            continue
        if row.layer >= 16 or row.kl > 0.1 or row.addition < 0:
            continue
        passed += 1
        if best is None or row.target_log_odds < best.target_log_odds:
            best = row
    choice = arditi(frame, n_layers=20)
    assert choice.kept == passed and best is not None and choice.row is not None
    assert (
        choice.row["target_log_odds"] == best.target_log_odds and choice.row["layer"] == best.layer
    )


def test_the_choice_keeps_integers() -> None:
    frame = pd.DataFrame(published("gemma-2b-it", "direction_evaluations"))
    choice = arditi(frame, n_layers=18)
    assert choice.row is not None and json.dumps(choice.row["layer"]) == "10"
    assert isinstance(choice.row["position"], int)


def test_limits_are_counted_in_order_and_their_edges_are_inside() -> None:
    frame = table(
        layer=[7, 8, 7, 7, 7, 9],
        target_log_odds=[1.0, -9, -9, -9, -9, math.nan],
        addition=[0.0, 1, -1e-9, 1, 1, 1],
        kl=[0.1, 0, 0, 0.1 + 1e-9, math.nan, 5],
    )
    choice = arditi(frame, n_layers=10)
    assert choice.row is not None and choice.row["target_log_odds"] == 1.0
    assert list(choice.removed.values()) == [2, 1, 1, 1]
    assert list(choice.removed) == ["not finite", "layer >= 8", "kl > 0.1", "addition < 0"]
    other = arditi(frame, n_layers=10, prune_layers=0.0, max_kl=1.0, min_addition=-1.0)
    assert other.row is not None and other.row["target_log_odds"] == -9 and other.kept == 4


@pytest.mark.parametrize("column", ["target_log_odds", "addition", "kl"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_never_chosen(column: str, bad: float) -> None:
    frame = table(layer=[1, 2], target_log_odds=[-5.0, 5], addition=[1.0, 1], kl=[0.0, 0.0])
    frame.loc[0, column] = bad
    choice = arditi(frame, n_layers=10)
    assert choice.row is not None and choice.row["layer"] == 2
    frame.loc[1, column] = bad
    assert arditi(frame, n_layers=10).row is None


def test_no_candidate_says_what_removed_them_and_what_to_relax() -> None:
    frame = table(
        layer=[1, 1, 1, 9],
        target_log_odds=[1.0, 2, 3, 4],
        addition=[1.0, 1, -1, 1],
        kl=[5.0, 6, 0, 0],
    )
    choice = arditi(frame, n_layers=10)
    assert choice.row is None and choice.kept == 0 and choice.considered == 4
    assert choice.removed == {"not finite": 0, "layer >= 8": 1, "kl > 0.1": 2, "addition < 0": 1}
    assert "kl > 0.1" in choice.relax and "2 candidates" in choice.relax
    assert choice.limits()["relax"] == choice.relax
    hopeless = table(layer=[9], target_log_odds=[1.0], addition=[-1.0], kl=[5.0])
    assert "several" in arditi(hopeless, n_layers=10).relax


def test_input_that_cannot_be_selected_from() -> None:
    frame = table(layer=[1], target_log_odds=[1.0], addition=[1.0], kl=[0.0])
    for missing in frame:
        with pytest.raises(RunError, match=f"no column {missing}.*refusal_score"):
            arditi(frame.drop(columns=missing), n_layers=10)
    with pytest.raises(RunError, match="no rows"):
        arditi(frame.iloc[:0], n_layers=10)
    with pytest.raises(RunError):
        arditi(pd.DataFrame(), n_layers=10)
    with pytest.raises(RunError, match="at least 1"):
        arditi(frame, n_layers=0)
    text = frame.astype(object).assign(kl="0.05")
    choice = arditi(text, n_layers=10)
    assert choice.row is not None and choice.row["kl"] == 0.05
    assert arditi(frame.assign(kl="much"), n_layers=10).removed["not finite"] == 1


def test_a_table_that_has_both_names_is_refused_or_read() -> None:
    frame = pd.DataFrame(published("gemma-2b-it", "direction_evaluations"))
    try:
        arditi(frame.assign(target_log_odds=frame["refusal_score"]), n_layers=18)
    except RunError as error:
        assert "target_log_odds" in str(error)


def test_columns_of_both_names_keep_their_own_values() -> None:
    frame = table(
        layer=[0, 0], target_log_odds=[1.0, 2.0], refusal_score=[9.0, 8.0], addition=[1.0] * 2
    )
    row = arditi(frame.assign(kl_div_score=0.0), n_layers=4).row  # the package's own name decides
    assert row is not None and (row["target_log_odds"], row["refusal_score"], row["kl"]) == (
        1.0,
        9.0,
        0,
    )


# --------------------------------------------------------------------------------- within a budget


def test_constrained_takes_the_least_behaviour_within_the_budget() -> None:
    frame = table(expression_rate=[0.0, 0.1, 0.3, math.nan], kl=[0.2, 0.09, 0.01, 0.0])
    choice = choose_plan(frame)
    assert choice.row is not None and choice.row["expression_rate"] == 0.1
    assert choice.kept == 2 and list(choice.removed.values()) == [1, 1]
    assert set(choice.row) == set(frame)  # nothing of the rule's own is left in the row
    loose = choose_plan(frame, max_kl=1.0)
    assert loose.row is not None and loose.row["expression_rate"] == 0.0


def test_constrained_holds_the_upper_bound_against_the_budget() -> None:
    frame = table(expression_rate=[0.0, 0.5], kl=[0.05, 0.05], kl_high=[0.11, 0.1])
    choice = choose_plan(frame)
    assert choice.row is not None and choice.row["expression_rate"] == 0.5
    frame["kl_high"] = [math.nan, math.nan]  # a bound that is unknown is not within the budget
    assert choose_plan(frame).row is None


def with_soft_score(frame: pd.DataFrame, values: list[float]) -> pd.DataFrame:
    return frame.assign(unedited_answer_logprob=values)


def test_constrained_breaks_ties_by_the_soft_score_then_kl() -> None:
    frame = table(expression_rate=[0.0, 0.03, 0.03, 0.2], kl=[0.01, 0.05, 0.02, 0.0])
    frame = with_soft_score(frame, [-1.0, -5, -5, -99])
    strict, tolerant = (
        choose_plan(frame),
        choose_plan(frame, by=RuleInput(n=10)),
    )
    assert strict.row is not None and strict.row["expression_rate"] == 0.0
    assert tolerant.row is not None and tolerant.row["kl"] == 0.02
    assert tolerant.row["expression_rate"] == 0.03
    by_kl = choose_plan(frame, by=RuleInput("kl"))
    assert by_kl.row is not None and by_kl.row["kl"] == 0.0


def test_constrained_limits_repetition_and_says_what_to_relax() -> None:
    frame = table(expression_rate=[0.0, 0.5], kl=[0.05, 5.0], repetition=[0.6, 0.1])
    choice = choose_plan(frame, at_most={"repetition": 0.3})
    assert choice.row is None and choice.considered == 2
    assert [*choice.removed.values()] == [0, 1, 1]
    assert any("repetition > 0.3" in name for name in choice.removed)
    assert "1 candidates" in choice.relax
    found = choose_plan(frame)
    assert found.row is not None and found.row["repetition"] == 0.6
    with pytest.raises(RunError, match="no column expression_rate"):
        choose_plan(frame.drop(columns="expression_rate"))


@pytest.mark.parametrize("seed", SEEDS)
def test_constrained_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frame = table(
        expression_rate=list(rng.integers(0, 9, 60) / 8), kl=list(rng.exponential(0.1, 60))
    )
    frame = with_soft_score(frame, list(rng.integers(-3, 3, 60) * 1.0))
    passing = [row for row in frame.to_dict("records") if row["kl"] <= 0.1]
    least = min(row["expression_rate"] for row in passing)
    near = [row for row in passing if row["expression_rate"] <= least + 0.25]
    expected = min(near, key=lambda row: (row["unedited_answer_logprob"], row["kl"]))
    choice = choose_plan(frame, by=RuleInput(n=2))
    assert choice.row == expected and choice.kept == len(passing)


# --------------------------------------------------------------------------------- the Pareto front


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "objectives", [("target_log_odds", "kl"), ("target_log_odds", "kl", "repetition")]
)
def test_pareto_front_against_brute_force(seed: int, objectives: tuple[str, ...]) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 8, (50, 3)).astype(float)  # many ties
    values[rng.random((50, 3)) < 0.05] = np.nan
    values[rng.random((50, 3)) < 0.05] = -np.inf  # as low as can be, and no result either
    frame = pd.DataFrame(values, columns=["target_log_odds", "kl", "repetition"])
    rows = frame[list(objectives)].to_numpy()
    finite = [i for i in range(50) if np.isfinite(rows[i]).all()]
    expected = {
        i
        for i in finite
        if not any((rows[j] <= rows[i]).all() and (rows[j] < rows[i]).any() for j in finite)
    }
    front = pareto_front(frame, objectives=objectives)
    assert set(front.index) == expected
    found = front[list(objectives)].apply(tuple, axis=1).tolist()
    assert found == sorted(found)
    if len(objectives) == 2:  # along the front, less of one costs more of the other
        assert front["kl"].is_monotonic_decreasing


def test_pareto_front_of_little() -> None:
    one = table(target_log_odds=[3.0], kl=[1.0])
    assert pareto_front(one).equals(one)
    assert (
        len(pareto_front(table(target_log_odds=[1.0, 1], kl=[2.0, 2]))) == 2
    )  # equals do not beat
    assert pareto_front(table(target_log_odds=[math.nan], kl=[1.0])).empty
    with pytest.raises(RunError, match="no column kl"):
        pareto_front(one.drop(columns="kl"))


def test_two_limits_that_read_the_same_both_hold() -> None:
    """An objective named repetition is of positive prompts; the limit of `at_most` is of all answers."""
    frame = table(
        expression_rate=[0.0, 0.3], kl=[0.01, 0.01], repetition=[0.4, 0.0], positive_repetition=[0.0, 0.0]
    )  # fmt: skip
    limits = [each for each in parse_objectives(("kl", "repetition<=0")) if each.limit is not None]
    choice = choose_plan(frame, "strongest", at_most={"repetition": 0.0}, limits=limits)
    assert choice.row is not None and choice.row["repetition"] == 0.0 and choice.kept == 1
