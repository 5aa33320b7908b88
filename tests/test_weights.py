"""The contract: hooks == edited weights in memory == the reloaded export; what has no exact form says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import KINDS, N_LAYERS, editing, forward, rows_of, shared, tiny, unit
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from interp_ablate import (
    Ablate,
    Add,
    Clamp,
    Plan,
    Site,
    everywhere,
    export_checkpoint,
    from_hf,
    sites_of,
)
from interp_ablate.edits import Affine
from interp_ablate.errors import ExportError
from interp_ablate.model import Model
from interp_ablate.sites import RESIDUAL_POINTS, WRITER_POINTS
from interp_ablate.weights import (
    ARCHITECTURES,
    as_writers,
    edited_state_dict,
    edited_weight,
    writer_maps,
)

TOLERANCE = 1e-5  # fp32, logits of size 1
WRITERS = everywhere(N_LAYERS)
RESIDUAL = sites_of(RESIDUAL_POINTS, range(N_LAYERS))
ROWS = rows_of(9, 14)


def exact_plans() -> dict[str, Plan]:
    """Plans with an exact weight form."""
    strengths = [0.2 + 0.25 * i for i in range(len(WRITERS))]
    band = sites_of(("attn_out", "mlp_out"), [1, 2])
    after = [Site(0, "embed"), *(s for s in RESIDUAL if s.point != "resid_pre")]
    before = [s for s in RESIDUAL if s.point != "resid_post"] + [Site(N_LAYERS - 1, "resid_post")]
    return {
        "everywhere": Plan((Ablate(unit(), WRITERS),)),
        "strengths": Plan((Ablate(unit(), WRITERS, strength=strengths),)),
        "subspace": Plan((Ablate(unit(k=2), WRITERS),)),
        "two at one site": Plan((Ablate(unit(0), WRITERS, strength=1.3), Ablate(unit(1), band))),
        "a band": Plan((Ablate(unit(), band, strength=0.7),)),
        "embed alone": Plan((Ablate(unit(), Site(0, "embed")),)),
        "residual": Plan((Ablate(unit(), RESIDUAL),)),
        "residual subspace": Plan((Ablate(unit(k=3), RESIDUAL),)),
        "embed, mid, post": Plan((Ablate(unit(), after),)),
        "pre, mid, last post": Plan((Ablate(unit(), before),)),
        "clamp at zero": Plan((Clamp(unit(), WRITERS, value=0.0),)),
    }


EXACT = tuple(exact_plans())
NOTHING_LEFT = ("everywhere", "subspace", "residual", "residual subspace", "clamp at zero")


def in_memory(kind: str, tied: bool, plan: Plan) -> Any:
    """A fresh Hugging Face model with the edited weights put in, untied where it has to be."""
    source, _ = tiny(kind, tied=tied)
    state, _ = edited_state_dict(source.state_dict(), plan, source.config)
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    hf = type(source)(config).eval()
    hf.load_state_dict(state)
    return hf


def logits_of(hf: Any, rows: list[list[int]] = ROWS) -> list[Tensor]:
    with torch.no_grad():
        return [hf(torch.tensor([row])).logits[0] for row in rows]


# --------------------------------------------------------------------------------- the contract


def test_every_architecture_of_the_table_is_tested() -> None:
    assert {tiny(kind)[0].config.model_type for kind in KINDS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", EXACT)
def test_weights_equal_hooks_for_every_exact_plan(kind: str, tied: bool, name: str) -> None:
    plan = exact_plans()[name]
    source, _ = tiny(kind, tied=tied)
    for row, got, plain in zip(ROWS, logits_of(in_memory(kind, tied, plan)), logits_of(source)):
        want = forward(source, row, editing(plan))  # what the hooks give: see test_applied
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        assert (want - plain).abs().max() > 1e-2  # the edit does change the logits


def check_export(model: Model, kind: str, tied: bool, name: str, out: Path) -> None:
    """Hooks, weights in memory and the reloaded folder agree; what is not edited is the same bytes."""
    plan, (source, _) = exact_plans()[name], tiny(kind, tied=tied)
    certificate = export_checkpoint(model, plan, out, prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_difference"] < TOLERANCE
    assert certificate["max_abs_logit_effect_of_plan"] > 1e-2
    with model.applied(plan):
        hooked = [model.logits([row], keep=len(row))[0] for row in ROWS]
    edited, reloaded = in_memory(kind, tied, plan), AutoModelForCausalLM.from_pretrained(out)
    for want, memory, disk in zip(hooked, logits_of(edited), logits_of(reloaded)):
        torch.testing.assert_close(memory, want, atol=TOLERANCE, rtol=0)
        assert torch.equal(disk, memory)
    source.save_pretrained(out / "source")
    before, after = (read_bytes(place / "model.safetensors") for place in (out / "source", out))
    untied = tied and name != "a band"
    assert set(after) == set(before) | ({"lm_head.weight"} if untied else set())
    for tensor_name, content in before.items():
        assert (after[tensor_name] == content) == (tensor_name not in touched(kind, plan))
    if untied:
        assert after["lm_head.weight"] == before["model.embed_tokens.weight"]


def test_hooks_equal_weights_equal_the_reloaded_export(
    kind: str, tied: bool, backend: str, tmp_path: Path
) -> None:
    check_export(shared(kind, backend, tied=tied), kind, tied, "strengths", tmp_path / "out")


@pytest.mark.parametrize("name", ("residual subspace", "pre, mid, last post", "a band"))
def test_exports_of_other_plans(tied: bool, name: str, tmp_path: Path) -> None:
    check_export(shared("qwen3", tied=tied), "qwen3", tied, name, tmp_path / "out")


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_nothing_is_left_along_the_direction_anywhere(kind: str, tied: bool, name: str) -> None:
    plan = exact_plans()[name]
    basis, hf = next(iter(plan)).vectors, in_memory(kind, tied, plan)

    def measure(site: Site, x: Tensor) -> Tensor:
        left = (x[0].double() @ basis.T).norm(dim=-1) / x[0].double().norm(dim=-1)
        assert left.max() < 2e-6, site
        return x

    for row in ROWS:
        forward(hf, row, measure)


@pytest.mark.parametrize("tie", (False, True))
def test_without_untying_the_unembedding_would_be_edited_too(tie: bool) -> None:
    """The fault that the lm_head of an export avoids: a tied head edited with the embedding."""
    plan, (source, _) = exact_plans()["everywhere"], tiny("llama_gqa", tied=True)
    state, _ = edited_state_dict(source.state_dict(), plan, source.config)
    assert torch.equal(state["lm_head.weight"], source.lm_head.weight)
    if tie:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf = in_memory("llama_gqa", True, plan)
    hf.load_state_dict(state)
    want = forward(source, ROWS[0], editing(plan))
    apart = float((logits_of(hf)[0] - want).abs().max())
    assert (apart > 1e-2) if tie else (apart < TOLERANCE)


# --------------------------------------------------------------------------------- what is and is not touched


def touched(kind: str, plan: Plan) -> set[str]:
    entry = ARCHITECTURES[tiny(kind)[0].config.model_type]
    return {f"{entry.writer(site)}.weight" for site in as_writers(plan, N_LAYERS).sites}


@pytest.mark.parametrize("name", ("everywhere", "a band", "embed alone"))
def test_untouched_tensors_are_the_same(kind: str, tied: bool, name: str) -> None:
    plan, (source, _) = exact_plans()[name], tiny(kind, tied=tied)
    before = source.state_dict()
    after, changed = edited_state_dict(before, plan, source.config)
    assert set(changed) == touched(kind, plan) and len(changed) == len(set(changed))
    assert set(after) == set(before)
    for tensor_name, tensor in after.items():
        if tensor_name in changed:
            assert not torch.equal(tensor, before[tensor_name]), tensor_name
            assert tensor.dtype == before[tensor_name].dtype
        else:
            assert tensor is before[tensor_name], tensor_name


def read_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            tensor = file.get_tensor(name)
            found[name] = (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
    return found


def test_bfloat16_is_kept_and_rounded_once() -> None:
    source, _ = tiny("qwen2", tied=True)
    state = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    plan = exact_plans()["two at one site"]
    after, changed = edited_state_dict(state, plan, source.config)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    maps = writer_maps(plan, source.config)
    eye = torch.eye(32, dtype=torch.float64)
    for name in changed:
        affine = maps[name.removesuffix(".weight")]
        full = eye + affine.left @ affine.right.T  # the whole map in float64, then one rounding
        wide = state[name].double()
        want = wide @ full.T if "embed" in name else full @ wide
        # two float64 orders of summation may fall on two sides of a rounding boundary, hardly ever
        assert (after[name] != want.bfloat16()).float().mean() < 1e-3, name
        torch.testing.assert_close(after[name].double(), want, rtol=2**-8, atol=1e-12)


def test_edited_weight_against_its_definition() -> None:
    weight = torch.randn(32, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = exact_plans()["subspace"]
    ((_, affine),) = plan.maps_at(Site(1, "mlp_out"))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(x @ edited_weight(weight, affine).T, affine(x @ weight.T))
    rows = edited_weight(weight.T, affine, is_embedding=True)
    torch.testing.assert_close(rows, affine(weight.T))
    again = edited_weight(edited_weight(weight, affine), affine)
    torch.testing.assert_close(again, edited_weight(weight, affine))  # idempotent
    assert torch.linalg.matrix_rank(edited_weight(weight, affine) - weight) == 2
    assert torch.equal(edited_weight(weight, Affine.identity(32)), weight)


# --------------------------------------------------------------------------------- biases that write to the stream


def biased(**options: Any) -> Any:
    return tiny("llama_gqa", attention_bias=True, mlp_bias=True, **options)


@pytest.mark.parametrize("name", EXACT)
def test_biases_of_writers_are_edited_too(name: str) -> None:
    plan, (source, _), (edited, _) = exact_plans()[name], biased(), biased()
    assert source.model.layers[0].self_attn.o_proj.bias.abs().max() > 0.1
    state, _ = edited_state_dict(source.state_dict(), plan, source.config)
    edited.load_state_dict(state)
    for row, got in zip(ROWS, logits_of(edited)):
        torch.testing.assert_close(got, forward(source, row, editing(plan)), atol=TOLERANCE, rtol=0)


def test_additions_and_clamps_are_exact_where_there_is_a_bias(tmp_path: Path) -> None:
    sites = sites_of(("attn_out", "mlp_out"), range(N_LAYERS))
    plan = Plan((Add(unit(), sites, coefficient=2.0), Clamp(unit(1), sites[:2], value=1.0)))
    source, _ = biased()
    export_checkpoint(from_hf(*biased()), plan, tmp_path / "out", prompts=ROWS)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for row, got, plain in zip(ROWS, logits_of(reloaded), logits_of(source)):
        want = forward(source, row, editing(plan))
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        assert (want - plain).abs().max() > 1e-2


# --------------------------------------------------------------------------------- no exact form

LESS = [site for site in RESIDUAL if site != Site(1, "resid_mid")]


@pytest.mark.parametrize(
    ("plan", "reason"),
    (
        (Plan((Ablate(unit(), LESS),)), r"some places only \(blocks.1.hook_resid_mid"),
        (Plan((Ablate(unit(), [Site(2, "resid_post")]),)), r"some places only \(blocks.0"),
        (Plan((Ablate(unit(), RESIDUAL, strength=0.5),)), r"strength other than 1"),
        (Plan((Add(unit(), Site(1, "resid_pre")),)), r"an addition, a clamp or a strength"),
        (Plan((Clamp(unit(), RESIDUAL, value=1.0),)), r"an addition, a clamp or a strength"),
        (Plan((Ablate(unit(0), RESIDUAL), Ablate(unit(1), RESIDUAL))), r"different directions"),
        (Plan((Ablate(unit(), RESIDUAL), Ablate(unit(k=2), WRITERS))), r"different directions"),
        (Plan((Add(unit(), Site(1, "mlp_out")),)), r"needs model.layers.1.mlp.down_proj.bias"),
        (Plan((Clamp(unit(), Site(0, "attn_out"), value=1.0),)), r"needs .*o_proj.bias"),
        (Plan((Ablate(unit(), WRITERS, positions="prompt"),)), r"prompt positions only"),
        (Plan((Ablate(unit(), RESIDUAL, positions="generated"),)), r"generated positions only"),
        (Plan((Ablate(torch.ones(8), WRITERS),)), r"d_model 8, the checkpoint 32"),
        (Plan((Ablate(unit(), Site(3, "mlp_out")),)), r"blocks.3.hook_mlp_out.*3 layers"),
    ),
)
def test_plans_without_an_exact_form_say_why(plan: Plan, reason: str, tmp_path: Path) -> None:
    model = shared()
    with pytest.raises(ExportError, match=reason):
        edited_state_dict(model.hf_state_dict(), plan, model.hf_config)
    with pytest.raises(ExportError, match=reason):
        export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    assert not list(tmp_path.iterdir())


def test_what_is_refused_is_indeed_not_what_the_writers_do() -> None:
    """The reasons are not caution: ablating the writers instead gives other logits."""
    hf, _ = tiny()
    everything = forward(hf, ROWS[0], editing(Plan((Ablate(unit(), WRITERS),))))
    for sites in (LESS, [s for s in RESIDUAL if s.point != "resid_mid"]):
        some = forward(hf, ROWS[0], editing(Plan((Ablate(unit(), sites),))))
        assert (some - everything).abs().max() > 1e-2


def test_the_nearest_exact_plan_is_exact() -> None:
    for plan in exact_plans().values():
        assert all(site.point in WRITER_POINTS for site in as_writers(plan, N_LAYERS).sites)
    assert as_writers(exact_plans()["residual"], N_LAYERS) == Plan((Ablate(unit(), WRITERS),))


def test_an_unknown_architecture_is_refused_by_name() -> None:
    config = GPT2Config(n_layer=3, n_embd=32, architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        ExportError, match=r"model type 'gpt2' \(GPT2LMHeadModel\).*entries for llama"
    ):
        writer_maps(Plan((Ablate(unit(), WRITERS),)), config)


def test_a_writer_that_is_not_there_is_an_error() -> None:
    hf, _ = tiny()
    state = hf.state_dict()
    del state["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ExportError, match=r"has no model.layers.1.mlp.down_proj.weight"):
        edited_state_dict(state, exact_plans()["everywhere"], hf.config)
