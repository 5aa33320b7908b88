"""The contract: hooks == edited weights in memory == the reloaded export; what has no exact form says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import (
    KINDS,
    N_LAYERS,
    PARTS,
    editing,
    forward,
    hf_forward,
    rows_of,
    shared,
    source_of,
    tiny,
    unit,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig

from interp_ablate import Ablate, Add, Clamp, Plan, Site, everywhere, export_checkpoint, sites_of
from interp_ablate.edits.affine import Affine
from interp_ablate.errors import ExportError
from interp_ablate.models.architectures import ARCHITECTURES, architecture_of
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.sites import RESIDUAL_POINTS, WRITER_POINTS
from interp_ablate.weights.plan_to_weights import (
    TensorEdit,
    WeightPlan,
    edited_state_dict,
    edited_tensor,
    weight_plan,
)
from interp_ablate.weights.weight_form import writers_only_form

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


def planned(hf: Any, plan: Plan, **options: Any) -> WeightPlan:
    """The changes of a Hugging Face model's tensors under a plan."""
    state = hf.state_dict()
    return weight_plan(plan, hf.config, list(state), state.__getitem__, **options)


def edited(source: Any, plan: Plan, **options: Any) -> Any:
    """A fresh Hugging Face model with the edited weights put in, untied where it has to be."""
    done = planned(source, plan, **options)
    state, _ = edited_state_dict(source.state_dict(), done)
    config = copy.deepcopy(source.config)
    for name, value in done.config.items():
        setattr(config, name, value)
    hf = type(source)(config).eval()
    hf.load_state_dict(state)
    return hf


def in_memory(kind: str, tied: bool, plan: Plan) -> Any:
    return edited(tiny(kind, tied=tied)[0], plan)


def logits_of(hf: Any, rows: list[list[int]] = ROWS) -> list[Tensor]:
    with torch.no_grad():
        return [hf(torch.tensor([row])).logits[0] for row in rows]


# --------------------------------------------------------------------------------- the contract


def test_the_kinds_here_are_llama_style_entries() -> None:
    assert {tiny(kind)[0].config.model_type for kind in KINDS} < set(ARCHITECTURES)


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
    state, _ = edited_state_dict(source.state_dict(), planned(source, plan))
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
    """The names of the tensors that a plan edits, from the sites of its writers."""
    config = tiny(kind)[0].config
    names = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}
    return {
        "model.embed_tokens.weight"
        if site.point == "embed"
        else f"model.layers.{site.layer}.{names[site.point]}.weight"
        for site in writers_only_form(plan, architecture_of(config), config).sites
    }


