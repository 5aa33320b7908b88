"""GGUF files: control vectors and whole models, written, read back and held to the checkpoint they came from.

What llama.cpp itself makes of them is in test_llama_cpp.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, N_LAYERS, make_tokenizer, rows_of, shared, tiny, unit
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from interp_ablate import Ablate, Add, Plan, Site
from interp_ablate.edits.kinds import Clamp
from interp_ablate.errors import DirectionError, ExportError, ModelError
from interp_ablate.export.control_vector import read_control_vector, write_control_vector
from interp_ablate.export.gguf import export_gguf
from interp_ablate.export.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name

POST = Site(1, "resid_post")


def keys_of(path: Path) -> dict[str, Any]:
    return {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def write(plan: Plan, path: Path, **options: Any) -> dict[str, Any]:
    return write_control_vector(plan, path, **{"model_hint": "llama", "n_layers": 3, **options})


# ------------------------------------------------------------------------- control vectors


def test_a_control_vector_holds_the_sum_at_every_block(tmp_path: Path) -> None:
    a, b, path = unit(1), unit(2), tmp_path / "v.gguf"
    plan = Plan(
        (
            Add(a, [POST, Site(2, "resid_post")], coefficient=[3.0, -0.5]),
            Add(b, [Site(2, "resid_pre"), Site(2, "mlp_out")], coefficient=2.0),
        )
    )
    report = write(plan, path, model_hint="qwen2")
    keys, tensors = keys_of(path), tensors_of(path)
    assert keys["general.architecture"] == "controlvector"
    assert keys["controlvector.model_hint"] == "qwen2"
    assert keys["controlvector.layer_count"] == 2 == report["layer_count"]
    assert set(tensors) == {"direction.1", "direction.2"}
    assert np.array_equal(tensors["direction.1"], (3 * a + 2 * b).float().numpy())
    assert np.array_equal(tensors["direction.2"], (-0.5 * a + 2 * b).float().numpy())
    back = read_control_vector(path)
    assert (back.model_hint, back.layer_count, list(back.vectors)) == ("qwen2", 2, [1, 2])
    assert back.plan().sites == (POST, Site(2, "resid_post"))
    assert {edit.label for edit in back.plan()} == {"v"}
    double = back.plan(2.0).maps_at(POST)[0][1]
    torch.testing.assert_close(double.shift, 6 * a + 4 * b, rtol=1e-6, atol=1e-6)


def test_a_plan_read_back_is_the_same_function(tmp_path: Path) -> None:
    plan = Plan(
        (Add(unit(1), Site(2, "resid_pre"), coefficient=4), Add(unit(2), Site(2, "mlp_out")))
    )
    write(plan, tmp_path / "v.gguf")
    model, rows = shared(), rows_of(5, 7)
    with model.applied(plan):
        want = model.logits(rows)
    with model.applied(read_control_vector(tmp_path / "v.gguf").plan()):
        got = model.logits(rows)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert float((want - model.logits(rows)).abs().max()) > 0.1


@pytest.mark.parametrize("site", [Site(2, "resid_pre"), Site(1, "mlp_out")], ids=str)
def test_three_names_for_the_output_of_a_block(tmp_path: Path, site: Site) -> None:
    write(Plan((Add(unit(), POST),)), tmp_path / "a.gguf")
    write(Plan((Add(unit(), site),)), tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(), "no edits"),
        (Plan((Ablate(unit(), POST),)), "no addition"),
        (Plan((Clamp(unit(), POST, value=1),)), "no addition"),
        (Plan((Add(unit(), POST), Ablate(unit(), POST))), "no addition"),
        (Plan((Add(unit(), POST, positions="generated"),)), "positions='all'"),
        (Plan((Add(unit(), Site(0, "embed")),)), "hook_embed"),
        (Plan((Add(unit(), Site(1, "attn_out")),)), "hook_attn_out"),
        (Plan((Add(unit(), Site(1, "resid_mid")),)), "hook_resid_mid"),
        (Plan((Add(unit(), Site(0, "resid_pre")),)), "embedding"),
        (Plan((Add(unit(), Site(1, "resid_pre")),)), "block 0"),
        (Plan((Add(unit(), Site(0, "mlp_out")),)), "block 0"),
        (Plan((Add(unit(), Site(3, "resid_post")),)), "3 layers"),
        (Plan((Add(unit(), Site(4, "resid_pre")),)), "3 layers"),
    ],
)
def test_what_no_control_vector_can_hold(tmp_path: Path, plan: Plan, reason: str) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(b"as it was")
    with pytest.raises(ExportError, match=reason) as caught:
        write(plan, path)
    assert reason == "no edits" or "nearest plan" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]
    assert path.read_bytes() == b"as it was"


def test_a_model_hint_and_a_place_are_needed(tmp_path: Path) -> None:
    plan = Plan((Add(unit(), POST),))
    with pytest.raises(ExportError, match="model type"):
        write(plan, tmp_path / "v.gguf", model_hint="")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write(plan, tmp_path / "file" / "v.gguf")


def foreign(path: Path, tensors: dict[str, np.ndarray], arch: str = "controlvector") -> Path:
    """A file as repeng writes it: the blocks from the last to the first, a uint32 count."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "mistral")
    writer.add_uint32(f"{arch}.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some(seed: int = 0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=width).astype(np.float32)


def test_reads_the_files_of_repeng_and_llama_cpp(tmp_path: Path) -> None:
    vectors = {f"direction.{n}": some(n) for n in (31, 30, 2, 1)}
    found = read_control_vector(foreign(tmp_path / "happy.gguf", vectors))
    assert (found.name, found.model_hint, found.layer_count) == ("happy", "mistral", 4)
    assert list(found.vectors) == [1, 2, 30, 31]
    for n, vector in found.vectors.items():
        assert np.array_equal(vector.numpy(), vectors[f"direction.{n}"])
    # llama.cpp's generator: an int32 count, here without a hint, and with a key that is an array
    writer = gguf.GGUFWriter(tmp_path / "l.gguf", "controlvector")
    writer.add_int32("controlvector.layer_count", 29)
    writer.add_array("general.tags", ["a", "bc"])
    writer.add_array("general.numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    writer.add_tensor("direction.1", some(1))
    writer.add_tensor("direction.2", np.zeros(6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_control_vector(tmp_path / "l.gguf")
    assert (found.model_hint, found.layer_count) == ("", 29)
    assert np.array_equal(found.vectors[1].numpy(), some(1))
    assert found.plan().sites == (POST,)  # a zero vector adds nothing


@pytest.mark.parametrize(
    ("tensors", "arch", "reason"),
    [
        ({"direction.0": some()}, "controlvector", "direction.0"),
        ({"direction.x": some()}, "controlvector", "direction.N"),
        ({"output.weight": some()}, "controlvector", "direction.N"),
        ({"direction.1": some().astype(np.float16)}, "controlvector", "float32"),
        ({"direction.1": some()[None]}, "controlvector", "shape"),
        ({"direction.1": some(), "direction.2": some(0, 7)}, "controlvector", "one shape"),
        ({"direction.1": some() * np.float32("nan")}, "controlvector", "NaN"),
        ({"direction.1": some() * np.float32("inf")}, "controlvector", "infinity"),
        ({}, "controlvector", "no vectors"),
        ({"direction.1": some()}, "llama", "'llama'"),
    ],
)
def test_files_that_are_no_control_vector(
    tmp_path: Path, tensors: dict[str, np.ndarray], arch: str, reason: str
) -> None:
    with pytest.raises(DirectionError, match=reason):
        read_control_vector(foreign(tmp_path / "v.gguf", tensors, arch))


def test_files_that_are_cut_short_or_lie(tmp_path: Path) -> None:
    whole = foreign(tmp_path / "v.gguf", {"direction.1": some(), "direction.2": some(2)})
    data, path = whole.read_bytes(), tmp_path / "w.gguf"
    for size in range(1, len(data) - 8):  # 8: the padding after the last tensor
        path.write_bytes(data[:size])
        with pytest.raises(DirectionError):
            read_control_vector(path)
    for bad in (b"", b"PK\3\4 a zip", data.replace(b"GGUF\3", b"GGUF\1", 1)):
        path.write_bytes(bad)
        with pytest.raises(DirectionError, match="GGUF"):
            read_control_vector(path)
    # an array of 2^60 entries, of which none is there
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for kind in (4, 8, 9, 77):
        path.write_bytes(start + struct.pack("<IIQ", 9, kind, 2**60))
        with pytest.raises(DirectionError):
            read_control_vector(path)
    with pytest.raises(DirectionError, match="cannot read"):
        read_control_vector(tmp_path / "none.gguf")


# ---------------------------------------------------------------------------------- models


def with_merges() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two merges: llama.cpp loads none without."""
    tokenizer = make_tokenizer()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["model"]["vocab"] |= {"th": 259, "the": 260}
    inner["model"]["merges"] = [["t", "h"], ["th", "e"]]
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    found.chat_template = tokenizer.chat_template
    return found


def saved(folder: Path, kind: str = "llama_gqa", *, dtype: Any = torch.float32, **options: Any):
    """A tiny model's folder, and the model."""
    shard = options.pop("max_shard_size", "5GB")
    model, _ = tiny(kind, **options)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    with_merges().save_pretrained(folder)
    return model


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of model.safetensors; None removes one. Double underscores stand for dots."""
    file = folder / "model.safetensors"
    state = load_file(file)
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, file, metadata={"format": "pt"})


def reconfigure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **changes}))


def logits(model: Any, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


def test_transformers_reads_the_model_back(tmp_path: Path, kind: str, tied: bool) -> None:
    # transformers does not read a Qwen 3 file's head_dim, and takes every model's default of 128
    model = saved(tmp_path, kind, tied=tied, **({"head_dim": 128} if kind == "qwen3" else {}))
    report = export_gguf(tmp_path, tmp_path / "m.gguf", dtype="f32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    row = rows_of(11)[0]
    assert torch.equal(logits(back, row), logits(model, row))
    assert ("output.weight" in report["tensors"]) is not tied
    assert report["architecture"] == {"mistral": "llama"}.get(kind, kind.split("_")[0])


def test_every_tensor_is_the_checkpoints(tmp_path: Path) -> None:
    model = saved(tmp_path, attention_bias=True, mlp_bias=True)
    state = dict(model.state_dict())
    report = export_gguf(tmp_path, tmp_path / "m.gguf", dtype="f32")
    tensors = tensors_of(tmp_path / "m.gguf")
    assert len(tensors) == len(state) == len(report["tensors"])
    for target, source in report["tensors"].items():
        want = state[source].numpy()
        if "attn_q." in target or "attn_k." in target:
            assert not np.array_equal(tensors[target], want)
            for head, rows in enumerate(np.split(want, 4 if "attn_q" in target else 2)):
                got = tensors[target][head * 8 : head * 8 + 8]
                assert np.array_equal(got[0::2], rows[:4]) and np.array_equal(got[1::2], rows[4:])
        else:
            assert np.array_equal(tensors[target], want), target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shards_and_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path, "qwen3", dtype=dtype, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    export_gguf(tmp_path, tmp_path / "half.gguf")
    export_gguf(tmp_path, tmp_path / "full.gguf", dtype="f32")
    half, full = tensors_of(tmp_path / "half.gguf"), tensors_of(tmp_path / "full.gguf")
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(full["blk.1.ffn_down.weight"], weight.float().numpy())
    assert np.array_equal(half["blk.1.ffn_down.weight"], weight.to(torch.float16).numpy())
    for name, tensor in half.items():
        assert tensor.dtype == (np.float32 if tensor.ndim == 1 else np.float16), name
    assert keys_of(tmp_path / "half.gguf")["general.file_type"] == 1
    assert keys_of(tmp_path / "full.gguf")["general.file_type"] == 0


def test_the_config_is_written(tmp_path: Path) -> None:
    model = saved(tmp_path, "qwen3")
    export_gguf(tmp_path, tmp_path / "m.gguf")
    keys, config = keys_of(tmp_path / "m.gguf"), model.config
    want = {
        "block_count": N_LAYERS,
        "embedding_length": D_MODEL,
        "context_length": 256,
        "feed_forward_length": 48,
        "vocab_size": 264,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    assert {name: keys[f"qwen3.{name}"] for name in want} == want
    assert keys["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_llama_3_1_frequencies(tmp_path: Path, spelling: str) -> None:
    model = saved(tmp_path, head_dim=32, num_attention_heads=1, num_key_value_heads=1)
    export_gguf(tmp_path, tmp_path / "plain.gguf")
    assert "rope_freqs.weight" not in tensors_of(tmp_path / "plain.gguf")
    values = {"rope_type": "llama3", **LLAMA3}
    reconfigure(tmp_path, rope_parameters=None)
    if spelling == "rope_scaling":  # as configs were written before transformers 5
        reconfigure(tmp_path, rope_scaling=values, rope_theta=500.0)
    else:
        reconfigure(tmp_path, rope_parameters={**values, "rope_theta": 500.0})
    export_gguf(tmp_path, tmp_path / "m.gguf")
    config = LlamaConfig.from_pretrained(tmp_path)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"]
    np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)
    assert factors.min() == 1 and factors.max() == 8 and len(set(factors)) > 3
    assert keys_of(tmp_path / "m.gguf")["llama.rope.freq_base"] == 500
    assert model.config.rope_parameters["rope_theta"] != 500


def test_linear_rope_scaling(tmp_path: Path) -> None:
    saved(tmp_path)
    reconfigure(
        tmp_path,
        rope_parameters=None,
        rope_scaling={"type": "linear", "factor": 4.0},
        rope_theta=10000.0,
    )
    export_gguf(tmp_path, tmp_path / "m.gguf")
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == 4


def test_a_sliding_window_is_noted(tmp_path: Path) -> None:
    saved(tmp_path, "mistral", sliding_window=16)
    (note,) = export_gguf(tmp_path, tmp_path / "m.gguf")["notes"]
    assert "16 tokens" in note
    saved(tmp_path / "none", "mistral", sliding_window=None)
    assert not export_gguf(tmp_path / "none", tmp_path / "n.gguf")["notes"]


def refused(folder: Path, reason: str, **options: Any) -> None:
    """The export raises, and leaves nothing."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises((ExportError, ModelError), match=reason):
        export_gguf(folder, folder / "m.gguf", **options)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_folders_without_a_form(tmp_path: Path) -> None:
    refused(tmp_path, "config.json")
    saved(tmp_path)
    good = (tmp_path / "config.json").read_text()
    for change, reason in (
        ({"model_type": "gpt2"}, "there is one for llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "whole head"),
        ({"num_hidden_layers": 4}, "9 missing"),
        ({"num_hidden_layers": 2}, "9 without a place"),
    ):
        reconfigure(tmp_path, **change)
        refused(tmp_path, reason)
        (tmp_path / "config.json").write_text(good)
    refused(tmp_path, "unknown dtype", dtype="bf16")
    export_gguf(tmp_path, tmp_path / "m.gguf")
    refused(tmp_path, "exists")
    export_gguf(tmp_path, tmp_path / "m.gguf", overwrite=True)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", overwrite=True)


def test_tensors_without_a_form(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    name = "model__layers__0__self_attn__o_proj__bias"
    rewrite(tmp_path, **{name: torch.zeros(D_MODEL)})
    refused(tmp_path, "without a place.*o_proj.bias")
    rewrite(tmp_path, **{name: None, "lm_head__weight": None})
    refused(tmp_path, "missing.*lm_head")
    saved(tmp_path, "qwen2")
    rewrite(tmp_path, **{"model__norm__weight": torch.ones(D_MODEL, dtype=torch.int8)})
    refused(tmp_path, "int8")
    saved(tmp_path, "qwen2")
    weight = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    rewrite(tmp_path, lm_head__weight=weight * 1e6)
    refused(tmp_path, 'lm_head.weight does not fit in float16.*"f32"')
    export_gguf(tmp_path, tmp_path / "m.gguf", dtype="f32")
    saved(tmp_path / "wide", "qwen2")
    reconfigure(tmp_path / "wide", head_dim=16)
    refused(tmp_path / "wide", "head_dim")


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    """transformers ties it if it holds the embedding's values, and goes by the file if it does not."""
    model = saved(tmp_path, tied=True)
    embedding = model.state_dict()["model.embed_tokens.weight"]
    rewrite(tmp_path, lm_head__weight=embedding.clone())
    assert "output.weight" not in export_gguf(tmp_path, tmp_path / "m.gguf", dtype="f32")["tensors"]
    rewrite(tmp_path, lm_head__weight=embedding.flip(0))
    export_gguf(tmp_path, tmp_path / "n.gguf", dtype="f32")
    assert np.array_equal(tensors_of(tmp_path / "n.gguf")["output.weight"], embedding.flip(0))
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path), [5, 6, 7])
    assert torch.equal(wanted, logits(model, [5, 6, 7]).flip(1))


def test_weight_files_that_are_broken_or_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(tmp_path, "model.safetensors")
    file.unlink()
    refused(tmp_path, "safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in ({"a": "../other.safetensors"}, {"a": "/etc/passwd"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(tmp_path, "plain")
    index.write_text("{}")
    refused(tmp_path, "index")


# ------------------------------------------------------------------------------ tokenizers


def test_the_tokenizer_is_written(tmp_path: Path) -> None:
    saved(tmp_path)
    found = export_gguf(tmp_path, tmp_path / "m.gguf")["tokenizer"]
    keys, tokenizer = keys_of(tmp_path / "m.gguf"), with_merges()
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert tokens[:261] == tokenizer.convert_ids_to_tokens(range(261))
    assert tokens[261:] == [f"[PAD{i}]" for i in range(261, 264)]
    assert types == [3] * 3 + [1] * 258 + [5] * 3  # control, normal, unused
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.padding_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def test_added_tokens_and_bos(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer = with_merges()
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<tool>"])
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    fast = json.loads((tmp_path / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert export_gguf(tmp_path, tmp_path / "m.gguf")["tokenizer"]["add_bos"]
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["tokenizer.ggml.tokens"][261] == "<tool>"
    assert keys["tokenizer.ggml.token_type"][261] == 4  # user defined: found in any text
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.chat_template" not in keys


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer of a declared name, made by the tokenizers package."""
    steps, _ = PRE_TOKENIZERS[name]
    made = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"])
        if step["type"] == "ByteLevel"
        else pre_tokenizers.Digits(individual_digits=True)
        if step["type"] == "Digits"
        else pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated")
        for step in steps
    ]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


def fast_of(name: str) -> dict[str, Any]:
    inner = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name][1]))
    inner.pre_tokenizer = pre_tokenizer(name)
    return json.loads(inner.to_str())


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_told_apart(name: str) -> None:
    fast = fast_of(name)
    assert pre_tokenizer_name(fast) == name
    assert pre_tokenizer_name({**fast, "normalizer": {"type": "NFC"}}) == name
    with pytest.raises(ExportError, match="Lowercase"):
        pre_tokenizer_name({**fast, "normalizer": {"type": "Lowercase"}})
    fast["model"]["ignore_merges"] = not fast["model"]["ignore_merges"]
    with pytest.raises(ExportError, match="ignore_merges"):
        pre_tokenizer_name(fast)


def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    reconfigure(tmp_path, "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    refused(tmp_path, "Whitespace.*gpt-2, smollm, llama-bpe, qwen2")
    spaced = {"type": "ByteLevel", "trim_offsets": True}  # add_prefix_space is on where not given
    reconfigure(tmp_path, "tokenizer.json", pre_tokenizer=spaced)
    refused(tmp_path, "add_prefix_space")
    reconfigure(tmp_path, "tokenizer.json", pre_tokenizer={**spaced, "add_prefix_space": False})
    assert export_gguf(tmp_path, tmp_path / "m.gguf")["tokenizer"]["pre"] == "gpt-2"


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    saved(tmp_path, vocab_size=260)
    refused(tmp_path, "id 260.*260 rows")
    make_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "without merges")
    (tmp_path / "tokenizer.json").unlink()
    refused(tmp_path, "no tokenizer.json and no tokenizer.model")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    refused(tmp_path, "Unigram")


def sentencepiece_model(folder: Path, *, exact: bool = True) -> Any:
    """A tokenizer.model of Llama 2's kind: BPE over text with byte fallback, trained on a few words."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran after the cat\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity" if exact else "nmt_nfkc",
        remove_extra_whitespaces=not exact,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def sentencepiece_folder(folder: Path) -> Any:
    """A tiny Llama with a SentencePiece tokenizer of 300 pieces at most, and that tokenizer."""
    saved(folder, vocab_size=320)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    found = sentencepiece_model(folder)
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "added_tokens_decoder": {"318": {"content": "<|user|>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reconfigure(folder, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    return found


def test_sentencepiece(tmp_path: Path) -> None:
    pieces = sentencepiece_folder(tmp_path)
    found = export_gguf(tmp_path, tmp_path / "m.gguf")["tokenizer"]
    keys = keys_of(tmp_path / "m.gguf")
    n = pieces.vocab_size()
    assert found == {
        "model": "llama",
        "pre": "default",
        "n_tokens": n + 1,
        "add_bos": True,
        "special_ids": {"bos": 1, "eos": 2},
    }
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:n] == [pieces.IdToPiece(i) for i in range(n)]
    assert types[:4] == [2, 3, 3, 6] and types[259:n] == [1] * (n - 259)  # unknown, control, byte
    assert (tokens[318], types[318]) == ("<|user|>", 3) and types[319] == 5
    scores = [pieces.GetScore(i) for i in range(n)]
    assert keys["tokenizer.ggml.scores"][:n] == pytest.approx(scores)
    assert keys["tokenizer.ggml.add_space_prefix"] is True


def test_sentencepiece_that_normalizes_has_no_form(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path)
    sentencepiece_model(tmp_path, exact=False)
    refused(tmp_path, "normalizes text")
    (tmp_path / "tokenizer.model").write_bytes(b"something else")
    refused(tmp_path, "cannot read.*tokenizer.model")
