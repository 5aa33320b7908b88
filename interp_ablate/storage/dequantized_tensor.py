"""Dequantized tensors: one weight that several tensors of a file stand for, read as numbers.

Knows: tensors with factors by blocks. Does not know: which tensors of a folder belong together, or any format's names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.safetensors_header import TensorInfo
from interp_ablate.storage.safetensors_reader import BLOCK, TensorSource

DTYPE = torch.bfloat16
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class DequantizedTensor(TensorSource):
    """One tensor that several of a file stand for; `info` says its name, dtype and shape, not where its bytes are."""

    parts: tuple[TensorSource, ...]
    """The codes first, then what turns them into numbers."""
    dequantize: Callable[..., Tensor]
    """From the parts, whole or (of three axes) some rows of each, to the weights."""

    def read(self) -> Shaped[Tensor, "*shape"]:
        return torch.cat([block for _, block in self.blocks(max_bytes=0)])

    def blocks(self, *, max_bytes: int = BLOCK) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        n_rows = self.info.shape[0]
        step = max(1, max_bytes // (self.info.nbytes // n_rows))
        if len(self.info.shape) < 3:
            whole = self.dequantize(*(part.read() for part in self.parts))
            yield from (
                (slice(i, min(i + step, n_rows)), whole[i : i + step])
                for i in range(0, n_rows, step)
            )
            return
        parts = (part.blocks(max_bytes=step * part.info.nbytes // n_rows) for part in self.parts)
        for blocks in zip(*parts, strict=True):  # experts are dequantized a few at a time
            yield blocks[0][0], self.dequantize(*(block for _, block in blocks))


def dequantized_tensor(
    name: str,
    shape: Sequence[int],
    parts: Sequence[TensorInfo],
    dequantize: Callable[..., Tensor],
    dtype: torch.dtype = DTYPE,
) -> DequantizedTensor:
    """The tensor of a name and a shape that others stand for, which lie in the first one's file.

    Raises:
        ExportError: it would have no numbers.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if not n_bytes:
        raise ExportError(f"{parts[0].file} has {parts[0].name} for a weight without numbers")
    info = TensorInfo(name, dtype, tuple(shape), parts[0].file, parts[0].offset, n_bytes)
    return DequantizedTensor(info, tuple(map(TensorSource, parts)), dequantize)


def dtype_by(scales: TensorInfo) -> torch.dtype:
    """The dtype of weights that have such factors: theirs where it is one of 16 bits."""
    return scales.dtype if scales.dtype in _HALVES else DTYPE


def block_of(
    info: TensorInfo, shape: Sequence[int], scales: TensorInfo, size: Any
) -> tuple[int, int]:
    """The rows and columns of a weight that share one factor: the config's, or what the shapes say.

    Raises:
        ExportError: the factors do not divide the weight.
    """
    rows, columns = shape[-2:]
    grid = (1, 1, *scales.shape)[-2:]
    sizes = size if isinstance(size, list) and len(size) == 2 else [0, 0]
    if all(isinstance(n, int) and n > 0 for n in sizes):
        fitting = tuple(math.ceil(n / each) for n, each in zip((rows, columns), sizes))
        if grid == fitting:
            return sizes[0], sizes[1]
    if not all(grid) or rows % grid[0] or columns % grid[1]:
        raise ExportError(
            f"{info.file} has {info.name} of a weight {list(shape)} with scales {list(scales.shape)}, and its config "
            f"says blocks of {size!r}: they do not fit each other"
        )
    return rows // grid[0], columns // grid[1]


def spread(
    factors: Shaped[Tensor, "*grid"], shape: Sequence[int], block: tuple[int, int]
) -> Shaped[Tensor, "*experts rows columns"]:
    """One number a block, for each number of a weight."""
    rows, columns = shape[-2:]
    if factors.ndim < 2:
        factors = factors.reshape(1, -1)
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    return factors.repeat_interleave(block[1], -1)[..., :columns]


def scaled(
    values: Float[Tensor, "*experts rows columns"],
    scales: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype = DTYPE,
) -> Float[Tensor, "*experts rows columns"]:
    """Each block times its scale, in float32, rounded to a dtype. Scales in bytes are exponents of two."""
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    return (values.float() * spread(factors, values.shape, block)).to(dtype)