def read_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            tensor = file.get_tensor(name)
            found[name] = (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
    return found


# --------------------------------------------------------------------------------- biases that write to the stream


def biased(**options: Any) -> Any:
    return tiny("llama_gqa", attention_bias=True, mlp_bias=True, **options)


@pytest.mark.parametrize("name", EXACT)
def test_biases_of_writers_are_edited_too(name: str) -> None:
    plan, (source, _) = exact_plans()[name], biased()
    assert source.model.layers[0].self_attn.o_proj.bias.abs().max() > 0.1
    for row, got in zip(ROWS, logits_of(edited(source, plan))):
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


def adding() -> Plan:
    """Additions on the stream and at writers, in both orders with ablations of the same writers."""
    stream = sites_of(("resid_pre", "resid_mid", "resid_post"), [0, 2])
    blocks = sites_of(("attn_out", "mlp_out"), range(N_LAYERS))
    return Plan(
        (
            Add(unit(0), stream, coefficient=[0.5 + 0.3 * i for i in range(len(stream))]),
            Ablate(unit(1), WRITERS, strength=0.9),
            Add(unit(2) + unit(1), [*blocks, Site(1, "resid_mid"), Site(0, "embed")]),
            Clamp(unit(3), blocks[:3], value=1.5),
        )
    )


@pytest.mark.parametrize("biases", ({}, {"mlp_bias": True}, {"attention_bias": True}))
def test_biases_are_turned_on_where_something_is_added(biases: dict[str, bool], tied: bool) -> None:
    """Llama can have them: zeros but where something is added, and the config says so."""
    source, plan = tiny(tied=tied, **biases)[0], adding()
    done = planned(source, plan)
    assert {k: v for k, v in done.config.items() if k != "tie_word_embeddings"} == {
        name: True for name in ("attention_bias", "mlp_bias") if name not in biases
    }
    state, _ = edited_state_dict(source.state_dict(), done)
    for name in set(done.added) - {"lm_head.weight"}:
        writes = "o_proj" in name or "down_proj" in name
        assert name.endswith(".bias") and bool(state[name].any()) == writes, name
        assert state[name].dtype == torch.float32 and name not in source.state_dict()
    for row, got in zip(ROWS, logits_of(edited(source, plan))):
        want = forward(source, row, editing(plan))
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        assert (want - forward(source, row)).abs().max() > 1e-1


def test_an_addition_on_the_stream_is_one_at_the_writer_before_it() -> None:
    pairs = {
        Site(0, "resid_pre"): Site(0, "embed"),
        Site(2, "resid_pre"): Site(1, "mlp_out"),
        Site(1, "resid_mid"): Site(1, "attn_out"),
        Site(1, "resid_post"): Site(1, "mlp_out"),
    }
    entry, config = ARCHITECTURES["llama"], tiny()[0].config
    for site, writer in pairs.items():
        plan = Plan((Add(unit(), site, coefficient=3.0),))
        assert writers_only_form(plan, entry, config) == Plan(
            (Add(unit(), writer, coefficient=3.0),)
        )
    plan = Plan((Add(unit(), [*pairs, Site(2, "mlp_out")], coefficient=[1, 2, 3, 4, 5]),))
    edits = writers_only_form(plan, entry, config).edits
    assert [(edit.sites[0], edit.amounts[0]) for edit in edits] == [
        (Site(2, "mlp_out"), 5.0),
        *zip(pairs.values(), (1.0, 2.0, 3.0, 4.0)),
    ]
    parallel = writers_only_form(
        Plan((Add(unit(), Site(1, "resid_post")),)),
        ARCHITECTURES["gpt_neox"],
        source_of("gpt_neox").config,
    )
    assert parallel.sites == (Site(1, "mlp_out"),)


# --------------------------------------------------------------------------------- no exact form

LESS = [site for site in RESIDUAL if site != Site(1, "resid_mid")]


@pytest.mark.parametrize(
    ("plan", "reason"),
    (
        (Plan((Ablate(unit(), LESS),)), r"some places only \(blocks.1.hook_resid_mid"),
        (Plan((Ablate(unit(), [Site(2, "resid_post")]),)), r"some places only \(blocks.0"),
        (Plan((Ablate(unit(), RESIDUAL, strength=0.5),)), r"strength other than 1"),
        (
            Plan((Add(unit(), Site(1, "resid_pre")), Ablate(unit(), Site(1, "resid_mid")))),
            r"an addition beside other edits or a strength",
        ),
        (
            Plan((Clamp(unit(), RESIDUAL, value=range(len(RESIDUAL))),)),
            r"sets them to different values",
        ),
        (Plan((Ablate(unit(0), RESIDUAL), Ablate(unit(1), RESIDUAL))), r"different directions"),
        (Plan((Ablate(unit(), RESIDUAL), Ablate(unit(k=2), WRITERS))), r"different directions"),
        (
            Plan((Add(unit(), Site(1, "mlp_out")),)),
            r"a bias at model.layers.1.mlp.down_proj.weight",
        ),
        (
            Plan((Add(unit(), Site(1, "resid_mid")),)),
            r"addition .* needs a bias .*1.self_attn.o_proj",
        ),
        (Plan((Clamp(unit(), Site(0, "attn_out"), value=1.0),)), r"needs a bias .*o_proj.*qwen3"),
        (Plan((Ablate(unit(), Site(0, "pos_embed")),)), r"no tensor for hook_pos_embed"),
        (Plan((Ablate(unit(), WRITERS, positions="prompt"),)), r"prompt positions only"),
        (Plan((Ablate(unit(), RESIDUAL, positions="generated"),)), r"generated positions only"),
        (Plan((Ablate(torch.ones(8), WRITERS),)), r"d_model 8, the checkpoint 32"),
        (Plan((Ablate(unit(), Site(3, "mlp_out")),)), r"blocks.3.hook_mlp_out.*3 layers"),
    ),
)
def test_plans_without_an_exact_form_say_why(plan: Plan, reason: str, tmp_path: Path) -> None:
    model = shared("qwen3")
    with pytest.raises(ExportError, match=reason):
        planned(source_of("qwen3"), plan)
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
    entry, config = ARCHITECTURES["llama"], tiny()[0].config
    for plan in exact_plans().values():
        assert all(
            site.point in WRITER_POINTS for site in writers_only_form(plan, entry, config).sites
        )
    found = writers_only_form(exact_plans()["residual"], entry, config)
    assert found == Plan((Ablate(unit(), WRITERS),))


def test_an_empty_plan_changes_nothing() -> None:
    source = tiny(tied=True)[0]
    done, before = planned(source, Plan()), source.state_dict()
    after, changed = edited_state_dict(before, done)
    assert not changed and not done.config and not done.added
    assert all(after[name] is tensor for name, tensor in before.items())


def test_an_unknown_architecture_is_refused_by_name() -> None:
    config = BloomConfig(n_layer=3, hidden_size=32, architectures=["BloomForCausalLM"])
    with pytest.raises(
        ExportError, match=r"model type 'bloom' \(BloomForCausalLM\).*entries for llama.*models"
    ):
        weight_plan(Plan((Ablate(unit(), WRITERS),)), config, [], {}.__getitem__)


def test_a_writer_that_is_not_there_is_an_error() -> None:
    hf, _ = tiny()
    state = hf.state_dict()
    del state["model.layers.1.mlp.down_proj.weight"]
    missing = (
        r"no tensor for blocks.1.hook_mlp_out: looked for .*1.mlp.down_proj.weight; layer 1 holds "
    )
    with pytest.raises(ExportError, match=missing + r"model.layers.1.input_layernorm.weight"):
        weight_plan(exact_plans()["everywhere"], hf.config, list(state), state.__getitem__)


# --------------------------------------------------------------------------------- plans that were wrong once


def hooked(kind: str, plan: Plan) -> list[Tensor]:
    model = shared(kind)
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0] for row in ROWS]


