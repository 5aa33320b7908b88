"""Passes that start where a plan does: what a whole pass gives, without the blocks below."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import (
    DECLARED,
    DISCOVERED,
    HAS_HOOKED,
    N_LAYERS,
    NOT_FOUND,
    make,
    rows_of,
    shared,
    unit,
)
from torch import Tensor
from torch.testing import assert_close

from interp_ablate import Ablate, Add, Clamp, Plan, Site, collect
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.plan import everywhere
from interp_ablate.errors import ModelError, PlanError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.models.residual_cache import SHARE, ResidualCache, layers_to_keep, n_tokens

TOLERANCE = 2e-6  # the same blocks get the same activations: fp32 rounding of other shapes at most
ADDITION = Plan((Add(3 * unit(), Site(1, "resid_post")),))


@contextmanager
def counting(model: Model) -> Iterator[list[int]]:
    """The blocks that are really run, call by call."""
    ran: list[int] = []
    inner = [block.original_component for block in model.tl.blocks]

    def counted(i: int, block: Any) -> Any:
        real = functools.partial(type(block).forward, block)

        @functools.wraps(block.forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(i)
            return real(*args, **kwargs)

        return run

    for i, block in enumerate(inner):
        block.__dict__["forward"] = counted(i, block)
    try:
        yield ran
    finally:
        for block in inner:
            del block.__dict__["forward"]


def n_bytes(cache: ResidualCache) -> int:
    return sum(x.numel() * x.element_size() for x in cache._resid_post.values())


def under(model: Model, plan: Any, rows: Sequence[Any], **options: Any) -> Tensor:
    with model.applied(plan):
        return model.logits(rows, **options)


def compared(model: Model, cache: ResidualCache, plan: Any, rows: Any, first: int) -> None:
    """With a residual cache: the whole pass's logits, from the blocks that had to run alone."""
    whole = under(model, plan, rows, keep=3)
    with counting(model) as ran:
        got = under(model, plan, rows, keep=3, residual_cache=cache)
    assert_close(got, whole, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(ran) == set(range(first, N_LAYERS))


# --------------------------------------------------------------------------------- the same numbers


def plans_of(model: Model) -> list[tuple[int, Plan]]:
    """Plans of every kind and place, with the first block that each needs."""
    late = [site for site in model.writers if site.layer == 1]
    middle = Site(1, "resid_mid" if "resid_mid" in model.residual_points else "resid_pre")
    return [
        (0, Plan((Add(unit(), Site(0, "embed")), Add(unit(), Site(2, "resid_post"))))),
        (0, Plan((Clamp(unit(1), Site(0, "resid_pre"), value=2.0),))),
        (1, Plan((Add(2 * unit(), Site(0, "resid_post")),))),
        (1, Plan((Ablate(unit(k=2), middle, strength=0.7, positions="prompt"),))),
        (1, Plan((Ablate(unit(2), late[0], norm_preserving=True),))),
        (1, Plan((Erase(unit(2) + unit(3), unit(2), late, strength=0.6),))),
        (2, Plan((Clamp(unit(4), Site(2, "resid_pre"), value=-1.0),))),
        (2, ADDITION + Ablate(unit(), Site(2, "resid_post"))),
        (3, Plan((Add(3 * unit(), Site(2, "resid_post")),))),
    ]


@pytest.mark.parametrize("kind", DECLARED)
def test_every_edit_on_declared_architectures(kind: str) -> None:
    model = shared(kind)
    for prefix in (0, 10):
        rows = rows_of(*(prefix + n for n in (9, 6, 11)), prefix=prefix)
        cache = model.cache_residuals(rows)
        assert cache.layers == tuple(range(N_LAYERS))
        unedited = model.logits(rows, keep=3)
        for first, plan in plans_of(model):
            compared(model, cache, plan, rows, first)
            assert (
                under(model, plan, rows, keep=3, residual_cache=cache) - unedited
            ).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*DISCOVERED, *NOT_FOUND])
