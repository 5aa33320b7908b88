"""Writers of one site: what each map does to each row, against its formula in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import D_MODEL, unit
from torch import Tensor
from torch.testing import assert_close

from interp_ablate import Ablate, Add, Clamp, Plan, Site
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.batches import pad_left
from interp_ablate.models.plan_hooks import Maps, SiteWriter

SITE, EMBED = Site(1, "resid_post"), Site(0, "embed")
OBLIQUE = Erase(unit(4) + 0.5 * unit(5), unit(5), SITE, strength=0.6, value=1.5)
EDITS = {
    "rank 1": Ablate(unit(1), SITE, strength=0.7),
    "rank 3": Ablate(unit(2, k=3), SITE, strength=1.3),
    "rank 6": Ablate(unit(3, k=6), SITE),
    "shift": Add(3 * unit(6), SITE, coefficient=0.5),
    "rank 1 and shift": Clamp(unit(7), SITE, value=2.0),
    "oblique": OBLIQUE,
}
PLANS = {name: Plan((edit,)) for name, edit in EDITS.items()}
PLANS["two"] = Plan((EDITS["rank 3"], EDITS["shift"], EDITS["oblique"]))


def stream(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, D_MODEL, generator=generator, dtype=torch.float64) + 0.5


def step_of(
    lengths: Sequence[int], prompts: Sequence[int], plans: Tensor | None = None
) -> ForwardCall:
    """Left-padded rows of some lengths, of which the first tokens are prompt."""
    tokens, mask = pad_left([[1] * length for length in lengths])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return ForwardCall(tokens, mask, positions, torch.tensor(prompts), None, plans)


def by_hand(maps: Maps, x: Tensor, generated: Tensor | None = None) -> Tensor:
    """The maps one after the other in float64, each at its positions."""
    for kind, affine in maps:
        changed = affine(x)
        if kind == "all":
            x = changed
            continue
        assert generated is not None
        x = torch.where((generated if kind == "generated" else ~generated)[..., None], changed, x)
    return x


@pytest.mark.parametrize("name", PLANS)
def test_one_plan_is_its_map(name: str) -> None:
    maps, x = PLANS[name].maps_at(SITE), stream(2, 5)
    before, writer = x.clone(), SiteWriter(SITE, [maps], D_MODEL)
    got = writer(x, None)
    assert torch.equal(x, before)  # new tensors, nothing in place
    assert_close(got, by_hand(maps, x), rtol=1e-13, atol=1e-13)
    assert (got - x).abs().max() > 0.1
    flat = writer(x.view(-1, D_MODEL), None)  # some MLPs see [batch * pos, d_model]
    assert flat.shape == (10, D_MODEL)
    assert_close(flat.view(x.shape), got, rtol=1e-13, atol=1e-13)


def test_an_erasure_by_its_formula() -> None:
    """Not by what `Affine` makes of it."""
    x = stream(2, 5)
    got = SiteWriter(SITE, [PLANS["oblique"].maps_at(SITE)], D_MODEL)(x, None)
    along = x @ OBLIQUE.read
    assert_close(got @ OBLIQUE.read, along + 0.6 * (OBLIQUE.values[0] - along))
    left = got - x
    assert_close(left, (left @ OBLIQUE.write)[..., None] * OBLIQUE.write)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15), (torch.float16, 0.02)]
)
def test_the_dtype_is_that_of_the_activations(dtype: torch.dtype, tolerance: float) -> None:
    maps = [plan.maps_at(SITE) for plan in PLANS.values()]
    x = stream(len(maps), 4)
    step = step_of([4] * len(maps), [4] * len(maps), torch.arange(len(maps)))
    got = SiteWriter(SITE, maps, D_MODEL)(x.to(dtype), step)
    assert got.dtype == dtype
    want = torch.stack([by_hand(each, row) for each, row in zip(maps, x)])
    assert_close(got.double(), want, rtol=0, atol=tolerance)
    alone = SiteWriter(SITE, maps[-1:], D_MODEL)
    single, again = alone(x.to(dtype), None), alone(x, None)  # what is kept is kept by dtype
    assert (single.dtype, again.dtype) == (dtype, x.dtype)
    assert_close(again, by_hand(maps[-1], x), rtol=1e-12, atol=1e-12)
    assert_close(single.double(), again, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ranks", ("small", "large"))
def test_a_plan_a_row(ranks: str) -> None:
    """Plans of different ranks, one without any edit here; rows in any order, one plan for several."""
    names = [name for name in PLANS if ranks == "large" or name in ("rank 1", "shift", "oblique")]
    maps: list[Maps] = [*(PLANS[name].maps_at(SITE) for name in names), []]
    of_row = torch.tensor([len(names), 2, 0, 0, 1, *range(len(maps))])
    n = len(of_row)
    x, step = stream(n, 4), step_of([4] * n, [4] * n, of_row)
    writer = SiteWriter(SITE, maps, D_MODEL)
    got = writer(x, step)
    want = torch.stack([by_hand(maps[i], row) for i, row in zip(of_row.tolist(), x)])
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[0], x[0]) and (got[1:5] - x[1:5]).abs().amax((1, 2)).min() > 0.1
    flat = writer(x.view(-1, D_MODEL), step)
    assert_close(flat.view(x.shape), got, rtol=1e-13, atol=1e-13)
    # rows leave a batch while it is decoded
    some = torch.tensor([5, 1, 4])
    fewer = writer(x[some, -1:], step_of([1] * 3, [9] * 3, of_row[some]))
    assert_close(fewer, got[some, -1:], rtol=1e-12, atol=1e-12)
    same = writer(x, step)
    assert torch.equal(same, got)


def test_positions() -> None:
    """A row's prompt is counted from the row's own start, behind the padding."""
    plan = Plan(
        (
            Ablate(unit(1), SITE, positions="prompt"),
            Add(2 * unit(2), SITE, positions="generated"),
            Clamp(unit(3), SITE, value=1.0),
        )
    )
    maps, x = plan.maps_at(SITE), stream(3, 6)
    step = step_of([6, 4, 5], [3, 4, 1])
    got = SiteWriter(SITE, [maps], D_MODEL)(x, step)
    generated = torch.tensor(
        [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool
    )
    real = step.mask.bool()
    want = by_hand(maps, x, generated)
    assert_close(got[real], want[real], rtol=1e-13, atol=1e-13)
    assert (by_hand(maps, x, ~generated) - want)[real].abs().max() > 0.1


@pytest.mark.parametrize(("prompt", "there"), [(6, "prompt"), (0, "generated")])
def test_what_is_not_in_this_step_stays_as_it_is(prompt: int, there: str) -> None:
    x, step = stream(1, 6), step_of([6], [prompt])
    for positions in ("prompt", "generated"):
        maps = Plan((Ablate(unit(1), SITE, positions=positions),)).maps_at(SITE)  # type: ignore[arg-type]
        got = SiteWriter(SITE, [maps], D_MODEL)(x, step)
        assert_close(got, maps[0][1](x) if positions == there else x, rtol=1e-13, atol=1e-13)


def test_positions_of_a_plan_a_row() -> None:
    """Plans that have different positions at the same place, in each plan's own order."""
    early, late = (
        Ablate(unit(1), SITE, positions="prompt"),
        Add(unit(2), SITE, positions="generated"),
    )
    every, oblique = Ablate(unit(2, k=3), SITE), OBLIQUE
    plans = [
        Plan((early, every, late)),
        Plan((late, oblique, early)),
        Plan((every,)),
        Plan((late,)),
    ]
    maps = [plan.maps_at(SITE) for plan in plans]
    x, step = stream(4, 6), step_of([6] * 4, [3, 2, 4, 5], torch.arange(4))
    got = SiteWriter(SITE, maps, D_MODEL)(x, step)
    generated = torch.arange(6)[None] >= step.prompt_lengths[:, None]
    want = torch.stack([by_hand(m, row, late) for m, row, late in zip(maps, x, generated)])
    assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_norms_are_kept(dtype: torch.dtype) -> None:
    """Rows get the norm back that they had; an addition comes after that; other dtypes are rounded once."""
    plan = Plan((Ablate(unit(2, k=2), EMBED, norm_preserving=True), Add(3 * unit(1), EMBED)))
    x = stream(2, 5).to(dtype)
    x[0, 0] = unit(2, k=2)[0].to(dtype)  # nothing is left of it: it is not scaled up
    wide, before = x.double(), x.clone()
    got = SiteWriter(EMBED, [plan.maps_at(EMBED)], D_MODEL, norm_kept=True)(x, None)
    assert got.dtype == dtype and torch.equal(x, before)
    basis = plan.edits[0].vectors
    inside = wide - (wide @ basis.T) @ basis
    kept = inside * (wide.norm(dim=-1) / inside.norm(dim=-1))[..., None]
    kept[0, 0] = 0
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    assert_close(got.double(), kept + 3 * unit(1), rtol=0, atol=tolerance)
    plain = SiteWriter(EMBED, [plan.maps_at(EMBED)], D_MODEL)(x, None)
    assert (plain - got).abs().max() > 0.1


