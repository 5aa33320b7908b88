"""Erasures: the oblique map as theorems in float64; hooks == weights == reloaded on every kind of block."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import close, edited, hooked_logits, left_along, left_in, logits_of, moved
from tiny import (
    D_MODEL,
    N_LAYERS,
    PARTS,
    EditAt,
    editing,
    gains_of,
    hf_forward,
    rows_of,
    shared,
    source_of,
    unit,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from interp_ablate import Ablate, Add, Clamp, Plan, Site, export_checkpoint, sites_of
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import Affine
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import ExportError, PlanError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.control_vector import write_control_vector
from interp_ablate.models.architectures import architecture_of
from interp_ablate.weights.plan_to_weights import weight_plan
from interp_ablate.weights.weight_form import writers_only_form

ROWS = rows_of(9, 14)
LEFT = 1e-5  # of the stream's norm, along the unit read
PRE, POST = Site(2, "resid_pre"), Site(2, "resid_post")
READ = unit(0)
WRITE = 0.8 * unit(0) + unit(1)  # an angle of 51 degrees, or nearly so
KINDS = (
    "llama_gqa",
    "qwen2",
    "gpt2",
    "llama_biases",
    "gpt_neox",
    "gemma",
    "gemma2",
    "olmo2",
    "mixtral",
)
PRE_NORM = tuple(kind for kind in KINDS if not PARTS[kind].attn_norm)


def stream(seed: int = 99) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, 7, D_MODEL, generator=generator, dtype=torch.float64) + 1


def exactly(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def only(edit: Any, gain: Tensor | None = None) -> Affine:
    return edit.map_at(edit.sites[0], gain)


def gain_of(seed: int = 5) -> Tensor:
    return 1 + 0.6 * unit(seed) * D_MODEL**0.5


# --------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("strength", [1.0, 0.4, 2.0])
def test_the_map_is_its_formula(strength: float, value: float) -> None:
    write, read, x = 7 * WRITE, -3 * READ, stream()
    edited = only(Erase(write, read, PRE, strength=strength, value=value))(x)
    along = x @ read
    exactly(edited @ read, along + strength * (value - along))
    # nothing changes but along write
    exactly(edited, x - strength * (along - value)[..., None] * write / (read @ write))
    if strength == 1:
        exactly(only(Erase(write, read, PRE, value=value))(edited), edited)


def test_vectors_are_scaled_and_the_map_does_not_depend_on_their_lengths() -> None:
    edit, x = Erase(5 * WRITE, READ, PRE, value=1.5), stream()
    assert edit.d_model == D_MODEL and edit.vectors.shape == (2, D_MODEL)
    exactly(edit.write, WRITE / WRITE.norm())
    exactly(edit.read @ edit.write, torch.tensor(1.0, dtype=torch.float64))
    exactly(edit.read / edit.read.norm(), READ)
    for scale in (-1.0, 1e-3, 40.0):
        same = Erase(scale * WRITE, -scale * READ, PRE, value=-scale * 1.5)
        exactly(only(same)(x), only(edit)(x))
    assert_close(only(edit)(x) @ edit.read, torch.full((4, 7), edit.values[0]).double())


def test_ablations_and_clamps_are_the_erasures_whose_write_is_their_read() -> None:
    pairs = [
        (Erase(READ, 3 * READ, PRE, strength=0.3), Ablate(READ, PRE, strength=0.3)),
        (Erase(9 * READ, READ, PRE, value=1.5), Clamp(READ, PRE, value=1.5)),
    ]
    for erase, other in pairs:
        ours, theirs = only(erase), only(other)
        for part in ("left", "right", "shift"):
            assert_close(getattr(ours, part), getattr(theirs, part), rtol=1e-14, atol=1e-15)
    assert not torch.allclose(only(Erase(WRITE, READ, PRE))(stream()), only(pairs[0][1])(stream()))


def test_erasures_compose() -> None:
    x, first, second = stream(), Erase(WRITE, READ, PRE, value=2.0), Ablate(unit(3) + WRITE, PRE)
    third = Erase(unit(4), unit(4) + unit(0), PRE, strength=0.5, value=-1.0)
    [(where, composed)] = Plan((first, second, third)).maps_at(PRE)
    assert where == "all"
    exactly(composed(x), only(third)(only(second)(only(first)(x))))
    assert not only(first).is_linear and only(Erase(WRITE, READ, PRE)).is_linear


def test_numbers_a_site() -> None:
    sites = (POST, PRE, Site(0, "embed"))
    edit = Erase(WRITE, READ, sites, strength=(0.25, 1.0, 0.5), value=[1, 0, -2])
    for site, strength, value in zip(sites, (0.25, 1.0, 0.5), (1, 0, -2)):
        alone = Erase(WRITE, READ, site, strength=strength, value=value)
        exactly(edit.map_at(site)(stream()), only(alone)(stream()))


# --------------------------------------------------------------------------------- from an eraser


@dataclass(frozen=True)
class Fitted:
    write: Tensor
    read: Tensor
    centre: Tensor


def test_an_eraser_becomes_an_edit() -> None:
    found, x = Fitted(4 * WRITE.float(), READ.float() / 3, stream(3)[0, 0].float()), stream()
    edit = Erase.of(found, (PRE, POST), positions="prompt", label="mine")
    assert (edit.sites, edit.positions, edit.label) == ((PRE, POST), "prompt", "mine")
    centre, read, write = (v.double() for v in (found.centre, found.read, found.write))
    exactly(only(edit)(x), x - ((x - centre) @ read)[..., None] * write / (read @ write))
    half = Erase.of(found, PRE, strength=0.5)
    exactly(only(half)(x), (x + only(edit)(x)) / 2)
    with pytest.raises(PlanError, match=r"read and centre of one shape.*\(32,\) and \(31,\)"):
        Erase.of(Fitted(WRITE, READ, torch.ones(31)), PRE)
    with pytest.raises(PlanError, match=r"value must be finite"):
        Erase.of(Fitted(WRITE, READ, math.nan * READ), PRE)


def test_leace_is_an_erasure() -> None:
    """Fitted by its authors' package: the same map, after which the classes have one mean."""
    leace = pytest.importorskip("concept_erasure")
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    labels = torch.arange(400) % 2
    x = torch.randn(400, D_MODEL, generator=generator, dtype=torch.float64) @ mix
    x += labels[:, None] * (unit(1) + 2) + 5
    fitted = leace.LeaceEraser.fit(x, labels)
    edit = Erase.of(Fitted(fitted.proj_left[:, 0], fitted.proj_right[0], fitted.bias), PRE)
    assert_close(only(edit)(x), fitted(x), rtol=1e-8, atol=1e-8)
    assert edit.read.norm() > 1.05  # oblique
    means = [only(edit)(x)[labels == label].mean(0) for label in (0, 1)]
    assert_close(means[0], means[1], rtol=1e-8, atol=1e-8)
    orthogonal = only(Ablate(edit.read, PRE))(x)
    assert (orthogonal[labels == 0].mean(0) - orthogonal[labels == 1].mean(0)).norm() > 1e-2


