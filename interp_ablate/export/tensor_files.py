"""Tensor files: safetensors folders read tensor by tensor, never loaded and never believed.

Knows: safetensors headers, shards and their index, bytes on disk. Does not know: plans, models, which
tensor means what; how a folder is written (`tensor_copy` does).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_ablate.errors import ExportError

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library, here for the index too
BLOCK = 2 << 20  # bytes of a block of rows (or one row): its float32 copy stays in a cache
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
_DTYPES: dict[str, torch.dtype] = {
    name: vars(torch)[attribute]
    for name, attribute in _TORCH_NAMES.items()
    if attribute in vars(torch)
}
HEADER_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PER_ITEM = {"F4": 2}  # values that one torch item holds, along the last axis


# --------------------------------------------------------------------------------- nouns


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


@dataclass(frozen=True)
class Checkpoint:
    """A local Hugging Face folder as tensors on disk: a frozen view, made by `open`."""

    folder: Path
    files: tuple[TensorFile, ...]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the shards that the index names; check all.

        Other .safetensors files (consolidated ones, adapters) are not the model and are ignored. Names
        in the index must be plain file names: no separator, no `..`. The files themselves may be
        symbolic links to anywhere, because the hub's own cache is made of such links and whoever
        made the folder made them; a downloaded index is text that a stranger wrote.

        Raises:
            ExportError: no safetensors, or a header or an index that does not describe the files.
        """
        folder = Path(folder)
        index = _read_index(folder)
        names = [SINGLE] if index is None else list(dict.fromkeys(index["weight_map"].values()))
        files = tuple(read_tensor_file(folder / name) for name in sorted(names))
        if index is not None:
            _check_weight_map(folder, index["weight_map"], files)
        tensors = {name: info for file in files for name, info in file.tensors.items()}
        return cls(folder, files, tensors, index)

    @property
    def fingerprint(self) -> str:
        """Of the files' names, sizes, times of change and headers: cheap, and new for new contents."""
        stamps = [(file.name, *file.stamp) for file in self.files]
        return hashlib.sha256(json.dumps([stamps, self.index]).encode()).hexdigest()

    def source(self, name: str) -> TensorSource:
        """One tensor, to read whole or in blocks.

        Raises:
            ExportError: there is no such tensor.
        """
        if name not in self.tensors:
            raise ExportError(f"no tensor {name!r} in {self.folder}{_nearest(name, self.tensors)}")
        return TensorSource(self.tensors[name])

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of one tensor, from the header."""
        return self.source(name).info.dtype, self.source(name).info.shape

    def read(self, name: str) -> Shaped[Tensor, "*shape"]:
        """A whole tensor, in memory of its own."""
        return self.source(name).read()

    def blocks(
        self, name: str, *, max_bytes: int = BLOCK
    ) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        """Blocks of rows, each with its place on the first axis; see `TensorSource.blocks`."""
        return self.source(name).blocks(max_bytes=max_bytes)


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a file, read by plain reads: a mapped page would count as this process's memory."""

    info: TensorInfo

    def read(self) -> Shaped[Tensor, "*shape"]:
        """The whole tensor, in memory of its own.

        Raises:
            ExportError: the file cannot be read, or was changed since its header was.
        """
        data = _read_bytes(self.info.file, self.info.offset, self.info.nbytes)
        return data.view(self.info.dtype).reshape(self.info.shape)

    def blocks(self, *, max_bytes: int = BLOCK) -> Iterator[tuple[slice, Shaped[Tensor, "*shape"]]]:
        """Blocks of whole rows (of the first axis), at most `max_bytes` each or one row; any number
        of passes. A tensor without rows, or without an axis, is one block.

        Raises:
            ExportError: the file cannot be read, or was changed since its header was.
        """
        info = self.info
        if not info.nbytes or not info.shape:
            yield slice(0, info.shape[0] if info.shape else 1), self.read()
            return
        row = info.nbytes // info.shape[0]
        step = max(1, max_bytes // row)
        for first in range(0, info.shape[0], step):
            last = min(first + step, info.shape[0])
            data = _read_bytes(info.file, info.offset + first * row, (last - first) * row)
            yield slice(first, last), data.view(info.dtype).reshape(-1, *info.shape[1:])


# --------------------------------------------------------------------------------- headers


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check one safetensors header, without reading data or trusting any number in it.

    What the safetensors library refuses is refused here: a header that is not JSON, longer than
    100 MB or than the file; an unknown dtype; sizes that do not follow from dtype and shape; bytes
    that overlap, that nothing describes or that are missing. Besides, names given twice are refused
    (the library takes the last).

    Raises:
        ExportError: naming the file, what is wrong and, for a file cut short, how much is missing.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ExportError(f"{path} is not a file")
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
    header = _json_object(raw, path, "header")
    _check_metadata(header.get("__metadata__"), path)
    start = 8 + length
    entries = [_entry(n, e, path, start) for n, e in header.items() if n != "__metadata__"]
    entries.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(entries, path, start, state.st_size)
    stamp = (state.st_size, state.st_mtime_ns, hashlib.sha256(raw).hexdigest())
    return TensorFile(path, header, start, {info.name: info for info in entries}, stamp)


def _malformed(path: Path, reason: str) -> ExportError:
    return ExportError(
        f"{path} is not a whole safetensors file: {reason}. Download or save it again"
    )


def _json_object(raw: bytes, path: Path, part: str) -> dict[str, Any]:
    """JSON as a standard parser reads it: UTF-8, no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            key.encode()  # a lone surrogate is not text
            found[key] = value
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        content = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # a JSON or a UTF-8 error is a ValueError
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
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ExportError(
            f"{path}: {name!r} has the dtype {kind!r}, which this torch ({torch.__version__}) does "
            f"not have; it has {', '.join(_DTYPES)}"
        )
    if shape is None:
        raise _malformed(path, f"the shape of {name!r} is {_short(entry.get('shape'))}")
    offsets = _naturals(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(path, f"data_offsets of {name!r} are {_short(entry.get('data_offsets'))}")
    shape = _torch_shape(kind, shape, name, path)
    dtype, nbytes = _DTYPES[kind], offsets[1] - offsets[0]
    if math.prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63:
        raise _malformed(path, f"the shape of {name!r}, {_short(shape)}, is larger than any memory")
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise _malformed(
            path,
            f"{name!r} has {nbytes} bytes, but {kind} {_short(shape)} needs "
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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --------------------------------------------------------------------------------- the index


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a sharded folder, its names checked; None for a single file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise _no_weights(folder)
        return None
    try:
        if not path.is_file() or path.stat().st_size > MAX_HEADER:
            raise ExportError(f"{path} is not a file of at most {MAX_HEADER} bytes")
        index = _json_object(path.read_bytes(), path, "content")
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{path} has no weight_map: it must name the file of every tensor")
    for tensor, name in weight_map.items():
        if not _is_plain(name):
            raise ExportError(
                f"{path} puts {tensor!r} into {_short(repr(name))}: only plain names of .safetensors "
                "files in the same folder are accepted. Do not use this folder unless you know why"
            )
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise ExportError(
            f"{folder} has both {SINGLE} and {INDEX}, and programs differ in which of them is the "
            "model: remove the one that is not"
        )
    return index


def _is_plain(name: Any) -> bool:
    """Whether a name of the index stays in its folder, on any system."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and "\0" not in name
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
    )


