"""Rows under plans of their own: each row is what it would be alone under its plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    DECLARED,
    N_LAYERS,
    editing,
    forward,
    make,
    rows_of,
    shared,
    tiny,
    unit,
)
from torch import Tensor

from interp_ablate import Ablate, Add, Clamp, Plan, Site, collect, everywhere, sites_of
from interp_ablate.errors import ModelError, PlanError
from interp_ablate.models.batches import batches, in_parts
from interp_ablate.sites import RESIDUAL_POINTS

RESIDUAL = sites_of(RESIDUAL_POINTS, range(N_LAYERS))


def many_plans() -> list[Plan | None]:
    """Plans of different ranks, sites, positions and orders; one row is unedited, one plan comes twice."""
    late = [Site(1, "attn_out"), Site(2, "mlp_out")]
    ablation = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
    return [
        ablation,
        None,
        Plan((Ablate(unit(k=3), RESIDUAL, strength=0.7),)),
        Plan((Add(3 * unit(2), Site(1, "resid_post")),)),
        Plan((Add(2 * unit(1), late, positions="generated"), Ablate(unit(), late))),
        Plan((Clamp(unit(3), late, value=1.5, positions="prompt"), Add(unit(4), late))),
        ablation,
    ]


def seven_rows(prefix: int = 0, seed: int = 1) -> list[list[int]]:
    return rows_of(*(prefix + n for n in (9, 6, 11, 7, 8, 5, 9)), prefix=prefix, seed=seed)


def alone(model: Any, plan: Plan | None, run: Any) -> Any:
    if plan is None:
        return run()
    with model.applied(plan):
        return run()


@pytest.mark.parametrize("prefix", (0, 12))
def test_logits_are_those_of_each_plan_alone(kind: str, backend: str, prefix: int) -> None:
    model, plans = shared(kind, backend=backend), many_plans()
    rows = seven_rows(prefix)
    with model.applied_each(plans):
        got = model.logits(rows, keep=3)
        small = model.logits(rows, keep=3, batch_size=2)
    for i, (row, plan) in enumerate(zip(rows, plans)):
        want = alone(model, plan, lambda row=row: model.logits([row], keep=3))[0]
        torch.testing.assert_close(got[i], want, atol=2e-5, rtol=0)
        torch.testing.assert_close(small[i], want, atol=2e-5, rtol=0)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_logits_are_those_of_the_plain_forward_pass(backend: str) -> None:
    """Not only those of our own other way."""
    model, (hf, _), plans = shared(backend=backend), tiny(), many_plans()
    rows = seven_rows(10)
    with model.applied_each(plans):
        got = model.logits(rows, keep=2)
    for row, plan, found in zip(rows, plans, got):
        edit = editing(plan, prompt_length=len(row)) if plan is not None else (lambda site, x: x)
        torch.testing.assert_close(found, forward(hf, row, edit)[-2:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("prefix", (0, 12))
def test_generation_is_that_of_each_plan_alone(kind: str, backend: str, prefix: int) -> None:
    model, plans = shared(kind, backend=backend), many_plans()
    rows = seven_rows(prefix)
    with model.applied_each(plans):
        got = model.generate(rows, max_new_tokens=8)
        small = model.generate(rows, max_new_tokens=8, batch_size=3)
    want = [
        alone(model, plan, lambda row=row: model.generate([row], max_new_tokens=8))[0]
        for row, plan in zip(rows, plans)
    ]
    assert got == want and small == want
    assert len({g.tokens for g in got}) > 2


@pytest.mark.parametrize(
    "kind", [k for k in DECLARED if not k.startswith(("llama", "mistral"))] + ["opt"]
)
def test_other_architectures(kind: str) -> None:
    model = make(kind)
    plans = [
        Plan((Ablate(unit(), model.writers),)),
        None,
        Plan((Ablate(unit(1), model.writers, strength=0.4),)),
    ]
    rows = rows_of(19, 16, 18, prefix=10)
    with model.applied_each(plans):
        got = model.logits(rows)
    for row, plan, found in zip(rows, plans, got):
        want = alone(model, plan, lambda row=row: model.logits([row]))[0]
        torch.testing.assert_close(found, want, atol=5e-5, rtol=0)


def test_rows_that_end_early_leave_with_their_plans(backend: str) -> None:
    """The rest of the batch goes on under the plans of its own rows."""
    model, plans = make(backend=backend, seed=5), many_plans()
    rows = seven_rows(seed=3)
    with model.applied_each(plans):
        free = model.generate(rows, max_new_tokens=10)
    ends = free[0].tokens[2]  # a token that some row writes early
    model.__dict__["eos_token_ids"] = frozenset({ends})
    with model.applied_each(plans):
        got = model.generate(rows, max_new_tokens=10)
    assert 0 < sum(g.finished for g in got) < len(got)
    for cut, whole in zip(got, free):
        length = whole.tokens.index(ends) if ends in whole.tokens else 10
        assert cut.tokens == whole.tokens[:length]


def test_activations_under_plans_of_their_own(backend: str) -> None:
    model, plans = shared(backend=backend), many_plans()
    rows = seven_rows()
    site = Site(2, "resid_post")
    with model.applied_each(plans):
        got = collect(model, rows, [site]).at(site)
    for row, plan, found in zip(rows, plans, got):
        want = alone(model, plan, lambda row=row: collect(model, [row], [site])).at(site)[0]
        torch.testing.assert_close(found, want, atol=2e-5, rtol=0)


def test_an_outer_plan_is_under_all_rows(backend: str) -> None:
    model, outer = shared(backend=backend), Plan((Ablate(unit(5), RESIDUAL),))
    plans, rows = many_plans()[:3], rows_of(9, 6, 8)
    with model.applied(outer), model.applied_each(plans):
        got = model.logits(rows)
    for row, plan, found in zip(rows, plans, got):
        with model.applied(outer):
            want = alone(model, plan, lambda row=row: model.logits([row]))[0]
        torch.testing.assert_close(found, want, atol=2e-5, rtol=0)


# --------------------------------------------------------------------------------- what is refused


def test_another_number_of_prompts(backend: str) -> None:
    model = shared(backend=backend)
    for run in (model.logits, model.generate):
        wrong = pytest.raises(PlanError, match="2 prompts inside applied_each with 7 plans")
        with wrong, model.applied_each(many_plans()):
            run(rows_of(5, 6))
    assert not len(model.active_plan)


def test_what_has_no_meaning_is_refused(backend: str) -> None:
    model = shared(backend=backend)
    keeping = Ablate(unit(), Site(0, "mlp_out"), norm_preserving=True)
    with pytest.raises(PlanError, match="norm-preserving"), model.applied_each([None, keeping]):
        pass
    with (
        pytest.raises(PlanError, match="a plan \\(or None\\) for every row"),
        model.applied_each([]),
    ):
        pass
    outer, inner = model.applied_each(many_plans()), model.applied_each(many_plans())
    with pytest.raises(PlanError, match="inside applied_each"), outer, inner:
        pass
    with pytest.raises(PlanError, match="no one active plan"), model.applied_each(many_plans()):
        _ = model.active_plan
    if backend != "hf":  # which has no TransformerLens object
        with pytest.raises(PlanError, match="which row is"), model.applied_each(many_plans()):
            model.tl(torch.tensor([[1, 2, 3]]))
    with pytest.raises(PlanError, match="never written"), model.applied_each(many_plans()):
        pass
    wide = Plan((Ablate(torch.ones(5), Site(0, "embed")),))
    with pytest.raises(PlanError, match="d_model 5"), model.applied_each([None, wide]):
        pass
    assert model.logits(rows_of(4)).shape[0] == 1  # nothing is left behind


# --------------------------------------------------------------------------------- memory


class Hungry:
    """Runs batches of up to some rows; says how many rows every call had."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, batch: Any) -> tuple[int, ...]:
        self.sizes.append(len(batch.index))
        if len(batch.index) > self.most:
            raise self.error
        return batch.index


