"""Packed weights: GPTQ, AWQ and compressed-tensors, whose integers of a few bits share words of 32.

GPTQ (https://github.com/ModelCloud/GPTQModel) has `qweight` [in / n, out], n codes a word along the inputs, lowest bits
first; `qzeros` [groups, out / n]; `scales` [groups, out]; `g_idx` [in], the group of each input. Its first version stores
zero points less one. AWQ (https://github.com/casper-hansen/AutoAWQ, version "gemm") packs [in, out / 8] along the outputs,
which lie in a word in the order 0 2 4 6 1 3 5 7, in groups of consecutive inputs. compressed-tensors
(https://github.com/vllm-project/compressed-tensors) has `weight_packed` [out, in / n] of codes about half of their range, or
`weight` in one byte, with `weight_scale` and `weight_zero_point`.

Knows: the three formats, tensor by tensor. Does not know: transformers, models, or which tensor means what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.dequantized_tensor import (
    DequantizedTensor,
    block_of,
    dequantized_tensor,
    dtype_by,
    spread,
)
from interp_ablate.storage.incoming_files import shortened
from interp_ablate.storage.safetensors_header import TensorInfo
from interp_ablate.storage.safetensors_reader import Checkpoint

Found = Iterator[tuple[str, DequantizedTensor]]
_BITS = (2, 4, 8)
_WORD = 32
_IN_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]  # where a word has output 0, 1, ...
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_BYTES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def unpacked(
    words: Int[Tensor, "rows words"], bits: int, axis: int = 1
) -> UInt8[Tensor, "rows codes"]:
    """The codes of words of 32 bits in order along an axis, the lowest bits first."""
    mask = (1 << bits) - 1
    codes = [((words >> place) & mask).to(torch.uint8) for place in range(0, _WORD, bits)]
    return torch.stack(codes, axis + 1).flatten(axis, axis + 1)


def _gptq(stored: Checkpoint, about: Mapping[str, Any]) -> Found:
    version = about.get("checkpoint_format") or about.get("format") or "gptq"
    _accept(stored, "GPTQ", "checkpoint_format", version, ("gptq", "gptq_v2"))
    for key in ("is_marlin_format", "rotation", "adapter"):
        _accept(stored, "GPTQ", key, about.get(key) or None, (None,))
    own = about.get("dynamic") or {}  # of some modules, by pattern
    for each in own.values():
        other = (each or {}).get("checkpoint_format") or (each or {}).get("format")
        _accept(stored, "GPTQ", "dynamic format", other or version, (version,))
    symmetric = about.get("sym") is True and not any("sym" in (each or {}) for each in own.values())
    for name, info in _ending(stored, ".qweight"):
        zeros, scales, groups = _beside(stored, name, "qweight", "qzeros", "scales", "g_idx")
        n_in, n_out = math.prod(groups.shape), info.shape[-1]
        bits = _WORD * info.shape[0] // max(1, n_in)
        _accept(stored, f"GPTQ of {name}", "bits", bits, _BITS if own else (about.get("bits"),))
        _accept(stored, f"GPTQ of {name}", "bits", bits, _BITS)
        words = math.ceil(n_out * bits / _WORD)
        _fit(
            info.shape == (n_in * bits // _WORD, n_out)
            and scales.shape == (zeros.shape[0], n_out)
            and zeros.shape[1:] == (words,)
            and {info.dtype, zeros.dtype} == {torch.int32}
            and groups.dtype in (torch.int32, torch.int64),
            *(info, zeros, scales, groups),
        )
        numbers = partial(
            _from_gptq, bits=bits, less_one=version == "gptq", symmetric=symmetric, name=name
        )
        parts = {"words": info, "zeros": zeros, "scales": scales, "groups": groups}
        yield _named(name, "qweight", (n_out, n_in), parts, numbers)


def _from_gptq(
    words: Int[Tensor, "words out"],
    zeros: Int[Tensor, "groups words"],
    scales: Float[Tensor, "groups out"],
    groups: Int[Tensor, "in"],
    *,
    bits: int,
    less_one: bool,
    symmetric: bool,
    name: str,
) -> Float[Tensor, "out in"]:
    n_groups, n_out = scales.shape
    if less_one and not symmetric:  # one in every code of a word at once, as the makers take it off
        zeros = zeros + sum(1 << i for i in range(0, _WORD, bits))
    points, groups = unpacked(zeros, bits)[:, :n_out], groups.long()
    if symmetric:  # then they are the half; files exist that name the other version
        half = 1 << (bits - 1)
        if not bool((points == points[0, 0]).all()) or int(points[0, 0]) not in (half, half - 1):
            raise ExportError(
                f"{name} has zero points {points.unique().tolist()[:8]} in a GPTQ that its config calls symmetric, "
                f"where all are {half}: mend sym in its quantization_config, or give the weights before quantization"
            )
        points = torch.full_like(points, half)
    if not bool(((groups >= 0) & (groups < n_groups)).all()):
        raise ExportError(
            f"{name} has a g_idx that names other groups than its {n_groups}: download the folder again"
        )
    numbers = unpacked(words, bits, 0).float().sub_(points[groups]).mul_(scales[groups])
    return numbers.to(scales.dtype).T.contiguous()


def _awq(stored: Checkpoint, about: Mapping[str, Any]) -> Found:
    for key in ("version", "checkpoint_format", "format"):
        _accept(stored, "AWQ", key, str(about.get(key) or "gemm").lower(), ("gemm",))
    _accept(stored, "AWQ", "bits", about.get("bits", about.get("w_bit")), (4,))
    for name, info in _ending(stored, ".qweight"):
        zeros, scales = _beside(stored, name, "qweight", "qzeros", "scales")
        n_in, n_out = info.shape[0], scales.shape[-1]
        n_groups = scales.shape[0]
        _fit(
            info.shape == (n_in, n_out // 8)
            and n_out % 8 == 0
            and scales.shape == (n_groups, n_out)
            and zeros.shape == (n_groups, n_out // 8)
            and n_groups > 0
            and n_in % n_groups == 0
            and {info.dtype, zeros.dtype} == {torch.int32},
            *(info, zeros, scales),
        )
        parts = {"words": info, "zeros": zeros, "scales": scales}
        yield _named(name, "qweight", (n_out, n_in), parts, _from_awq)


def _from_awq(
    words: Int[Tensor, "in words"],
    zeros: Int[Tensor, "groups words"],
    scales: Float[Tensor, "groups out"],
) -> Float[Tensor, "out in"]:
    codes, points = (
        unpacked(each, 4).unflatten(-1, (-1, 8))[..., _IN_AWQ].flatten(-2)
        for each in (words, zeros)
    )
    size = len(codes) // len(scales)
    numbers = codes.float().sub_(points.repeat_interleave(size, 0))
    numbers.mul_(scales.repeat_interleave(size, 0))
    return numbers.T.to(scales.dtype).contiguous()


def _compressed(stored: Checkpoint, about: Mapping[str, Any]) -> Found:
    what, schemes = "compressed-tensors", [*(about.get("config_groups") or {}).values()]
    formats = {about.get("format"), *(each.get("format") for each in schemes)}
    for one in formats - {None, "mixed-precision"}:
        _accept(stored, what, "format", one, _FORMATS)
    sparse = (about.get("sparsity_config") or {}).get("format") or "dense"
    _accept(stored, what, "sparsity_config", sparse, ("dense",))
    for key in ("transform_config", "kv_cache_scheme"):
        _accept(stored, what, key, about.get(key) or None, (None,))
    schemes = [each.get("weights") or {} for each in schemes]
    widths = {each.get("num_bits") for each in schemes} & {*_BITS}
    block = next((each["block_structure"] for each in schemes if each.get("block_structure")), None)
    for name, info in stored.tensors.items():
        end = next((e for e in ("weight_packed", "weight") if name.endswith(f".{e}")), "")
        if not end or (end == "weight" and info.dtype not in _BYTES):
            continue
        (scales,) = _beside(stored, name, end, "weight_scale")
        single = len(scales.shape) < 2 and math.prod(scales.shape) == 1
        _fit(len(info.shape) == 2 and (len(scales.shape) == 2 or single), info, scales)
        zeros, groups = (
            stored.tensors.get(name.removesuffix(end) + each)
            for each in ("weight_zero_point", "weight_g_idx")
        )
        shape, bits = (info.shape[0], info.shape[1]), 0
        if end == "weight_packed":
            shape, bits = _packed_shape(stored, name, widths)
        if groups is not None:
            _fit(groups.shape == shape[1:] and scales.shape[:-1] == shape[:1], info, scales, groups)
        size = block_of(info, shape, scales, block)
        if zeros is None:
            _fit(any(each.get("symmetric") is not False for each in schemes), info, scales)
        else:
            rows = math.ceil(shape[0] * bits / _WORD), *scales.shape[1:]
            _fit(
                zeros.shape == (rows if zeros.dtype == torch.int32 else scales.shape), scales, zeros
            )
        parts = {"codes": info, "scales": scales, "zeros": zeros, "groups": groups}
        there = {key: each for key, each in parts.items() if each is not None}
        numbers = partial(_from_compressed, bits=bits, shape=shape, block=size, name=name)
        yield _named(name, end, shape, there, numbers)


def _packed_shape(stored: Checkpoint, name: str, widths: set[int]) -> tuple[tuple[int, int], int]:
    """The shape that a tensor beside packed codes holds, and the bits of a code that fit it."""
    info, (said,) = stored.tensors[name], _beside(stored, name, "weight_packed", "weight_shape")
    _fit(said.shape == (2,) and info.dtype == torch.int32, info, said)
    n_out, n_in = map(int, stored.read(said.name))
    fitting = [b for b in widths if info.shape == (n_out, math.ceil(n_in * b / _WORD))]
    _fit(len(fitting) == 1, info, said)
    return (n_out, n_in), fitting[0]


def _from_compressed(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    bits: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    name: str,
) -> Float[Tensor, "out in"]:
    half = 1 << bits >> 1
    if groups is not None and bool((groups == -1).any()):  # in their order, then
        groups = None
    if groups is not None and not bool(((groups >= 0) & (groups < scales.shape[1])).all()):
        raise ExportError(
            f"{name} has a weight_g_idx of groups that it does not have: download the folder again"
        )

    def each(factors: Tensor) -> Tensor:
        return spread(factors, shape, block) if groups is None else factors[:, groups.long()]

    numbers = unpacked(codes, bits)[:, : shape[1]].float().sub_(half) if bits else codes.float()
    if zeros is not None:
        if zeros.dtype == torch.int32:
            zeros = unpacked(zeros, bits, 0)[: shape[0]].short() - half
        numbers.sub_(each(zeros.float()))
    return numbers.mul_(each(scales)).to(scales.dtype)


def _ending(stored: Checkpoint, end: str) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in stored.tensors.items():
        if name.endswith(end):
            _fit(len(info.shape) == 2, info)
            yield name, info


def _beside(stored: Checkpoint, name: str, end: str, *others: str) -> list[TensorInfo]:
    found = [stored.tensors.get(name.removesuffix(end) + other) for other in others]
    for other, info in zip(others, found):
        if info is None:
            raise ExportError(
                f"{stored.tensors[name].file} has {name} without {name.removesuffix(end)}{other}: download the folder "
                "again, or give the weights before quantization"
            )
    return [info for info in found if info is not None]


def _named(
    name: str,
    end: str,
    shape: tuple[int, int],
    parts: Mapping[str, TensorInfo],
    numbers: Callable[..., Tensor],
) -> tuple[str, DequantizedTensor]:
    scales, whole = parts["scales"], f"{name.removesuffix(end)}weight"
    _fit(scales.dtype.is_floating_point and scales.dtype.itemsize > 1, scales)
    dtype = dtype_by(scales)

    def dequantize(*read: Tensor) -> Tensor:
        return numbers(**dict(zip(parts, read))).to(dtype)

    return whole, dequantized_tensor(whole, shape, [*parts.values()], dequantize, dtype)


def _accept(stored: Checkpoint, what: str, key: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise ExportError(
            f"{stored.folder} is quantized ({what}) with {key} {shortened(repr(value))}, and read here is "
            f"{', '.join('none' if each is None else repr(each) for each in accepted)}: give the weights before "
            "quantization"
        )


def _fit(fits: bool, *parts: TensorInfo) -> None:
    if not fits:
        said = ", ".join(
            f"{each.name} {list(each.shape)} {str(each.dtype).removeprefix('torch.')}"
            for each in parts
        )
        raise ExportError(
            f"{parts[0].file} has {said}: they do not fit each other in its format of quantization. Download the "
            "folder again, or give the weights before quantization"
        )


READERS: dict[str, Callable[[Checkpoint, Mapping[str, Any]], Found]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
