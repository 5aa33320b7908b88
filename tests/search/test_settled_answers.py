"""Answers that end once the behaviour is found in them: the same scores as of whole answers, from fewer tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tiny import make, rows_of, shared, unit

from interp_ablate.activations.collection import collect
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import TargetLogOdds
from interp_ablate.models.load import load_model
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.behaviour import Behaviour, settles
from interp_ablate.scoring.expression_lists import Expression
from interp_ablate.scoring.expressions import ExpressionScorer, expression_scorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.objective_scores import ObjectiveScores, PromptScores
from interp_ablate.search.objectives import parse_objectives
from interp_ablate.sites import Site

FOUND = ("expressions", "kl", "false_hits")
PIECES = (
    "I can't", "I cannot", "i\u2019m sorry", "sorry", " but", " not", " never", ".", ". ", "! ", "\n", " ", "  ", "e.g. ",
    "caf", "e", "\u0301", "\u4e0d\u80fd", "\u6211", '"', "```", "1.", "A", "s", "n't", ",", "\ufffd", "\u2026",
)  # fmt: skip


@pytest.mark.parametrize("scope", ["whole", "first_sentence"])
@pytest.mark.parametrize("negation", [False, True])
def test_no_text_takes_back_what_is_settled(scope: Any, negation: bool) -> None:
    phrases = (
        Expression("I can't", 0.6, "en"),
        Expression("sorry", 0.6, "en"),
        Expression("cafe", 1.0),
        Expression("\u4e0d\u80fd", 1.0),
        Expression("e.g.", 0.4),
    )
    scorer = ExpressionScorer(phrases, scope=scope, negation=negation)
    settled, draw, n_settled = settles(scorer), random.Random(0), 0
    assert settled is not None
    for _ in range(600):
        text = "".join(draw.choices(PIECES, k=draw.randint(3, 14)))
        expressed = scorer.outcome(text) == "expressed"
        early = [n for n in range(len(text)) if settled(text[:n])]
        assert expressed or not early, (text, text[: early[0]])
        n_settled += bool(early)
    assert n_settled > 50


def test_only_phrases_settle() -> None:
    assert settles(expression_scorer(contrast="declining")) is not None
    for other in (
        ExpressionScorer(("sorry",), patterns=(r"no\Z",)),
        ExpressionScorer((Expression("sorry"), Expression("gladly", -1.0))),
        ExpressionScorer(("sorry",), own_speech=True),
    ):
        assert settles(other) is None


def scored(
    bench: ValidationBench, plans: list[Plan], monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[list[PromptScores], int]:
    """The scores under some plans, and how many tokens their answers had."""
    tokens, generate = [], Model.generate

    def counted(*args: Any, **options: Any) -> Any:
        answers = generate(*args, **options)
        tokens.extend(len(answer.tokens) for answer in answers)
        return answers

    bench.score_by(ObjectiveScores(parse_objectives((*FOUND, *more))))
    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", counted)
        return bench.objectives_of(plans), sum(tokens)


def the_same_from_fewer(
    bench: ValidationBench, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, n_cut = scored(bench, plans, monkeypatch)
    whole, n_whole = scored(bench, plans, monkeypatch, "repetition")
    assert n_cut < n_whole
    for early, full in zip(cut, whole, strict=True):
        assert set(full) - set(early) == {"positive_repetition"}
        assert early == {name: full[name] for name in early}
        assert early.by_prompt == {name: full.by_prompt[name] for name in early.by_prompt}
    assert len({scores["expression_rate"] for scores in whole}) > 1


def a_bench(model: Model, positive: Any, negative: Any, expression: Behaviour) -> ValidationBench:
    return ValidationBench(
        model,
        positive,
        negative,
        target=TargetLogOdds((70,)),
        expression=expression,
        max_new_tokens=24,
    )


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_whole_answers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared() if seed == 0 else make(seed=seed)
    rows = [rows_of(*range(6, 22), seed=10 * seed + side) for side in (0, 1)]
    expression = ExpressionScorer((")", "*", ";", "`", "~", "%"))
    plans = [Plan((Ablate(unit(i), model.writers, strength=1.5),)) for i in range(3)]
    the_same_from_fewer(a_bench(model, *rows, expression), plans, monkeypatch)


@pytest.mark.slow
def test_scores_of_the_real_model_are_those_of_whole_answers(
    bundled_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, split = load_model(bundled_model), ContrastSet.load("declining").split(16, 12, 1)
    site = Site(21, "resid_post")
    (direction,) = estimate_directions(collect(model, split.train, sites=[site]))
    held_out = split.validation
    expression = expression_scorer(contrast="declining")
    bench = a_bench(model, held_out.positive, held_out.negative, expression)
    plans = [Plan((Ablate(direction, model.writers, strength=s),)) for s in (0.1, 0.6, 1.0)]
    the_same_from_fewer(bench, plans, monkeypatch)


def test_a_model_that_thinks_is_read_to_the_end() -> None:
    thinking = shared().thinking
    ends = settles(ExpressionScorer(("no",)))
    assert thinking.budget([False], 9, ends)._settled is ends
    assert thinking.budget([True], 9, ends)._settled is None
