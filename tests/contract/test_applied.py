"""Plans as hooks, against a plain forward pass written out by hand; they leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    N_LAYERS,
    PARTS,
    ROTARY_POINTS,
    editing,
    forward,
    gains_of,
    greedy,
    hf_forward,
    rows_of,
    shared,
    source_of,
    tiny,
    unit,
)
from torch import Tensor

from interp_ablate import Ablate, Add, Clamp, Plan, Site, everywhere, sites_of
from interp_ablate.errors import ModelError, PlanError
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.sites import RESIDUAL_POINTS, Point

TOLERANCE = 3e-5  # fp32, logits of size 1
NEVER = frozenset({-1})


def edits_at(sites: list[Site]) -> dict[str, Plan]:
    many = [0.3 + 0.4 * i for i in range(len(sites))]
    return {
        "ablate": Plan((Ablate(unit(), sites),)),
        "strengths": Plan((Ablate(unit(), sites, strength=many),)),
        "subspace": Plan((Ablate(unit(k=3), sites),)),
        "add": Plan((Add(3 * unit(), sites, coefficient=many),)),
        "clamp": Plan((Clamp(unit(), sites, value=1.5),)),
        "two": Plan((Add(unit(1), sites), Ablate(unit(), sites, strength=0.5))),
    }


EDITS = tuple(edits_at([Site(0, "embed")]))


def check(model: Model, hf: Any, plan: Plan, rows: list[list[int]]) -> None:
    """The logits at every position kept are those of the plain forward pass, and not the unedited ones."""
    keep = min(map(len, rows))
    with model.applied(plan):
        got = model.logits(rows, keep=keep)
    for row, found in zip(rows, got):
        want = forward(hf, row, editing(plan, prompt_length=len(row)))[-keep:]
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
        assert (want - forward(hf, row)[-keep:]).abs().max() > 1e-2  # the plan does something


# --------------------------------------------------------------------------------- every kind of site


@pytest.mark.parametrize("point", ROTARY_POINTS)
@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_at_each_point(backend: str, point: Point, edit: str) -> None:
    sites = list(sites_of((point,), range(N_LAYERS)))
    model, (hf, _) = shared(backend=backend), tiny()
    check(model, hf, edits_at(sites)[edit], rows_of(9, 6))
    check(model, hf, edits_at(sites[:1])[edit], rows_of(9, 6))


def test_all_points_at_once_on_every_architecture(kind: str, backend: str) -> None:
    sites = list(sites_of(ROTARY_POINTS, range(N_LAYERS)))
    plan = Plan(
        (
            Ablate(unit(0), sites, strength=0.5),
            Add(unit(1), sites[::2]),
            Ablate(unit(2, k=2), sites[1::3]),
            Clamp(unit(3), sites[::4], value=-0.5),
        )
    )
    check(shared(kind, backend), tiny(kind)[0], plan, rows_of(9, 13, 6))


@pytest.mark.parametrize("edit", EDITS)
def test_each_edit_at_learned_positions(backend: str, edit: str) -> None:
    model, hf, rows = shared("gpt2", backend), source_of("gpt2"), rows_of(9, 6)
    plan = edits_at([Site(0, "pos_embed")])[edit] + edits_at([Site(0, "embed")])["add"]
    with model.applied(plan):
        got = model.logits(rows, keep=6)
    for row, found in zip(rows, got):
        want = hf_forward(hf, "gpt2", row, editing(plan))[-6:]
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ("gemma2", "gemma3_text", "olmo2", "glm4"))
def test_all_points_at_once_in_post_norm_blocks(kind: str) -> None:
    """A projection and what its norm makes of it are two sites, each with its own edits."""
    model, hf, rows = shared(kind), source_of(kind), rows_of(9, 13, 6)
    sites = list(sites_of(ROTARY_POINTS, range(N_LAYERS)))
    normed = [site for site in sites if not site.point.endswith("_proj")]
    plan = Plan(
        (
            Ablate(unit(0), sites, strength=0.5),
            Add(unit(1), normed[::2]),
            Ablate(unit(2, k=2), sites[1::3]),
            Clamp(unit(3), normed[::4], value=-0.5),
        )
    )
    edit = editing(plan, gains=gains_of(hf, kind))
    with model.applied(plan):
        got = model.logits(rows, keep=6)
    for row, found in zip(rows, got):
        want = hf_forward(hf, kind, row, edit)[-6:]
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
    for read, written in read_and_written(model, kind, rows[0]):
        torch.testing.assert_close(read, written, atol=TOLERANCE, rtol=1e-5)


def read_and_written(model: Model, kind: str, row: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Without a plan, every site holds what the Hugging Face modules write there."""
    sites = list(sites_of(ROTARY_POINTS, range(N_LAYERS)))
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> Tensor:
        seen[site] = x
        return x

    hf_forward(source_of(kind), kind, row, keep)
    ((_, _, read),) = model.stream([row], capture=dict.fromkeys(sites, lambda x, batch: x))
    return [(read[site], seen[site]) for site in sites]