def agree(kind: str, plan: Plan) -> None:
    for want, got in zip(hooked(kind, plan), logits_of(edited(source_of(kind), plan))):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_a_residual_plan_with_a_norm_preserving_writer_is_refused() -> None:
    """The ablation of every writer, which it would be otherwise, gives other logits."""
    preserving = Ablate(unit(), [Site(1, "mlp_out")], norm_preserving=True)
    plan = Plan((Ablate(unit(), RESIDUAL), preserving))
    with pytest.raises(ExportError, match=r"preserves norms at some writers"):
        planned(source_of("llama_gqa"), plan)
    without = hooked("llama_gqa", exact_plans()["residual"])
    assert (hooked("llama_gqa", plan)[0] - without[0]).abs().max() > 1e-2


def test_a_projection_is_edited_before_its_output() -> None:
    """Weights compute what the hooks do, whatever the order in the plan."""
    first, second = (
        Ablate(unit(0), Site(1, "attn_out")),
        Ablate(unit(1) + unit(0), Site(1, "attn_proj")),
    )
    agree("llama_gqa", Plan((second, first)))
    agree("llama_gqa", Plan((first, second)))


def test_both_names_of_a_writer_in_one_edit() -> None:
    sites = [Site(1, "attn_proj"), Site(1, "attn_out")]
    agree("llama_gqa", Plan((Ablate(unit(), sites, strength=0.5),)))


@pytest.mark.parametrize("where", ("embeddings", "columns"))
def test_norm_preserving_where_weights_lie_along_the_direction(where: str) -> None:
    """Only the rounding of the stored dtype is left of them: nothing to give a norm to."""
    (source, _), (other, tokenizer) = tiny(), tiny()
    basis, rows = unit(k=3), torch.tensor(ROWS[1])
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(len(rows), 3, generator=generator, dtype=torch.float64) @ basis
    for hf in (source, other):
        if where == "embeddings":
            hf.model.embed_tokens.weight[rows] = along.float()
        else:
            hf.model.layers[1].mlp.down_proj.weight[:, : len(rows)] = along.T.float()
    plan = Plan((Ablate(basis, WRITERS, norm_preserving=True),))
    state, _ = edited_state_dict(source.state_dict(), planned(source, plan))
    small = {
        "embeddings": state["model.embed_tokens.weight"][rows],
        "columns": state["model.layers.1.mlp.down_proj.weight"][:, : len(rows)],
    }[where]
    assert small.abs().max() < 1e-6
    model = from_hf(other, tokenizer)
    read: list[Tensor] = []
    with model.applied(plan):
        capture = {Site(0, "embed"): lambda x, batch: read.append(x) or x}
        ((_, want, _),) = model.stream([ROWS[1]], keep=14, capture=capture)
    if where == "embeddings":  # after a norm, rounding noise is all there is: compare it here
        assert read[0].abs().max() < 1e-6
    else:
        got = logits_of(edited(source, plan))[1]
        torch.testing.assert_close(got, want[0], atol=TOLERANCE, rtol=0)


