"""Fitted strengths on tiny models: the gradient is right, the loss falls, the budget is kept."""

from __future__ import annotations

import pytest
import torch
from tiny import N_LAYERS, make, rows_of, shared, tiny, unit

from interp_ablate import (
    Ablate,
    Direction,
    Evidence,
    ExpressionScorer,
    Model,
    Plan,
    Site,
    everywhere,
    from_hf,
)
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.fit import (
    N_TOKENS,
    FitData,
    _first_token_kl,
    _own_words,
    fit_data,
    fit_strengths,
)

SITES = everywhere(N_LAYERS)
DIRECTION = Direction(unit(3), 1.0, Site(1, "resid_post"))
ANYTHING = ExpressionScorer((), patterns=("",))  # every answer expresses it


def sure(backend: str) -> Model:
    """A tiny model that is sure of its greedy answers: own words are likely at first."""
    hf, tokenizer = tiny(eos_token_id=None)
    with torch.no_grad():
        hf.lm_head.weight.mul_(4)
    return from_hf(hf, tokenizer, backend=backend)  # type: ignore[arg-type]


def data_of(model) -> FitData:  # type: ignore[no-untyped-def]
    positive = Evidence(model, rows_of(14, 15, 16, prefix=9), new_tokens=N_TOKENS + 1)
    return fit_data(positive, Evidence(model, rows_of(13, 15, prefix=9, seed=2)), ANYTHING)


def test_gradient_against_finite_differences(backend: str) -> None:
    model = make(backend=backend, eos_token_id=None)
    data = data_of(model)
    strengths = torch.full((len(SITES),), 0.3, requires_grad=True)

    def loss(values: torch.Tensor) -> torch.Tensor:
        with model.ablating(DIRECTION.vector, SITES, values):
            return _own_words(model, data).mean() + _first_token_kl(model, data)

    (gradient,) = torch.autograd.grad(loss(strengths), strengths)
    assert bool((gradient != 0).all())
    for i in (0, 2, len(SITES) - 1):
        step = torch.zeros(len(SITES))
        step[i] = 1e-2
        with torch.no_grad():
            slope = (loss(strengths + step) - loss(strengths - step)) / 2e-2
        torch.testing.assert_close(slope, gradient[i].to(slope), rtol=2e-2, atol=1e-3)


def test_live_strengths_are_the_plan(backend: str) -> None:
    model = make(backend=backend)
    rows = rows_of(9, 12, 14)
    strengths = torch.linspace(0, 1.5, len(SITES))
    with model.applied(Plan((Ablate(DIRECTION, SITES, strength=strengths.tolist()),))):
        want = model.logits(rows)
    with model.ablating(DIRECTION.vector, SITES, strengths):
        got = model.logits(rows)
    torch.testing.assert_close(got.detach(), want, atol=2e-5, rtol=1e-5)
    assert not model.logits(rows).requires_grad  # gradients end with the block


@pytest.mark.parametrize("kind", ("gemma2", "gpt2", "gpt_neox", "mixtral"))
def test_live_strengths_are_the_plan_on_other_architectures(kind: str) -> None:
    """At projections before a norm the direction is pulled back through its gain, as in plans."""
    model, rows = shared(kind), rows_of(9, 12, 14)
    strengths = torch.linspace(0.1, 1.5, len(model.writers))
    edit = Ablate(DIRECTION, model.writers, strength=strengths.tolist())
    with model.applied(Plan((edit,))):
        want = model.logits(rows)
    with model.ablating(DIRECTION.vector, model.writers, strengths):
        got = model.logits(rows)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert (want - model.logits(rows)).abs().max() > 1e-2


def test_fit_lowers_own_words_and_minds_the_budget(backend: str) -> None:
    model = sure(backend)
    data = data_of(model)
    # along what the final norm and the unembedding read for the first answer's tokens
    state = model.hf_state_dict()
    read = (state["lm_head.weight"][data.answers[0]] * state["model.norm.weight"]).sum(0)
    direction = Direction(read, 1.0, Site(2, "resid_post"))
    before = float(_own_words(model, data).mean())
    steps: list[int] = []

    def fit(budget: float) -> tuple[float, float]:
        found = fit_strengths(
            model, direction, SITES, data, kl_budget=budget, on_step=lambda: steps.append(1)
        )
        assert all(0 <= value <= 2 for value in found)
        with torch.no_grad(), model.ablating(direction.vector, SITES, torch.tensor(found)):
            return float(_own_words(model, data).mean()), float(_first_token_kl(model, data))

    generous = fit(10.0)
    assert len(steps) == 20 and fit(10.0) == generous  # deterministic
    frugal = fit(0.01)
    assert frugal[1] < generous[1] and generous[0] < min(frugal[0], before)


def test_second_round_adds_answers() -> None:
    model = make(eos_token_id=None)
    data = data_of(model)
    more = data.with_answers(
        Evidence(model, rows_of(11, 12, seed=5), new_tokens=N_TOKENS), ANYTHING
    )
    assert len(more.positive) == len(data.positive) + 2 == len(more.answers)
    assert [len(r) - n for r, n in zip(more.positive, more.prompt_lengths)] == [N_TOKENS] * 5


def test_nothing_to_fit_and_no_such_site() -> None:
    model = make()
    evidence = Evidence(model, rows_of(9, 12), new_tokens=N_TOKENS)
    with pytest.raises(InterpAblateError, match="no training prompt"):
        fit_data(evidence, evidence, ExpressionScorer(("zzzzzz",)))
    middle = [Site(1, "resid_mid")]
    with pytest.raises(PlanError), model.ablating(DIRECTION.vector, middle, torch.ones(1)):
        pass
