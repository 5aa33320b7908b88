"""LoRA adapters: PEFT's own loading and merging give the hooked model, on every declared architecture."""

from __future__ import annotations

import builtins
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import D_MODEL, DECLARED, N_LAYERS, make, rows_of, shared, source_of, unit
from torch import Tensor

from interp_ablate import Ablate, Add, Clamp, Plan, Site
from interp_ablate.edits.affine import Affine
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import ExportError
from interp_ablate.export.lora import WEIGHTS, export_lora, untied_base
from interp_ablate.export.lora_adapter import PREFIX, lora_adapter, minimal_adapter
from interp_ablate.models.load import from_hf
from interp_ablate.weights.plan_to_weights import WeightPlan, weight_plan

peft = pytest.importorskip("peft")

ROWS = rows_of(9, 14)
BOTH = {"untied": False, "tied": True}
EXACT = {"rtol": 0, "atol": 1e-5}


def writers(kind: str) -> list[Site]:
    return DECLARED[kind].writers


def hooked(model: Any, plan: Plan) -> list[Tensor]:
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0].float() for row in ROWS]


@torch.no_grad()
def plain(hf: Any) -> list[Tensor]:
    return [hf(torch.tensor([row])).logits[0].float() for row in ROWS]


def base_of(kind: str, tied: bool = False, **config: Any) -> Any:
    return copy.deepcopy(
        tiny.tiny(kind, tied=tied, **config)[0] if config else source_of(kind, tied)
    )


def load(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


def assert_exact(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def assert_the_hooked_model(
    kind: str, plan: Plan, out: Path, *, tied: bool = False, model: Any = None, **config: Any
) -> dict[str, Any]:
    """Export; PEFT over a fresh base, unmerged and merged, against the hooks. Returns the certificate."""
    model = model or shared(kind, tied=tied)
    certificate = export_lora(model, plan, out, prompts=ROWS)
    want, before = hooked(model, plan), plain(base_of(kind, tied, **config))
    assert max(float((a - b).abs().max()) for a, b in zip(want, before)) > 1e-2
    assert_exact(plain(load(base_of(kind, tied, **config), out)), want)
    base = base_of(kind, tied, **config)
    if tied:
        base = untied_base(base)
        assert_exact(plain(base), before)
    merged = load(base, out).merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert_exact(plain(merged), want)
    assert certificate["passed"]
    assert certificate["max_abs_logit_difference"] < 1e-5
    assert certificate["merged_max_abs_logit_difference"] < 1e-5
    assert certificate["max_abs_logit_effect_of_plan"] > 1e-2
    return certificate


def tensors_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / WEIGHTS)


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text())


# --------------------------------------------------------------------------------- every architecture


@pytest.mark.parametrize("tied", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("kind", DECLARED)
def test_hooks_adapter_and_merged_agree(kind: str, tied: bool, tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers(kind)),))
    model = shared(kind, tied=tied)
    before = {name: tensor.clone() for name, tensor in model.hf_state_dict().items()}
    assert_the_hooked_model(kind, plan, tmp_path / "out", tied=tied)
    for (
        name,
        tensor,
    ) in model.hf_state_dict().items():  # PEFT merges in place: not into the user's model
        assert torch.equal(tensor, before[name]), name
    factors = {n: x for n, x in tensors_of(tmp_path / "out").items() if "lora_B.bias" not in n}
    experts = 4 if DECLARED[kind].experts else 1
    for name, tensor in factors.items():
        if name.endswith("base_layer.bias"):
            continue
        rank = tensor.shape[1] if "_B" in name else tensor.shape[0]
        dense = ".experts." not in name
        assert rank == (1 if dense else experts), name
        assert tensor.dtype == torch.float32
    assert len([n for n in factors if "_A" in n]) == len(writers(kind))


def test_a_model_with_the_hooked_backend(tmp_path: Path) -> None:
    if not tiny.HAS_HOOKED:
        pytest.skip("this TransformerLens has no HookedTransformer")
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    model = make("llama_gqa", "hooked", tied=True)
    assert_the_hooked_model("llama_gqa", plan, tmp_path / "out", tied=True, model=model)


