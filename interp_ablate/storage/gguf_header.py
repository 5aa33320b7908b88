"""Headers of GGUF files, distrusted: keys and tensors, read without believing a length in them.

The gguf package's own reader believes a file that lies about lengths: it ends in errors of `struct` and numpy,
or in no end at all.

Knows: GGUF's layout, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Does not know: what keys and
tensors mean.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from interp_ablate.errors import InterpAblateError
from interp_ablate.storage.incoming_files import check_file

# GGUF numbers its value types; code -> struct format. 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_AXES = 8  # ggml has 4

Fault: TypeAlias = Callable[[str], InterpAblateError]
"""Makes an error of what is wrong with the file, such as "is cut short"."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    """The fastest axis first, as GGUF has it."""
    kind: int
    """ggml's number of the type: 0 is float32, 1 float16."""
    offset: int
    """Counted from the file's start; bytes."""


@dataclass(frozen=True)
class GGUFHeader:
    """The keys and tensors of a GGUF file."""

    keys: dict[str, Any]
    """Values by name; an array is its length."""
    tensors: tuple[GGUFTensor, ...]


@contextmanager
def gguf_bytes(path: Path, error: type[InterpAblateError]) -> Iterator[mmap.mmap]:
    """The file as a memory map, read only.

    Raises:
        InterpAblateError: of the kind `error`: empty, no regular file, or it cannot be read.
    """
    if not check_file(path, error):
        raise error(f"{path} is empty, not a GGUF file")
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure


def read_gguf_header(data: mmap.mmap, fault: Fault) -> GGUFHeader:
    """Read keys and tensors; nothing beyond the end of the file is believed.

    Raises:
        InterpAblateError: made by `fault`: not GGUF, another version, cut short, a key or tensor twice.
    """
    cursor = _Cursor(data, fault)
    if data[:4] != b"GGUF":
        raise fault(f"is not a GGUF file (it starts with {data[:4]!r})")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise fault(f"is GGUF version {version}; little-endian versions {_VERSIONS} can be read")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name, kind = cursor.text(), cursor.number("I")
        if name in keys:
            raise fault(f"has the key {name!r} twice")
        keys[name] = cursor.value(kind)
    alignment = whole_number(keys, "general.alignment", 32, fault)
    if alignment < 1:
        raise fault(f"has the alignment {alignment}")
    infos = []
    for _ in range(n_tensors):
        name, axes = cursor.text(), cursor.number("I")
        if axes > _MAX_AXES:
            raise fault(f"has a tensor {name!r} with {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(GGUFTensor(n, shape, kind, start + at) for n, shape, kind, at in infos)
    return GGUFHeader(keys, tensors)


def whole_number(keys: dict[str, Any], name: str, default: int, fault: Fault) -> int:
    """The integer under a key.

    Raises:
        InterpAblateError: made by `fault`: another type.
    """
    value = keys.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise fault(f"has {name} = {value!r}, which is no integer")
    return value


class _Cursor:
    """A reader of one file that refuses to go beyond its end."""

    def __init__(self, data: mmap.mmap, fault: Fault) -> None:
        self.data, self.fault, self.at = data, fault, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise self.fault(f"is cut short: {len(self.data)} bytes, and {end} are needed")
        self.at, start = end, self.at
        return self.data[start:end]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"holds a string that is not UTF-8 ({raw[:20]!r})") from error

    def value(self, kind: int) -> Any:
        """One value; an array is passed over, and its length returned."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fault(f"has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            raise self.fault(f"has an array of the unknown type {inner}")
        return count
