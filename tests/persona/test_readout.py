"""Reading: the slope on scores, and layers judged on questions that made none of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny import N_LAYERS

from interp_ablate import Site
from interp_ablate.activations.pooling import response_activations
from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.persona.readout import COLUMNS, METHOD, fit_readout, score_slope
from interp_ablate.persona.rollouts import Rollout
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.sites import sites_of

SITE = Site(1, "resid_post")
POST = sites_of(("resid_post",), range(N_LAYERS))
QUESTIONS = ("Why?", "How are you?", "Who is there?", "What now?")


def answer(question: str, tokens: tuple[int, ...], score: float | None, **more: float) -> Rollout:
    key = {"side": "positive"}
    return Rollout(
        key, Prompt(question, "Be brave."), tokens, "x", True, score, more.get("coherence", 90.0)
    )


def answers(seed: int = 0, n: int = 40) -> list[Rollout]:
    """Answers of random tokens, of which token 40's share is the score."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(n):
        tokens = random.integers(41, 90, 8)
        much = int(random.integers(0, 8))
        tokens[:much] = 40
        found.append(
            answer(QUESTIONS[i % 4], tuple(random.permutation(tokens).tolist()), 100 * much / 8)
        )
    return found


# ---- the slope --------------------------------------------------------------------------------------


def test_the_slope_is_the_least_squares_one() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=random, dtype=torch.float64)
    scores = 100 * torch.rand(50, generator=random, dtype=torch.float64)
    found = score_slope(x, scores, SITE)
    assert found is not None and (found.method, found.position) == (METHOD, "response_mean")
    one = torch.stack([torch.ones(50, dtype=torch.float64), scores], 1)
    slope = torch.linalg.lstsq(one, x).solution[1]
    torch.testing.assert_close(found.raw, 2 * scores.std(correction=0) * slope)


def test_of_two_scores_it_is_the_difference_in_means() -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=random, dtype=torch.float64)
    scores = torch.tensor([90.0] * 10 + [10.0] * 10)
    found, other = score_slope(x, scores, SITE), difference_in_means(x[:10], x[10:], SITE)
    assert found is not None and other is not None
    torch.testing.assert_close(found.raw, other.raw)
    uneven, parted = (
        score_slope(x[:14], scores[:14], SITE),
        difference_in_means(x[:10], x[10:14], SITE),
    )
    assert uneven is not None and parted is not None
    torch.testing.assert_close(uneven.vector, parted.vector)  # along it, but not as long
    assert uneven.norm == pytest.approx(2 * (10 * 4) ** 0.5 / 14 * parted.norm)
    # the degree counts, which a threshold throws away
    degrees = scores.clone()
    degrees[0] = 50.0
    graded = score_slope(x, degrees, SITE)
    assert graded is not None and not torch.allclose(graded.vector, found.vector)


def test_what_does_not_vary_has_no_slope() -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert score_slope(x, torch.full((9,), 70.0), SITE) is None
    assert score_slope(torch.ones(9, 4), torch.arange(9.0), SITE) is None


# ---- layers -----------------------------------------------------------------------------------------