def test_what_only_the_model_knows_is_asked_of_it() -> None:
    maps, x = [PLANS[name].maps_at(SITE) for name in ("rank 1", "shift")], stream(2, 3)
    for step in (None, step_of([3, 3], [3, 3])):
        with pytest.raises(PlanError, match=r"whose: use model\.generate"):
            SiteWriter(SITE, maps, D_MODEL)(x, step)
    late = Plan((Ablate(unit(1), SITE, positions="generated"),)).maps_at(SITE)
    with pytest.raises(PlanError, match=r"'generated' positions.*model\.generate"):
        SiteWriter(SITE, [late], D_MODEL)(x, None)


def test_gradients_flow_through() -> None:
    """Scores of edited activations can be followed back to what came in."""
    maps = [PLANS["two"].maps_at(SITE), PLANS["rank 6"].maps_at(SITE)]
    x = stream(2, 3).requires_grad_()
    got = SiteWriter(SITE, maps, D_MODEL)(x, step_of([3, 3], [3, 3], torch.arange(2)))
    weight = stream(2, 3, seed=1)
    (gradient,) = torch.autograd.grad((got * weight).sum(), x)
    y = x.detach().requires_grad_()
    want = torch.stack([by_hand(each, row) for each, row in zip(maps, y)])
    (expected,) = torch.autograd.grad((want * weight).sum(), y)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
