"""Dequantized checkpoints: a folder of block-scaled FP8 or MXFP4 weights, read as the bfloat16 ones that they stand for.

FP8 is DeepSeek's and Qwen's: `NAME` in float8 and `NAME_scale_inv`, one factor a block. MXFP4 is gpt-oss': `NAME_blocks`
has two 4-bit floats a byte, 16 bytes to an exponent of `NAME_scales`
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).

Knows: both formats, tensor by tensor. Does not know: transformers, models, or which tensor means what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.safetensors_header import TensorInfo
from interp_ablate.storage.safetensors_reader import BLOCK, Checkpoint, TensorSource

DTYPE = torch.bfloat16
METHODS = ("fp8", "mxfp4")
BITSANDBYTES = "bitsandbytes"
EXPORT_INSTEAD = (
    "Export from the folder of the weights before quantization, under the same plan: interp-ablate export --source "
    "UNQUANTIZED --plan PLAN --out DIR"
)
# The values of a 4-bit float with two bits of exponent and one of mantissa (E2M1), by its bits.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_HALF, *(-value for value in _HALF))
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class DequantizedTensor(TensorSource):
    """One tensor that two of a file stand for; `info` says its name, dtype and shape, not where its bytes are."""

    values: TensorSource
    scales: TensorSource
    dequantize: Callable[[Tensor, Tensor], Tensor]
    """From values and scales, whole or some rows of both, to the weights."""

    def read(self) -> Shaped[Tensor, "*shape"]:
        return torch.cat([block for _, block in self.blocks(max_bytes=0)])

    def blocks(self, *, max_bytes: int = BLOCK) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        n_rows = self.info.shape[0]
        step = max(1, max_bytes // (self.info.nbytes // n_rows))
        if len(self.info.shape) < 3:
            whole = self.dequantize(self.values.read(), self.scales.read())
            yield from (
                (slice(i, min(i + step, n_rows)), whole[i : i + step])
                for i in range(0, n_rows, step)
            )
            return
        parts = (
            part.blocks(max_bytes=step * part.info.nbytes // n_rows)
            for part in (self.values, self.scales)
        )  # experts are dequantized a few at a time
        for (place, values), (_, scales) in zip(*parts, strict=True):
            yield place, self.dequantize(values, scales)


@dataclass(frozen=True)
class DequantizedCheckpoint(Checkpoint):
    """A quantized folder as its weights; `tensors` has those that stand for others, without their parts."""

    stored: Checkpoint
    """The folder's own tensors."""
    method: str
    """One of `METHODS`."""
    dequantized: Mapping[str, DequantizedTensor] = field(default_factory=dict)
    parts: Mapping[str, Collection[str]] = field(default_factory=dict)
    """The stored tensors of each dequantized one."""

    def source(self, name: str) -> TensorSource:
        return self.dequantized.get(name) or super().source(name)

    def keeping(self, names: Collection[str]) -> DequantizedCheckpoint:
        """The same, with the tensors named as they are stored."""
        kept = {part for name in names for part in self.parts[name]}
        tensors = {name: info for name, info in self.tensors.items() if name not in names}
        return replace(
            self,
            tensors={**tensors, **{part: self.stored.tensors[part] for part in kept}},
            dequantized={n: t for n, t in self.dequantized.items() if n not in names},
            parts={n: p for n, p in self.parts.items() if n not in names},
        )