# --------------------------------------------------------------------------------- before a norm


def normed(y: Tensor, gain: Tensor) -> Tensor:
    return gain * y / y.pow(2).mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_before_a_norm_the_read_is_ablated_and_nothing_of_it_is_left(strength: float) -> None:
    site, gain, y = Site(1, "attn_proj"), gain_of(), stream()
    edit, along = Erase(WRITE, READ, site, strength=strength), gain * READ
    changed = edit.map_at(site, gain)(y)
    exactly(changed @ along, (1 - strength) * (y @ along))
    # the smallest change: along gain * read alone
    exactly(changed, y - strength * ((y @ along) / (along @ along))[..., None] * along)
    exactly(changed, Ablate(READ, site, strength=strength).map_at(site, gain)(y))
    if strength == 1:
        exactly(normed(changed, gain) @ READ, torch.zeros(4, 7, dtype=torch.float64))
        assert (normed(only(edit)(y), gain) @ READ).abs().max() > 1e-2  # the gain left out


def test_a_gain_of_zero_in_some_dimensions_does_no_harm() -> None:
    """In Gemma 3: what would write along `write` behind the norm is infinite there."""
    site, gain, y = Site(1, "mlp_proj"), gain_of(), stream()
    gain[:5], gain[5:9] = 0, 1e-9
    changed = Erase(WRITE, READ, site).map_at(site, gain)(y)
    exactly(normed(changed, gain) @ READ, torch.zeros(4, 7, dtype=torch.float64))
    exactly(changed[..., :5], y[..., :5])
    assert (changed.norm(dim=-1) <= y.norm(dim=-1)).all()