ERRORS = (
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
)


@pytest.mark.parametrize("error", ERRORS, ids=("cpu", "cuda", "python"))
def test_batches_are_halved_where_memory_runs_out(error: Exception) -> None:
    given = batches(rows_of(*range(3, 25)), size=16)
    run = Hungry(5, error)
    done = [i for part in in_parts(given, run, "rows") for i in part]
    assert sorted(done) == list(range(22))
    assert (
        run.sizes[:3] == [16, 8, 4] and max(run.sizes[3:]) <= 4
    )  # it does not try large ones again


def test_a_row_that_does_not_fit_and_other_errors_are_raised() -> None:
    given = batches(rows_of(5, 6), size=2)
    with pytest.raises(ModelError, match=r"memory ran out in a pass over \d tokens: use --dtype"):
        list(in_parts(given, Hungry(0, MemoryError()), "rows"))
    run = Hungry(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_parts(given, run, "rows"))
    assert run.sizes == [2]


@pytest.mark.parametrize("do", ("logits", "generate"))
def test_a_model_goes_on_with_smaller_batches(
    backend: str, do: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved in the middle of a generation too, with nothing lost or repeated."""
    model, plans = shared(backend=backend), many_plans()
    rows = seven_rows(10)
    run = getattr(model, do)
    with model.applied_each(plans):
        want = run(rows)
    forward, calls = type(model._backend).forward, []

    def hungry(self: Any, step: Any, keep: int) -> Tensor | None:
        calls.append(len(step.tokens))
        middle = do == "logits" or step.tokens.shape[1] == 1  # not the prompt, not its prefix
        if keep and len(step.tokens) > 3 and middle:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, step, keep)

    monkeypatch.setattr(type(model._backend), "forward", hungry)
    with model.applied_each(plans):
        if do == "generate":
            assert run(rows) == want
        else:
            torch.testing.assert_close(run(rows), want, atol=2e-5, rtol=0)
    assert max(calls) == 7 and {4, 2} <= set(calls)


@pytest.mark.parametrize("do", ("collect", "logits", "generate"))
def test_memory_that_is_gone_for_one_batch_costs_nothing(
    backend: str, do: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it at the third batch: that batch is run again in halves."""
    model = shared(backend=backend)
    rows, calls = rows_of(*range(5, 17), seed=4), []
    run: dict[str, Any] = {
        "collect": lambda: collect(model, rows, batch_size=3).values,
        "logits": lambda: model.logits(rows, batch_size=3),
        "generate": lambda: model.generate(rows, max_new_tokens=3, batch_size=3),
    }
    want = run[do]()
    forward = type(model._backend).forward

    def hungry(self: Any, step: Any, keep: int) -> Tensor | None:
        calls.append(len(step.tokens))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, step, keep)

    monkeypatch.setattr(type(model._backend), "forward", hungry)
    if do == "generate":
        assert run[do]() == want
    else:
        torch.testing.assert_close(run[do](), want, atol=2e-5, rtol=0)
    assert calls[2] == 3 and calls[3] == 2
