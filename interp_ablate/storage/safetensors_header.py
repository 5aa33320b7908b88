"""Headers of safetensors files, distrusted.

Knows: names, shapes, offsets. Does not know: models.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.incoming_files import (
    WHOLE,
    check_file,
    parse_json,
    shortened,
)

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library, here for the index too
# Names of https://huggingface.co/docs/safetensors; an older torch lacks the last two.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
DTYPES: dict[str, torch.dtype] = {
    name: vars(torch)[attribute]
    for name, attribute in _TORCH_NAMES.items()
    if attribute in vars(torch)
}
PER_ITEM = {"F4": 2}  # values that one torch item holds, along the last axis


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes of `file` from `offset`, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file, its header read and checked, its data not read.

    Attributes:
        header: the JSON header as it stands, `__metadata__` included.
        start: bytes before the data (the length field and the header).
        tensors: by name, in the order of their bytes.
        stamp: size, time of change and a digest of the header: another stamp is another file.
    """

    path: Path
    header: dict[str, Any]
    start: int
    tensors: dict[str, TensorInfo]
    stamp: tuple[int, int, str]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.stamp[0]

    @property
    def metadata(self) -> dict[str, str] | None:
        return self.header.get("__metadata__")


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check one safetensors header, without reading data or trusting any number in it.

    What the safetensors library refuses is refused here: a header that is not JSON, longer than
    100 MB or than the file; an unknown dtype; sizes that do not follow from dtype and shape; bytes
    that overlap, that nothing describes or that are missing. Besides, names given twice are refused
    (the library takes the last).

    Raises:
        ExportError: naming the file, what is wrong and, for a file cut short, how much is missing.
    """
    check_file(path, ExportError)
    try:
        state = path.stat()
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(read_up_to(file.fileno(), 0, 8), "little")
            if state.st_size < 8:
                raise _malformed(path, f"{state.st_size} bytes, and a header alone has more")
            if length > min(MAX_HEADER, state.st_size - 8):
                raise _malformed(
                    path,
                    f"it says its header has {length} bytes; the file has {state.st_size}, and a "
                    f"header at most {MAX_HEADER}",
                )
            raw = read_up_to(file.fileno(), 8, length)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    header = json_object(raw, path, "header")
    _check_metadata(header.get("__metadata__"), path)
    start = 8 + length
    entries = [_entry(n, e, path, start) for n, e in header.items() if n != "__metadata__"]
    entries.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(entries, path, start, state.st_size)
    stamp = (state.st_size, state.st_mtime_ns, hashlib.sha256(raw).hexdigest())
    return TensorFile(path, header, start, {info.name: info for info in entries}, stamp)


def _malformed(path: Path, reason: str) -> ExportError:
    return ExportError(
        f"{path} is not a whole safetensors file: {reason}. Save it again, or {WHOLE}"
    )


def json_object(raw: bytes, path: Path, part: str) -> dict[str, Any]:
    """JSON as a standard parser reads it: UTF-8, no key twice, no NaN."""
    try:
        content = parse_json(raw.decode(), finite=True)
    except ValueError as error:  # a JSON or a UTF-8 error is a ValueError
        raise _malformed(path, f"its {part} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise _malformed(path, f"its {part} is a JSON {type(content).__name__}, not an object")
    return content


def _check_metadata(metadata: Any, path: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "its __metadata__ is not a table of strings")


def _naturals(value: Any) -> list[int] | None:
    """A list of non-negative integers that a file offset can hold, or None."""
    if not isinstance(value, list):
        return None
    sound = all(type(number) is int and 0 <= number < 2**63 for number in value)
    return value if sound else None


def _entry(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    """One header entry as a place in the file; its own numbers must agree with each other."""
    if not isinstance(entry, dict):
        raise _malformed(path, f"the entry of {name!r} is not an object")
    kind, shape = entry.get("dtype"), _naturals(entry.get("shape"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ExportError(
            f"{path}: {name!r} has the dtype {kind!r}, which this torch ({torch.__version__}) does "
            f"not have; it has {', '.join(DTYPES)}"
        )
    if shape is None:
        raise _malformed(path, f"the shape of {name!r} is {shortened(entry.get('shape'))}")
    offsets = _naturals(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(
            path, f"data_offsets of {name!r} are {shortened(entry.get('data_offsets'))}"
        )
    shape = _torch_shape(kind, shape, name, path)
    dtype, nbytes = DTYPES[kind], offsets[1] - offsets[0]
    if math.prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63:
        raise _malformed(
            path, f"the shape of {name!r}, {shortened(shape)}, is larger than any memory"
        )
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise _malformed(
            path,
            f"{name!r} has {nbytes} bytes, but {kind} {shortened(shape)} needs "
            f"{math.prod(shape) * dtype.itemsize}",
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _torch_shape(kind: str, shape: list[int], name: str, path: Path) -> list[int]:
    """The shape as torch has it: two F4 values are one item."""
    per_item = PER_ITEM.get(kind, 1)
    if per_item == 1:
        return shape
    if not shape or shape[-1] % per_item:
        raise _malformed(path, f"{name!r} is {kind}, so its last axis must be even; it is {shape}")
    return [*shape[:-1], shape[-1] // per_item]


def _check_layout(entries: Sequence[TensorInfo], path: Path, start: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    end, before = start, "the header"
    for info in entries:
        if info.offset != end:
            between = "overlaps" if info.offset < end else "leaves unused bytes after"
            raise _malformed(path, f"{info.name!r} {between} {before}")
        end, before = info.offset + info.nbytes, repr(info.name)
    if size < end:
        raise _malformed(
            path, f"it was cut short: {end - size} of {end} bytes are missing at the end"
        )
    if size > end:
        raise _malformed(path, f"{size - end} bytes at its end belong to no tensor")


def read_up_to(handle: int, offset: int, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = os.pread(handle, nbytes, offset)
        if not part:
            break
        parts.append(part)
        offset, nbytes = offset + len(part), nbytes - len(part)
    return b"".join(parts)


def read_bytes(path: Path, offset: int, nbytes: int) -> Shaped[Tensor, " bytes"]:
    """Bytes of a file as uint8, read into memory of their own."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    left = data.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while left:
                done = file.readinto(left)
                if not done:
                    raise ExportError(f"{path} became shorter while it was read: start again")
                left = left[done:]
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    return data
