"""Affine edits, joint edits and affine concept editing: theorems in float64, data, bad input."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.subspaces import Subspace
from interp_ablate.edits.affine_concept import affine_concept_edit
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.joint import ablate_by_site, ablate_sets, jointly
from interp_ablate.edits.kinds import Ablate, Add, Clamp, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.sites import Site

D = 12
PRE, POST, EMBED = Site(2, "resid_pre"), Site(2, "resid_post"), Site(0, "embed")
ATTN, MLP = Site(1, "attn_out"), Site(1, "mlp_out")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed: int = 99) -> Tensor:
    return 3 * draw(seed, 4, 7, D) + 1


def exactly(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def affine(seed: int = 0, k: int = 3, sites: Any = PRE, **options: Any) -> AffineEdit:
    shift = options.pop("shift", draw(seed + 2, D))
    return AffineEdit(draw(seed, k, D), draw(seed + 1, k, D), sites, shift=shift, **options)


# --------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_the_map_is_its_formula(strength: float) -> None:
    x, write, read, shift = stream(), draw(0, 3, D), draw(1, 3, D), draw(2, D)
    edit = AffineEdit(write, read, PRE, shift=shift, strength=strength)
    expected = x + strength * sum((x @ read[k])[..., None] * write[k] for k in range(3))
    exactly(edit.map_at(PRE)(x), expected + strength * shift)
    exactly(edit.times(0.5).map_at(PRE)(x), (x + edit.map_at(PRE)(x)) / 2)
    assert edit.d_model == D and edit.rank == 3
    assert not edit.map_at(PRE).is_linear and edit.without_shift().map_at(PRE).is_linear


def test_the_other_kinds_are_affine_edits() -> None:
    x, r = stream(), draw(3, D)
    unit = r / r.norm()
    clamp = AffineEdit(-unit, unit, PRE, shift=2.5 * unit)
    exactly(clamp.map_at(PRE)(x), Clamp(r, PRE, value=2.5).map_at(PRE)(x))
    assert clamp.is_projection and not clamp.times(0.5).is_projection
    assert not affine().is_projection
    moved = AffineEdit(-unit, unit, PRE, shift=2.5 * unit + 0.1 * draw(4, D))
    assert not moved.is_projection  # what it adds across is added again


def test_json_keeps_every_bit(tmp_path: Path) -> None:
    sites = (PRE, MLP)
    plan = Plan(
        (affine(sites=sites, strength=(1 / 3, 0.2), positions="prompt", label="x"), affine(5))
    )
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.fingerprint == plan.fingerprint
    for ours, theirs in zip(plan, back, strict=True):
        for site in ours.sites:
            for part in ("left", "right", "shift"):
                a, b = (getattr(edit.map_at(site), part) for edit in (ours, theirs))
                assert torch.equal(a, b)
    assert list(plan.to_dict()["edits"][0]) == [
        "op", "strength", "sites", "positions", "label", "write", "read", "shift"
    ]  # fmt: skip
    assert repr(plan.edits[1]) == "<affine given at 1 site, rank 3, with a shift, strength 1>"
    moved = plan.edits[0].at_sites([(MLP, ATTN)])
    assert moved.sites == (ATTN,) and moved.amounts == (0.2,)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AffineEdit(draw(0, 2, D), draw(1, 3, D), PRE), r"one shape \[k, d_model\]"),
        (lambda: affine(shift=draw(0, D - 1)), r"one shape \[k, d_model\]"),
        (lambda: affine(shift=math.nan * draw(0, D)), "must be finite"),
        (lambda: AffineEdit(1e300 * draw(0, 2, D), draw(1, 2, D), PRE), "at most 1e\\+09"),
        (lambda: AffineEdit(draw(0, 2, 2, D), draw(1, 2, D), PRE), r"shape \[k, d_model\]"),
        (lambda: AffineEdit("x", draw(1, 2, D), PRE), "is a tensor"),  # type: ignore[arg-type]
        (lambda: AffineEdit(0 * draw(0, 2, D), 0 * draw(1, 2, D), PRE), "is zero"),
        (lambda: affine(sites=[]), "one or more sites"),
        (lambda: affine(strength=math.inf), "strength must be finite"),
        (lambda: affine(positions="last"), "'last'"),
        (lambda: affine().map_at(PRE, torch.ones(D)), "before a norm"),
        (lambda: affine().map_at(POST), "has no map at"),
    ],
)
def test_bad_input(make: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


@pytest.mark.parametrize(
    ("field", "value"), [("write", ...), ("shift", [1.0]), ("read", ["a"]), ("strength", "1")]
)
def test_bad_json(field: str, value: Any) -> None:
    data = json.loads(json.dumps(Plan((affine(),)).to_dict()))
    if value is ...:
        del data["edits"][0][field]
    else:
        data["edits"][0][field] = value
    with pytest.raises(PlanError):
        Plan.from_dict(data)


# --------------------------------------------------------------------------------- joint edits


def projections(seed: int = 0) -> list[Any]:
    """Edits whose directions are not orthogonal, with what each dot product is after them."""
    return [
        Ablate(draw(seed, D), PRE),
        Ablate(draw(seed + 1, 2, D) + draw(seed, D), PRE, strength=0.4),
        Clamp(draw(seed + 2, D) + draw(seed, D), PRE, value=1.5),
        Erase(draw(seed + 3, D), draw(seed + 3, D) + draw(seed, D), PRE, strength=0.7, value=-2.0),
    ]


def test_each_dot_product_is_what_its_edit_alone_makes_it() -> None:
    x, edits = stream(), projections()
    for count in range(2, 5):
        for some in itertools.permutations(edits, count):
            (joint,) = jointly(some)
            after = joint.map_at(PRE)(x)
            for edit in some:
                read = edit.vectors[1:] if isinstance(edit, Erase) else edit.vectors
                exactly(after @ read.T, edit.map_at(PRE)(x) @ read.T)
            write = torch.cat([e.vectors[:1] if isinstance(e, Erase) else e.vectors for e in some])
            basis = torch.linalg.qr(write.T)[0]
            away = after - x
            exactly(away @ basis @ basis.T, away)  # it writes along them only
    inorder = Plan(tuple(edits)).maps_at(PRE)[0][1](x)
    assert (
        inorder @ edits[0].vectors.T
    ).abs().max() > 0.1  # the fault: in turn they undo each other


def test_the_order_of_joint_edits_does_not_matter() -> None:
    x, edits = stream(), projections(7)
    first = jointly(edits).edits[0].map_at(PRE)(x)
    for some in itertools.permutations(edits):
        exactly(jointly(some).edits[0].map_at(PRE)(x), first)


def test_whole_ablations_are_the_ablation_of_their_subspace() -> None:
    v = draw(0, 3, D)
    (joint,) = jointly(Plan((Ablate(v[0], (PRE, MLP)), Ablate(v[1:], (PRE, MLP)))))
    assert isinstance(joint, Ablate)
    exactly(joint.map_at(PRE)(stream()), Ablate(v, PRE).map_at(PRE)(stream()))
    (again,) = jointly([Ablate(v[0], PRE), Ablate(v[0], PRE), Ablate(v[:2], PRE)])
    assert len(again.vectors) == 2  # one in the span of another counts once


def test_one_edit_is_joint_as_it_is_and_one_of_strength_0_has_no_part() -> None:
    one, other = Ablate(draw(0, D), (PRE, MLP)), draw(1, D)
    exactly(jointly(one).edits[0].map_at(PRE)(stream()), one.map_at(PRE)(stream()))
    # without a part in the subspace: nothing along it is taken out, and it may depend on the others
    for nothing in (
        Ablate(other, PRE, strength=0.0),
        Erase(draw(0, D), draw(0, D), PRE, strength=0.0, value=3.0),
    ):
        plan = jointly([one, nothing])
        exactly(plan.maps_at(PRE)[0][1](stream()), one.map_at(PRE)(stream()))
    assert jointly([Ablate(other, PRE, strength=0.0)]) == Plan()
    zero = jointly([Clamp(other, PRE, value=0.0)])
    exactly(zero.maps_at(PRE)[0][1](stream()), Ablate(other, PRE).map_at(PRE)(stream()))


def test_sites_are_joined_where_they_are_shared() -> None:
    first = Ablate(draw(0, D), (PRE, MLP, ATTN), strength=(1.0, 0.5, 1.0), label="a")
    second = Ablate(draw(1, D), (PRE, MLP), label="b")
    plan = jointly(Plan((first, second)))
    assert set(plan.sites) == {PRE, MLP, ATTN} and len(plan) == 3
    x = stream()
    for site in (PRE, MLP):
        [(_, each)] = plan.maps_at(site)
        exactly(each(x) @ second.vectors.T, 0 * x[..., :1])
        exactly(each(x) @ first.vectors.T, (0.0 if site == PRE else 0.5) * (x @ first.vectors.T))
    exactly(plan.maps_at(ATTN)[0][1](x), first.map_at(ATTN)(x))
    assert {edit.label for edit in plan} == {"a", "a and b"}


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([Add(draw(0, D), PRE)], "has no part in a joint edit"),
        ([Ablate(draw(0, D), MLP, norm_preserving=True)], "has no part in a joint edit"),
        ([Ablate(draw(0, D), PRE), Clamp(draw(0, D), PRE, value=1.0)], "not linearly independent"),
        (
            [Ablate(draw(0, D), PRE), Ablate(draw(1, D), PRE, positions="prompt")],
            "different positions",
        ),
    ],
)
def test_what_cannot_be_joint(edits: list[Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        jointly(edits)


def test_lists_and_subspaces_are_ablated_together(caplog: pytest.LogCaptureFixture) -> None:
    one, two = Direction(draw(0, D), 2.0, PRE), Direction(draw(1, D) + draw(0, D), 1.0, POST)
    edit = Ablate([one, two], PRE)
    assert edit.label == f"{one.name} and {two.name}"
    after = edit.map_at(PRE)(stream())
    for each in (one, two):
        exactly(after @ each.vector.to(after), 0 * after[..., 0])
    basis = torch.linalg.qr(draw(3, D, 2))[0].T
    space = Subspace(basis, PRE)
    exactly(Ablate(space, PRE).vectors, basis)
    assert Ablate(space, PRE).label == space.name
    exactly(
        Ablate([one, space], PRE).map_at(PRE)(stream()) @ basis.T, torch.zeros(4, 7, 2).double()
    )
    with pytest.raises(PlanError, match="one d_model"):
        Ablate([draw(0, D), draw(0, D - 1)], PRE)
    Plan((Ablate(one, PRE), Ablate(two, PRE)))
    assert "jointly(plan)" in caplog.text


class TwoLayers:
    n_layers = 2
    writers = (EMBED, *(Site(i, p) for i in range(2) for p in ("attn_out", "mlp_out")))  # type: ignore[arg-type]


def test_sets_of_directions_by_site_and_by_layer() -> None:
    one, two = draw(0, D), draw(1, D)
    plan = ablate_by_site({PRE: [one, two], "blocks.1.hook_mlp_out": one}, strength=0.5)
    x = stream()
    exactly(plan.maps_at(PRE)[0][1](x) @ two, 0.5 * (x @ two))
    assert plan.sites == (MLP, PRE)
    layers = ablate_sets(TwoLayers(), {0: [one, two], -1: two})
    assert layers.sites == TwoLayers.writers[1:]
    exactly(layers.maps_at(ATTN)[0][1](x), Ablate(two, ATTN).map_at(ATTN)(x))
    exactly(layers.maps_at(Site(0, "mlp_out"))[0][1](x) @ one, 0 * x[..., 0])
    with pytest.raises(PlanError, match="no layers"):
        ablate_sets(TwoLayers(), {2: one})
    with pytest.raises(PlanError, match="from sites to their directions"):
        ablate_by_site({})


# --------------------------------------------------------------------------------- ACE


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_ace_is_its_formula(alpha: float) -> None:
    found, negatives, x = Direction(draw(0, D), 2.5, PRE), draw(4, 9, D) + 1, stream()
    edited = affine_concept_edit(found, negatives, PRE, alpha=alpha).map_at(PRE)(x)
    raw, mean = found.raw.double(), negatives.mean(0)

    def proj(y: Tensor) -> Tensor:
        return (y @ raw / (raw @ raw))[..., None] * raw

    exactly(edited, x - proj(x) + proj(mean) + alpha * raw)
    by_mean = affine_concept_edit(found, {PRE: mean}, alpha=alpha)
    exactly(by_mean.map_at(PRE)(x), edited)
    half = affine_concept_edit(found, negatives, PRE, alpha=alpha, strength=0.5)
    exactly(half.map_at(PRE)(x), (x + edited) / 2)


def test_ace_at_writers_sums_to_the_mean_of_the_stream() -> None:
    found = Direction(draw(0, D), 2.5, PRE)
    writers = list(TwoLayers.writers)
    parts = {site: draw(10 + i, 9, D) for i, site in enumerate(writers)}
    stream_mean = sum(parts.values()).mean(0) @ found.vector.double()  # type: ignore[union-attr]
    x = {site: draw(50 + i, 3, D) for i, site in enumerate(writers)}
    for negatives in (parts, sum(parts.values())):
        edit = affine_concept_edit(found, negatives, writers, alpha=2.0)  # type: ignore[arg-type]
        total = sum(edit.map_at(site)(x[site]) for site in writers) @ found.vector.double()
        exactly(total, (stream_mean + 2.0 * found.norm).expand(3))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_ace_tells_of_a_writer_missing_within_a_layer(
    missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream then has not the mean that was given."""
    found, writers = Direction(draw(0, D), 2.5, PRE), list(TwoLayers.writers)
    affine_concept_edit(found, draw(4, 9, D), writers)
    affine_concept_edit(found, {site: draw(4, 9, D) for site in writers[1:]})
    assert not caplog.messages
    left_out = writers.pop(missing)
    affine_concept_edit(found, draw(4, 9, D), writers)
    (message,) = caplog.messages
    assert f"{left_out} is not among its sites (1 of 4 are missing)" in message


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: affine_concept_edit(d.vector, draw(1, D), PRE), "takes a Direction"),
        (lambda d: affine_concept_edit(d, draw(1, D)), "needs sites"),
        (lambda d: affine_concept_edit(d, draw(1, D), (ATTN, MLP)), "without the embedding"),
        (
            lambda d: affine_concept_edit(
                d, draw(1, D), TwoLayers.writers[:1] + TwoLayers.writers[3:]
            ),
            "of layer 0",
        ),
        (lambda d: affine_concept_edit(d, None, PRE), "got None"),
        (lambda d: affine_concept_edit(d, {PRE: [[1.0], [1.0, 2.0]]}), "are a tensor"),
        (lambda d: affine_concept_edit(d, {PRE: draw(1, D)}, (PRE, POST)), "no negatives at"),
        (lambda d: affine_concept_edit(d, draw(1, D - 1), PRE), r"\[prompt, d_model\]"),
        (lambda d: affine_concept_edit(d, math.nan * draw(1, D), PRE), "NaN"),
        (lambda d: affine_concept_edit(d, draw(1, D), PRE, alpha=math.inf), "alpha is a finite"),
    ],
)
def test_ace_refuses_in_words(make: Callable[[Direction], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make(Direction(draw(0, D), 2.5, PRE))