def test_writers_found_in_a_component_map(tmp_path: Path) -> None:
    model = make("starcoder2", use_bias=True)
    plan = Plan((Ablate(unit(1), tiny.PARTS["starcoder2"].writers),))
    certificate = export_lora(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["max_abs_logit_difference"] < 1e-5
    assert certificate["merged_max_abs_logit_difference"] < 1e-5
    assert config_of(tmp_path / "out")["bias"] == "lora_only"


# --------------------------------------------------------------------------------- plans


def sites(kind: str, point: str) -> list[Site]:
    return [site for site in writers(kind) if site.point == point]


def plans(kind: str) -> dict[str, tuple[Plan, set[int]]]:
    """Plans and the ranks that their adapters have."""
    every = writers(kind)
    a, b, two = unit(1), unit(2), unit(3, k=2)
    spread = [0.3 + 0.2 * i for i in range(len(every))]
    some = sites(kind, "mlp_out")
    return {
        "strengths": (Plan((Ablate(a, every, strength=spread),)), {1}),
        "reflection": (Plan((Ablate(a, every, strength=2.0),)), {1}),
        "subspace": (Plan((Ablate(two, every, strength=0.7),)), {2}),
        "composed": (Plan((Ablate(a, every), Ablate(b, some, strength=0.5))), {1, 2}),
        "same twice": (Plan((Ablate(a, every, strength=0.5), Ablate(a, some))), {1}),
        "a plane's own line": (Plan((Ablate(two, every), Ablate(two[0], every))), {2}),
        "one layer": (Plan((Ablate(a, Site(1, "mlp_out")),)), {1}),
        "embedding shift": (Plan((Ablate(a, every), Add(b, Site(0, "embed")))), {1, 2}),
        "erase": (Plan((Erase(a + b, a, every, strength=spread),)), {1}),
        "erase to a value": (
            Plan((Erase(a + b, a, every, value=[2.0] + [0.0] * (len(every) - 1)),)),
            {1, 2},
        ),
    }


CASES = [("llama_gqa", name) for name in plans("llama_gqa")]
CASES += [
    (kind, name)
    for kind in ("gpt2", "mixtral")
    for name in ("composed", "embedding shift", "erase", "erase to a value")
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_plans(kind: str, name: str, tmp_path: Path) -> None:
    plan, ranks = plans(kind)[name]
    out = tmp_path / "out"
    assert_the_hooked_model(kind, plan, out)
    found = json.loads((out / "interp_ablate.json").read_text())["ranks"]
    assert set(found.values()) == ranks
    written = tensors_of(out)
    config = config_of(out)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["lora_alpha"] == config["r"]  # scaling 1
    for weight, rank in found.items():
        module = PREFIX + weight.removesuffix(".weight").removesuffix(
            ".down_proj" * ("experts" in weight)
        )
        (down,) = (x for n, x in written.items() if n.startswith(f"{module}.lora_") and "_A" in n)
        (up,) = (
            x
            for n, x in written.items()
            if n.startswith(f"{module}.lora_") and "_B" in n and "bias" not in n
        )
        if "experts" not in weight:
            assert down.shape[0] == up.shape[1] == rank
            assert int(torch.linalg.matrix_rank(up.double())) == rank


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3_moe_mixed"])
def test_peft_has_nothing_to_warn_about(kind: str, tmp_path: Path) -> None:
    """Of layouts it must guess, targets it does not find, patterns it ignores, missing tensors."""
    more = Ablate(unit(2, k=2), sites(kind, "attn_out")), Ablate(unit(3), Site(2, "mlp_out"))
    plan = Plan((Ablate(unit(1), writers(kind)), *more))
    assert_the_hooked_model(kind, plan, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        load(base_of(kind), tmp_path / "out")


def test_what_cancels_is_left_out(tmp_path: Path) -> None:
    back = Ablate(unit(1), Site(0, "attn_out"), strength=2.0)
    plan = Plan((back, back, Ablate(unit(1), Site(2, "mlp_out"))))
    assert_the_hooked_model("llama_gqa", plan, tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["model.layers.2.mlp.down_proj"]


def test_the_residual_stream_everywhere(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), DECLARED["llama_gqa"].residual),))
    assert_the_hooked_model("llama_gqa", plan, tmp_path / "out", tied=True)


def test_only_named_modules_are_adapted(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), [Site(1, "mlp_out"), Site(1, "attn_out")]),))
    export_lora(shared("llama_gqa"), plan, tmp_path / "out", prompts=ROWS)
    adapted = load(base_of("llama_gqa"), tmp_path / "out")
    found = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if "lora_A" in n}
    block = f"{PREFIX}model.layers.1"
    assert found == {f"{block}.mlp.down_proj", f"{block}.self_attn.o_proj"}


