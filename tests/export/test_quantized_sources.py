"""Folders of quantized weights: read as transformers dequantizes them, streamed with the edit, certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_models import build
from support.tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from interp_ablate import Plan
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import InterpAblateError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.preflight import check_source_exports
from interp_ablate.export.source_folder import opened
from interp_ablate.models.load import load_model
from interp_ablate.models.sources import resolve
from interp_ablate.storage.dequantized_checkpoint import DequantizedCheckpoint

ROWS = [[*range(5, 17)], [3, 4, 5]]
BLOCK = 32
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip


def quantized(model_type: str, place: Path) -> Path:
    """A folder as DeepSeek, Qwen (FP8 in blocks) and gpt-oss (MXFP4) publish theirs, by code of its own."""
    build(model_type).to(torch.bfloat16).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    method = _mxfp4 if model_type == "gpt_oss" else _fp8
    about, tensors = method(load_file(place / "model.safetensors"))
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return place


def _fp8(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    result = dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") or any(size % BLOCK for size in tensor.shape):
            continue
        rows, columns = (size // BLOCK for size in tensor.shape)
        cut = tensor.float().reshape(rows, BLOCK, columns, BLOCK)
        scale = cut.abs().amax((1, 3), keepdim=True) / 448
        result[name] = (cut / scale).to(torch.float8_e4m3fn).reshape(tensor.shape)
        result[f"{name}_scale_inv"] = scale.reshape(rows, columns).clone()
    return FP8, result


def _mxfp4(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    result = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            result[name] = tensor
            continue
        n_experts, n_in, n_out = tensor.shape
        blocks = (n_experts, n_out, n_in // 32, 16)
        result[f"{name}_blocks"] = torch.randint(256, blocks, generator=generator).to(torch.uint8)
        scales = torch.randint(121, 125, blocks[:3], generator=generator)
        result[f"{name}_scales"] = scales.to(torch.uint8)
    skipped = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    return {"quant_method": "mxfp4", "modules_to_not_convert": skipped}, result


@torch.no_grad()
def left_along(folder: Path, r: torch.Tensor) -> float:
    """The largest share of a hidden state along r in plain transformers, in bfloat16 (in float32 it fails on FP8)."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    hidden = hf(torch.tensor(ROWS[:1]), output_hidden_states=True).hidden_states[:-1]
    return max(
        float(((h.float() @ r).abs() / r.norm() / h.float().norm(dim=-1)).max()) for h in hidden
    )


@pytest.mark.parametrize("model_type", ("qwen3", "deepseek_v3", "gpt_oss"))
def test_weights_are_those_that_transformers_dequantizes(model_type: str, tmp_path: Path) -> None:
    source = opened(quantized(model_type, tmp_path / "a"))
    assert isinstance(source, DequantizedCheckpoint) and len(source.dequantized) >= 8
    hf = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16)
    memory, n = {**hf.state_dict()}, 0
    for name in source.dequantized:
        want = memory.get(name)
        if want is None:  # fused in memory: of expert i, stack entry i
            stack, _, rest = name.partition(".experts.")
            i, proj, _ = rest.split(".")
            fused = memory[
                f"{stack}.experts.{'down_proj' if proj == 'down_proj' else 'gate_up_proj'}"
            ][int(i)]
            half = len(fused) // 2
            want = {"down_proj": fused, "gate_proj": fused[:half], "up_proj": fused[half:]}[proj]
        assert torch.equal(source.read(name), want)
        assert torch.equal(
            torch.cat([block for _, block in source.blocks(name, max_bytes=999)]), want
        )
        n += 1
    assert n == len(source.dequantized)


@pytest.mark.parametrize("model_type", ("qwen3", "deepseek_v3", "gpt_oss"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_streamed_and_certified(model_type: str, dtype: str, tmp_path: Path) -> None:
    source = quantized(model_type, tmp_path / "a")
    check_source_exports(resolve(source), tmp_path / "b")
    model = load_model(source, dtype=dtype, backend="hf" if dtype == "bfloat16" else "auto")
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    plan = Plan((Ablate(r, model.writers),))
    certificate = export_checkpoint(model, plan, tmp_path / "b", prompts=ROWS)
    assert certificate["passed"]
    manifest = export_folder(source, plan, tmp_path / "c")
    before, one, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert one.keys() == other.keys()
    assert all(
        torch.equal(tensor.view(torch.uint8), one[name].view(torch.uint8))
        for name, tensor in other.items()
    )
    about = json.loads((tmp_path / "c" / "config.json").read_text()).get("quantization_config")
    said = manifest["dequantized"]
    assert said in (tmp_path / "c" / "README.md").read_text()
    assert said == json.loads((tmp_path / "b" / "certificate.json").read_text())["dequantized"]
    small = {name for name, tensor in other.items() if tensor.element_size() == 1}
    if model_type == "qwen3":  # what is not edited is the same bytes
        assert (
            about["quant_method"] == "fp8"
            and "model.layers.1.mlp.down_proj" in about["modules_to_not_convert"]
        )
        assert small == {n for n in before if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight",
                                                          "gate_proj.weight", "up_proj.weight"))}  # fmt: skip
        for name in small:
            assert torch.equal(other[name].view(torch.uint8), before[name].view(torch.uint8))
            assert torch.equal(other[f"{name}_scale_inv"], before[f"{name}_scale_inv"])
    else:
        assert about is None and not small
        assert not [name for name in other if name.endswith(("_scale_inv", "_scales", "_blocks"))]
    assert left_along(tmp_path / "c", r) < 1e-2  # rounded to bfloat16
    assert left_along(source, r) > 0.05
    assert audit(AuditSource.of_folder(source), plan, tmp_path / "c").passed


@pytest.mark.parametrize("method", ("gptq", "awq", "bitsandbytes"))
@pytest.mark.parametrize("model_type", ("llama", "olmoe"))
def test_other_quantizations_are_refused_before_any_work(
    method: str, model_type: str, tmp_path: Path
) -> None:
    source = quantized(model_type, tmp_path / "a")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method,
        "bits": 4,
        "load_in_4bit": True,
        "load_in_8bit": False,
    }
    (source / "config.json").write_text(json.dumps(config))
    plan = Plan((Ablate(torch.ones(64), "blocks.0.hook_attn_out"),))
    with pytest.raises(InterpAblateError, match=f"quantized \\({method}\\).*before quantization"):
        export_folder(source, plan, tmp_path / "b")
    with pytest.raises(InterpAblateError, match=f"quantized \\({method}\\).*before quantization"):
        check_source_exports(resolve(source), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fault", ("no scale", "another grid"))
def test_parts_that_do_not_fit_are_named(fault: str, tmp_path: Path) -> None:
    source = quantized("llama", tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    scales = tensors.pop(name)
    if fault == "another grid":
        tensors[name] = scales[:1].repeat(7, 1)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InterpAblateError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        opened(source)
