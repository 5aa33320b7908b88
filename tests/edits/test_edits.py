"""Edits and plans: the affine maps as theorems in float64, plans as data, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import Affine, rescale_rows, through_gain
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Ablate, Add, Clamp, Edit, Erase
from interp_ablate.edits.plan import Plan, band, everywhere
from interp_ablate.errors import PlanError
from interp_ablate.sites import RESIDUAL_POINTS, WRITER_POINTS, Point, Site

D = 12
SEEDS = range(5)
PRE, POST = Site(2, "resid_pre"), Site(2, "resid_post")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed: int = 99) -> Tensor:
    return 3 * draw(seed, 4, 7, D) + 1


def direction(seed: int = 0, norm: float = 2.5) -> Direction:
    return Direction(draw(seed, D), norm, PRE)


def affine(seed: int, k: int) -> Affine:
    return Affine(draw(seed, D, k), draw(seed + 1000, D, k), draw(seed + 2000, D))


def only(edit: Edit) -> Affine:
    return edit.map_at(edit.sites[0])


def exactly(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------- affine maps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ranks", [(1, 1), (0, 2), (3, 0), (2, 3), (1, 2, 0, 1)])
def test_composition_is_application_in_turn(seed: int, ranks: tuple[int, ...]) -> None:
    maps = [affine(seed + i, k) for i, k in enumerate(ranks)]
    x = stream(seed)
    expected, composed = x, Affine.identity(D)
    for each in maps:
        expected, composed = each(expected), composed.then(each)
    exactly(composed(x), expected)
    left = maps[0]
    for each in maps[1:]:
        left = left.then(each)
    exactly(left(x), expected)  # associative, and the identity is neutral


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_is_the_map_without_its_shift(seed: int) -> None:
    each, x, y = affine(seed, 2), stream(seed), stream(seed + 1)
    exactly(each.linear(x + y), each.linear(x) + each.linear(y))
    exactly(each(x) - each.linear(x), each.shift.expand_as(x))
    assert not each.is_linear and Affine(each.left, each.right, 0 * each.shift).is_linear


def test_identity_returns_the_same_numbers_and_writes_nothing() -> None:
    x = stream()
    before = x.clone()
    assert torch.equal(Affine.identity(D)(x), x)
    affine(0, 2)(x)
    assert torch.equal(x, before)


def test_to_takes_the_dtype_of_the_stream() -> None:
    each, x = affine(0, 2), stream().bfloat16()
    assert each.to(x)(x).dtype == torch.bfloat16


# --------------------------------------------------------------------------------- ablation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 5, D])
def test_ablation_leaves_nothing_along_and_everything_across(seed: int, k: int) -> None:
    vectors, x = draw(seed, k, D) * 7, stream(seed)
    edit = Ablate(vectors, PRE)
    each = only(edit)
    basis = edit.vectors
    exactly(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    # the span is that of the input: the input has no part outside the basis
    exactly(vectors @ basis.T @ basis, vectors)
    exactly(each(x) @ vectors.T, torch.zeros(4, 7, k, dtype=torch.float64))
    exactly(each(each(x)), each(x))
    across = x - x @ basis.T @ basis
    exactly(each(x), across)
    exactly(each(across), across)
    assert each.is_linear


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.3, 2.0, -1.0])
def test_strength_is_the_share_that_is_removed(strength: float) -> None:
    found, x = direction(), stream()
    edited = only(Ablate(found, PRE, strength=strength))(x)
    exactly(edited @ found.vector, (1 - strength) * (x @ found.vector))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_subspace_does_not_depend_on_scale_order_or_basis(seed: int) -> None:
    vectors, x = draw(seed, 3, D), stream(seed)
    expected = only(Ablate(vectors, PRE, strength=0.7))(x)
    mixed = draw(seed + 5, 3, 3) @ vectors
    scaled = vectors * torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.float64)
    for same in (vectors.flip(0), scaled, mixed):
        assert_close(only(Ablate(same, PRE, strength=0.7))(x), expected, rtol=1e-8, atol=1e-8)


def test_orthonormal_vectors_keep_their_sign_and_a_single_one_its_direction() -> None:
    basis = torch.linalg.qr(draw(0, D, 3))[0].T
    for signs in ([1, 1, 1], [-1, 1, -1], [1, -1, 1]):
        signed = basis * torch.tensor(signs, dtype=torch.float64)[:, None]
        exactly(Ablate(signed, PRE).vectors, signed)
    exactly(Ablate(5 * basis[1], PRE).vectors[0], basis[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_any_dtype_is_kept_as_float64(dtype: torch.dtype) -> None:
    vector = (3 * draw(0, D)).to(dtype)
    assert Ablate(vector, PRE).vectors.dtype == Add(vector, PRE).vectors.dtype == torch.float64
    assert torch.equal(Add(vector, PRE).vectors[0], vector.double())


# --------------------------------------------------------------------------------- add, clamp


@pytest.mark.parametrize("coefficient", [0.0, 1.0, -2.5])
def test_addition_adds_the_raw_vector(coefficient: float) -> None:
    found, x = direction(norm=4.0), stream()
    edited = only(Add(found, PRE, coefficient=coefficient))(x)
    exactly(edited - x, (coefficient * 4.0 * found.vector).expand_as(x))
    given = draw(3, D)
    exactly(only(Add(given, PRE, coefficient=coefficient))(x), x + coefficient * given)


@pytest.mark.parametrize("value", [0.0, 3.0, -1.5])
def test_clamping_sets_the_projection_and_nothing_else(value: float) -> None:
    found, x = direction(), stream()
    each = only(Clamp(found, PRE, value=value))
    edited = each(x)
    exactly(edited @ found.vector, torch.full((4, 7), value, dtype=torch.float64))
    exactly(each(edited), edited)
    exactly(only(Ablate(found, PRE))(edited), only(Ablate(found, PRE))(x))
    exactly(only(Clamp(9 * found.vector, PRE, value=value))(x), edited)
    if value == 0:
        exactly(edited, only(Ablate(found, PRE))(x))


def test_a_number_a_site() -> None:
    sites = (POST, PRE, Site(0, "embed"))
    amounts = (0.25, 0.5, 1.0)
    x, found = stream(), direction()
    edits: list[Edit] = [
        Ablate(found, sites, strength=amounts),
        Add(found, sites, coefficient=list(amounts)),
        Clamp(found, iter(sites), value=amounts),
    ]
    for edit in edits:
        assert edit.sites == sites and edit.amounts == amounts
        for site, amount in zip(sites, amounts):
            kind: Any = type(edit)
            alone = kind(found, site, **{kind.amount: amount})
            exactly(edit.map_at(site)(x), only(alone)(x))


@pytest.mark.parametrize("one", [np.float32(0.5), np.int64(2), torch.tensor(0.5)])
def test_a_number_of_numpy_or_torch_is_a_number(one: Any) -> None:
    assert Ablate(UNIT[0], (PRE, POST), strength=one).amounts == (float(one),) * 2


# --------------------------------------------------------------------------------- plans


def random_plan(seed: int) -> Plan:
    """All operations, ranks, positions, one number and one a site."""
    found = direction(seed, norm=math.pi)
    return Plan(
        (
            Ablate(draw(seed, 3, D), (PRE, POST), strength=(1 / 3, 0.1 + 0.2)),
            Add(found, PRE, coefficient=1e-17, positions="prompt"),
            Clamp(found, (POST, Site(0, "embed")), value=-2 / 3, positions="generated", label="x"),
            Ablate(found, PRE, strength=1.1),
            Erase(draw(seed + 7, D), found, (PRE, POST), strength=(0.7, 1 / 3), value=0.1 + 0.2),
        )
    )


def test_plans_compose_by_appending() -> None:
    first, second = random_plan(0), random_plan(1)
    edits = (*first, *second)
    assert (first + second).edits == edits and len(first + second) == 10
    assert (first + second.edits[0]).edits == (*first.edits, second.edits[0])
    assert len(first) == 5  # nothing is appended in place
    assert first + Plan() == Plan() + first == first
    assert Plan(list(first.edits)) == first and Plan(first.edits[0]) == Plan((first.edits[0],))  # type: ignore[arg-type]
    third = random_plan(2)
    assert (first + second) + third == first + (second + third)
    assert first.sites == (Site(0, "embed"), PRE, POST) and first.d_model == D


@pytest.mark.parametrize("seed", SEEDS)
def test_maps_at_a_site_apply_in_the_order_written(seed: int) -> None:
    plan, x = random_plan(seed), stream(seed)
    (_, middle), (_, add), (_, last) = plan.maps_at(PRE)
    assert [where for where, _ in plan.maps_at(PRE)] == ["all", "prompt", "all"]
    expected = x
    for edit in plan:
        if PRE in edit.sites:
            expected = edit.map_at(PRE)(expected)
    exactly(last(add(middle(x))), expected)
    twice = Plan((Add(draw(1, D), PRE), Ablate(draw(1, D), PRE)))
    [(where, composed)] = twice.maps_at(PRE)
    assert where == "all"
    exactly(composed(x), only(twice.edits[1])(only(twice.edits[0])(x)))
    other = Plan(twice.edits[::-1]).maps_at(PRE)[0][1]
    assert not torch.allclose(other(x), composed(x))
    assert plan.maps_at(Site(9, "resid_pre")) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_json_keeps_every_bit(seed: int, tmp_path: Path) -> None:
    plan = random_plan(seed)
    plan.save(tmp_path / "plan.json")
    back = Plan.load(str(tmp_path / "plan.json"))
    assert back == plan and hash(back) == hash(plan) and back.fingerprint == plan.fingerprint
    assert back.to_dict() == Plan.from_dict(back.to_dict()).to_dict() == plan.to_dict()
    for a, b in zip(plan, back, strict=True):
        assert torch.equal(a.vectors, b.vectors) and a.vectors.dtype == b.vectors.dtype
        assert (a.sites, a.amounts, a.positions, a.label) == (
            b.sites,
            b.amounts,
            b.positions,
            b.label,
        )
        for site in a.sites:
            ours, theirs = a.map_at(site), b.map_at(site)
            for part in ("left", "right", "shift"):
                assert torch.equal(getattr(ours, part), getattr(theirs, part))
    json.dumps(plan.to_dict(), allow_nan=False)


def test_equality_and_hash_are_of_the_content() -> None:
    found = direction()
    base = Plan((Ablate(found, PRE),))
    assert base == Plan((Ablate(found, PRE),)) and len({base, Plan((Ablate(found, PRE),))}) == 1
    others = [
        Plan(),
        Plan((Ablate(found, POST),)),
        Plan((Ablate(found, PRE, strength=0.5),)),
        Plan((Ablate(found, PRE, positions="prompt"),)),
        Plan((Ablate(found, PRE, label="y"),)),
        Plan((Ablate(direction(1), PRE),)),
        Plan((Clamp(found, PRE, value=1.0),)),
        base + base,
    ]
    assert len({base, *others}) == len(others) + 1 and base != "a plan"


def test_load_takes_any_object_with_a_plan(tmp_path: Path) -> None:
    plan, path = random_plan(0), tmp_path / "selected.json"
    path.write_text(json.dumps({"plan": plan.to_dict(), "test": {"behaviour_after": 0.0}}))
    assert Plan.load(path) == plan


def test_labels() -> None:
    found = direction()
    assert Ablate(found, PRE).label == found.name and Ablate(found.vector, PRE).label == "given"
    assert Add(found, PRE, label="mine").label == "mine"


def test_repr_says_what_where_and_how_much() -> None:
    found = direction()
    assert (
        repr(Add(found, PRE, coefficient=-2.5)) == f"<add {found.name} at 1 site, coefficient -2.5>"
    )
    plan = band(found, 9, attention=(1.2, 4), mlp=(0.0, 4), width=2)
    assert repr(plan.edits[0]) == f"<ablate {found.name} at 3 sites, strength 0.6 to 1.2>"
    assert repr(plan.edits[0]) in repr(plan)


# --------------------------------------------------------------------------------- before a norm


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_pulled_back_ablation_leaves_nothing_after_the_norm(seed: int, k: int) -> None:
    """Where an RMS norm with this gain follows; and it is not the ablation of the normed output."""
    vectors, gain, x = draw(seed, k, D), 1 + 0.5 * draw(seed + 50, D), stream(seed)
    site = Site(1, "attn_proj")
    edit = Ablate(vectors, site)

    def norm(y: Tensor) -> Tensor:
        return gain * y / y.pow(2).mean(-1, keepdim=True).sqrt()

    after = norm(edit.map_at(site, gain)(x))
    exactly(after @ vectors.T, torch.zeros(4, 7, k, dtype=torch.float64))
    normed = only(edit)(norm(x))
    exactly(normed @ vectors.T, torch.zeros(4, 7, k, dtype=torch.float64))
    assert (after - normed).abs().max() > 1e-2
    assert (norm(only(edit)(x)) @ vectors.T).abs().max() > 1e-2  # the fault: the gain left out
    basis = through_gain(edit.vectors, gain)
    exactly(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    exactly(edit.map_at(site, gain)(x), x - x @ basis.T @ basis)
    exactly(edit.map_at(site, torch.ones(D))(x), only(edit)(x))
    [(_, composed)] = Plan((edit, Ablate(draw(9, D), site, strength=0.5))).maps_at(site, gain)
    other = Ablate(draw(9, D), site, strength=0.5).map_at(site, gain)
    exactly(composed(x), other(edit.map_at(site, gain)(x)))


def test_a_strength_before_a_norm_is_a_share_of_the_projection() -> None:
    site, gain, x = Site(1, "mlp_proj"), 1 + 0.5 * draw(50, D), stream()
    edited = Ablate(direction(), site, strength=0.25).map_at(site, gain)(x)
    along = gain * direction().vector
    exactly(edited @ along, 0.75 * (x @ along))


@pytest.mark.parametrize("edit", [Add(draw(0, D), PRE), Clamp(draw(0, D), PRE, value=1.0)])
def test_nothing_is_added_before_a_norm(edit: Edit) -> None:
    with pytest.raises(PlanError, match=r"before a norm.*attn_out or mlp_out"):
        edit.map_at(PRE, torch.ones(D))
    with pytest.raises(PlanError, match=r"before a norm"):
        Plan((edit,)).maps_at(PRE, torch.ones(D))


# --------------------------------------------------------------------------------- norm-preserving


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_row_keeps_its_norm_and_leaves_the_direction(seed: int, strength: float) -> None:
    vectors, rows = draw(seed, 2, D), draw(seed + 9, 20, D)
    each = only(Ablate(vectors, Site(1, "mlp_out"), strength=strength, norm_preserving=True))
    kept, factor = rescale_rows(rows, each, eps=1e-15)
    exactly(kept.norm(dim=1), rows.norm(dim=1))
    exactly(kept, each(rows) * factor[:, None])
    assert (factor > 1).all()
    if strength == 1:
        exactly(kept @ vectors.T, torch.zeros(20, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_nothing_but_the_direction_stays_small(dtype: torch.dtype) -> None:
    """Its norm given back would be rounding noise at full size."""
    vector = draw(0, D)
    rows = torch.stack([vector, 0 * vector, vector + 0.1 * draw(1, D)]).to(dtype)  # stored so
    each = only(Ablate(vector, Site(1, "mlp_out")))
    kept, factor = rescale_rows(rows.double(), each, eps=torch.finfo(dtype).eps)
    assert factor[:2].tolist() == [1.0, 1.0] and factor[2] > 1
    assert kept[:2].norm() < 1e-5 and torch.isfinite(kept).all()
    exactly(kept[2].norm(), rows[2].double().norm())


@pytest.mark.parametrize("point", WRITER_POINTS)
def test_norm_preserving_is_part_of_the_plan(point: Point, tmp_path: Path) -> None:
    site = Site(0, point)
    plain, kept = (Plan((Ablate(direction(), site, norm_preserving=n),)) for n in (False, True))
    assert "norm_preserving" not in plain.to_dict()["edits"][0]  # plans of before read the same
    assert kept.to_dict()["edits"][0]["norm_preserving"] is True
    assert plain != kept and plain.fingerprint != kept.fingerprint
    for plan in (plain, kept):
        plan.save(tmp_path / "plan.json")
        back = Plan.load(tmp_path / "plan.json")
        assert back == plan and back.edits[0].norm_preserving == plan.edits[0].norm_preserving
    assert kept.norm_preserving_at(site) and plain.norm_preserving_at(site) is None
    assert kept.norm_preserving_at(Site(1, "mlp_out")) is None


def test_norm_preserving_shares_its_site_with_nothing() -> None:
    site, other = Site(1, "mlp_out"), Site(1, "attn_out")
    plan = Plan(
        (
            Ablate(direction(0), (site, other), norm_preserving=True),
            Ablate(direction(1), Site(2, "mlp_out")),
            Add(direction(1), other),  # a bias has no part in it
            Ablate(direction(2), site, strength=0.5),
        )
    )
    assert plan.norm_preserving_at(other) is plan.edits[0]
    assert plan.norm_preserving_at(other) and plan.norm_preserving_at(Site(2, "mlp_out")) is None
    with pytest.raises(PlanError, match=r"2 edits at blocks\.1\.hook_mlp_out.*one subspace"):
        plan.norm_preserving_at(site)


@pytest.mark.parametrize("point", RESIDUAL_POINTS)
def test_norm_preserving_is_for_writers_at_every_position(point: Point) -> None:
    with pytest.raises(PlanError, match=rf"weights of writers.*got .*{point}"):
        Ablate(direction(), [Site(1, "mlp_out"), Site(1, point)], norm_preserving=True)
    with pytest.raises(PlanError, match=r"positions='prompt'"):
        Ablate(direction(), Site(1, "mlp_out"), positions="prompt", norm_preserving=True)


@pytest.mark.parametrize("op", ["add", "clamp"])
def test_only_an_ablation_preserves_norms(op: str) -> None:
    number = {"add": "coefficient", "clamp": "value"}[op]
    sites = ["blocks.1.hook_mlp_out"]
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_dict(spoiled(op=op, sites=sites, norm_preserving=True, **{number: 1.0}))


def test_norm_preserving_in_json_is_true_or_false() -> None:
    for value in ("no", 1, None):
        with pytest.raises(PlanError, match=r'"norm_preserving" of an edit is true or false'):
            Plan.from_dict(spoiled(sites=["blocks.1.hook_mlp_out"], norm_preserving=value))


# --------------------------------------------------------------------------------- bad input

NAN = torch.full((D,), math.nan)
UNIT = torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Ablate(UNIT[0], []), ["one or more sites"]),
        (lambda: Ablate(UNIT[0], "blocks.0.hook_resid"), ["as a site"]),  # type: ignore[arg-type]
        (lambda: Ablate(UNIT[0], [PRE, POST, PRE]), ["twice", "blocks.2.hook_resid_pre"]),
        (lambda: Ablate(torch.zeros(2, 3, D), PRE), ["[d_model]", "(2, 3, 12)"]),
        (lambda: Ablate(torch.zeros(0, D), PRE), ["(0, 12)"]),
        (lambda: Ablate(torch.tensor(1.0), PRE), ["shape"]),
        (lambda: Ablate(NAN, PRE), ["NaN"]),
        (lambda: Add(NAN / 0, PRE), ["NaN or infinity"]),
        (lambda: Clamp(0 * UNIT[0], PRE, value=1), ["zero"]),
        (lambda: Ablate(torch.stack([UNIT[0], 0 * UNIT[0]]), PRE), ["zero"]),
        (lambda: Ablate(torch.stack([UNIT[0], -3 * UNIT[0]]), PRE), ["independent"]),
        (lambda: Ablate(torch.cat([UNIT, UNIT[:1]]), PRE), ["13 directions", "independent"]),
        (lambda: Add(UNIT[:2], PRE), ["add takes one vector", "2 rows"]),
        (lambda: Clamp(UNIT[:2], PRE, value=1), ["clamp takes one vector"]),
        (lambda: Ablate(UNIT[0], PRE, strength=(1, 2)), ["2 values of strength", "1 sites"]),
        (lambda: Add(UNIT[0], (PRE, POST), coefficient=[1]), ["1 values of coefficient"]),
        (lambda: Ablate(UNIT[0], PRE, strength=math.nan), ["strength must be finite"]),
        (lambda: Clamp(UNIT[0], PRE, value=math.inf), ["value must be finite"]),
        (lambda: Ablate(UNIT[0], PRE, positions="last"), ["'last'", "generated"]),  # type: ignore[arg-type]
        (lambda: Plan((Ablate(UNIT[0], PRE), Ablate(torch.ones(3), PRE))), ["[3, 12]"]),
        (lambda: Plan().d_model, ["no edits"]),
        (lambda: Plan((Ablate(UNIT[0], PRE),)) + Add(torch.ones(3), PRE), ["d_model"]),
    ],
)
def test_bad_edits(make: Callable[[], object], parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


def spoiled(**changes: Any) -> dict[str, Any]:
    """A plan's JSON with fields of its only edit changed; ... removes one."""
    data = Plan((Ablate(UNIT[0], PRE),)).to_dict()
    for key, value in changes.items():
        data["edits"][0][key] = value
        if value is ...:
            del data["edits"][0][key]
    return data


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (None, ["not a plan", "interp_ablate.plan/1"]),
        ([], ["not a plan"]),
        ({"edits": []}, ["format"]),
        ({"format": "interp_ablate.plan/2", "edits": []}, ["interp_ablate.plan/1"]),
        ({"format": "interp_ablate.plan/1", "edits": ["ablate"]}, ["cannot be read"]),
        (spoiled(op="remove"), ["remove", "ablate, add, clamp, erase"]),
        (spoiled(op=...), ["'op'"]),
        (spoiled(sites=...), ["'sites'"]),
        (spoiled(vectors=...), ["'vectors'"]),
        (spoiled(strength=...), ["'strength'"]),
        (spoiled(sites=["blocks.0.hook_q"]), ["cannot be read", "hook_q"]),
        (spoiled(sites=[]), ["sites"]),
        (spoiled(sites=3), ["cannot be read"]),
        (spoiled(vectors=[]), ["cannot be read"]),
        (spoiled(vectors=[["a"]]), ["cannot be read"]),
        (spoiled(vectors=[[1.0], [1.0, 2.0]]), ["cannot be read"]),
        (spoiled(vectors=[[0.0] * D]), ["zero"]),
        (spoiled(vectors=[[math.nan] * D]), ["NaN"]),
        (spoiled(strength=math.nan), ["finite"]),
        (spoiled(strength=[1, 2]), ["2 values"]),
        (spoiled(strength=None), ["cannot be read"]),
        (spoiled(positions="first"), ["'first'"]),
    ],
)
def test_bad_json(data: Any, parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(data)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)
    for content in (b"{", b"\xff\xfe", b"", b'{"plan": null}', b"[1]"):
        path.write_bytes(content)
        with pytest.raises(PlanError, match="plan"):
            Plan.load(path)