def test_the_writers_are_those_that_leave_nothing(kind: str, backend: str) -> None:
    assert list(shared(kind, backend).writers) == PARTS[kind].writers
    assert shared(kind, backend).writers == everywhere(N_LAYERS)


def test_resid_mid_reaches_the_skip_path_and_the_mlp(backend: str) -> None:
    """The Bridge's own hook_resid_mid is the MLP branch's input only: nothing may be left in the stream."""
    model, row, r = shared(backend=backend), rows_of(9)[0], unit()
    site = Site(1, "resid_mid")
    seen: dict[Site, Tensor] = {}

    def keep(at: Site, x: Tensor) -> Tensor:
        if at == site:
            x = x - ((x.double() @ r)[..., None] * r).float()
        seen[at] = x[0]
        return x

    forward(tiny()[0], row, keep)
    capture = {
        s: (lambda x, batch: x[0]) for s in (site, Site(1, "mlp_out"), Site(1, "resid_post"))
    }
    with model.applied(Ablate(r, site)):
        ((_, _, got),) = model.stream([row], capture=capture)
    for at, x in got.items():
        torch.testing.assert_close(x, seen[at], atol=TOLERANCE, rtol=0, msg=str(at))
    assert (got[site].double() @ r).abs().max() < 1e-5
    along = (got[Site(1, "resid_post")] - got[Site(1, "mlp_out")]).double() @ r
    assert along.abs().max() < 1e-5


def test_all_residual_sites_equal_all_writers(kind: str, backend: str) -> None:
    model, rows = shared(kind, backend), rows_of(9, 6)
    with model.applied(Ablate(unit(), sites_of(RESIDUAL_POINTS, range(N_LAYERS)))):
        residual = model.logits(rows, keep=4)
    with model.applied(Ablate(unit(), everywhere(N_LAYERS))):
        writers = model.logits(rows, keep=4)
    torch.testing.assert_close(residual, writers, atol=TOLERANCE, rtol=0)


# --------------------------------------------------------------------------------- positions


def positional(positions: Any) -> Plan:
    sites = [Site(0, "resid_mid"), Site(1, "resid_pre"), Site(2, "mlp_out")]
    return Plan(
        (
            Add(2 * unit(0), sites, positions=positions),
            Ablate(unit(1), sites, positions=positions),
        )
    )


def test_prompt_positions_in_forward_passes(backend: str) -> None:
    check(shared(backend=backend), tiny()[0], positional("prompt"), rows_of(9, 6, 14))