def test_layers_are_judged_on_questions_that_made_no_slope() -> None:
    given = answers()
    found = fit_readout(tiny.shared(), given, POST, source="brave tiny")
    assert [row["layer"] for row in found.rows] == list(range(N_LAYERS))
    assert all(list(row) == list(COLUMNS) for row in found.rows)
    # by hand, at one site: read after the bare question, without its system prompt
    bare = [replace(a, prompt=Prompt(a.prompt.text)) for a in given]
    x = response_activations(tiny.shared(), bare, [SITE], batch_size=16)[:, 0].double().numpy()
    y = np.array([a.score for a in given])
    groups, seen = np.array([a.prompt.text for a in given]), np.empty(len(given))
    for question in QUESTIONS:
        out = groups == question
        slope = (y[~out] - y[~out].mean()) @ (x[~out] - x[~out].mean(0))
        seen[out] = (x[out] - x[~out].mean(0)) @ slope / np.linalg.norm(slope)
    row = found.rows[1]
    assert row["r"] == pytest.approx(np.corrcoef(seen, y)[0, 1], abs=1e-6)
    assert row["r_low"] <= row["r"] <= row["r_high"] and row["r"] > 0.5
    assert (row["answers"], row["questions"]) == (40, 4)
    whole = (y - y.mean()) @ (x - x.mean(0))
    np.testing.assert_allclose(
        found.directions[1].vector.numpy(), whole / np.linalg.norm(whole), atol=1e-6
    )
    best = max(found.rows, key=lambda r: r["r"])
    assert best["chosen"] and sum(r["chosen"] for r in found.rows) == 1
    assert found.chosen == Site(best["layer"], "resid_post") and not found.why


def test_scores_without_a_reason_are_not_read() -> None:
    """Ten answers a question and 32 dimensions: in its own sample any slope looks good."""
    random = np.random.default_rng(3)
    noise = [replace(a, score=float(random.uniform(0, 100))) for a in answers()]
    found = fit_readout(tiny.shared(), noise, POST)
    assert all(row["r"] < 0.35 for row in found.rows)
    x = response_activations(tiny.shared(), noise, [SITE])[:, 0]
    y = torch.tensor([a.score for a in noise])
    own = score_slope(x, y, SITE)
    assert own is not None
    in_sample = np.corrcoef((x.double() @ own.vector).numpy(), y.numpy())[0, 1]
    assert in_sample > 0.35 and in_sample > found.rows[1]["r"] + 0.2


def test_only_candidates_may_be_chosen_and_only_what_reads() -> None:
    given = answers()
    best = fit_readout(tiny.shared(), given, POST)
    assert best.chosen is not None
    others = [site for site in POST if site != best.chosen]
    found = fit_readout(tiny.shared(), given, POST, candidates=others)
    assert found.chosen in others and len(found.directions) == len(POST)
    assert [row["r"] for row in found.rows] == [row["r"] for row in best.rows]
    random = np.random.default_rng(5)  # nothing to read: nothing is chosen, and why
    noise = [replace(a, score=float(random.uniform(0, 100))) for a in given]
    none = fit_readout(tiny.shared(), noise, POST)
    assert none.chosen is None and "no layer reads the scores" in none.why
    assert not any(row["chosen"] for row in none.rows) and len(none.directions) == len(POST)


def test_a_question_whose_others_have_one_score_is_left_out_of_r() -> None:
    """Without question 0 no score varies: its answers cannot be judged, the others' can."""
    given = [a if a.prompt.text == QUESTIONS[0] else replace(a, score=50.0) for a in answers(n=40)]
    (row,) = fit_readout(tiny.shared(), given, POST[:1]).rows
    assert (row["answers"], row["questions"]) == (30, 3)


def test_incoherent_and_unscored_answers_are_left_out() -> None:
    given = answers(n=20)
    more = [
        answer("Why?", (41, 42), None),
        answer("Why?", (41, 42), 0.0, coherence=20.0),
        answer("Why?", (), 10.0),
    ]
    plain, with_more = (fit_readout(tiny.shared(), a, POST[:1]) for a in (given, [*given, *more]))
    assert plain.rows == with_more.rows and with_more.rows[0]["answers"] == 20


def test_too_little_to_read_from_is_said() -> None:
    assert (
        "5 coherent answers with a score to 4 questions"
        in fit_readout(tiny.shared(), answers(n=5), POST).why
    )
    one = [replace(a, prompt=Prompt("Why?")) for a in answers()]
    assert "2 questions" in fit_readout(tiny.shared(), one, POST).why
    same = [replace(a, score=50.0) for a in answers()]
    found = fit_readout(tiny.shared(), same, POST)
    assert "do not vary" in found.why and found.chosen is None and found.directions == ()