def _no_weights(folder: Path) -> ExportError:
    if not folder.is_dir():
        return ExportError(f"{folder} is not a folder")
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
    )
    if pickles:
        return ExportError(
            f"{folder} has its weights as {pickles[0]}, a pickle, which is not read here. Convert it "
            "first: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(other) writes safetensors"
        )
    return ExportError(
        f"{folder} has neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face model"
    )


def _check_weight_map(
    folder: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]
) -> None:
    """The index and the shards name the same tensors in the same places."""
    place: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in place:
                raise ExportError(f"{folder}: {name!r} is in {place[name]} and in {file.name}")
            place[name] = file.name
    for name in weight_map:
        if place.get(name) != weight_map[name]:
            there = f"it is in {place[name]}" if name in place else "no shard has it"
            raise ExportError(
                f"{folder / INDEX} puts {name!r} into {weight_map[name]}, but {there}: download the "
                "folder again"
            )
    unnamed = sorted(set(place) - set(weight_map))
    if unnamed:
        raise ExportError(
            f"{folder / INDEX} does not name {unnamed[0]!r} (in {place[unnamed[0]]}) and "
            f"{len(unnamed) - 1} more tensors: download the folder again"
        )


def _nearest(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(tensors), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --------------------------------------------------------------------------------- bytes


def read_up_to(handle: int, offset: int, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        part = os.pread(handle, nbytes, offset)
        if not part:
            break
        parts.append(part)
        offset, nbytes = offset + len(part), nbytes - len(part)
    return b"".join(parts)


def _read_bytes(path: Path, offset: int, nbytes: int) -> Shaped[Tensor, " bytes"]:
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