def test_nothing_is_added_before_a_norm() -> None:
    site, gain = Site(1, "attn_proj"), gain_of()
    with pytest.raises(PlanError, match=r"before a norm.*attn_out or mlp_out"):
        Erase(WRITE, READ, site, value=1.0).map_at(site, gain)
    nothing = Erase(WRITE, READ, site, value=1.0, strength=0.0)
    exactly(nothing.map_at(site, gain)(stream()), stream())


# --------------------------------------------------------------------------------- as data


def erasures() -> Plan:
    label = {"label": "x", "positions": "prompt"}
    return Plan(
        (
            Erase(WRITE / 3, math.pi * READ, (PRE, POST), strength=(1 / 3, 1.0), value=(0.1, 0.2)),
            Ablate(READ, PRE),
            Erase(unit(3) + 1e-5 * unit(4), unit(4), PRE, value=1 / 3, **label),  # type: ignore[arg-type]
        )
    )


def test_json_keeps_every_bit(tmp_path: Path) -> None:
    plan = erasures()
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.fingerprint == plan.fingerprint
    assert back.to_dict() == Plan.from_dict(back.to_dict()).to_dict() == plan.to_dict()
    for ours, theirs in zip(plan, back, strict=True):
        assert torch.equal(ours.vectors, theirs.vectors)
        for site in ours.sites:
            for part in ("left", "right", "shift"):
                a, b = (getattr(edit.map_at(site), part) for edit in (ours, theirs))
                assert torch.equal(a, b)
    entry = plan.to_dict()["edits"][0]
    assert entry["op"] == "erase" and list(entry) == [
        "op", "strength", "sites", "positions", "label", "value", "write", "read"
    ]  # fmt: skip
    other = Plan((Erase(WRITE, READ, PRE, value=1.0),))
    assert len({other, Plan((Erase(WRITE, READ, PRE),)), Plan((Ablate(READ, PRE),))}) == 3
    assert Plan((Erase(WRITE, READ, PRE, value=1.0),)) == other


def test_moved_edits_keep_every_bit() -> None:
    edit = erasures().edits[0]
    assert isinstance(edit, Erase)
    here = edit.at_sites([(POST, Site(0, "embed"))])
    assert here.sites == (Site(0, "embed"),)
    assert (here.amounts, here.values) == (edit.amounts[1:], edit.values[1:])
    assert torch.equal(only(here).shift, edit.map_at(POST).shift)
    assert edit.sites == (PRE, POST)  # the first is as it was
    kept = Ablate(READ, [Site(1, "mlp_proj")], norm_preserving=True, label="y", strength=0.5)
    there = kept.at_sites([(Site(1, "mlp_proj"), Site(1, "mlp_out"))])
    assert there.to_dict() == kept.to_dict() | {"sites": ["blocks.1.hook_mlp_out"]}


def test_repr_and_label() -> None:
    found = Direction(READ, 2.0, PRE)
    assert Erase(found, READ, PRE).label == Erase(WRITE, found, PRE).label == found.name
    assert repr(Erase(WRITE, READ, PRE)) == "<erase given at 1 site, strength 1>"
    many = Erase(READ, READ, (PRE, POST), strength=(0.5, 1), value=(0, 2), label="mine")
    assert repr(many) == "<erase mine at 2 sites, strength 0.5 to 1, value 0 to 2>"
    exactly(Erase(found, found, PRE).read, READ)