def test_a_plan_written_by_hand_needs_unit_vectors() -> None:
    """What `to_dict` writes is read bit for bit; anything else would be another edit than the JSON says."""
    first, *_ = UNIT.tolist()
    for rows in ([[2.0] + [0.0] * (D - 1)], [[1.0] * D, [1.0] + [0.0] * (D - 1)]):
        with pytest.raises(PlanError, match="not unit, or not orthonormal"):
            Plan.from_dict(spoiled(vectors=rows))
    for almost, read in ((1 + 1e-13, True), (1 + 1e-9, False)):
        data = spoiled(vectors=[[almost * number for number in first]])
        if read:
            assert Plan.from_dict(data).to_dict() == data
        else:
            with pytest.raises(PlanError, match="not unit"):
                Plan.from_dict(data)
    for vectors in ([[7.0] * D], [[1.0] + [0.0] * (D - 1)]):  # an addition has any length
        data = Plan((Add(torch.tensor(vectors[0]), PRE),)).to_dict()
        assert data["edits"][0]["vectors"] == vectors and Plan.from_dict(data).to_dict() == data


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan.from_dict(spoiled(vectors=[1.0] * D)).d_model,
        lambda: Plan.from_dict(spoiled(op="add", coefficient=1, vectors=UNIT[:2].tolist())),
        lambda: Plan.from_dict(spoiled(op="clamp", value=1, vectors=UNIT[:2].tolist())),
        lambda: Plan.from_dict(spoiled(vectors=[[10**400] * D])),
        lambda: Plan.from_dict(spoiled(strength=True)),
        lambda: Plan.from_dict({"format": "interp_ablate.plan/1", "edits": None}),
        lambda: Plan.from_dict({"format": "interp_ablate.plan/1"}),
        lambda: Plan(("ablate",)),  # type: ignore[arg-type]
        lambda: Plan(3),  # type: ignore[arg-type]
        lambda: Plan() + "ablate",  # type: ignore[operator]
        lambda: Ablate(UNIT[0], 3),  # type: ignore[arg-type]
        lambda: Ablate("a direction", PRE),  # type: ignore[arg-type]
        lambda: Add(None, PRE),  # type: ignore[arg-type]
        lambda: Ablate(UNIT[0], PRE).map_at(POST),
        lambda: Ablate(UNIT[0], PRE, strength=True),
        lambda: Ablate(UNIT[0], PRE, strength=torch.tensor(True)),  # type: ignore[arg-type]
        lambda: Ablate(UNIT[0], (PRE, POST), strength=(1, "2")),  # type: ignore[arg-type]
        lambda: Ablate(UNIT[0], PRE, strength="1"),  # type: ignore[arg-type]
        lambda: Ablate(UNIT[0], PRE, strength=None),  # type: ignore[arg-type]
        lambda: band(direction(), 4, attention=(1, 1), mlp=(1, 1), width=0),
        lambda: band(direction(), 4, attention=(1, 1), mlp=(1, 1), width=-1),
        lambda: band(direction(), 4, attention=(1, 1), mlp=(1, 1), width=math.inf),
        lambda: band(direction(), 4, attention=(-1, 1), mlp=(1, 1), width=1),
        lambda: band(direction(), 4, attention=(1, 1), mlp=(math.nan, 1), width=1),
        lambda: band(direction(), 4, attention=(1, math.nan), mlp=(1, 1), width=1),
        lambda: band(direction(), 4, attention=(1, 9), mlp=(1, -3), width=2),
        lambda: band(direction(), 4, attention=(0, 1), mlp=(0, 1), width=2),
    ],
)
def test_bad_input_is_a_plan_error(make: Callable[[], object]) -> None:
    with pytest.raises(PlanError):
        make()


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    random_plan(0).save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(PlanError, match=r"cannot write .*nowhere\.json"):
        random_plan(1).save(path / "nowhere.json")
    path.with_name("folder").mkdir()
    with pytest.raises(PlanError, match=r"cannot write .*folder"):
        random_plan(1).save(path.with_name("folder"))
    assert Plan.load(path) == random_plan(0)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "plan.json"]