def test_parallel_blocks_have_no_middle_to_add_to() -> None:
    assert PARTS["gpt_neox"].parallel
    with pytest.raises(ExportError, match=r"parallel do not have. Add at resid_pre or resid_post"):
        planned(source_of("gpt_neox"), Plan((Add(unit(), Site(1, "resid_mid")),)))


def test_accepting_a_tie_whose_head_is_stored_too() -> None:
    """Some tied checkpoints hold both names, and so does `state_dict()`; both must be edited."""
    source, plan = source_of("llama_gqa", True), exact_plans()["everywhere"]
    done = planned(source, plan, tied="accept")
    state, _ = edited_state_dict(source.state_dict(), done)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    other = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    other["lm_head.weight"][5, 3] += 1  # tied by the config, but not in the file
    for choice in ("untie", "accept"):
        with pytest.raises(ExportError, match=r"lm_head.weight of its own that differs"):
            weight_plan(plan, source.config, list(other), other.__getitem__, tied=choice)  # type: ignore[arg-type]


def test_more_experts_than_the_config_says_are_an_error() -> None:
    source = source_of("mixtral")
    state = source.state_dict()
    names = [name for name in state if not name.endswith("experts.down_proj")]
    template = "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"
    names += [template.format(layer, i) for layer in range(N_LAYERS) for i in range(5)]
    plan = Plan((Ablate(unit(), Site(1, "mlp_out")),))
    with pytest.raises(ExportError, match=r"says 4 experts, but layer 1 has more: .*experts.4.w2"):
        weight_plan(plan, source.config, names, state.__getitem__)


def test_an_addition_beside_a_norm_preserving_ablation_is_exact_where_there_is_a_bias() -> None:
    source = source_of("llama_biases")
    plan = Plan(
        (Ablate(unit(), WRITERS, norm_preserving=True), Add(unit(2), Site(1, "resid_post")))
    )
    for row, want, got in zip(ROWS, hooked("llama_biases", plan), logits_of(edited(source, plan))):
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        assert (want - hf_forward(source, "llama_biases", row)).abs().max() > 1e-2


def test_skipping_a_tied_embedding_must_leave_something() -> None:
    plan = Plan((Ablate(unit(), Site(0, "embed")),))
    with pytest.raises(ExportError, match=r"edits the embedding only"):
        planned(source_of("llama_gqa", True), plan, tied="skip-embedding")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_are_refused_and_large_ones_are_not(dtype: torch.dtype) -> None:
    one = torch.eye(4, dtype=torch.float64)[:, :1]
    half = TensorEdit("embedding", Affine(-one / 2, one, torch.zeros(4).double()), False, "embed")
    largest = torch.full((8, 4), torch.finfo(dtype).max).to(dtype)
    assert not largest.sum().isfinite()
    expected = largest.double()
    expected[:, 0] /= 2
    assert torch.equal(edited_tensor(largest, half), expected.to(dtype))
    largest[3] = torch.nan  # a row that nothing reads
    assert edited_tensor(largest, half)[4:].isfinite().all()
    grown = TensorEdit("embedding", Affine(one, one, torch.zeros(4).double()), False, "embed")
    with pytest.raises(ExportError, match="not finite at embed"):
        edited_tensor(largest, grown)


@pytest.mark.parametrize("layout", ["embedding", "linear", "conv1d"])
@pytest.mark.parametrize("keeps_norm", [False, True])
def test_edited_weights_are_the_same_bits_in_any_number_of_threads(
    layout: Any, keeps_norm: bool
) -> None:
    torch.manual_seed(0)
    rows, d_model, before = 1000, 2048, torch.get_num_threads()
    axes = torch.linalg.qr(torch.randn(d_model, 3, dtype=torch.float64))[0]
    affine = Affine(-axes, axes, torch.zeros(d_model, dtype=torch.float64))
    wide = torch.randn(*((d_model, rows) if layout == "linear" else (rows, d_model)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        edit, found = TensorEdit(layout, affine, keeps_norm), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(edited_tensor(wide.to(dtype), edit))
            assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), dtype
