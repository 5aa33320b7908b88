"""Affine edits, joint edits and ACE: hooks == weights == reloaded == LoRA on every kind of block, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import (
    EVERY,
    close,
    edited,
    hooked_logits,
    left_in,
    logits_of,
    moved,
    oracle,
)
from tiny import D_MODEL, DECLARED, PARTS, hf_forward, make, rows_of, shared, source_of, unit
from transformers import AutoModelForCausalLM

from interp_ablate import Ablate, Add, Clamp, Plan, Site, collect, export_checkpoint
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.optimal_transport import gaussian_transport
from interp_ablate.edits.affine_concept import affine_concept_edit
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.joint import ablate_sets, jointly
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import ExportError, PlanError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.control_vector import write_control_vector
from interp_ablate.export.lora import export_lora
from interp_ablate.weights.plan_to_weights import weight_plan

PRE_NORM = [kind for kind in EVERY if not PARTS[kind].attn_norm]
POST_NORM = [kind for kind in EVERY if PARTS[kind].attn_norm]
WITH_BIASES = ("gpt2", "llama_biases", "gpt_neox")
TWO = (0.8 * unit(0) + unit(1), unit(0))  # 51 degrees apart, or nearly so


def affine(sites: Any, *, shift: bool = False, strength: Any = 1.0) -> AffineEdit:
    added = 0.5 * unit(9) if shift else None
    return AffineEdit(0.6 * unit(5, k=3), unit(6, k=3), sites, shift=added, strength=strength)


def plans_of(kind: str) -> dict[str, Plan]:
    """Plans with an exact weight form on an architecture without norms after its projections."""
    parts = PARTS[kind]
    writers = parts.writers
    many = [0.2 + 0.2 * i for i in range(len(writers))]
    clamps = (Ablate(TWO[0], parts.residual), Clamp(TWO[1], parts.residual, value=1.5))
    found = {
        "linear": Plan((affine(writers, strength=many),)),
        "beside others": Plan((Ablate(TWO[0], writers), affine(writers[2:]), Ablate(TWO[1], writers[:3]))),
        "joint": jointly([Ablate(TWO[0], writers, strength=0.5), Erase(unit(2), unit(2) + TWO[1], writers[1:])]),
        "joint subspace": jointly([Ablate(TWO[0], writers), Ablate(TWO[1], writers)]),
        "joint stream": jointly([Ablate(TWO[0], parts.residual), Erase(unit(2), unit(2) + TWO[1], parts.residual)]),
    }  # fmt: skip
    if kind in DECLARED and kind != "gemma":  # elsewhere the embedding's scale is not known
        found["joint stream value"] = jointly(clamps)
        found["ace stream"] = Plan((ace(parts.residual),))
        found["ace writers"] = Plan((ace(writers),))
    if kind in WITH_BIASES:
        found["shift"] = Plan((affine(writers, shift=True, strength=many),))
    return found


def ace(sites: Any) -> Erase:
    found = Direction(TWO[0], 1.5, Site(1, "resid_pre"))
    return affine_concept_edit(found, unit(3, k=4) + 0.5, sites, alpha=0.5)


CASES = [(kind, name) for kind in PRE_NORM for name in plans_of(kind)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_hooks_equal_weights_equal_the_oracle(kind: str, name: str) -> None:
    plan, source = plans_of(kind)[name], source_of(kind)
    want = oracle(source, kind, plan)
    assert moved(want, logits_of(source)) > 1e-2
    model = shared(kind)
    close(hooked_logits(model, plan), want)
    hf, done = edited(source, plan, stored=True, entry=model.architecture)
    close(logits_of(hf), want)
    close(hooked_logits(model, done.plan), want)


@pytest.mark.parametrize("kind", PRE_NORM)
def test_joint_ablations_leave_nothing_of_either(kind: str) -> None:
    entry = shared(kind).architecture
    for name in ("joint subspace",):
        hf, _ = edited(source_of(kind), plans_of(kind)[name], entry=entry)
        for vector in TWO:
            assert left_in(hf, kind, vector[None] / vector.norm()) < 1e-5
    inturn = Plan(tuple(Ablate(vector, PARTS[kind].writers) for vector in TWO))
    hf, _ = edited(source_of(kind), inturn, entry=entry)
    assert left_in(hf, kind, TWO[0][None] / TWO[0].norm()) > 0.02  # the fault


@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2"))
def test_a_joint_clamp_of_the_stream_is_at_its_values_everywhere(kind: str) -> None:
    hf, done = edited(source_of(kind), plans_of(kind)["joint stream value"])
    found: list[tuple[float, float]] = []

    def look(site: Site, x: torch.Tensor) -> torch.Tensor:
        if site.point.startswith("resid"):
            wide = x.double()
            found.append(
                (float((wide @ TWO[0]).abs().max()), float((wide @ TWO[1] - 1.5).abs().max()))
            )
        return x

    for row in rows_of(9, 14):
        hf_forward(hf, kind, row, look)
    assert found and max(max(pair) for pair in found) < 1e-5
    assert sum(not edit.affine.is_linear for edit in done.edits.values()) == 1  # written once


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama_gqa", "joint"), ("llama_gqa", "ace stream"), ("gpt2", "shift"), ("mixtral", "linear"),
     ("llama_biases", "shift"), ("llama_gqa", "joint stream value")],
)  # fmt: skip
def test_exports_reload_and_pass_the_audit(kind: str, name: str, tmp_path: Path) -> None:
    model, plan = shared(kind), plans_of(kind)[name]
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=rows_of(9, 14))
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 1e-2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(logits_of(reloaded), oracle(source_of(kind), kind, plan))
    found = audit(AuditSource.of_model(model), plan, tmp_path / "out")
    assert found.passed and found.edited, found.problems
    other = Plan((Ablate(TWO[0], plan.sites if "stream" not in name else model.writers),))
    assert not audit(AuditSource.of_model(model), other, tmp_path / "out").passed


@pytest.mark.parametrize(
    ("kind", "name"), [("llama_gqa", "joint"), ("gpt2", "shift"), ("qwen2", "linear")]
)
def test_adapters_hold_them(kind: str, name: str, tmp_path: Path) -> None:
    """Certified unmerged and merged by the export itself, in PEFT."""
    pytest.importorskip("peft")
    certificate = export_lora(
        shared(kind), plans_of(kind)[name], tmp_path / "lora", prompts=rows_of(9, 14)
    )
    assert certificate["passed"]


def test_a_transport_fitted_at_a_writer_is_exact_and_moves_its_outputs(tmp_path: Path) -> None:
    """In the exported checkpoint the writer's own outputs have the target's moments on the prompts of the fit."""
    kind, site = "gpt2", Site(1, "mlp_out")
    model = make(kind)
    positive, negative = (rows_of(*[6] * 24, seed=seed) for seed in (3, 4))
    rows = [
        collect(model, some, [site], (-1,)).values[:, 0, 0].double()
        for some in (positive, negative)
    ]
    found = gaussian_transport(*rows, site, rank=4)
    plan = Plan((AffineEdit.of(found, site),))
    assert export_checkpoint(model, plan, tmp_path / "out", prompts=rows_of(9, 14))["passed"]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    outputs = []
    hook = hf.transformer.h[1].mlp.register_forward_hook(
        lambda m, a, y: outputs.append(y[0, -1].double())
    )
    with torch.no_grad():
        for row in positive:
            hf(torch.tensor([row]))
    hook.remove()
    moved_to, target = (x @ found.components.T for x in (torch.stack(outputs), rows[1]))
    torch.testing.assert_close(moved_to.mean(0), target.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_to.T.cov(), target.T.cov(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", POST_NORM)
def test_before_a_norm_it_is_refused_before_any_hook(kind: str) -> None:
    model, plan = shared(kind), Plan((affine([Site(1, "mlp_proj")]),))
    with pytest.raises(PlanError, match=r"before a norm.*one subspace"), model.applied(plan):
        pytest.fail("the block must not be entered")
    after = Plan((affine([Site(1, "mlp_out")], shift=True),))
    close(hooked_logits(model, after), oracle(source_of(kind), kind, after))


def test_what_weights_cannot_hold_is_refused_with_the_nearest_plan(tmp_path: Path) -> None:
    source = source_of("llama_gqa")
    state = source.state_dict()
    for plan in (
        Plan((affine([Site(1, "resid_post")]),)),
        Plan((affine(PARTS["llama_gqa"].residual),)),
    ):
        with pytest.raises(ExportError, match=r"An affine edit is exact at writers"):
            weight_plan(plan, source.config, list(state), state.__getitem__)
        close(hooked_logits(shared("llama_gqa"), plan), oracle(source, "llama_gqa", plan))
    qwen, shifted = source_of("qwen2"), Plan((affine([Site(1, "mlp_out")], shift=True),))
    tensors = qwen.state_dict()
    with pytest.raises(ExportError, match="needs a bias"):
        weight_plan(shifted, qwen.config, list(tensors), tensors.__getitem__)
    with pytest.raises(ExportError, match="is no addition"):
        write_control_vector(shifted, tmp_path / "v.gguf", model_hint="llama", n_layers=3)
    assert not list(tmp_path.iterdir())


def test_rows_under_plans_of_their_own() -> None:
    model, rows = shared("llama_gqa"), rows_of(9, 9, 9)
    writers = PARTS["llama_gqa"].writers
    plans = [
        Plan((affine(writers, shift=True),)),
        None,
        ablate_sets(model, {0: TWO, 2: TWO[1]}),
    ]
    with model.applied_each(plans):
        each = model.logits(rows)
        texts = model.generate(rows, max_new_tokens=5)
    for i, plan in enumerate(plans):
        with model.applied(plan):
            close([each[i]], [model.logits(rows[i : i + 1])[0]])
            assert model.generate(rows[i : i + 1], max_new_tokens=5)[0].tokens == texts[i].tokens


def test_an_affine_edit_then_an_addition() -> None:
    plan = Plan(
        (
            affine([Site(0, "embed"), Site(1, "mlp_out")], shift=True),
            Add(unit(4), Site(1, "resid_post")),
        )
    )
    want = oracle(source_of("gpt2"), "gpt2", plan)
    close(logits_of(edited(source_of("gpt2"), plan)[0]), want)
    assert plan.d_model == D_MODEL