def method_of(quantization: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names; old ones of bitsandbytes name their bits alone."""
    bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or (BITSANDBYTES if bits else None)
    return str(getattr(method, "value", method))


def dequantized(stored: Checkpoint, quantization: Mapping[str, Any]) -> DequantizedCheckpoint:
    """A checkpoint as the weights that it stands for, by its config's `quantization_config`.

    Raises:
        ExportError: another method than FP8 in blocks and MXFP4; tensors that do not fit each other.
    """
    method = method_of(quantization)
    if method not in METHODS:
        raise ExportError(
            f"{stored.folder} is quantized ({method}): an edit of its tensors would be rounded away. "
            + EXPORT_INSTEAD
        )
    found = dict(_fp8(stored, quantization) if method == "fp8" else _mxfp4(stored))
    parts = {
        name: [
            *(tensor.values.info.name, tensor.scales.info.name),
            *(
                n
                for n in (f"{name.removesuffix('weight')}{end}" for end in _ACTIVATIONS)
                if n in stored.tensors
            ),
        ]
        for name, tensor in found.items()
    }
    taken = {part for each in parts.values() for part in each}
    tensors = {name: info for name, info in stored.tensors.items() if name not in taken}
    left = [
        n for n, info in tensors.items() if info.dtype.itemsize == 1 and info.dtype != torch.bool
    ]
    if left:
        raise ExportError(
            f"{stored.folder} is quantized ({method}), and {left[0]} is stored as {tensors[left[0]].dtype}, which is no "
            "part of that: export from the folder of the weights before quantization"
        )
    tensors |= {name: tensor.info for name, tensor in found.items()}
    return DequantizedCheckpoint(
        stored.folder, stored.files, tensors, stored.index, stored, method, found, parts
    )


# Scales of activations, which weights in bfloat16 do without.
_ACTIVATIONS = ("activation_scale", "input_scale")


def _fp8(
    stored: Checkpoint, quantization: Mapping[str, Any]
) -> Iterator[tuple[str, DequantizedTensor]]:
    size = quantization.get("weight_block_size")
    for name, info in stored.tensors.items():
        if info.dtype not in _FP8:
            continue
        scales = stored.tensors.get(f"{name}_scale_inv")
        if scales is None:
            raise ExportError(f"{info.file} has {name} in FP8, but no {name}_scale_inv")
        block = _block(info, scales, size)
        yield name, _tensor(stored, name, info.shape, info, scales, partial(from_fp8, block=block))


def _block(info: TensorInfo, scales: TensorInfo, size: Any) -> tuple[int, int]:
    """The rows and columns that share one scale: the config's, or what the shapes say."""
    rows, columns = info.shape[-2:]
    grid = (1, 1, *scales.shape)[-2:]
    sizes = size if isinstance(size, list) and len(size) == 2 else [0, 0]
    if all(isinstance(n, int) and n > 0 for n in sizes):
        fitting = tuple(math.ceil(n / each) for n, each in zip((rows, columns), sizes))
        if grid == fitting:
            return sizes[0], sizes[1]
    if rows % grid[0] or columns % grid[1]:
        raise ExportError(
            f"{info.file} has {info.name} {list(info.shape)} with scales {list(scales.shape)}, and its config says "
            f"weight_block_size = {size!r}: they do not fit each other"
        )
    return rows // grid[0], columns // grid[1]


def _mxfp4(stored: Checkpoint) -> Iterator[tuple[str, DequantizedTensor]]:
    for name, info in stored.tensors.items():
        if not name.endswith("_blocks"):
            continue
        whole = name.removesuffix("_blocks")
        scales = stored.tensors.get(f"{whole}_scales")
        kinds = info.dtype, scales.dtype if scales else None
        if (
            scales is None
            or kinds != (torch.uint8,) * 2
            or info.shape[:-1] != scales.shape
            or len(info.shape) != 4
        ):
            raise ExportError(
                f"{info.file} has {name} without {whole}_scales of bytes that fit it: the folder is no MXFP4 of "
                "experts"
            )
        n_experts, n_out, groups, n_bytes = info.shape
        shape = (n_experts, groups * n_bytes * 2, n_out)
        yield whole, _tensor(stored, whole, shape, info, scales, from_mxfp4)


def _tensor(
    stored: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    values: TensorInfo,
    scales: TensorInfo,
    dequantize: Callable[[Tensor, Tensor], Tensor],
) -> DequantizedTensor:
    nbytes = math.prod(shape) * DTYPE.itemsize
    info = TensorInfo(name, DTYPE, shape, values.file, values.offset, nbytes)
    return DequantizedTensor(info, TensorSource(values), TensorSource(scales), dequantize)


def from_fp8(
    values: Shaped[Tensor, "*experts rows columns"], scales: Tensor, block: tuple[int, int]
) -> Float[Tensor, "*experts rows columns"]:
    """Each block times its scale, in float32, rounded to bfloat16. Scales in bytes are exponents of two."""
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if factors.ndim < 2:
        factors = factors.reshape(1, -1)
    rows, columns = values.shape[-2:]
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    return (values.float() * factors.repeat_interleave(block[1], -1)[..., :columns]).to(DTYPE)


def from_mxfp4(
    values: Shaped[Tensor, "experts d_model groups bytes"],
    scales: Shaped[Tensor, "experts d_model groups"],
) -> Float[Tensor, "experts d_mlp d_model"]:
    """Two numbers a byte, the low half first, times two to the power of their group's exponent; exact in bfloat16."""
    table = torch.tensor(_E2M1)
    pairs = torch.stack([table[(values & 15).long()], table[(values >> 4).long()]], -1)
    numbers = pairs.flatten(-2) * (scales.float() - 127).exp2()[..., None]
    return numbers.flatten(-2).to(DTYPE).transpose(-1, -2).contiguous()