def test_other_architectures(kind: str) -> None:
    model, rows = shared(kind), rows_of(19, 16, 21, prefix=10)
    cache = model.cache_residuals(rows)
    for site, first in ((Site(0, "resid_post"), 1), (Site(2, "resid_pre"), 2)):
        compared(model, cache, Add(3 * unit(), site), rows, first)


def test_bit_for_bit_where_batches_have_the_same_shapes() -> None:
    model = shared()
    for rows in (rows_of(9, 6, 11), rows_of(19, 16, 21, prefix=12), rows_of(9)):
        cache = model.cache_residuals(rows)
        for _, plan in plans_of(model):
            assert torch.equal(
                under(model, plan, rows, residual_cache=cache), under(model, plan, rows)
            )


def test_the_cache_holds_what_a_whole_pass_has() -> None:
    """Against `collect`, which knows nothing of it; the shared tokens are kept once."""
    model, rows = shared(), rows_of(15, 13, 18, prefix=9)
    cache = model.cache_residuals(rows)
    width = model.d_model * 4
    assert n_bytes(cache) == N_LAYERS * n_tokens(rows) * width == N_LAYERS * (9 + 6 + 4 + 9) * width
    for layer in range(N_LAYERS):
        site = Site(layer, "resid_post")
        want = collect(model, rows, [site], positions=(-1, -2)).values[:, :, 0]
        for row, values in zip(rows, want):
            places = torch.tensor([[len(row) - 1, len(row) - 2]])
            got = cache.entering(layer + 1, [row], places)[0]
            assert_close(got, values, atol=1e-5, rtol=1e-5)


def test_some_of_the_rows_in_any_order_and_batches() -> None:
    """Rows that share more, or nothing at the front of the batch; shorter kept ends."""
    model = shared()
    rows = rows_of(15, 13, 18, 12, 14, prefix=9)
    twin = [*rows[0][:13], 7, 8]  # shares more with the first row than all do
    cache = model.cache_residuals([*rows, twin, rows[1]])
    for some in (rows[::-1], [rows[0], twin], rows[2:3], [rows[1], rows[1], twin]):
        for options in ({}, {"batch_size": 1}, {"batch_size": 2}, {"keep": 11}):
            got = under(model, ADDITION, some, residual_cache=cache, **options)
            assert_close(
                got, under(model, ADDITION, some, **options), atol=TOLERANCE, rtol=TOLERANCE
            )