@pytest.mark.parametrize("prefix", (0, 9))
@pytest.mark.parametrize("positions", ("prompt", "generated", "all"))
def test_positions_of_prompts_and_responses(backend: str, positions: str, prefix: int) -> None:
    """Teacher-forced: rows of which the end is a response; prompts of different lengths, padded."""
    model, (hf, _) = shared(backend=backend), tiny()
    rows, lengths = rows_of(16, 12, 19, prefix=prefix), [11, 10, 12]
    plan = positional(positions)
    found: dict[int, Tensor] = {}
    with model.applied(plan):
        for batch, logits, _ in model.stream(rows, keep=2, prompt_lengths=lengths):
            assert logits is not None
            found.update(zip(batch.index, logits))
    for i, row in enumerate(rows):
        want = forward(hf, row, editing(plan, prompt_length=lengths[i]))[-2:]
        torch.testing.assert_close(found[i], want, atol=TOLERANCE, rtol=0)


def test_a_shared_prefix_ends_where_the_shortest_prompt_does(backend: str) -> None:
    """Equal rows, of which one is nearly all prompt and the other nearly all response."""
    model, (hf, _) = shared(backend=backend), tiny()
    row, lengths = rows_of(20)[0], [18, 9]
    plan = positional("generated")
    with model.applied(plan):
        ((batch, logits, _),) = model.stream([row, row], keep=1, prompt_lengths=lengths)
    assert logits is not None
    for i, found in zip(batch.index, logits):
        want = forward(hf, row, editing(plan, prompt_length=lengths[i]))[-1:]
        torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", (0, 9))
@pytest.mark.parametrize("positions", ("all", "prompt", "generated"))
def test_cached_generation_equals_recomputing_the_whole_sequence(
    backend: str, positions: str, prefix: int
) -> None:
    model, (hf, _) = shared(backend=backend), tiny()
    rows, plan = rows_of(12, 10, 17, prefix=prefix), positional(positions)
    want = [greedy(hf, row, 8, plan=plan, eos=model.eos_token_ids) for row in rows]
    with model.applied(plan):
        got = model.generate(rows, max_new_tokens=8)
    assert [g.tokens for g in got] == want
    assert want != [greedy(hf, row, 8, eos=model.eos_token_ids) for row in rows]


def test_generation_under_a_plan_on_every_architecture(kind: str, backend: str) -> None:
    model, (hf, _) = shared(kind, backend), tiny(kind)
    rows = rows_of(12, 10, 17)
    plan = positional("generated") + positional("prompt") + Ablate(unit(5), everywhere(N_LAYERS))
    want = [greedy(hf, row, 6, plan=plan, eos=model.eos_token_ids) for row in rows]
    with model.applied(plan):
        assert [g.tokens for g in model.generate(rows, max_new_tokens=6)] == want


def test_rows_that_end_early_keep_the_others_positions(backend: str) -> None:
    hf, tokenizer = tiny()
    rows, plan = rows_of(12, 10, 17, 11), positional("generated")
    free = [greedy(hf, row, 8, plan=plan, eos=NEVER) for row in rows]
    ending = free[0][2]
    other, _ = tiny()
    other.generation_config.eos_token_id = [2, ending]
    model = from_hf(other, tokenizer, backend=backend)  # type: ignore[arg-type]
    want = [greedy(hf, row, 8, plan=plan, eos=model.eos_token_ids) for row in rows]
    with model.applied(plan):
        got = model.generate(rows, max_new_tokens=8)
    assert [g.tokens for g in got] == want
    assert len({len(tokens) for tokens in want}) > 1


# --------------------------------------------------------------------------------- nesting


