"""Folders of GPTQ, AWQ and compressed-tensors: loaded, streamed and certified as the plain weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hand_hooked import left_along
from support.packed import KINDS, packed_folder
from transformers import AutoModelForCausalLM

from interp_ablate import Plan
from interp_ablate.cli.main import main
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import ModelError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.lora import export_lora
from interp_ablate.export.preflight import check_model_exports, check_source_exports
from interp_ablate.export.source_folder import opened
from interp_ablate.models.load import load_model
from interp_ablate.models.model import Model
from interp_ablate.models.sources import resolve
from interp_ablate.training.trainable_model import load_base

ROWS = [[*range(5, 17)], [3, 4, 5]]


def everywhere(model: Model) -> tuple[torch.Tensor, Plan]:
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return r, Plan((Ablate(r, model.writers),))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_the_plain_weights_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    packed, plain = packed_folder(tmp_path, kind)
    source, want = opened(packed), load_file(plain / "model.safetensors")
    assert source.tensors.keys() == want.keys()
    for name, tensor in want.items():
        got = source.read(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    model = load_model(packed, backend="hf")
    state = model.tl.hf.state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("kind", "model_type"),
    (
        ("gptq with order", "llama"),
        ("awq", "olmoe"),  # experts, one by one
        ("pack-quantized of zero points", "gemma3"),  # the text tower of a wrapped model
        ("gptq_v2", "phi3"),  # one tensor for queries, keys and values
        ("float-quantized", "gemma2"),  # norms after what writes
    ),
)
def test_streamed_and_certified(kind: str, model_type: str, tmp_path: Path) -> None:
    packed, plain = packed_folder(tmp_path, kind, model_type)
    check_source_exports(resolve(packed), tmp_path / "b")
    model = load_model(packed)
    assert model.backend == load_model(plain).backend
    r, plan = everywhere(model)
    check_model_exports(model, tmp_path / "b")
    certificate = export_checkpoint(model, plan, tmp_path / "b", prompts=ROWS)
    assert certificate["passed"]
    manifest = export_folder(packed, plan, tmp_path / "c")
    export_folder(plain, plan, tmp_path / "d")
    one, other, wanted = (load_file(tmp_path / name / "model.safetensors") for name in "bcd")
    assert one.keys() == other.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == one[name].dtype == other[name].dtype
        assert torch.equal(tensor, one[name]) and torch.equal(tensor, other[name])
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
    said = manifest["dequantized"]
    assert said in (tmp_path / "c" / "README.md").read_text()
    assert said == json.loads((tmp_path / "b" / "certificate.json").read_text())["dequantized"]
    assert audit(AuditSource.of_folder(packed), plan, tmp_path / "c").passed
    # in plain transformers; rounded to 16 bits
    assert left_along(tmp_path / "c", r, ROWS) < 1e-2 < 0.05 < left_along(plain, r, ROWS)


def test_a_quantized_unembedding_tied_or_not(tmp_path: Path) -> None:
    packed, plain = packed_folder(tmp_path, "gptq", head=True, tied=False)
    assert "lm_head.qweight" in load_file(packed / "model.safetensors")
    for model in (packed, plain):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    got, want = (load_model(folder).logits(ROWS) for folder in (packed, plain))
    assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", ("llama", "qwen2"))  # the second has some biases of its own
def test_biases_that_older_makers_of_gptq_add(model_type: str, tmp_path: Path) -> None:
    packed, plain = packed_folder(tmp_path, "gptq", model_type)
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".scales")]:
        bias = name.replace("scales", "bias")
        tensors.setdefault(bias, torch.zeros(tensors[name].shape[1]).half())
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    model = load_model(packed)
    assert torch.equal(model.logits(ROWS), load_model(plain).logits(ROWS))
    _, plan = everywhere(model)
    for folder in (packed, plain):
        export_folder(folder, plan, tmp_path / "out" / folder.name)
    one, other = (
        load_file(tmp_path / "out" / n / "model.safetensors") for n in ("packed", "plain")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert audit(AuditSource.of_folder(packed), plan, tmp_path / "out" / "packed").passed
    tensors["model.layers.1.mlp.up_proj.bias"] += 1
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"unknown to its model model\.layers\.1\.mlp\.up_proj\.bias"
    ):
        load_model(packed)


def test_parts_of_one_weight_in_two_files(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path, "gptq")
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    files = {
        name: f"model-0000{1 + name.endswith(('scales', 'g_idx'))}-of-00002.safetensors"
        for name in tensors
    }
    for file in set(files.values()):
        save_file(
            {name: tensors[name] for name in files if files[name] == file},
            packed / file,
            metadata={"format": "pt"},
        )
    index = {"metadata": {}, "weight_map": files}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    _, plan = everywhere(load_model(packed))
    export_folder(packed, plan, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 1  # of the other, nothing is left
    assert audit(AuditSource.of_folder(packed), plan, tmp_path / "out").passed
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_linear_maps_stored_the_other_way_round_are_refused(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path, "gptq", "gpt2")
    assert "transformer.h.0.attn.c_proj.qweight" in load_file(
        packed / "model.safetensors"
    )  # square
    said = r"is quantized \(gptq\).*\[in, out\].*before quantization"
    plan = Plan((Ablate(torch.ones(64), "blocks.0.hook_attn_out"),))
    for tried in (
        lambda: load_model(packed),
        lambda: check_source_exports(resolve(packed), tmp_path / "b"),
        lambda: export_folder(packed, plan, tmp_path / "b"),
    ):
        with pytest.raises(ModelError, match=said):
            tried()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("fault", ("in another shape", "unknown to its model", "no tensor"))
def test_names_and_shapes_are_held_to_the_config_before_codes_are_read(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = packed_folder(tmp_path, "gptq")
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for end in ("qweight", "qzeros", "scales", "g_idx"):
        part = tensors.pop(f"{name}.{end}")
        if fault == "unknown to its model":
            tensors[f"{name}.{end}"] = part
            tensors[f"other.{end}"] = part.clone()
        elif fault == "in another shape" and end != "g_idx":
            tensors[f"{name}.{end}"] = part[:, : part.shape[1] // 2].clone()
        elif fault == "in another shape":
            tensors[f"{name}.{end}"] = part
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("interp_ablate.storage.packed_weights.unpacked", None)
    with pytest.raises(ModelError, match=fault):
        load_model(packed)
    with pytest.raises(ModelError, match=fault):
        check_source_exports(resolve(packed), tmp_path / "b")


def test_adapters_training_and_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = packed_folder(tmp_path, "awq")
    model = load_model(packed)
    _, plan = everywhere(model)
    assert export_lora(model, plan, tmp_path / "b", prompts=ROWS)["passed"]
    want = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    got = load_base(packed).hf.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.state_dict().items())
    printed = []
    for folder in (packed, plain):
        assert main(["--quiet", "budget", str(folder), "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