# --------------------------------------------------------------------------------- families


@pytest.mark.parametrize("n_layers", [1, 2, 7])
def test_everywhere_is_every_writer_once(n_layers: int) -> None:
    sites = everywhere(n_layers)
    assert len(set(sites)) == len(sites) == 2 * n_layers + 1 and sites[0] == Site(0, "embed")
    assert {site.point for site in sites} == {"embed", "attn_out", "mlp_out"} < set(WRITER_POINTS)
    assert list(sites) == sorted(sites)


def test_ablating_every_writer_leaves_nothing_in_their_sum() -> None:
    found, sites = direction(), everywhere(4)
    plan = Plan((Ablate(found, sites),))
    total = sum(plan.maps_at(site)[0][1](stream(i)) for i, site in enumerate(sites))
    assert isinstance(total, Tensor)
    exactly(total @ found.vector, torch.zeros(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("width", [0.5, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("centre", [0.0, 4.5, 8.0, 12.0])
def test_a_band_falls_off_linearly_from_its_centre(centre: float, width: float) -> None:
    peaks = {"attn_out": (1.2, centre), "mlp_out": (0.6, 8 - centre)}
    if all(abs(layer - middle) >= width for _, middle in peaks.values() for layer in range(9)):
        with pytest.raises(PlanError, match="reaches none of 9 layers"):
            band(direction(), 9, attention=(1.2, centre), mlp=(0.6, 8 - centre), width=width)
        return
    plan = band(direction(), 9, attention=(1.2, centre), mlp=(0.6, 8 - centre), width=width)
    assert plan.edits
    for edit in plan:
        assert isinstance(edit, Ablate) and edit.positions == "all"
        (point,) = {site.point for site in edit.sites}
        peak, middle = peaks[point]
        strengths = dict(zip((site.layer for site in edit.sites), edit.amounts))
        for layer in range(9):
            expected = peak * (1 - abs(layer - middle) / width)
            assert (layer in strengths) == (expected > 0)
            if expected > 0:
                assert strengths[layer] == pytest.approx(expected, rel=1e-12)
    points = [edit.sites[0].point for edit in plan]
    assert points == sorted(points) and len(points) == len(set(points))


def test_a_band_is_at_the_points_that_are_asked_for() -> None:
    shape: dict[str, Any] = {"attention": (1.2, 4), "mlp": (0.6, 5), "width": 2.5}
    plain = band(direction(), 9, **shape)
    moved = band(direction(), 9, **shape, points=("attn_proj", "mlp_proj"))
    assert [e.amounts for e in moved] == [e.amounts for e in plain]
    assert [[s.layer for s in e.sites] for e in moved] == [
        [s.layer for s in e.sites] for e in plain
    ]
    assert [{s.point for s in e.sites} for e in moved] == [{"attn_proj"}, {"mlp_proj"}]
    assert [{s.point for s in e.sites} for e in plain] == [{"attn_out"}, {"mlp_out"}]


def test_a_strength_of_zero_leaves_its_sites_out() -> None:
    plan = band(direction(), 9, attention=(0.0, 4), mlp=(1.0, 4), width=2)
    assert [edit.sites[0].point for edit in plan] == ["mlp_out"]
    assert [site.layer for site in plan.sites] == [3, 4, 5]


# --------------------------------------------------------------------------------- what was not meant


def test_one_value_at_every_writer_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    sites = [Site(0, "embed"), Site(0, "attn_out"), Site(0, "mlp_out")]
    vector = torch.eye(8)[0]
    Plan((Clamp(vector, sites, value=[1.5, 0, 0]),))
    Plan((Clamp(vector, sites, value=0.0),))
    Plan((Clamp(vector, [Site(0, "resid_pre"), Site(0, "resid_post")], value=1.5),))
    assert not caplog.messages
    Plan((Clamp(vector, sites, value=1.5),))
    (message,) = caplog.messages
    assert "the stream is set to 4.5" in message and "value=[v] + [0] * 2" in message


@pytest.mark.parametrize("conditional", [False, True])
def test_an_erasure_to_one_value_at_every_writer_is_warned_of(
    conditional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`Erase.of` a fitted eraser at all writers set the stream to so many times its centre, in silence."""
    sites, vector = (
        [Site(0, "resid_post"), Site(1, "attn_out"), Site(1, "mlp_out")],
        torch.eye(8)[0],
    )
    condition = Condition(vector, Site(0, "resid_post"), threshold=0.0)
    for value in ([0.0, 1.5, 0.0], 0.0, 1.5):
        edit = Erase(vector, vector, sites, value=value)
        assert not caplog.messages
        Plan((Conditional(edit, condition) if conditional else edit,))
    (message,) = caplog.messages
    assert "sets each of 2 writers to 1.5" in message and "the stream is set to 3" in message


def test_an_ablation_that_a_later_one_undoes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    site, basis = Site(0, "mlp_out"), torch.eye(8)
    oblique = basis[0] + basis[1]
    Plan((Ablate(basis[0], site), Ablate(basis[1], site), Ablate(basis[0], site)))
    Plan((Ablate(basis[0], site), Ablate(oblique, Site(1, "mlp_out"))))
    both = Plan((Ablate(torch.stack([basis[0], oblique]), site),))
    assert not caplog.messages
    plan = Plan((Ablate(basis[0], site), Ablate(oblique, site)))
    (message,) = caplog.messages
    assert "cosine up to 0.71" in message and "Ablate([v1, v2], sites)" in message
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = [
        p.edits[-1].map_at(site)(p.edits[0].map_at(site)(x))[:, 0].abs().max() for p in (plan, both)
    ]
    assert left[0] > 0.1 and left[1] < 1e-12