def test_nested_plans_act_as_one_after_the_other(backend: str) -> None:
    """Also where the inner plan writes upstream of the outer one in the same block."""
    model, (hf, _) = shared(backend=backend), tiny()
    row = rows_of(9)[0]
    outer = Plan((Clamp(unit(5), [Site(1, "resid_mid"), Site(0, "mlp_out")], value=3.0),))
    inner = Plan(
        (
            Ablate(unit(k=2), [Site(1, "resid_pre"), Site(1, "attn_out"), Site(1, "resid_mid")]),
            Clamp(unit(3), [Site(0, "mlp_out"), Site(0, "resid_mid")], value=2.0),
        )
    )
    with model.applied(outer):
        with model.applied(inner):
            assert model.active_plan == outer + inner
            both = model.logits([row], keep=9)[0]
        assert model.active_plan == outer
        first = model.logits([row], keep=9)[0]
    torch.testing.assert_close(
        both, forward(hf, row, editing(outer + inner)), atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(first, forward(hf, row, editing(outer)), atol=TOLERANCE, rtol=0)
    assert not len(model.active_plan)


def test_nested_plans_at_a_projection_and_after_it(backend: str) -> None:
    """The projection is upstream of attn_out, whichever of the two plans is the outer one.

    Without a norm between them both are one HookPoint on the Bridge, which cannot go back.
    """
    model, (hf, _) = shared(backend=backend), tiny()
    late = Plan((Clamp(unit(0), Site(1, "attn_out"), value=2.0),))
    early = Plan((Ablate(unit(0) + unit(1), Site(1, "attn_proj")),))
    row = rows_of(9)[0]
    want = forward(hf, row, editing(late + early))
    for outer, inner in ((early, late), (late, early)):
        if backend != "hooked" and outer is late:
            one_place = pytest.raises(PlanError, match=r"one place here")
            with model.applied(outer):
                with one_place, model.applied(inner):
                    pytest.fail("the block must not be entered")
                got = model.logits([row], keep=9)[0]  # the outer one still works
            want = forward(hf, row, editing(late))
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
            break
        with model.applied(outer), model.applied(inner):
            got = model.logits([row], keep=9)[0]
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_nested_norm_preserving_plans_at_one_site_are_refused(backend: str) -> None:
    """As they are in one plan: `active_plan` has no function then."""
    model = shared(backend=backend)
    outer, inner = (Ablate(unit(i), Site(1, "mlp_out"), norm_preserving=True) for i in range(2))
    with model.applied(outer):
        with (
            pytest.raises(PlanError, match=r"one of them norm-preserving"),
            model.applied(inner),
        ):
            pytest.fail("the block must not be entered")
        model.logits(rows_of(9))


# --------------------------------------------------------------------------------- TransformerLens' own methods


def test_run_with_cache_sees_the_edit_and_leaves_the_hooks(backend: str) -> None:
    if backend == "hf":
        pytest.skip("there is no TransformerLens object")
    model, row, r = shared(backend=backend), rows_of(9)[0], unit()
    tokens = torch.tensor([row])
    sites = sites_of(RESIDUAL_POINTS, range(N_LAYERS))
    with model.applied(Ablate(r, sites)):
        before = model.logits([row], keep=9)
        logits, cache = model.tl.run_with_cache(tokens)
        for site in sites:
            assert (cache[str(site)][0].double() @ r).abs().max() < 1e-5, site
        torch.testing.assert_close(logits, before, atol=TOLERANCE, rtol=0)
        assert torch.equal(model.logits([row], keep=9), before)
        with model.tl.hooks(fwd_hooks=[(str(sites[0]), lambda x, hook: x)]):
            model.tl.run_with_cache(tokens)
        assert torch.equal(model.logits([row], keep=9), before)
    assert not torch.equal(model.logits([row], keep=9), before)


def test_positions_are_unknown_to_transformer_lens_itself(backend: str) -> None:
    if backend == "hf":
        pytest.skip("there is no TransformerLens object")
    model, row = shared(backend=backend), rows_of(9)[0]
    plan = Ablate(unit(), Site(1, "resid_pre"), positions="prompt")
    with pytest.raises(PlanError, match=r"only this Model's own methods"), model.applied(plan):
        model.tl(torch.tensor([row]))


# --------------------------------------------------------------------------------- leaving nothing


def hooks_of(model: Model) -> int:
    return len(model._backend.hook_ids())


def test_after_the_block_nothing_is_left(kind: str, backend: str) -> None:
    model, rows = shared(kind, backend), rows_of(9, 6)
    before, hooks = model.logits(rows, keep=6), hooks_of(model)
    with model.applied(Ablate(unit(), sites_of(ROTARY_POINTS, range(N_LAYERS)))):
        assert hooks_of(model) > hooks
        model.logits(rows)
    assert hooks_of(model) == hooks
    assert torch.equal(model.logits(rows, keep=6), before)


def test_an_exception_inside_the_block_removes_the_hooks(backend: str) -> None:
    model, rows = shared(backend=backend), rows_of(9, 6)
    before, hooks = model.logits(rows), hooks_of(model)
    with (
        pytest.raises(KeyError, match=r"mine"),
        model.applied(Ablate(unit(), everywhere(N_LAYERS))),
    ):
        raise KeyError("mine")  # and not the error of a plan that never ran
    outer = Ablate(unit(), Site(0, "resid_mid"))
    with pytest.raises(KeyError, match=r"mine"), model.applied(outer), model.applied(outer):
        raise KeyError("mine")
    assert hooks_of(model) == hooks and not len(model.active_plan)
    assert torch.equal(model.logits(rows), before)


def test_a_failed_capture_removes_its_hooks(backend: str) -> None:
    model = shared(backend=backend)
    hooks = hooks_of(model)

    def fail(x: Tensor, batch: Any) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"mine"):
        list(model.stream(rows_of(5), capture={Site(1, "resid_mid"): fail}))
    assert hooks_of(model) == hooks
    model.logits(rows_of(5))


