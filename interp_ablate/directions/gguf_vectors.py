"""Control vector files (GGUF) of llama.cpp and repeng, read without trusting the lengths in them.

Knows: the tensors of a control vector, and the checks that llama.cpp makes of them. Does not know: the layout of
GGUF, directions, plans, or how the vectors are used.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import DirectionError
from interp_ablate.storage.gguf_header import (
    Fault,
    GGUFTensor,
    gguf_bytes,
    read_gguf_header,
    whole_number,
)

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")
_F32 = 0  # ggml's number of the type


@dataclass(frozen=True, eq=False)
class GGUFVectors:
    """The content of a control vector file."""

    name: str
    model_hint: str
    """Model type that the vectors are for; nobody enforces it."""
    layer_count: int
    """The file's own number; generators write the number of vectors here, readers ignore it."""
    vectors: dict[int, Float[Tensor, " d_model"]] = field(repr=False)
    """Block (from 1) -> the vector that is added to its output."""


def read_gguf_vectors(path: str | Path) -> GGUFVectors:
    """Read a control vector of llama.cpp's cvector-generator, of repeng, or of this package.

    The header is read here and not by the gguf package, whose reader believes a file that lies about
    lengths. llama.cpp's generator computes the vector of `direction.N` from the output of block N - 1;
    it is added to the output of block N all the same, and that is what the result says.

    Raises:
        DirectionError: not GGUF, cut short, another kind of file, `direction.0`, vectors that are not
            float32 [d_model], of different lengths, or not finite.
    """
    path = Path(path)

    def fault(what: str) -> DirectionError:
        return DirectionError(
            f"{path} {what}. A control vector is a GGUF file with general.architecture "
            f"{ARCHITECTURE!r} and float32 tensors direction.1, direction.2, ...: write it again, or "
            "fetch it again"
        )

    with gguf_bytes(path, DirectionError) as data:
        header = read_gguf_header(data, fault)
        kind = header.keys.get("general.architecture")
        if kind is None:
            raise fault("does not say what it holds (no general.architecture)")
        if kind != ARCHITECTURE:
            raise fault(f"holds a {kind!r}, not a control vector")
        vectors: dict[int, Tensor] = {}
        for block, vector in _vectors(data, header.tensors, fault):
            vectors[block] = (
                vectors[block] + vector if block in vectors else vector
            )  # as llama.cpp does
    return GGUFVectors(
        name=path.stem,
        model_hint=str(header.keys.get(f"{ARCHITECTURE}.model_hint", "")),
        layer_count=whole_number(header.keys, f"{ARCHITECTURE}.layer_count", len(vectors), fault),
        vectors=dict(sorted(vectors.items())),
    )


def _vectors(
    data: mmap.mmap, tensors: Sequence[GGUFTensor], fault: Fault
) -> Iterator[tuple[int, Tensor]]:
    """Block and vector of every tensor, checked as llama.cpp checks them and for being finite too."""
    if not tensors:
        raise fault("holds no vectors")
    width = tensors[0].shape
    for tensor in tensors:
        block, shape = _block_in(tensor.name, fault), tensor.shape
        if tensor.kind != _F32 or len(shape) != 1 or shape != width or not shape[0]:
            what = (
                "float32" if tensor.kind == _F32 else f"of ggml type {tensor.kind} (float32 is 0)"
            )
            raise fault(
                f"has {tensor.name} {what} with shape {list(shape)}; wanted float32 and one shape [d_model] "
                f"for all (the first has {list(width)})"
            )
        end = tensor.offset + 4 * shape[0]
        if end > len(data):
            raise fault(f"is cut short: {len(data)} bytes, and {end} are needed")
        vector = torch.frombuffer(bytearray(data[tensor.offset : end]), dtype=torch.float32)
        if not torch.isfinite(vector).all():
            raise fault(f"has NaN or infinity in {tensor.name}")
        yield block, vector


def _block_in(name: str, fault: Fault) -> int:
    match = _NAME.fullmatch(name)
    if match is None:
        raise fault(f"has a tensor {name!r}, where direction.N is expected")
    block = int(match[1])
    if block == 0:
        raise fault("has direction.0, which llama.cpp refuses: vectors start at block 1")
    return block
