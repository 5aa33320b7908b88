"""Control vector files (GGUF) of llama.cpp and repeng, read without trusting the lengths in them.

Knows: GGUF's header, and the checks that llama.cpp makes. Does not know: directions, plans, or how the vectors
are used.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import DirectionError

ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")
# GGUF numbers its value types; code -> struct format. 8 is a string, 9 an array.
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY, _F32 = 8, 9, 0
_VERSIONS = (2, 3)


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
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DirectionError(f"{path} is empty, not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise DirectionError(f"cannot read {path}: {error.strerror or error}") from error


class _Cursor:
    """A reader of one file that refuses to go beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int, *, start: int | None = None) -> bytes:
        start = self.at if start is None else start
        if start + count > len(self.data):
            raise self.error(
                f"is cut short: {len(self.data)} bytes, and {start + count} are needed"
            )
        self.at = start + count
        return self.data[start : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"holds a string that is not UTF-8 ({raw[:20]!r})") from error

    def value(self, kind: int) -> Any:
        """One value; arrays are passed over, a control vector needs none."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.error(f"has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.text()
        else:
            raise self.error(f"has an array of the unknown type {inner}")
        return None

    def error(self, what: str) -> DirectionError:
        return DirectionError(
            f"{self.path} {what}. A control vector is a GGUF file with general.architecture "
            f"{ARCHITECTURE!r} and float32 tensors direction.1, direction.2, ...: write it again, or "
            "fetch it again"
        )


def _parse(cursor: _Cursor) -> GGUFVectors:
    if cursor.data[:4] != b"GGUF":
        raise cursor.error(f"is not a GGUF file (it starts with {cursor.data[:4]!r})")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise cursor.error(
            f"is GGUF version {version}; little-endian versions {_VERSIONS} can be read"
        )
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name, kind = cursor.text(), cursor.number("I")
        keys[name] = cursor.value(kind)
        if name == "general.architecture" and keys[name] != ARCHITECTURE:
            raise cursor.error(f"holds a {keys[name]!r}, not a control vector")
    if "general.architecture" not in keys:
        raise cursor.error("does not say what it holds (no general.architecture)")
    alignment = _integer(cursor, keys, "general.alignment", 32)
    if alignment < 1:
        raise cursor.error(f"has the alignment {alignment}")
    vectors: dict[int, Tensor] = {}
    for block, vector in _vectors(cursor, n_tensors, alignment):
        vectors[block] = (
            vectors[block] + vector if block in vectors else vector
        )  # as llama.cpp does
    return GGUFVectors(
        name=cursor.path.stem,
        model_hint=str(keys.get(f"{ARCHITECTURE}.model_hint", "")),
        layer_count=_integer(cursor, keys, f"{ARCHITECTURE}.layer_count", len(vectors)),
        vectors=dict(sorted(vectors.items())),
    )


def _integer(cursor: _Cursor, keys: dict[str, Any], name: str, default: int) -> int:
    value = keys.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise cursor.error(f"has {name} = {value!r}, which is no integer")
    return value


def _vectors(cursor: _Cursor, count: int, alignment: int) -> Iterator[tuple[int, Tensor]]:
    """Block and vector of every tensor, checked as llama.cpp checks them and for being finite too."""
    infos = []
    for _ in range(count):
        name = cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // alignment) * alignment
    if not infos:
        raise cursor.error("holds no vectors")
    width = infos[0][1]
    for name, shape, kind, offset in infos:
        block = _block_in(cursor, name)
        if kind != _F32 or len(shape) != 1 or shape != width or not shape[0]:
            what = "float32" if kind == _F32 else f"of ggml type {kind} (float32 is 0)"
            raise cursor.error(
                f"has {name} {what} with shape {shape}; wanted float32 and one shape [d_model] for all "
                f"(the first has {width})"
            )
        raw = bytearray(cursor.take(4 * shape[0], start=start + offset))
        vector = torch.frombuffer(raw, dtype=torch.float32)
        if not torch.isfinite(vector).all():
            raise cursor.error(f"has NaN or infinity in {name}")
        yield block, vector


def _block_in(cursor: _Cursor, name: str) -> int:
    match = _NAME.fullmatch(name)
    if match is None:
        raise cursor.error(f"has a tensor {name!r}, where direction.N is expected")
    block = int(match[1])
    if block == 0:
        raise cursor.error("has direction.0, which llama.cpp refuses: vectors start at block 1")
    return block
