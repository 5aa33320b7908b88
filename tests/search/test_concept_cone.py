"""Concept cones on tiny models: gradients, an orthonormal basis, mixtures inside, and behaviour that every one removes."""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import N_LAYERS, editing, forward, rows_of, tiny, unit
from torch.nn.functional import softplus

from interp_ablate import Ablate, Direction, Model, Plan, everywhere
from interp_ablate.directions.direction import random_direction
from interp_ablate.errors import DirectionError, PlanError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.load import from_hf
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.concept_cone import ConceptCone, ablation_loss, fit_cone
from interp_ablate.search.gradient_fit import N_TOKENS, UNLIKELY, FitData, fit_data
from interp_ablate.sites import Site

ANYTHING = ExpressionScorer((), patterns=("",))  # every answer expresses it


@cache
def task() -> tuple[Model, FitData, Direction, Any]:
    """A tiny model that is sure of its answers, those answers, what its unembedding reads of one, and its HF model."""
    hf, tokenizer = tiny(eos_token_id=None)
    with torch.no_grad():
        hf.lm_head.weight.mul_(4)
    model = from_hf(hf, tokenizer, backend="bridge")
    positive = ModelOutputs(model, rows_of(14, 15, 16, prefix=9), max_new_tokens=N_TOKENS + 1)
    data = fit_data(positive, ModelOutputs(model, rows_of(13, 15, prefix=9, seed=2)), ANYTHING)
    read = (hf.lm_head.weight[data.answers[0]] * hf.model.norm.weight).sum(0)
    return model, data, Direction(read, 1.0, Site(2, "resid_post")), hf


def by_hand(item: Direction | torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Of an ablation everywhere, from plain passes: the answers' log-probabilities, and the KL on the other rows."""
    _, data, _, hf = task()
    plan = Plan() if item is None else Plan((Ablate(item, everywhere(N_LAYERS)),))
    edit = editing(plan)
    likely, kls = [], []
    for row, length, answer in zip(data.positive, data.prompt_lengths, data.answers):
        logprobs = forward(hf, row, edit).double().log_softmax(-1)
        likely.append(sum(logprobs[length - 1 + i, token] for i, token in enumerate(answer)))
    for row, length in zip(data.negative, data.negative_lengths):
        plain, edited = (
            forward(hf, row, each)[length - 1 :].double().log_softmax(-1)
            for each in (lambda site, x: x, edit)
        )
        kls.append(float((plain.exp() * (plain - edited)).sum(-1).mean()))
    return torch.stack(likely), fmean(kls)  # type: ignore[arg-type]


@cache
def fitted() -> ConceptCone:
    model, data, direction, _ = task()
    return fit_cone(model, direction, data, rank=3, steps=8, kl_weight=1.0)


def test_the_loss_is_that_of_the_plan_and_its_gradient_that_of_finite_differences() -> None:
    model, data, direction, _ = task()
    along = (direction.vector + 0.3 * unit(8)).float().requires_grad_(True)
    likely, kl = ablation_loss(model, along, data)
    want, want_kl = by_hand(along.detach())
    assert likely.item() == pytest.approx(float(softplus(want - UNLIKELY).mean()), abs=1e-4)
    assert kl.item() == pytest.approx(want_kl, abs=1e-5)
    loss = likely + kl
    loss.backward()
    assert along.grad is not None
    assert float(along.grad @ along.detach()) == pytest.approx(0, abs=1e-4)  # length says nothing
    for seed in range(3):
        step = 1e-2 * unit(20 + seed).float()
        ends = [float(sum(ablation_loss(model, along.detach() + s * step, data))) for s in (1, -1)]
        assert (ends[0] - ends[1]) / 2 == pytest.approx(
            float(along.grad @ step), rel=0.05, abs=2e-3
        )


def test_the_basis_is_orthonormal_and_mixtures_lie_between() -> None:
    cone = fitted()
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(cone.vectors @ cone.vectors.T, eye, atol=1e-12, rtol=0)
    mixtures = cone.sample(200, seed=1)
    shares = torch.stack([item.vector for item in mixtures]) @ cone.vectors.T
    assert (shares >= -1e-12).all()
    torch.testing.assert_close(shares.norm(dim=1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(  # uniform over angles: every axis alike
        shares.mean(0), shares.mean().expand(3), atol=0.06, rtol=0
    )
    again = cone.sample(200, seed=1)
    assert [m.fingerprint for m in mixtures] == [m.fingerprint for m in again]
    assert [item.method for item in cone.directions] == ["cone_1", "cone_2", "cone_3"]
    start = task()[2]
    assert {(item.site, item.norm) for item in cone.directions} == {(start.site, start.norm)}


def test_every_direction_of_the_cone_removes_the_behaviour() -> None:
    """Each basis vector and each mixture, ablated alone, takes more at less KL than every random direction."""
    direction = task()[2]
    cone = fitted()
    assert min(cone.losses) < cone.losses[0]

    def loss(item: Direction) -> float:
        likely, kl = by_hand(item)
        return float(softplus(likely - UNLIKELY).mean()) + kl

    chance = [loss(random_direction(direction, seed=seed)) for seed in range(12)]
    inside = [loss(item) for item in (*cone.directions, *cone.sample(6, seed=5))]
    assert max(inside) < min(chance)
    assert max(inside) < float(softplus(by_hand(None)[0] - UNLIKELY).mean()) / 2


def test_the_same_seed_gives_the_same_cone_and_directions_stay_outside() -> None:
    model, data, direction, _ = task()
    other = Direction(unit(6), 1.0, direction.site)
    options = {"rank": 2, "steps": 2, "orthogonal_to": [other]}
    first, again = (fit_cone(model, direction, data, **options) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first.vectors, again.vectors) and first.losses == again.losses
    assert (first.vectors @ other.vector).abs().max() < 1e-12
    third = fit_cone(model, direction, data, **options, seed=1)  # type: ignore[arg-type]
    assert not torch.equal(first.vectors, third.vectors)
    assert not model.plans.is_edited


def test_what_cannot_be_fitted_is_refused() -> None:
    model, data, direction, _ = task()
    for name, value in (("rank", 0), ("steps", 0), ("rank", True)):
        with pytest.raises(PlanError, match=f"{name} is a whole number from"):
            fit_cone(model, direction, data, **{name: value})
    with pytest.raises(PlanError, match="kl_weight"):
        fit_cone(model, direction, data, kl_weight=-1)
    with pytest.raises(PlanError, match="32 directions in 32 dimensions"):
        fit_cone(model, direction, data, rank=32)
    with pytest.raises(DirectionError, match="d_model 3, the model 32"):
        fit_cone(model, Direction(torch.ones(3), 1.0, direction.site), data)
    with pytest.raises(DirectionError, match="nothing of it is left"):
        fit_cone(model, direction, data, orthogonal_to=[direction])
