"""What was begun under some plans is not finished under others: refused in words, in one thread and in several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
from tiny import make, rows_of, unit
from torch.testing import assert_close

from interp_ablate import Ablate, Add, Plan, Site
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.evaluation.metrics import TargetLogOdds
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench

SITE = Site(1, "resid_pre")
PLAN, OTHER = Plan((Ablate(unit(), SITE),)), Plan((Add(3 * unit(1), SITE),))
ROWS = rows_of(9, 12, 7)
OTHERS = "plans applied now are not those"


def test_a_stream_is_read_under_the_plans_it_began_under(backend: str) -> None:
    model = make(backend=backend)
    with model.applied(PLAN):
        inside = model.stream(ROWS, batch_size=1)
        next(inside)
        unread = model.stream(ROWS)
    for stream in (inside, unread):
        with pytest.raises(PlanError, match=OTHERS):
            next(stream)
    outside = model.stream(ROWS, batch_size=1)
    with model.applied(PLAN):
        model.logits(ROWS)
        with pytest.raises(PlanError, match=OTHERS):
            next(outside)
        again = model.stream(ROWS)
    with model.applied(PLAN):  # the same plan, applied once more
        assert next(again)[1] is not None
    with model.plans.unembedding_through(PLAN.maps_at(SITE)[0][1]):
        stream = model.stream(ROWS)
    with pytest.raises(PlanError, match=OTHERS):
        next(stream)


def test_outputs_are_first_read_where_they_were_made() -> None:
    model = make()
    want = ModelOutputs(model, ROWS, max_new_tokens=3)
    logprobs, texts = want.first_logprobs, want.texts
    outputs = ModelOutputs(model, ROWS, max_new_tokens=3)
    with model.applied(OTHER):
        model.logits(ROWS)
        for read in (
            lambda: outputs.first_logprobs,
            lambda: outputs.texts,
            lambda: outputs.continuation_logprobs([[5]] * 3),
            lambda: outputs.head(2).first_logprobs,
            lambda: generate_outputs_together([outputs]),
        ):
            with pytest.raises(PlanError, match=OTHERS):
                read()
        assert want.first_logprobs is logprobs  # computed before: of the model as it was
        under = ModelOutputs(model, ROWS).first_logprobs
    assert torch.equal(outputs.first_logprobs, logprobs) and outputs.texts == texts
    assert (under - logprobs).abs().max() > 1e-2


def test_outputs_are_not_computed_of_other_weights_or_under_hooks() -> None:
    model = make()
    outputs = ModelOutputs(model, ROWS)
    handle = model.hook_point(SITE).register_forward_hook(lambda module, args, x: 2 * x)
    with pytest.raises(InterpAblateError, match="have changed"):
        _ = outputs.first_logprobs
    assert ModelOutputs(model, ROWS).first_logprobs is not None
    handle.remove()
    before = outputs.first_logprobs
    with torch.no_grad():
        next(model.tl.parameters()).mul_(1.5)
    with pytest.raises(InterpAblateError, match="have changed"):
        _ = outputs.texts
    assert outputs.first_logprobs is before


def test_a_bench_keeps_no_baseline_of_another_plan() -> None:
    def bench_of(model: Model) -> ValidationBench:
        scorer = ExpressionScorer((), patterns=("",))
        target = TargetLogOdds((5, 9))
        return ValidationBench(
            model, rows_of(9, 8), rows_of(7, 9, seed=2), target=target, expression=scorer,
            max_new_tokens=3,
        )  # fmt: skip

    model = make()
    want, bench = bench_of(model).baseline, bench_of(model)
    with model.applied(OTHER):
        model.logits(ROWS)
        with pytest.raises(PlanError, match=OTHERS):
            _ = bench.baseline
    assert bench.baseline == want


# --------------------------------------------------------------------------------- threads


def test_two_threads_never_mix_their_plans(backend: str) -> None:
    """60 rounds: right numbers, or a refusal in words."""
    model, plans = make(backend=backend), (PLAN, OTHER)
    want = []
    for plan in plans:
        with model.applied(plan):
            want.append(model.logits(ROWS))
    assert (want[0] - want[1]).abs().max() > 1e-2
    refused = count()

    def work(which: int) -> int:
        right = 0
        for _ in range(60):
            try:
                with model.applied(plans[which]):
                    got = model.logits(ROWS, batch_size=1)
            except PlanError as error:
                assert "another thread" in str(error) or "never written" in str(error)
                next(refused)
            else:
                assert_close(got, want[which], atol=1e-5, rtol=1e-5)
                right += 1
        return right

    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(work, range(2)))
    assert sum(right) + next(refused) == 120 and sum(right) > 0


def test_threads_without_plans_take_turns(backend: str) -> None:
    """What one thread captures is never another's pass: the same to rounding.

    A thread of a pool starts with its own number of OpenMP threads, so sums may be split otherwise (7e-7 seen).
    """
    model = make(backend=backend)
    rows = [rows_of(8 + i, 6, seed=i) for i in range(2)]

    def read(which: int) -> list[torch.Tensor]:
        kept = []
        for batch, _, captured in model.stream(
            rows[which], keep=0, capture={SITE: lambda x, batch: x[:, -1].clone()}, batch_size=1
        ):
            assert len(batch.index) == 1
            kept.append(captured[SITE])
        return kept

    want = [read(0), read(1)]
    texts = [model.generate(each, max_new_tokens=4) for each in rows]
    with ThreadPoolExecutor(4) as pool:
        for which, got in enumerate(pool.map(read, [0, 1] * 20)):
            assert_close(got, want[which % 2], atol=1e-5, rtol=1e-5)
        answers = pool.map(lambda k: model.generate(rows[k], max_new_tokens=4), [0, 1] * 10)
        for which, got_texts in enumerate(answers):
            assert got_texts == texts[which % 2]


def test_another_threads_plan_is_refused_in_words() -> None:
    model = make()
    with ThreadPoolExecutor(1) as pool, model.applied(PLAN):
        model.logits(ROWS)
        for call in (
            lambda: model.logits(ROWS),
            lambda: model.generate(ROWS, max_new_tokens=2),
            lambda: model.applied(OTHER).__enter__(),
            lambda: ModelOutputs(model, ROWS),
        ):
            with pytest.raises(PlanError, match="another thread has a plan applied"):
                pool.submit(call).result()
        assert model.active_plan == PLAN


@pytest.mark.parametrize("nothing", [None, Plan(())])
def test_a_plan_without_edits_leaves_the_model_as_it_is(backend: str, nothing: Plan | None) -> None:
    model = make(backend=backend)
    outside = ModelOutputs(model, ROWS)
    with model.applied(nothing):
        assert not model.plans.is_edited
        inside = model.logits(ROWS)
        outside.first_logprobs  # noqa: B018  (begun outside, and nothing is applied here)
    assert torch.equal(inside, model.logits(ROWS))


def test_a_condition_is_read_before_hooks_of_others_write_at_its_site(backend: str) -> None:
    """Added before the plan is applied or after it; a hook below the site is read through."""
    model, below = make(backend=backend), Site(0, "resid_pre")
    condition = Condition(unit(5), SITE, threshold=0.0, similarity="cosine")
    plan = Plan((Conditional(Add(3 * unit(1), Site(2, "resid_pre")), condition),))

    def decide(site: Site | None, early: bool) -> list[bool]:
        decided: list[bool] = []
        original = Condition.is_met

        def is_met(self: Condition, pooled: torch.Tensor) -> torch.Tensor:
            decided.extend(original(self, pooled).tolist())
            return original(self, pooled)

        def hook() -> Any:
            point = model.plans._site_map.hook_point(site)
            return point.register_forward_hook(lambda _, __, x: x + 100 * unit(5).to(x))

        handles = [hook()] if site and early else []
        with pytest.MonkeyPatch.context() as patch, model.applied(plan):
            patch.setattr(Condition, "is_met", is_met)
            handles += [hook()] if site and not early else []
            model.logits([[5] * 9])
        for handle in handles:
            handle.remove()
        return decided

    met = decide(None, True)
    for early in (True, False):
        assert decide(SITE, early) == met and decide(below, early) == [True]
    assert met == [False]