# --------------------------------------------------------------------------------- biases


@pytest.mark.parametrize("kind", ["llama_biases", "gpt2", "gpt_neox"])
def test_additions_where_there_are_biases(kind: str, tmp_path: Path) -> None:
    block = sites(kind, "attn_out") + sites(kind, "mlp_out")
    plan = Plan((Ablate(unit(1), block[:2]), Add(3 * unit(2), block)))
    assert_the_hooked_model(kind, plan, tmp_path / "out")
    assert config_of(tmp_path / "out")["lora_bias"] is True
    ranks = json.loads((tmp_path / "out" / "interp_ablate.json").read_text())["ranks"]
    assert sorted(ranks.values()) == [0] * (len(block) - 2) + [1, 1]
    adapted = load(base_of(kind), tmp_path / "out")
    with adapted.disable_adapter():
        assert_exact(plain(adapted), plain(base_of(kind)))


def test_a_clamp(tmp_path: Path) -> None:
    plan = Plan((Clamp(unit(1), sites("gpt2", "mlp_out"), value=2.0),))
    assert_the_hooked_model("gpt2", plan, tmp_path / "out")


def test_an_erasure_to_a_value_where_there_are_biases(tmp_path: Path) -> None:
    plan = Plan((Erase(unit(1) + unit(2), unit(1), sites("gpt2", "mlp_out"), value=2.0),))
    assert_the_hooked_model("gpt2", plan, tmp_path / "out")


@pytest.mark.parametrize("tied", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2", "olmo2"])
def test_an_erasure_of_every_writer(kind: str, tied: bool, tmp_path: Path) -> None:
    """Tied and before norms."""
    plan = Plan((Erase(unit(1) + unit(2), unit(1), writers(kind)),))
    assert_the_hooked_model(kind, plan, tmp_path / "out", tied=tied)


def test_an_embedding_with_biases_replaces_the_bases(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("gpt2")), Add(unit(2), sites("gpt2", "mlp_out"))))
    assert_the_hooked_model("gpt2", plan, tmp_path / "out", tied=True)
    config = config_of(tmp_path / "out")
    assert (config["bias"], config["lora_bias"]) == ("lora_only", False)
    assert "lora_only" in (tmp_path / "out" / "README.md").read_text()
    # PEFT itself writes the same file again
    load(base_of("gpt2", True), tmp_path / "out").save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_biases_at_some_projections_only(tmp_path: Path) -> None:
    config = {"attention_bias": True}
    model = make("llama_gqa", **config)
    plan = Plan((Ablate(unit(1), [Site(0, "attn_out"), Site(0, "mlp_out")]),))
    assert_the_hooked_model("llama_gqa", plan, tmp_path / "out", model=model, **config)
    assert config_of(tmp_path / "out")["bias"] == "lora_only"


# --------------------------------------------------------------------------------- tied embeddings


def test_a_plain_merge_into_a_tied_base_is_another_function(tmp_path: Path) -> None:
    """Why `untied_base` is needed, and why the card says so."""
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    model = shared("llama_gqa", tied=True)
    export_lora(model, plan, tmp_path / "out", prompts=ROWS)
    merged = load(base_of("llama_gqa", True), tmp_path / "out").merge_and_unload()
    assert (
        max(float((a - b).abs().max()) for a, b in zip(plain(merged), hooked(model, plan))) > 1e-2
    )
    assert "def untied_base" in (tmp_path / "out" / "README.md").read_text()