def spoiled(**changes: Any) -> dict[str, Any]:
    """A plan's JSON with fields of its only edit changed; ... removes one."""
    data = Plan((Erase(torch.eye(4)[0], torch.ones(4), PRE),)).to_dict()
    for key, value in changes.items():
        data["edits"][0][key] = value
        if value is ...:
            del data["edits"][0][key]
    return data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"write": ...}, "lacks or misnames 'write'"),
        ({"read": ...}, "lacks or misnames 'read'"),
        ({"value": ...}, "lacks or misnames 'value'"),
        ({"strength": ...}, "lacks or misnames 'strength'"),
        ({"write": [2.0, 0, 0, 0]}, r"write is not unit, or read \. write is not 1.*Erase\(\.\.\."),
        ({"read": [1 + 1e-9, 0, 0, 0]}, r"write is not unit, or read \. write is not 1"),
        ({"write": [[1.0, 0, 0, 0]]}, r"lists of numbers; got shapes \(1, 4\) and \(4,\)"),
        ({"read": 3}, r"lists of numbers; got shapes \(4,\) and \(\)"),
        ({"read": ["a"]}, "cannot be read"),
        ({"read": [1.0, 0.0]}, "write has d_model 4, read 2"),
        ({"read": [0.0, 1, 0, 0]}, "orthogonal"),
        ({"read": [math.nan, 1, 0, 0]}, "NaN"),
        ({"read": [0.0] * 4}, "zero"),
        ({"value": "1"}, "value is a number"),
        ({"value": None}, "value is a number"),
        ({"value": True}, "value is a number"),
        ({"value": math.inf}, "value must be finite"),
        ({"value": [1, 2]}, "2 values of value for 1 sites"),
        ({"strength": [1, 2]}, "2 values of strength"),
        ({"positions": "last"}, "'last'"),
        ({"sites": [str(PRE)] * 2}, "twice"),
        ({"norm_preserving": True}, "only an ablation preserves norms"),
    ],
)
def test_bad_json(changes: dict[str, Any], said: str) -> None:
    data = json.loads(json.dumps(spoiled(**changes)))
    with pytest.raises(PlanError, match=said):
        Plan.from_dict(data)
    assert Plan.from_dict(spoiled()).to_dict() == spoiled()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Erase(unit(k=2)[0], unit(k=2)[1], PRE), r"orthogonal \(their cosine is"),
        (lambda: Erase(torch.ones(3), torch.ones(4), PRE), "write has d_model 3, read 4"),
        (lambda: Erase(unit(k=2), READ, PRE), r"erase takes one vector \[d_model\]; got 2 rows"),
        (lambda: Erase(WRITE, unit(k=2), PRE), "erase takes one vector"),
        (lambda: Erase(0 * WRITE, READ, PRE), "zero"),
        (lambda: Erase(WRITE, math.nan * READ, PRE), "NaN"),
        (lambda: Erase(WRITE, READ, []), "one or more sites"),
        (lambda: Erase(WRITE, READ, PRE, strength=math.nan), "strength must be finite"),
        (lambda: Erase(WRITE, READ, PRE, value="1"), "value is a number"),  # type: ignore[arg-type]
        (lambda: Erase(WRITE, READ, PRE, value=[1, 2]), "2 values of value for 1 sites"),
        (lambda: Erase(WRITE, 1e-300 * READ, PRE, value=1e3), "in units of the scaled read"),
        (lambda: Erase(WRITE, READ, PRE, positions="first"), "'first'"),  # type: ignore[arg-type]
        (lambda: Erase(WRITE, READ, PRE).map_at(POST), "has no map at"),
        (lambda: Plan((Ablate(READ, PRE), Erase(torch.ones(3), torch.ones(3), PRE))), "d_model"),
        (lambda: Plan((3,)), "Ablate, Add, Clamp and Erase"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(make: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


# --------------------------------------------------------------------------------- the contract


def erasing(plan: Plan, gains: Mapping[Site, Tensor]) -> EditAt:
    """A plan as an `edit` for `hf_forward`, from the formula of each edit and the vectors given here."""

    def edit(site: Site, x: Tensor) -> Tensor:
        for one in plan:
            if not isinstance(one, Erase):
                x = editing(Plan((one,)), gains=gains)(site, x)
            elif site in one.sites:
                i, wide = one.sites.index(site), x.double()
                read, write = one.read, one.write
                if site in gains:
                    read = write = one.read * gains[site]
                along = (wide @ read - one.values[i])[..., None]
                x = (wide - one.amounts[i] * along * write / (read @ write)).to(x.dtype)
        return x

    return edit


def oracle(kind: str, tied: bool, plan: Plan) -> list[Tensor]:
    hf = source_of(kind, tied)
    return [hf_forward(hf, kind, row, erasing(plan, gains_of(hf, kind))) for row in ROWS]


def plans_of(kind: str) -> dict[str, Plan]:
    """Plans of erasures with an exact weight form on an architecture, without values."""
    parts = PARTS[kind]
    writers, (attn, mlp) = parts.writers, parts.points[-2:]
    many = [0.2 + 0.2 * i for i in range(len(writers))]
    band = sites_of((attn, mlp), [1, 2])
    found = {
        "writers": Plan((Erase(WRITE, READ, writers),)),
        "strengths": Plan((Erase(WRITE, READ, writers, strength=many),)),
        "beside others": Plan(
            (
                Erase(WRITE, READ, writers, strength=0.7),
                Ablate(unit(2) + unit(1), band),
                Erase(unit(4), unit(4) + unit(0), band, strength=(0.3, 1.2, 0.9, 0.6)),
            )
        ),
    }
    if not parts.attn_norm:
        found["residual"] = Plan((Erase(WRITE, READ, parts.residual),))
    return found


def values_of(kind: str) -> dict[str, Plan]:
    """Plans that set `read . x` to something."""
    parts = PARTS[kind]
    writers = parts.writers
    once = [1.5 if site == Site(0, "embed") else 0.0 for site in writers]
    found = {}
    if kind not in ("gemma", "gemma2", "olmo2"):
        found["residual value"] = Plan((Erase(WRITE, READ, parts.residual, value=1.5),))
        found["residual clamp"] = Plan((Clamp(READ, parts.residual, value=1.5),))
        found["value at embed"] = Plan((Erase(WRITE, READ, writers, value=once),))
    if kind in ("gpt2", "llama_biases", "gpt_neox"):
        many = [0.5 * i - 1 for i in range(len(writers))]
        found["values"] = Plan((Erase(WRITE, READ, writers, strength=0.8, value=many),))
        found["value, then addition"] = found["values"] + Add(unit(5), Site(1, "resid_post"))
    return found


NOTHING_LEFT = ("writers", "residual")
SET = ("residual value", "residual clamp", "value at embed")
CASES = [
    (kind, tied, name)
    for kind in KINDS
    for tied in (False, True)
    for name in (*plans_of(kind), *values_of(kind))
    if not tied or name in ("strengths", "residual", "residual value")
]


def plan_of(kind: str, name: str) -> Plan:
    return {**plans_of(kind), **values_of(kind)}[name]


@pytest.mark.parametrize(("kind", "tied", "name"), CASES)
def test_hooks_equal_weights_equal_the_oracle(kind: str, tied: bool, name: str) -> None:
    plan, source = plan_of(kind, name), source_of(kind, tied)
    want = oracle(kind, tied, plan)
    assert moved(want, logits_of(source)) > 1e-2
    model = shared(kind, tied=tied)
    close(hooked_logits(model, plan), want)
    hf, done = edited(source, plan, stored=True)
    close(logits_of(hf), want)
    close(hooked_logits(model, done.plan), want)  # what the weights say they do


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, n) for kind in KINDS for n in NOTHING_LEFT if n in plans_of(kind)]
)
def test_nothing_is_left_along_the_read(kind: str, name: str) -> None:
    source = source_of(kind)
    hf, _ = edited(source, plan_of(kind, name))
    assert left_in(hf, kind, READ[None]) < LEFT
    orthogonal, _ = edited(source, Plan((Ablate(WRITE, PARTS[kind].writers),)))
    assert left_in(orthogonal, kind, READ[None]) > 0.05  # the control
    assert left_in(orthogonal, kind, WRITE[None] / WRITE.norm()) < LEFT
    assert left_in(hf, kind, WRITE[None] / WRITE.norm()) > 0.05


