"""Dequantized checkpoints: a folder of quantized weights, read as the ones of 16 bits that they stand for.

FP8 is DeepSeek's and Qwen's: `NAME` in float8 and `NAME_scale_inv`, one factor a block. MXFP4 is gpt-oss': `NAME_blocks`
has two 4-bit floats a byte, 16 bytes to an exponent of `NAME_scales`
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf). GPTQ, AWQ and compressed-tensors
are read by `packed_weights.py`.

Knows: FP8 and MXFP4, tensor by tensor; what a folder is without the parts of its tensors. Does not know:
transformers, models, or which tensor means what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.dequantized_tensor import (
    DTYPE,
    DequantizedTensor,
    block_of,
    dequantized_tensor,
    scaled,
)
from interp_ablate.storage.packed_weights import READERS
from interp_ablate.storage.safetensors_reader import Checkpoint, TensorSource

METHODS = ("fp8", "mxfp4")  # transformers dequantizes these itself
PACKED = tuple(READERS)
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
class DequantizedCheckpoint(Checkpoint):
    """A quantized folder as its weights; `tensors` has those that stand for others, without their parts."""

    stored: Checkpoint
    """The folder's own tensors."""
    method: str
    """One of `METHODS` or `PACKED`."""
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

    def with_parts(self, names: Mapping[str, str]) -> DequantizedCheckpoint:
        """The same, with one more stored tensor as a part of each dequantized one that is named."""
        parts = {name: [*self.parts[name], part] for name, part in names.items()}
        taken = {*names.values()}
        tensors = {name: info for name, info in self.tensors.items() if name not in taken}
        return replace(self, tensors=tensors, parts={**self.parts, **parts})


def method_of(quantization: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names; old ones of bitsandbytes name their bits alone."""
    bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or (BITSANDBYTES if bits else None)
    return str(getattr(method, "value", method))


def dequantized(stored: Checkpoint, quantization: Mapping[str, Any]) -> DequantizedCheckpoint:
    """A checkpoint as the weights that it stands for, by its config's `quantization_config`.

    Raises:
        ExportError: a method or a variant that is not read here; tensors that do not fit each other.
    """
    method = method_of(quantization)
    if method not in METHODS + PACKED:
        raise ExportError(
            f"{stored.folder} is quantized ({method}): an edit of its tensors would be rounded away. "
            + EXPORT_INSTEAD
        )
    readers = {"fp8": _fp8, "mxfp4": _mxfp4, **READERS}
    try:
        found = dict(readers[method](stored, quantization))
    except (AttributeError, IndexError, TypeError) as error:  # values and axes of other kinds
        raise ExportError(
            f"{stored.folder} is quantized ({method}), and its tensors or its quantization_config are none of that: "
            "give the weights before quantization"
        ) from error
    parts = {
        name: [
            *(part.info.name for part in tensor.parts),
            *(
                n
                for n in (f"{name.removesuffix('weight')}{end}" for end in _BESIDE)
                if n in stored.tensors
            ),
        ]
        for name, tensor in found.items()
    }
    taken = {part for each in parts.values() for part in each}
    tensors = {name: info for name, info in stored.tensors.items() if name not in taken}
    left = [
        name
        for name, info in tensors.items()
        if (info.dtype.itemsize == 1 and info.dtype != torch.bool) or name in found
    ]
    if not found and method in PACKED:
        raise ExportError(
            f"{stored.folder} is quantized ({method}), and none of its tensors is: give the weights before "
            "quantization, or take quantization_config out of its config.json"
        )
    if left:
        raise ExportError(
            f"{stored.folder} is quantized ({method}), and {left[0]} is stored as {tensors[left[0]].dtype}, which is no "
            "part of that: export from the folder of the weights before quantization"
        )
    tensors |= {name: tensor.info for name, tensor in found.items()}
    return DequantizedCheckpoint(
        stored.folder, stored.files, tensors, stored.index, stored, method, found, parts
    )


# Beside a weight: what the weight of 16 bits does without, scales of activations above all.
_BESIDE = (
    *("activation_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    "weight_shape",
)


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
        block = block_of(info, info.shape, scales, size)
        numbers = partial(scaled, block=block)
        yield name, dequantized_tensor(name, info.shape, (info, scales), numbers)


def _mxfp4(
    stored: Checkpoint, quantization: Mapping[str, Any]
) -> Iterator[tuple[str, DequantizedTensor]]:
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
        yield whole, dequantized_tensor(whole, shape, (info, scales), from_mxfp4)


def from_mxfp4(
    values: Shaped[Tensor, "experts d_model groups bytes"],
    scales: Shaped[Tensor, "experts d_model groups"],
) -> Float[Tensor, "experts d_mlp d_model"]:
    """Two numbers a byte, the low half first, times two to the power of their group's exponent; exact in bfloat16."""
    table = torch.tensor(_E2M1)
    pairs = torch.stack([table[(values & 15).long()], table[(values >> 4).long()]], -1)
    numbers = pairs.flatten(-2) * (scales.float() - 127).exp2()[..., None]
    return numbers.flatten(-2).to(DTYPE).transpose(-1, -2).contiguous()