def test_an_untied_and_merged_model_can_be_saved(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    model = shared("llama_gqa", tied=True)
    export_lora(model, plan, tmp_path / "out", prompts=ROWS)
    load(
        untied_base(base_of("llama_gqa", True)), tmp_path / "out"
    ).merge_and_unload().save_pretrained(tmp_path / "merged")
    again = type(base_of("llama_gqa", True)).from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings is False
    assert_exact(plain(again), hooked(model, plan))


def test_skip_embedding(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    model = shared("llama_gqa", tied=True)
    export_lora(model, plan, tmp_path / "out", tied="skip-embedding", prompts=ROWS)
    blocks = Plan((Ablate(unit(1), writers("llama_gqa")[1:]),))
    assert not [name for name in tensors_of(tmp_path / "out") if "embed" in name]
    adapted = load(base_of("llama_gqa", True), tmp_path / "out")
    assert_exact(plain(adapted), hooked(model, blocks))
    assert_exact(plain(adapted.merge_and_unload()), hooked(model, blocks))


def test_accept_is_merged_as_it_is_and_shows_its_cost(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    model = shared("llama_gqa", tied=True)
    certificate = export_lora(model, plan, tmp_path / "out", tied="accept", prompts=ROWS)
    assert_exact(plain(load(base_of("llama_gqa", True), tmp_path / "out")), hooked(model, plan))
    cost = certificate["cost_of_accept"]
    merged = load(base_of("llama_gqa", True), tmp_path / "out").merge_and_unload()
    gap = max(float((a - b).abs().max()) for a, b in zip(plain(merged), hooked(model, plan)))
    assert cost["max_abs_logit_difference"] == pytest.approx(gap, abs=1e-5)
    assert gap > 1e-2 and cost["kl"] > 0
    assert certificate["merged_max_abs_logit_difference"] < 1e-5


def test_untied_stays_untied(tmp_path: Path) -> None:
    base = untied_base(base_of("llama_gqa", True))
    want = base.lm_head.weight.clone()
    with torch.no_grad():
        base.model.embed_tokens.weight.zero_()
    base.tie_weights()
    assert torch.equal(base.lm_head.weight, want)
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(tmp_path / "base")
    assert torch.equal(again.lm_head.weight, want)


def test_peft_has_nothing_to_warn_about_an_untied_base(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    export_lora(shared("llama_gqa", tied=True), plan, tmp_path / "out", prompts=ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(untied_base(base_of("llama_gqa", True)), tmp_path / "out").merge_and_unload()


# --------------------------------------------------------------------------------- what has no form


def refused(plan: Plan, kind: str, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(ExportError, match=match):
        export_lora(shared(kind), plan, out, prompts=ROWS, **options)
    assert list(out.parent.iterdir()) == []


def test_norm_preserving_has_no_low_rank(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa"), norm_preserving=True),))
    refused(plan, "llama_gqa", tmp_path / "out", "without norm_preserving")


def test_an_addition_without_a_bias(tmp_path: Path) -> None:
    plan = Plan((Add(unit(1), Site(1, "mlp_out")),))
    refused(plan, "llama_gqa", tmp_path / "out", "cannot merge it")
    refused(plan, "mistral", tmp_path / "out", "needs a bias")
    erase = Plan((Erase(unit(1), unit(1), Site(1, "mlp_out"), value=1.0),))
    refused(erase, "llama_gqa", tmp_path / "out", "leave what is added.*out of the adapter's plan")
    refused(erase, "mistral", tmp_path / "out", "needs a bias")


def test_a_plan_that_changes_nothing(tmp_path: Path) -> None:
    refused(Plan(), "llama_gqa", tmp_path / "out", "nothing to export")
    nothing = Plan((Ablate(unit(1), Site(0, "attn_out"), strength=0.0),))
    refused(nothing, "llama_gqa", tmp_path / "out", "nothing to export")


def test_a_residual_plan_without_a_weight_form(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), Site(1, "resid_post")),))
    refused(plan, "llama_gqa", tmp_path / "out", "nearest exact plan")


def test_a_failed_certificate_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.export import lora

    def spoiled(*arguments: Any, **options: Any) -> Any:
        adapter = lora_adapter(*arguments, **options)
        name = next(n for n in adapter.tensors if "embed" not in n)
        adapter.tensors[name] *= 1.5
        return adapter

    monkeypatch.setattr(lora, "lora_adapter", spoiled)
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    refused(plan, "llama_gqa", tmp_path / "out", r"max_abs_logit_difference .*\(limit")


def test_an_adapter_that_peft_cannot_load_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.export import lora

    def elsewhere(*arguments: Any, **options: Any) -> Any:
        adapter = lora_adapter(*arguments, **options)
        adapter.fields["target_modules"] = ["no.such.module"]
        return adapter

    monkeypatch.setattr(lora, "lora_adapter", elsewhere)
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    refused(plan, "llama_gqa", tmp_path / "out", "PEFT cannot load")


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), Site(0, "attn_out")),))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ExportError, match="exists"):
        export_lora(shared("llama_gqa"), plan, out, prompts=ROWS)
    with pytest.raises(ExportError, match="no export"):
        export_lora(shared("llama_gqa"), plan, out, prompts=ROWS, overwrite=True)
    assert (out / "mine").read_text() == "kept"
    (out / "interp_ablate.json").touch()
    export_lora(shared("llama_gqa"), plan, out, prompts=ROWS, overwrite=True)
    assert (out / WEIGHTS).is_file() and not (out / "mine").exists()