def test_nothing_is_left_under_the_hooks(backend: str) -> None:
    for kind, name in (("llama_gqa", "residual"), ("gpt2", "writers")):
        plan, sites = plan_of(kind, name), PARTS[kind].residual
        model = shared(kind, backend)

        def read(look: EditAt, model: Any = model, sites: Any = sites) -> None:
            capture = {site: (lambda x, batch, site=site: look(site, x)) for site in sites}
            list(model.stream(ROWS[:1], capture=capture))

        with model.applied(plan):
            assert left_along(READ[None], read) < LEFT
        close(hooked_logits(model, plan), oracle(kind, False, plan))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in values_of(kind) if name in SET]
)
def test_the_stream_is_at_the_value_everywhere(kind: str, name: str) -> None:
    hf, done = edited(source_of(kind), plan_of(kind, name))
    found: list[float] = []

    def look(site: Site, x: Tensor) -> Tensor:
        if site.point.startswith("resid"):
            found.append(float((x.double() @ READ - 1.5).abs().max()))
        return x

    for row in ROWS:
        hf_forward(hf, kind, row, look)
    assert len(found) > 2 * N_LAYERS and max(found) < 1e-5
    # it is written once, by the embedding: no bias is needed for it
    assert not [n for n, a in done.added.items() if n.endswith("bias") and a.value is not None]
    assert sum(not edit.affine.is_linear for edit in done.edits.values()) == 1