def test_hooks_write_nothing_in_place(backend: str) -> None:
    """Weights stay as they are: an embedding row edited in place would be edited for good."""
    model, rows = shared(backend=backend), rows_of(9, 6)
    before = model.fingerprint
    with model.applied(Add(unit(), sites_of(ROTARY_POINTS, range(N_LAYERS)))):
        model.generate(rows, max_new_tokens=3)
    assert model.fingerprint == before


# --------------------------------------------------------------------------------- what is refused


def test_a_plan_that_never_fires_is_an_error(backend: str) -> None:
    model = shared(backend=backend)
    never = pytest.raises(PlanError, match=r"1 of 1 sites of the plan were never written")
    with never, model.applied(Ablate(unit(), Site(0, "resid_mid"))):
        pass


def test_a_plan_on_generated_positions_where_nothing_is_generated(backend: str) -> None:
    model = shared(backend=backend)
    late, rows = Ablate(unit(), Site(0, "resid_mid"), positions="generated"), rows_of(5, 7)
    plain = model.logits(rows)
    with model.applied(late):
        assert torch.equal(model.logits(rows), plain)
    with model.applied(late):
        model.generate(rows, max_new_tokens=1)
    with pytest.raises(PlanError, match=r"nothing ran inside the block"), model.applied(late):
        pass


def test_an_empty_plan_is_no_plan(backend: str) -> None:
    model, rows = shared(backend=backend), rows_of(9, 6)
    before = model.logits(rows)
    with model.applied(Plan()):
        assert torch.equal(model.logits(rows), before)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    (
        (
            Ablate(unit(), [Site(0, "resid_pre"), Site(7, "mlp_out")]),
            ModelError,
            r"no layer 7.*layers 0 to 2",
        ),
        (
            Ablate(torch.ones(8), Site(0, "resid_pre")),
            PlanError,
            r"d_model 8, the model 32: it was made for another",
        ),
    ),
    ids=("layer", "d_model"),
)
def test_a_plan_for_another_model_is_refused_before_any_hook(
    backend: str, plan: Any, error: type[Exception], message: str
) -> None:
    model = shared(backend=backend)
    hooks = hooks_of(model)
    with pytest.raises(error, match=message), model.applied(plan):
        pytest.fail("the block must not be entered")
    assert hooks_of(model) == hooks
