"""Folders as GPTQ, AWQ and compressed-tensors publish theirs, by packers of their own, and the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.family_models import build
from support.tiny import make_tokenizer

GROUP = 32
Parts = dict[str, torch.Tensor]
Packer = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
_SEED = torch.Generator().manual_seed(5)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers below 2 ** bits in words of 32 bits along the last axis, the first in the lowest bits; zeros at the end."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per)).unflatten(
        -1, (-1, per)
    )
    word = sum(codes[..., i] * 2 ** (bits * i) for i in range(per))
    return torch.where(word < 2**31, word, word - 2**32).to(torch.int32).contiguous()  # type: ignore[arg-type]


def rounded(
    weight: torch.Tensor, bits: int, groups: torch.Tensor, half: bool, dtype: torch.dtype
) -> Any:
    """Codes [out, in], zero points and scales [out, groups] of a weight, and the numbers they are."""
    n, top = int(groups.max()) + 1, 2**bits - 1
    parts = [weight.float()[:, groups == k] for k in range(n)]
    low = torch.stack([each.amin(1).clamp(max=0) for each in parts], 1)
    high = torch.stack([each.amax(1).clamp(min=0) for each in parts], 1)
    if half:
        high = torch.maximum(-low, high) + 1e-6
        low = -high
    scales = ((high - low + 1e-6) / top).to(dtype)
    zeros = (
        torch.full_like(low, 2 ** (bits - 1))
        if half
        else (-low / scales.float()).round().clamp(0, top)
    )
    codes = (weight.float() / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, top)
    numbers = ((codes - zeros[:, groups]) * scales.float()[:, groups]).to(dtype)
    return codes, zeros, scales, numbers


def gptq(
    *,
    bits: int = 4,
    sym: bool = True,
    act_order: bool = False,
    less_one: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Packer:
    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // GROUP
        if act_order:
            groups = groups[torch.randperm(len(groups), generator=_SEED)]
        codes, zeros, scales, numbers = rounded(weight, bits, groups, sym, dtype)
        stored = (
            words(zeros.T, bits).long()
            - (int("1".zfill(bits) * (32 // bits), 2) if less_one else 0)
        ) % 2**32
        return {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": torch.where(stored < 2**31, stored, stored - 2**32)
            .to(torch.int32)
            .contiguous(),
            "scales": scales.T.contiguous(),
            "g_idx": groups.int(),
        }, numbers

    return pack


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // GROUP
    codes, zeros, scales, numbers = rounded(weight, 4, groups, False, torch.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = [
        words(each.T.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4) for each in (codes, zeros)
    ]
    return {"qweight": mixed[0], "qzeros": mixed[1], "scales": scales.T.contiguous()}, numbers


def pack_quantized(
    *, bits: int = 4, sym: bool = True, act_order: bool = False, size: int = GROUP
) -> Packer:
    def pack(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // size
        if act_order:
            groups = groups[torch.randperm(len(groups), generator=_SEED)]
        codes, zeros, scales, numbers = rounded(weight, bits, groups, sym, torch.bfloat16)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        parts |= {} if sym else {"weight_zero_point": words(zeros.T, bits).T.contiguous()}
        return parts | ({"weight_g_idx": groups.int()} if act_order else {}), numbers

    return pack


def int_quantized(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales, numbers = rounded(
        weight, 8, torch.zeros(weight.shape[1]).long(), True, torch.bfloat16
    )
    return {
        "weight": (codes - zeros).to(torch.int8),
        "weight_scale": scales,
        "input_scale": torch.ones(1),
    }, numbers


def float_quantized(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, (codes.float() * scales.float()).to(
        torch.bfloat16
    )


def _compressed(form: str, bits: int, **scheme: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "float" if form[0] == "f" else "int",
        "dynamic": False,
        **scheme,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    about = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return {**about, "config_groups": groups, "quantization_status": "compressed"}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
_AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
}
KINDS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq": (_GPTQ, gptq()),
    "gptq of 8 bits": ({**_GPTQ, "bits": 8, "checkpoint_format": "gptq"}, gptq(bits=8)),
    "gptq with order": (
        {**_GPTQ, "sym": False, "desc_act": True, "checkpoint_format": "gptq"},
        gptq(sym=False, act_order=True),
    ),
    "gptq_v2": (
        {**_GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(sym=False, less_one=False, dtype=torch.bfloat16),
    ),
    "gptq_v2 named gptq": ({**_GPTQ, "checkpoint_format": "gptq"}, gptq(less_one=False)),
    "awq": (_AWQ, awq),
    "pack-quantized": (_compressed("pack-quantized", 4), pack_quantized()),
    "pack-quantized of zero points": (
        _compressed("pack-quantized", 4, symmetric=False),
        pack_quantized(sym=False, act_order=True),
    ),
    "pack-quantized by channels": (
        _compressed("pack-quantized", 8, strategy="channel"),
        pack_quantized(bits=8, size=1 << 20),
    ),
    "int-quantized": (_compressed("int-quantized", 8), int_quantized),
    "float-quantized": (_compressed("float-quantized", 8), float_quantized),
}  # fmt: skip


def packed_folder(
    place: Path, kind: str, model_type: str = "llama", *, head: bool = False, **form: Any
) -> tuple[Path, Path]:
    """A packed folder, and one of the plain weights that it stands for."""
    about, packer = KINDS[kind]
    plain, packed = place / "plain", place / "packed"
    build(model_type, **form).to(torch.float16).save_pretrained(plain)
    make_tokenizer().save_pretrained(plain)
    make_tokenizer().save_pretrained(packed)
    tensors = load_file(plain / "model.safetensors")
    stored: Parts = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim != 2 or not (name.endswith("_proj.weight") or (head and "lm_head" in name)):
            stored[name] = tensor
            continue
        parts, tensors[name] = packer(tensor)
        stored |= {name.removesuffix("weight") + end: each for end, each in parts.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return packed, plain