def test_post_norm_blocks_on_the_bridge_leave_nothing() -> None:
    for kind in ("gemma2", "olmo2"):
        model, sites = shared(kind), PARTS[kind].residual

        def read(look: EditAt, model: Any = model, sites: Any = sites) -> None:
            capture = {site: (lambda x, batch, site=site: look(site, x)) for site in sites}
            list(model.stream(ROWS[:1], capture=capture))

        with model.applied(plan_of(kind, "writers")):
            assert left_along(READ[None], read) < LEFT


@pytest.mark.parametrize(
    ("kind", "tied", "name"),
    (
        ("llama_gqa", True, "strengths"),
        ("llama_gqa", True, "residual value"),
        ("gpt2", True, "values"),
        ("gemma2", True, "writers"),
        ("mixtral", False, "beside others"),
    ),
)
def test_exports_reload_and_pass_the_audit(
    kind: str, tied: bool, name: str, tmp_path: Path
) -> None:
    model, plan = shared(kind, tied=tied), plan_of(kind, name)
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 1e-2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(logits_of(reloaded), oracle(kind, tied, plan))
    found = audit(AuditSource.of_model(model), plan, tmp_path / "out")
    assert found.passed and found.edited, found.problems
    other = Plan((Ablate(READ, done_at(kind, plan)),))
    assert not audit(AuditSource.of_model(model), other, tmp_path / "out").passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| erase | `given` | " in card and "| strength " in card and ", value " in card


def done_at(kind: str, plan: Plan) -> list[Site]:
    """Where an ablation has a weight form like the plan's."""
    return PARTS[kind].writers if plan.sites[0].point == "resid_pre" else list(plan.sites)