def test_captures_below_the_edit_are_not_skipped() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    sites = [Site(0, "resid_post"), Site(1, "attn_out"), Site(2, "mlp_out")]
    for n, first in ((0, 1), (1, 1), (2, 2)):
        capture = dict.fromkeys(sites[n:], lambda x, batch: x[:, -1])
        with model.applied(ADDITION):
            ((_, _, want),) = model.stream(rows, capture=capture)
            with counting(model) as ran:
                ((_, _, got),) = model.stream(rows, capture=capture, residual_cache=cache)
        assert min(ran) == first
        for site in sites[n:]:
            assert_close(got[site], want[site], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("prefix", (0, 12))
def test_rows_under_plans_of_their_own(prefix: int) -> None:
    """All start where the first of the plans does."""
    model = shared()
    rows = rows_of(*(prefix + n for n in (9, 6, 11, 7)), prefix=prefix)
    cache = model.cache_residuals(rows)
    late = Plan((Ablate(unit(1), Site(2, "mlp_out"), positions="prompt"),))
    with model.applied_each([ADDITION, None, late, ADDITION]):
        want = model.logits(rows, keep=2)
        with counting(model) as ran:
            got = model.logits(rows, keep=2, residual_cache=cache)
    assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(ran) == {2}


def test_nested_plans_decide_together() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    for outer, first in (
        (Add(unit(1), Site(0, "resid_post")), 1),
        (Add(unit(1), Site(0, "embed")), 0),
    ):
        with model.applied(outer):
            compared(model, cache, ADDITION, rows, first)
    middle = Ablate(unit(2), Site(1, "resid_mid"))
    with model.applied(middle):
        compared(model, cache, Add(unit(3), Site(1, "attn_out")), rows, 1)


def test_no_plan_at_all_needs_no_block() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    with counting(model) as ran:
        got = model.logits(rows, residual_cache=cache)
    assert not ran
    assert_close(got, model.logits(rows), atol=TOLERANCE, rtol=TOLERANCE)


def test_generating_goes_on_as_before() -> None:
    """A late start leaves nothing behind, in blocks or in caches."""
    model, rows = make(), rows_of(19, 16, 21, prefix=12)
    before = model.generate(rows, max_new_tokens=6), model.logits(rows)
    under(model, ADDITION, rows, residual_cache=model.cache_residuals(rows))
    assert before[0] == model.generate(rows, max_new_tokens=6)
    assert torch.equal(before[1], model.logits(rows))
    assert not any("forward" in block.original_component.__dict__ for block in model.tl.blocks)


# --------------------------------------------------------------------------------- would it be seen?


@pytest.mark.parametrize("prefix", (0, 12))
def test_a_wrong_cache_gives_wrong_logits(prefix: int) -> None:
    """A cache that is changed at one token of one row changes that row's logits."""
    model = shared()
    rows = rows_of(*(prefix + n for n in (9, 6, 11)), prefix=prefix)
    cache = model.cache_residuals(rows)
    want = under(model, ADDITION, rows)
    cache._resid_post[1][cache._starts[tuple(rows[1])] + 1] += 1.0
    changed = (under(model, ADDITION, rows, residual_cache=cache) - want).abs().amax((1, 2))
    assert changed[1] > 1e-2 and changed[[0, 2]].max() < TOLERANCE
    if prefix:
        cache._resid_post[1][2] += 1.0
        changed = (under(model, ADDITION, rows, residual_cache=cache) - want).abs().amax((1, 2))
        assert changed.min() > 1e-3


# --------------------------------------------------------------------------------- the whole pass instead


def test_rows_that_are_not_cached_are_run_whole() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows[:2])
    compared(model, cache, ADDITION, rows, 0)
    compared(model, cache, ADDITION, [rows[0][:-1]], 0)
    compared(model, cache, ADDITION, rows[:2], 2)