def test_without_peft_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    refused(plan, "llama_gqa", tmp_path / "out", "pip install peft")


# --------------------------------------------------------------------------------- numbers and files


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "mixtral"])
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny.tiny(kind, tied=True)
    model = tiny.from_hf(hf.to(torch.bfloat16), tokenizer)
    plan = Plan((Ablate(unit(1), writers(kind)),))
    certificate = export_lora(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["dtype"] == "bfloat16"
    assert certificate["share_of_edit_missed"] < 0.1
    assert certificate["compared"] == dict.fromkeys(("stored", "hooked", "reloaded"), "bfloat16")
    # rounding of activations alone is 0.05 to 0.2 here, in unedited models too
    effect = certificate["max_abs_logit_effect_of_plan"]
    assert certificate["max_abs_logit_difference"] < effect / 5
    assert certificate["merged_max_abs_logit_difference"] < effect / 5
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float32}


def test_factors_can_be_stored_in_16_bits(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), sites("llama_gqa", "mlp_out")),))
    model = make("llama_gqa")
    wide = export_lora(model, plan, tmp_path / "wide", prompts=ROWS)
    assert wide["max_abs_logit_difference"] < 1e-5
    with pytest.raises(
        ExportError, match="limit"
    ):  # too coarse for a float32 model, and it says so
        export_lora(model, plan, tmp_path / "out", dtype=torch.bfloat16, prompts=ROWS)
    half = tiny.from_hf(tiny.tiny("llama_gqa")[0].to(torch.bfloat16), tiny.make_tokenizer())
    export_lora(half, plan, tmp_path / "out", dtype=torch.bfloat16, prompts=ROWS)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_product_is_the_edit_in_float64() -> None:
    """B A is W' - W, from the formula, blocks of rows included."""
    state = {n: t.double() for n, t in source_of("llama_gqa").state_dict().items()}
    sub = unit(4, k=2)
    plan = weight_plan(
        Plan((Ablate(sub, [Site(0, "embed"), Site(1, "mlp_out")], strength=0.4),)),
        source_of("llama_gqa").config,
        list(state),
        state.__getitem__,
    )
    found = lora_adapter(plan, list(state), state.__getitem__, dtype=torch.float64).tensors
    projector = sub.T @ sub
    base = f"{PREFIX}model.layers.1.mlp.down_proj.lora_"
    want = -0.4 * projector @ state["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(found[f"{base}B.weight"] @ found[f"{base}A.weight"], want)
    base = f"{PREFIX}model.embed_tokens.lora_embedding_"
    want = -0.4 * state["model.embed_tokens.weight"] @ projector
    torch.testing.assert_close((found[f"{base}B"] @ found[f"{base}A"]).T, want)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "mixtral"])
