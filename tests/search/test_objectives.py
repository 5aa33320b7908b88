"""Objectives: the grammar and its errors, conditions, own scorers' numbers, the front in two directions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_ablate.errors import RunError
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.scoring.behaviour import ScoredBehaviour
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.search.objective_scores import ObjectiveScores, PromptScores, false_hits
from interp_ablate.search.objectives import (
    Objective,
    leading,
    meets,
    parse_conditions,
    parse_objective,
    parse_objectives,
)
from interp_ablate.search.selection import pareto_front, spread_out
from interp_ablate.search.trials import Trial


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("kl", Objective("kl", "kl")),
        ("kl<=0.02", Objective("kl", "kl", limit=0.02)),
        ("max:expressions>=0.5", Objective("expressions", "expressions", True, limit=0.5)),
        ("expressions:declining", Objective("expressions", "expressions:declining")),
        (
            "polite=max:judge:gpt@http://localhost:8000/v1?weighted=true>=.7",
            Objective(
                "polite", "judge:gpt@http://localhost:8000/v1?weighted=true", True, limit=0.7
            ),
        ),
        ("negative:lexicon:-length", Objective("lexicon", "lexicon:-length", side="negative")),
        ("own/score.py:vowels <= 1e-2", Objective("vowels", "own/score.py:vowels", limit=0.01)),
        ("max:own/score.py:-vowels", Objective("vowels", "own/score.py:-vowels", True)),
        ("expressions:a?languages=all", Objective("expressions", "expressions:a?languages=all")),
    ],
)
def test_the_grammar(text: str, wanted: Objective) -> None:
    found = parse_objective(text)
    assert found == wanted
    assert parse_objective(found.text) == found


@pytest.mark.parametrize(
    "texts, said",
    [
        (("kll",), "did you mean kl"),
        (("repitition",), "there are expressions, false_hits, kl, repetition"),
        (("max:kl",), "only made small"),
        (("kl>=0.1",), "its limit is <="),
        (("max:expressions<=0.1",), "whose limit is >="),
        (("kl<=much",), "not a number"),
        (("kl<=",), "not a number"),
        (("negative:expressions",), "false_hits"),
        (("kl", "kl<=0.1"), "give each"),
        (("a=kl", "kl"), "are the same"),
        (("judge:m@x", "judge:n@x"), "names of their own"),
        (("kl=lexicon:length",), "NAME=SPEC"),
        (("",), "cannot read"),
    ],
)
def test_bad_objectives_say_what_there_is(texts: tuple[str, ...], said: str) -> None:
    with pytest.raises(RunError, match=said):
        parse_objectives(texts)
    with pytest.raises(RunError, match=said):
        SearchSettings(objective=texts)


def test_conditions_are_of_the_searchs_objectives() -> None:
    objectives = parse_objectives(("expressions", "kl", "tidy=max:lexicon:length"))
    conditions = parse_conditions("expressions<=0.03, kl<=0.01,tidy>=0.5", objectives)
    good = {"expression_rate": 0.03, "kl": 0.01, "tidy": 0.5}
    assert meets(conditions, good)
    for name, value in (("expression_rate", 0.031), ("kl", 0.02), ("tidy", 0.4)):
        assert not meets(conditions, good | {name: value})
    assert not meets(conditions, {"expression_rate": 0.0, "kl": 0.0})
    for text, said in (
        ("repetition<=0.1", "it has expressions, kl, tidy"),
        ("exprssions<=0.1", "did you mean expressions"),
        ("tidy<=0.5", "whose limit is >="),
        ("kl<0.1", "cannot read"),
        ("kl", "cannot read"),
        ("kl<=0.1,", "cannot read"),
    ):
        with pytest.raises(RunError, match=said):
            parse_conditions(text, objectives)
    with pytest.raises(RunError, match="no objective 'x'"):
        SearchSettings(stop_at="x<=1")
    with pytest.raises(RunError, match="no objective of that name"):
        SearchSettings(objective_rubric=("x=is it good?",))
    judged = ("kl", "q=judge:m@http://127.0.0.1:1/v1")
    settings = SearchSettings(objective=judged, objective_rubric=("q=a = b\nc",))
    assert settings.rubrics == {"q": "a = b\nc"}
    with pytest.raises(RunError, match="no judge"):
        SearchSettings(objective_rubric=("=d e = f",))


def test_the_leading_objective_is_no_damage() -> None:
    assert leading(parse_objectives(("kl", "repetition", "max:lexicon:length"))).name == "lexicon"
    assert leading(parse_objectives(("kl", "repetition"))).name == "kl"
    assert leading(parse_objectives(())).column == "expression_rate"


class Outputs(SimpleNamespace):
    """Outputs whose answers are given."""

    @classmethod
    def of(cls, *texts: str) -> Any:
        exchanges = [PromptResponse("?", text) for text in texts]  # type: ignore[arg-type]
        return cls(texts=list(texts), exchanges=exchanges)


class Length:
    """100 for one letter, None for an answer of two."""

    name, identity = "length", {"kind": "length"}

    def __call__(self, exchanges: Any) -> list[float | None]:
        return [None if len(e.answer) == 2 else 100.0 / len(e.answer) for e in exchanges]


def test_an_answer_without_a_verdict_counts_as_the_worst() -> None:
    objectives = parse_objectives(("a=x:y", "b=max:x:y", "c=negative:x:y", "kl"))
    scorers = {name: ScoredBehaviour(Length()) for name in "abc"}  # type: ignore[arg-type]
    scores = ObjectiveScores(objectives, scorers)
    positive, negative = Outputs.of("x", "xx", "xxxx"), Outputs.of("xxxxx")
    values = scores.values(None, (positive, negative), (positive, negative))  # type: ignore[arg-type]
    assert values == {"a": [1.0, 1.0, 0.25], "b": [1.0, 0.0, 0.25], "c": [0.2]}
    assert scores.reads_negative and not ObjectiveScores().reads_negative
    assert ObjectiveScores().own == ()


def test_false_hits_are_those_that_the_edit_brought() -> None:
    def behaviour(on: Any, unedited: Any) -> torch.Tensor:
        return torch.tensor([float(text == "no") for text in on.texts])

    before, after = Outputs.of("no", "no", "yes", "yes"), Outputs.of("no", "yes", "no", "yes")
    assert false_hits(behaviour, after, before) == [0.0, 0.0, 1.0, 0.0]  # type: ignore[arg-type]


def test_the_behaviours_own_scorer_is_not_scored_twice() -> None:
    own = ScoredBehaviour(Length())  # type: ignore[arg-type]
    objectives = parse_objectives(("x:y", "n=negative:x:y", "kl"))
    scores = ObjectiveScores.of(objectives, {"x": own, "n": own}, own)
    assert scores.objectives[0].column == "expression_rate" and [o.name for o in scores.own] == [
        "n"
    ]


def test_the_numbers_behind_a_score_are_kept_by_prompt() -> None:
    scores = PromptScores({"kl": 0.5}, {"kl": [0.12345678, 1.0]})
    trial = Trial({}).scored(scores, 1.0)
    assert trial.by_prompt == {"kl": [0.123457, 1.0]} and trial.scores == {"kl": 0.5}


def test_the_front_in_two_directions_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 6, (60, 3)).astype(float), columns=["kl", "good", "rep"])
    objectives = (
        Objective("kl", "kl"),
        Objective("good", "x:y", maximize=True),
        Objective("rep", "x:z"),
    )
    kept = []
    for i, a in frame.iterrows():
        beaten = False
        for _, b in frame.iterrows():
            as_good = b.kl <= a.kl and b.good >= a.good and b.rep <= a.rep
            beaten |= bool(as_good and (b.kl < a.kl or b.good > a.good or b.rep < a.rep))
        if not beaten:
            kept.append(i)
    front = pareto_front(frame, objectives=objectives)
    assert sorted(front.index) == kept
    few = spread_out(front, objectives, 4)
    assert len(few) == 4 and set(few.index) <= set(front.index)
    assert few["kl"].min() == front["kl"].min() and spread_out(front, objectives, 99) is front