def test_somebodys_hooks_below_are_called() -> None:
    """At a hook point, on a module, in the embedding; those above the start are none of its business."""
    model, rows = make(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    seen: list[Any] = []
    block = model.tl.blocks[0]
    below = (block.hook_in, block.hook_out, block.original_component, model.tl.embed.hook_out)
    for module in below:
        seen.clear()
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        got = under(model, ADDITION, rows, residual_cache=cache)
        handle.remove()
        assert seen and torch.equal(got, under(model, ADDITION, rows))
    for module in (model.tl.blocks[1].hook_out, model.tl.blocks[2].hook_in):
        seen.clear()
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        with counting(model) as ran:
            under(model, ADDITION, rows, residual_cache=cache)
        handle.remove()
        assert seen and set(ran) == {2}


def test_an_edit_of_the_users_below_is_in_the_logits() -> None:
    model, rows = make(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    name = "blocks.0.hook_resid_post"
    with model.tl.hooks(fwd_hooks=[(name, lambda x, hook: x * 1.5)]):
        got = under(model, ADDITION, rows, residual_cache=cache)
        assert_close(got, under(model, ADDITION, rows), atol=0, rtol=0)
        assert not model.cache_residuals(rows).layers  # nor is an edited model cached
    assert (got - under(model, ADDITION, rows, residual_cache=cache)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_hooked_model_is_not_cached(layer: int) -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    handle = model.tl.blocks[layer].hook_out.register_forward_hook(lambda m, args, x: 2 * x)
    cache, want = model.cache_residuals(rows), model.logits(rows)
    got = model.logits(rows, residual_cache=cache)
    handle.remove()
    assert not cache.layers and torch.equal(got, want)


def test_changed_weights_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = make(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    before = under(model, ADDITION, rows, residual_cache=cache)
    with torch.no_grad():
        model.tl.blocks[0].mlp.out.weight.mul_(2.0)
    with caplog.at_level(logging.WARNING):
        compared(model, cache, ADDITION, rows, 0)
    assert "weights have changed" in caplog.text
    assert (under(model, ADDITION, rows, residual_cache=cache) - before).abs().max() > 1e-3
    compared(model, model.cache_residuals(rows), ADDITION, rows, 2)


def test_under_gradients_all_is_run() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    direction, strength = unit().float(), torch.ones(1, requires_grad=True)
    with model.plans.fitting_erasure(direction, direction, [Site(0, "mlp_out")], strength):
        ((_, want, _),) = model.stream(rows)
        ((_, got, _),) = model.stream(rows, residual_cache=cache)
        with pytest.raises(PlanError, match="unedited"):
            model.cache_residuals(rows)
    assert got is not None and want is not None and torch.equal(got, want) and got.requires_grad


def test_blocks_that_take_more_from_each_other_are_not_skipped() -> None:
    """The last block reads what the first one left beside the stream, as shared keys and values are."""
    model, rows = make(), rows_of(9, 6, 11)
    first, last = (model.tl.blocks[i].original_component for i in (0, 2))
    left: list[Tensor] = []
    run_first, run_last = first.forward, last.forward

    @functools.wraps(run_first)
    def leave(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        left[:] = [run_first(x, *args, **kwargs)]
        return left[0]

    @functools.wraps(run_last)
    def take(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run_last(x, *args, **kwargs) + 0.1 * left.pop()

    first.__dict__["forward"], last.__dict__["forward"] = leave, take
    cache = model.cache_residuals(rows)
    assert not cache.layers and not n_bytes(cache)
    with model.applied(ADDITION):
        assert torch.equal(model.logits(rows, residual_cache=cache), model.logits(rows))
    assert first.__dict__["forward"] is leave and last.__dict__["forward"] is take


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has no HookedTransformer")
def test_a_hooked_transformer_runs_whole() -> None:
    model, rows = shared(backend="hooked"), rows_of(9, 6, 11)
    cache = model.cache_residuals(rows)
    assert not cache.layers and model.site_map.first_block(ADDITION.sites) == 0
    assert torch.equal(
        under(model, ADDITION, rows, residual_cache=cache), under(model, ADDITION, rows)
    )


# --------------------------------------------------------------------------------- cache, errors


@pytest.mark.parametrize(
    ("n_layers", "fitting", "kept"),
    [
        (4, 9, (0, 1, 2, 3)),
        (4, 4, (0, 1, 2, 3)),
        (4, 3, (1, 3)),
        (4, 1, (3,)),
        (4, 0, ()),
        (30, 10, tuple(range(2, 30, 3))),
        (30, 7, (4, 9, 14, 19, 24, 29)),
    ],
)
def test_as_many_layers_as_fit_into_the_share(
    n_layers: int, fitting: int, kept: tuple[int, ...]
) -> None:
    assert layers_to_keep(n_layers, 100, int(fitting * 100 / SHARE) + 1) == kept
    assert len(kept) <= max(fitting, 0)


def test_with_some_layers_a_pass_starts_at_the_last_one_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    layer = n_tokens(rows) * model.d_model * 4
    for fitting, layers, starts in ((2, (1,), (0, 2, 2)), (1, (2,), (0, 0, 3)), (0, (), (0, 0, 0))):
        with monkeypatch.context() as patched:
            free = int(fitting * layer / SHARE) + 8
            patched.setattr(
                "interp_ablate.models.residual_cache.free_memory", lambda device, free=free: free
            )
            cache = model.cache_residuals(rows)
        assert cache.layers == layers and n_bytes(cache) == len(layers) * layer
        for site, first in zip((0, 1, 2), starts):
            compared(model, cache, Add(3 * unit(), Site(site, "resid_post")), rows, first)


def test_out_of_cache_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in halves, while rows are cached and when they are used."""
    model, rows = shared(), rows_of(19, 16, 21, 14, 17, prefix=12)
    want = under(model, ADDITION, rows)
    forward, sizes = model._backend.forward, []

    def small(step: Any, keep: int) -> Any:
        sizes.append(len(step.tokens))
        if len(step.tokens) > 2:
            raise RuntimeError("can't allocate memory")
        return forward(step, keep)

    monkeypatch.setattr(model._backend, "forward", small)
    cache = model.cache_residuals(rows)
    with counting(model) as ran:
        got = under(model, ADDITION, rows, residual_cache=cache)
    assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(ran) == {2} and max(sizes) == 5


def test_an_error_inside_leaves_the_model_whole() -> None:
    model, rows = make(), rows_of(19, 16, 21, prefix=12)
    cache, want = model.cache_residuals(rows), model.logits(rows)

    def broken(*args: Any) -> None:
        raise ValueError("broken")

    handle = model.tl.blocks[2].hook_in.register_forward_hook(broken)
    with pytest.raises(ValueError, match="broken"):
        under(model, ADDITION, rows, residual_cache=cache)
    handle.remove()
    assert torch.equal(model.logits(rows), want)
    compared(model, cache, ADDITION, rows, 2)


def test_only_the_unedited_model_is_cached() -> None:
    model, rows = shared(), rows_of(9, 6, 11)
    with pytest.raises(PlanError, match="outside of applied"), model.applied(ADDITION):
        model.logits(rows)
        model.cache_residuals(rows)
    with pytest.raises(ModelError, match="no layer 7"):
        model.site_map.first_block([Site(7, "resid_post")])
    assert model.site_map.first_block(()) == N_LAYERS


# --------------------------------------------------------------------------------- evidence


def test_evidence_under_a_plan_starts_where_the_plan_does() -> None:
    model, rows = shared(), rows_of(19, 16, 21, prefix=12)
    baseline = ModelOutputs(model, rows, max_new_tokens=5, batch_size=2)
    early = baseline.with_plan(Plan((Ablate(unit(1), everywhere(N_LAYERS)),)))
    _ = early.first_logprobs
    assert "residual_cache" not in baseline.__dict__  # an edit from the start needs none
    for site, first in ((0, 1), (1, 2), (2, 3)):
        plan = Plan((Add(3 * unit(), Site(site, "resid_post")),))
        found = baseline.with_plan(plan)
        assert (found.plan, found.rows, found.max_new_tokens, found.batch_size) == (
            plan,
            rows,
            5,
            2,
        )
        known = baseline.residual_cache
        with counting(model) as ran:
            got = found.first_logprobs
        assert set(ran) == set(range(first, N_LAYERS)) and baseline.residual_cache is known
        want = ModelOutputs(model, rows, plan, batch_size=2).first_logprobs
        assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
        part = baseline.with_plan(plan).head(2)
        with counting(model) as ran:
            assert_close(part.first_logprobs, want[:2], atol=2e-5, rtol=0)
        assert set(ran) == set(range(first, N_LAYERS))


def test_evidence_inside_another_plan() -> None:
    """The outer plan counts, whether or not anything was cached before."""
    model, rows = shared(), rows_of(9, 6, 11)
    outer = Plan((Add(2 * unit(1), Site(0, "mlp_out")),))
    want = ModelOutputs(model, rows, outer + ADDITION).first_logprobs
    assert (want - ModelOutputs(model, rows, ADDITION).first_logprobs).abs().max() > 1e-2
    for before in (False, True):
        baseline = ModelOutputs(model, rows)
        if before:
            _ = baseline.residual_cache
        with model.applied(outer):
            got = baseline.with_plan(ADDITION).first_logprobs
        assert_close(got, want, atol=1e-5, rtol=0)