def test_long_tensors_are_read_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_ablate.export import lora_adapter as adapters

    state = source_of(kind).state_dict()
    plan = Plan((Ablate(unit(1), writers(kind)),))
    weights = weight_plan(plan, source_of(kind).config, list(state), state.__getitem__)
    whole = lora_adapter(weights, list(state), state.__getitem__).tensors
    monkeypatch.setattr(adapters, "BLOCK", 7 * D_MODEL)
    blocks = lora_adapter(weights, list(state), state.__getitem__).tensors
    assert list(blocks) == list(whole)
    for name, tensor in blocks.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7)


def test_minimal_keeps_the_product() -> None:
    a, b = unit(1)[:, None], unit(2)[:, None]
    zero = torch.zeros(D_MODEL, dtype=torch.float64)
    for left, right, rank in (
        (torch.cat([a, b], 1), torch.cat([b, a], 1), 2),
        (torch.cat([a, a], 1), torch.cat([b, b], 1), 1),
        (torch.cat([a, -a], 1), torch.cat([b, b], 1), 0),
        (torch.cat([a, 1e-6 * b], 1), torch.cat([a, b], 1), 2),  # small, not rounding
    ):
        small_left, small_right = minimal_adapter(Affine(left, right, zero))
        assert small_left.shape == small_right.shape == (D_MODEL, rank)
        torch.testing.assert_close(small_left @ small_right.T, left @ right.T, rtol=0, atol=1e-14)


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    for name in ("one", "two"):
        export_lora(shared("llama_gqa"), plan, tmp_path / name, prompts=ROWS)
    for file in ("adapter_config.json", WEIGHTS, "interp_ablate.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    modules = config_of(tmp_path / "one")["target_modules"]
    assert modules == sorted(modules) and len(modules) == 1 + 2 * N_LAYERS


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")),))
    certificate = export_lora(
        shared("llama_gqa"), plan, tmp_path / "out", prompts=ROWS, report={"behaviour_after": 0.25}
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "certificate.json",
        "interp_ablate.json",
    }
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == certificate
    manifest = json.loads((tmp_path / "out" / "interp_ablate.json").read_text())
    assert manifest["kind"] == "lora" and manifest["test"] == {"behaviour_after": 0.25}
    assert Plan.load(tmp_path / "out" / "interp_ablate.json") == plan
    assert len(manifest["edited"]) + len(manifest["unchanged"]) == len(
        source_of("llama_gqa").state_dict()
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "## Merging" in card


def test_an_empty_weight_plan_is_refused() -> None:
    with pytest.raises(ExportError, match="nothing to export"):
        lora_adapter(WeightPlan(Plan()), [], {}.__getitem__)


# --------------------------------------------------------------------------------- servers


@pytest.mark.parametrize("tied", BOTH.values(), ids=BOTH)
def test_the_plan_without_its_embedding_and_what_that_costs(tmp_path: Path, tied: bool) -> None:
    """Servers that take adapters of layers only: no embedding among the targets, and the loss in numbers."""
    model, plan = shared("llama_gqa", tied=tied), Plan((Ablate(unit(1), writers("llama_gqa")),))
    certificate = export_lora(model, plan, tmp_path / "out", tied="skip-embedding", prompts=ROWS)
    assert not [name for name in tensors_of(tmp_path / "out") if "embed" in name]
    assert not [name for name in config_of(tmp_path / "out")["target_modules"] if "embed" in name]
    lesser = Plan((Ablate(unit(1), writers("llama_gqa")[1:]),))
    want = hooked(model, lesser)
    assert_exact(plain(load(base_of("llama_gqa", tied), tmp_path / "out")), want)
    apart = max(float((a - b).abs().max()) for a, b in zip(want, hooked(model, plan)))
    cost = certificate["cost_of_skipped_embedding"]
    assert cost["max_abs_logit_difference"] == pytest.approx(apart, abs=1e-5) and apart > 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How far it is from the plan itself" in card and "skip-embedding" not in card
    assert "convert_lora_to_gguf.py" in card


def test_a_plan_without_an_embedding_costs_nothing(tmp_path: Path) -> None:
    plan = Plan((Ablate(unit(1), writers("llama_gqa")[1:]),))
    certificate = export_lora(
        shared("llama_gqa"), plan, tmp_path / "out", tied="skip-embedding", prompts=ROWS
    )
    assert "cost_of_skipped_embedding" not in certificate


def test_the_card_says_which_servers_take_the_adapter(tmp_path: Path) -> None:
    for kind, said in (
        ("llama_gqa", "--tied skip-embedding"),
        ("mixtral", "no adapter of fused experts"),
    ):
        export_lora(
            shared(kind), Plan((Ablate(unit(1), writers(kind)),)), tmp_path / kind, prompts=ROWS
        )
        assert said in (tmp_path / kind / "README.md").read_text()


@pytest.mark.parametrize("kind", ("mixtral", "qwen3_moe", "llama_gqa"))
def test_layer_1_is_not_layer_10(tmp_path: Path, kind: str) -> None:
    """Names are matched whole: not inside layers.10 or layers.11, nor an expert's number."""
    config = {"num_hidden_layers": 12}
    plan = Plan((Ablate(unit(1, k=2), [Site(1, "attn_out"), Site(1, "mlp_out")]),
                 Ablate(unit(3), [Site(1, "mlp_out")])))  # fmt: skip
    model = make(kind, **config)
    export_lora(model, plan, tmp_path / "out", prompts=ROWS)
    base = base_of(kind, **config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = load(base, tmp_path / "out").merge_and_unload().state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed and all(".layers.1." in name for name in changed) and len(changed) == 2


# --------------------------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", "granitemoeshared", "jamba", "llama4_text", "mixtral", "qwen2_moe", "qwen3_next"],
)
def test_all_experts_and_shared_ones_are_adapted(model_type: str, tmp_path: Path) -> None:
    """Plain PEFT over a fresh base against hooks of torch: stacked in both orientations, biases, shared experts.

    Experts [expert, in, d_model] (gpt-oss, Llama 4) ended in an error of torch before.
    """
    from support.family_models import build

    model = from_hf(build(model_type), tiny.make_tokenizer())
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    export_lora(model, Plan((Ablate(r, model.writers),)), tmp_path / "out", prompts=ROWS)
    unit_r, hf = r / r.norm(), build(model_type)

    def without(module: Any, args: Any, out: Any) -> Any:
        x = out if isinstance(out, Tensor) else out[0]
        x = x - (x @ unit_r)[..., None] * unit_r
        return x if isinstance(out, Tensor) else (x, *out[1:])

    # nothing enters along r and every block's output is projected: what an ablation at all writers computes
    lists = [m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4]
    blocks = next(m for m in lists if type(m[0]).__name__.endswith("Layer"))
    before = plain(hf)
    hf.get_input_embeddings().register_forward_hook(without)
    for block in blocks:
        for part in block.children():
            if not any("norm" in word for word in type(part).__name__.lower().split()):
                part.register_forward_hook(without)
    want = plain(hf)
    assert max(float((a - b).abs().max()) for a, b in zip(want, before)) > 1e-2
    assert_exact(plain(load(build(model_type), tmp_path / "out")), want)
    assert_exact(plain(load(build(model_type), tmp_path / "out").merge_and_unload()), want)


def test_a_bias_of_no_linear_layer_is_refused(tmp_path: Path) -> None:
    from support.family_models import build

    model = from_hf(build("jetmoe"), tiny.make_tokenizer())
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportError, match=r"self_attention\.experts\.bias .* Export a checkpoint"):
        export_lora(model, Plan((Ablate(r, model.writers),)), tmp_path / "out", prompts=ROWS)