def test_an_accepted_tie_reads_through_the_transposed_map() -> None:
    """Oblique: the map of the unembedding is not the embedding's own."""
    source, plan = source_of("llama_gqa", True), plan_of("llama_gqa", "writers")
    hf, done = edited(source, plan, stored=True, tied="accept")
    assert done.tied == "accept" and not done.added
    hidden = [
        hf_forward(source, "llama_gqa", row, erasing(plan, {}), hidden=True).double()
        for row in ROWS
    ]
    transposed = [h - (h @ WRITE)[:, None] * READ / (READ @ WRITE) for h in hidden]
    embed = source.model.embed_tokens.weight.double()
    close(logits_of(hf), [(h @ embed.T).float() for h in transposed])
    assert done.unembed_map is not None  # what the certificate reads through
    for h, want in zip(hidden, transposed):
        exactly(done.unembed_map(h), want)
    valued = plan_of("llama_gqa", "value at embed")
    with pytest.raises(ExportError, match=r"choose tied='untie'"):
        edited(source, valued, stored=True, tied="accept")


# --------------------------------------------------------------------------------- the residual stream


def as_planned(kind: str, *edits: Any) -> Plan:
    config = source_of(kind).config
    return writers_only_form(Plan(edits), architecture_of(config), config)


@pytest.mark.parametrize("kind", PRE_NORM)
def test_the_whole_stream_is_all_writers(kind: str) -> None:
    writers, residual = PARTS[kind].writers, PARTS[kind].residual
    once = [1.5 if site.point == "embed" else 0.0 for site in writers]
    plans: dict[str, tuple[Plan, Any, Tensor]] = {
        "plain": (as_planned(kind, Erase(WRITE, READ, residual)), 0.0, WRITE),
        "value": (as_planned(kind, Erase(WRITE, READ, residual, value=1.5)), once, WRITE),
        "clamp": (as_planned(kind, Clamp(READ, residual, value=1.5)), once, READ),
        # one map under other lengths and signs, in parts and twice
        "parts": (
            as_planned(
                kind,
                Erase(-WRITE, 5 * READ, residual[:4], value=7.5),
                Erase(WRITE, READ, residual[2:], value=1.5),
            ),
            once,
            WRITE,
        ),
    }
    for name, (plan, value, write) in plans.items():
        want = Plan((Erase(write, READ, writers, value=value),))
        assert plan.sites == want.sites, name
        for site in want.sites:
            exactly(plan.maps_at(site)[0][1](stream()), want.maps_at(site)[0][1](stream()))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([Erase(WRITE, READ, PARTS["gpt2"].residual[1:])], r"some places only"),
        ([Erase(WRITE, READ, [Site(1, "resid_post")])], r"some places only.*Erase\(write, read, "),
        ([Erase(WRITE, READ, PARTS["gpt2"].residual, strength=0.5)], r"strength other than 1"),
        (
            [Erase(WRITE, READ, PARTS["gpt2"].residual, value=range(3 * N_LAYERS))],
            r"different values.*value 0, at embed, pos_embed, attn_out, mlp_out of every layer",
        ),
        (
            [
                Erase(WRITE, READ, PARTS["gpt2"].residual),
                Erase(WRITE, unit(4), PARTS["gpt2"].residual),
            ],
            r"different directions",
        ),
        ([Erase(WRITE, READ, PARTS["gpt2"].residual), Ablate(WRITE, PRE)], r"different directions"),
        (
            [Erase(WRITE, READ, PARTS["gpt2"].residual, value=1.0), Add(READ, PRE)],
            r"an addition beside other edits",
        ),
        (
            [Erase(WRITE, READ, [*PARTS["gpt2"].residual, Site(0, "embed")], value=1.0)],
            r"at hook_embed, which writes to it: it is there twice",
        ),
        (
            [Erase(WRITE, READ, [*PARTS["gpt2"].residual, Site(1, "mlp_out")], value=1.0)],
            r"at blocks.1.hook_mlp_out, which writes to it",
        ),
        ([Erase(WRITE, READ, PARTS["gpt2"].residual, positions="prompt")], r"prompt positions"),
    ],
)
def test_plans_without_an_exact_form_say_why(edits: list[Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        as_planned("gpt2", *edits)
    plan = Plan(tuple(edits))  # and they are indeed another function than the one at all writers
    everywhere = oracle("gpt2", False, plans_of("gpt2")["writers"])
    if all(edit.positions == "all" for edit in plan):
        assert moved(oracle("gpt2", False, plan), everywhere) > 1e-2


def test_a_value_that_is_there_twice_is_another_function() -> None:
    """The reason is not caution: with learned positions, embed and resid_pre differ."""
    residual = PARTS["gpt2"].residual
    once = oracle("gpt2", False, Plan((Erase(WRITE, READ, residual, value=1.5),)))
    also = [*residual[1:], Site(0, "embed"), Site(0, "pos_embed")]
    twice = oracle("gpt2", False, Plan((Erase(WRITE, READ, also, value=1.5),)))
    assert moved(once, twice) > 1e-2
    # without them they are one place
    llama = PARTS["llama_gqa"].residual
    plan = as_planned("llama_gqa", Erase(WRITE, READ, [Site(0, "embed"), *llama[1:]], value=1.5))
    same = as_planned("llama_gqa", Erase(WRITE, READ, llama, value=1.5))
    assert plan == same


@pytest.mark.parametrize("kind", ("gemma2", "olmo2"))
def test_post_norm_blocks_refuse_the_stream_and_values(kind: str) -> None:
    source, model = source_of(kind), shared(kind)
    state = source.state_dict()
    nearest = r"embed, attn_proj, mlp_proj of every layer: Erase\(write, read, model\.writers\)"
    for sites in (PARTS[kind].residual, [Site(1, "attn_out"), Site(1, "mlp_out")]):
        plan = Plan((Erase(WRITE, READ, sites),))
        with pytest.raises(ExportError, match=nearest):
            weight_plan(plan, source.config, list(state), state.__getitem__)
        close(hooked_logits(model, plan), oracle(kind, False, plan))  # hooks do what they say
    valued = Plan((Erase(WRITE, READ, Site(1, "mlp_proj"), value=1.0),))
    with pytest.raises(PlanError, match=r"before a norm"):
        weight_plan(valued, source.config, list(state), state.__getitem__)
    with pytest.raises(PlanError, match=r"before a norm"), model.applied(valued):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("qwen2", Site(1, "attn_out")),
        ("mixtral", Site(1, "mlp_out")),
        ("gemma", Site(0, "embed")),
    ],
)
def test_values_without_a_bias_are_refused(kind: str, site: Site) -> None:
    source = source_of(kind)
    state = source.state_dict()
    plan = Plan((Erase(WRITE, READ, site, value=1.0),))
    with pytest.raises(ExportError, match=r"an erasure to a value\) at .*(value 0|scales its emb)"):
        weight_plan(plan, source.config, list(state), state.__getitem__)
    close(hooked_logits(shared(kind), plan), oracle(kind, False, plan))


def test_values_turn_biases_on_where_there_can_be_some() -> None:
    plan = Plan((Erase(WRITE, READ, PARTS["llama_gqa"].writers, strength=0.5, value=0.7),))
    hf, done = edited(source_of("llama_gqa"), plan)
    assert done.config == {"attention_bias": True, "mlp_bias": True}
    close(logits_of(hf), oracle("llama_gqa", False, plan))


def test_control_vectors_refuse_an_erasure(tmp_path: Path) -> None:
    plan = Plan((Erase(WRITE, READ, Site(1, "resid_post"), value=1.0),))
    with pytest.raises(ExportError, match=r"erase given.*is no addition.*erasure goes into the w"):
        write_control_vector(plan, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    assert not list(tmp_path.iterdir())


def test_a_norm_preserving_ablation_shares_its_site_with_no_erasure() -> None:
    site = Site(1, "mlp_out")
    plan = Plan((Ablate(READ, site, norm_preserving=True), Erase(WRITE, READ, site)))
    with pytest.raises(PlanError, match=r"one of them norm-preserving"):
        plan.norm_preserving_at(site)


def test_the_hooks_leave_the_model_as_it_was() -> None:
    model, before = shared("llama_gqa"), copy.deepcopy(source_of("llama_gqa").state_dict())
    hooked_logits(model, plan_of("llama_gqa", "residual value"))
    assert all(torch.equal(model.hf_state_dict()[n], tensor) for n, tensor in before.items())
