"""Tensor files: safetensors folders read, copied and edited tensor by tensor, never loaded.

Knows: safetensors headers, shards and their index, bytes on disk, folders that grow in hidden places
and survive a kill. Does not know: plans, models, which tensor means what, or why one is edited.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.files import write_whole

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
JOURNAL = ".interp_ablate.partial.jsonl"
JOURNAL_FORMAT = "interp_ablate.partial/1"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library, here for the index too
BLOCK = 2 << 20  # bytes of a block of rows (or one row): its float32 copy stays in a cache
WAITING = 128 << 20  # bytes of finished blocks that may wait for the disk
COPY = 64 << 20  # bytes asked of the kernel at once
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
_HEADER_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PER_ITEM = {"F4": 2}  # values that one torch item holds, along the last axis
# What the kernel says when it cannot copy between these two files, and reading and writing can.
_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
}


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


Blocks: TypeAlias = Iterable[Tensor]
Edit: TypeAlias = Callable[[TensorSource], Blocks]


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the source does not have, to be written into the file that holds `beside`.

    Attributes:
        content: the name of a source tensor whose bytes it gets, or a function that yields its blocks.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    beside: str
    content: str | Callable[[], Blocks]

    @classmethod
    def copy_of(cls, name: str, original: TensorInfo, *, beside: str | None = None) -> NewTensor:
        """The bytes of a source tensor (before any edit) under another name, in the same file."""
        home = original.name if beside is None else beside
        return cls(name, original.dtype, original.shape, home, original.name)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
            length = int.from_bytes(_read_up_to(file.fileno(), 0, 8), "little")
            if state.st_size < 8:
                raise _malformed(path, f"{state.st_size} bytes, and a header alone has more")
            if length > min(MAX_HEADER, state.st_size - 8):
                raise _malformed(
                    path,
                    f"it says its header has {length} bytes; the file has {state.st_size}, and a "
                    f"header at most {MAX_HEADER}",
                )
            raw = _read_up_to(file.fileno(), 8, length)
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
    per_item = _PER_ITEM.get(kind, 1)
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


def _read_up_to(handle: int, offset: int, nbytes: int) -> bytes:
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


def _write_bytes(handle: int, offset: int, data: memoryview) -> None:
    while data:
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done


def _bytes_of(block: Tensor) -> memoryview:
    flat = block.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _copy_bytes(handle: int, offset: int, path: Path, place: int, nbytes: int) -> None:
    """Copy `nbytes` of `path` from `place` to an open file at `offset`, inside the kernel if it can."""
    source = os.open(path, os.O_RDONLY)
    try:
        in_kernel = sys.platform == "linux"
        while nbytes:
            done = 0
            if in_kernel:
                done = _copy_in_kernel(source, handle, min(nbytes, COPY), place, offset)
                in_kernel = done > 0
            if not done:
                data = os.pread(source, min(nbytes, COPY // 8), place)
                if not data:
                    raise ExportError(f"{path} became shorter while it was copied: start again")
                _write_bytes(handle, offset, memoryview(data))
                done = len(data)
            place, offset, nbytes = place + done, offset + done, nbytes - done
    finally:
        os.close(source)


def _copy_in_kernel(source: int, target: int, nbytes: int, place: int, offset: int) -> int:
    """Bytes copied; 0 where the kernel or the file system cannot."""
    try:
        return os.copy_file_range(source, target, nbytes, place, offset)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return 0


class _Lane:
    """One thread that does work in the order given, while the caller prepares the next.

    Work that holds memory says how much; the caller waits when more than `WAITING` bytes do. An error
    of earlier work is raised by a later `put`, or by `finish`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensor-files")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._held = 0

    def stop(self, *, drop: bool) -> None:
        """Let the work at hand end, and do or drop what waits."""
        self._thread.shutdown(wait=True, cancel_futures=drop)

    def put(self, work: Callable[..., None], *arguments: Any, holds: int = 0) -> None:
        while self._waiting and (
            self._held + holds > WAITING or self._waiting[0][0].done() or len(self._waiting) > 1000
        ):
            self._settle()
        self._waiting.append((self._thread.submit(work, *arguments), holds))
        self._held += holds

    def _settle(self) -> None:
        future, held = self._waiting.popleft()
        self._held -= held
        future.result()

    def finish(self) -> None:
        while self._waiting:
            self._settle()


# --------------------------------------------------------------------------------- folders


@dataclass
class StreamedFolder:
    """A hidden folder that grows file by file, with a journal of those that are whole.

    Attributes:
        path: the hidden folder; whatever is written there appears with it.
        whole: names of finished files and their sizes.
    """

    path: Path
    journal: int
    whole: dict[str, int] = field(default_factory=dict)

    def keep(self, name: str, size: int) -> None:
        """Write down that a file is whole: a later run will not write it again."""
        self.whole[name] = size
        self._write({"file": name, "size": size})

    def begin(self, fingerprint: str) -> None:
        """Take up what an earlier run with the same fingerprint finished; remove everything else."""
        found = self._finished(fingerprint)
        for entry in self.path.iterdir():
            if entry.name not in found and entry.name != JOURNAL:
                _remove(entry)
        if not found:
            os.ftruncate(self.journal, 0)
            self._write({"format": JOURNAL_FORMAT, "fingerprint": fingerprint})
        else:
            logger.info("%s: %d files are whole already", self.path, len(found))
        self.whole = found

    def _write(self, line: dict[str, Any]) -> None:
        # The line break comes first: a line that a kill cut short cannot swallow the next one.
        os.write(self.journal, b"\n" + json.dumps(line).encode() + b"\n")
        os.fsync(self.journal)

    def _finished(self, fingerprint: str) -> dict[str, int]:
        """Files of the journal that are still there with their size; none of another fingerprint."""
        lines = []
        for text in _read_up_to(self.journal, 0, os.fstat(self.journal).st_size).splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # empty, or cut short by a kill
        if not lines or lines[0] != {"format": JOURNAL_FORMAT, "fingerprint": fingerprint}:
            return {}
        sizes = {line["file"]: line["size"] for line in lines[1:]}
        return {
            name: size
            for name, size in sizes.items()
            if (self.path / name).is_file() and (self.path / name).stat().st_size == size
        }


@contextmanager
def streamed_folder(
    out: str | Path, *, source: Checkpoint, fingerprint: str, overwrite: bool = False
) -> Iterator[StreamedFolder]:
    """A hidden sibling `.NAME.partial` of `out` that takes its place when the block ends well.

    A kill or Ctrl-C leaves the hidden folder: the next run with the same source and `fingerprint` keeps
    its finished files, any other starts over. An error removes it. A second process is refused.

    Args:
        source: what is copied; `out` must not hold it.
        fingerprint: of everything besides the source's files that decides what is written.

    Raises:
        ExportError: `out` exists (and overwrite is off) or holds the source, another process writes
            there, the place cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    hidden = out.with_name(f".{out.name}.partial") if out.name else out
    _check_place(out, source, overwrite)
    try:
        journal = _lock(hidden)
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error.strerror or error}") from error
    try:
        folder = StreamedFolder(hidden, journal)
        folder.begin(f"{source.fingerprint} {fingerprint}")
        yield folder
        _check_place(out, source, overwrite)
        _put_in_place(hidden, out)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise ExportError(
            f"cannot write {out}: {error.strerror or error}; nothing is left"
        ) from error
    except Exception:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    finally:
        os.close(journal)


def _check_place(out: Path, source: Checkpoint, overwrite: bool) -> None:
    real = Path(os.path.realpath(out))
    for path in (source.folder, *(file.path for file in source.files)):
        there = Path(os.path.realpath(path))
        if real == there or real in there.parents:
            raise ExportError(f"{out} holds the source {path}: choose another place to write to")
    if os.path.lexists(out) and not overwrite:
        raise ExportError(f"{out} exists: choose another --out, or pass overwrite (--force)")


def _lock(hidden: Path) -> int:
    """The journal of a hidden folder, open and locked for this process.

    Raises:
        ExportError: another process holds it, or the folder was not made by `streamed_folder`.
        OSError: the place cannot be written.
    """
    while True:
        hidden.mkdir(parents=True, exist_ok=True)
        path = hidden / JOURNAL
        if not path.exists() and any(hidden.iterdir()):
            raise ExportError(f"{hidden} is in the way and has no journal: remove it")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ExportError(f"another process is writing {hidden}: wait for it") from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): keep other processes away", hidden, error)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
        os.close(handle)  # its owner finished in between


def _put_in_place(hidden: Path, out: Path) -> None:
    """`hidden` becomes `out` and loses its journal; what was there before is removed last."""
    old = out.with_name(f".{out.name}.old")
    replaces = os.path.lexists(out)
    if replaces:
        _remove(old)
        os.replace(out, old)
    try:
        os.replace(hidden, out)
    except OSError:
        if replaces:
            os.replace(old, out)
        raise
    (out / JOURNAL).unlink()
    _sync(out)
    _sync(out.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """A file, a link or a folder with all in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------------- copying


@dataclass(frozen=True)
class _Piece:
    """A run of bytes of a new file: given, copied from a file, or yielded by a function."""

    nbytes: int
    given: bytes | None = None
    origin: tuple[Path, int] | None = None
    tensor: TensorInfo | NewTensor | None = None
    blocks: Callable[[], Blocks] | None = None


def copy_checkpoint(
    source: Checkpoint,
    folder: StreamedFolder,
    *,
    edit: Mapping[str, Edit],
    extra: Sequence[NewTensor] = (),
) -> Checkpoint:
    """Write the source's weight files again, tensor by tensor: some edited, some new, all else copied.

    The files have the source's names, tensors, order and metadata; so has the index. A header is made
    anew only for a file that gets new tensors. Files that the folder's journal names are left alone.

    Args:
        edit: for a tensor's name, a function that reads it (whole or in blocks, in any number of passes)
            and yields its new contents as blocks of rows of the same dtype and, together, the same
            shape. A block is written later, by another thread: it must not be changed after the yield.
        extra: tensors that the source does not have.

    Returns the written files, opened again (so checked) in the hidden folder.

    Raises:
        ExportError: a name that is not there or there twice, blocks that do not fit, a source that is
            malformed or changed meanwhile, not enough room.
        OSError: the disk is full or broken (`streamed_folder` makes it an ExportError).
    """
    _check_names(source, edit, extra)
    files = [file for file in source.files if file.name not in folder.whole]
    _check_room(folder.path, files, extra)
    homes: dict[Path, list[NewTensor]] = {}
    for new in extra:
        homes.setdefault(source.tensors[new.beside].file, []).append(new)
    with _Writer(folder) as writer:
        for file in files:
            writer.write(file, _merged(_pieces(source, file, edit, homes.get(file.path, ()))))
        writer.finish()
    _write_index(source, folder.path, extra)
    _sync(folder.path)
    return Checkpoint.open(folder.path)


def _check_names(source: Checkpoint, edit: Mapping[str, Edit], extra: Sequence[NewTensor]) -> None:
    for name in (*edit, *(new.beside for new in extra)):
        source.source(name)
    taken = {"__metadata__", *source.tensors}
    for new in extra:
        if new.name in taken:
            raise ExportError(
                f"the new tensor {new.name!r} has a name that is taken: choose another"
            )
        taken.add(new.name)
        if isinstance(new.content, str):
            original = source.source(new.content).info
            if (original.dtype, original.shape) != (new.dtype, new.shape):
                raise ExportError(
                    f"{new.name!r} is declared as {new.dtype} {list(new.shape)}, but copies "
                    f"{original.name!r}, {original.dtype} {list(original.shape)}"
                )


def _check_room(folder: Path, files: Sequence[TensorFile], extra: Sequence[NewTensor]) -> None:
    """Fails in the first second, not after an hour."""
    needed = sum(file.size for file in files) + sum(new.nbytes for new in extra)
    free = shutil.disk_usage(folder).free
    if files and needed > free:
        raise ExportError(
            f"{needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free at {folder.parent}: free space "
            "or choose another place"
        )


def _pieces(
    source: Checkpoint,
    file: TensorFile,
    edit: Mapping[str, Edit],
    extra: Sequence[NewTensor],
) -> Iterator[_Piece]:
    """The new file from its first byte to its last."""
    tensors: list[TensorInfo | NewTensor] = list(file.tensors.values())
    if extra:
        for new in extra:
            tensors.insert(_place_of(new, tensors), new)
        header = _new_header(file, tensors)
        yield _Piece(len(header), given=header)
    else:
        yield _Piece(file.start, origin=(file.path, 0))
    for tensor in tensors:
        if isinstance(tensor, TensorInfo) and tensor.name in edit:
            blocks = partial(edit[tensor.name], TensorSource(tensor))
            yield _Piece(tensor.nbytes, tensor=tensor, blocks=blocks)
        elif isinstance(tensor, TensorInfo):
            yield _Piece(tensor.nbytes, origin=(file.path, tensor.offset))
        elif isinstance(tensor.content, str):
            original = source.tensors[tensor.content]
            yield _Piece(tensor.nbytes, origin=(original.file, original.offset))
        else:
            yield _Piece(tensor.nbytes, tensor=tensor, blocks=tensor.content)


def _place_of(new: NewTensor, tensors: Sequence[TensorInfo | NewTensor]) -> int:
    """Where its bytes go: after the last tensor of items at least as wide, which keeps all aligned."""
    wide = [i for i, t in enumerate(tensors) if t.dtype.itemsize >= new.dtype.itemsize]
    return wide[-1] + 1 if wide else 0


def _new_header(file: TensorFile, tensors: Sequence[TensorInfo | NewTensor]) -> bytes:
    header: dict[str, Any] = {}
    if "__metadata__" in file.header:
        header["__metadata__"] = file.header["__metadata__"]
    end = 0
    for tensor in tensors:
        if isinstance(tensor, TensorInfo):
            entry = dict(file.header[tensor.name])
        else:
            kind, shape = _HEADER_NAMES[tensor.dtype], list(tensor.shape)
            shape[-1:] = [size * _PER_ITEM.get(kind, 1) for size in shape[-1:]]
            entry = {"dtype": kind, "shape": shape}
        header[tensor.name] = {**entry, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _merged(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Neighbours that are copied from neighbouring bytes, as one."""
    last: _Piece | None = None
    for piece in pieces:
        if last is not None and last.origin is not None and piece.origin is not None:
            path, place = last.origin
            if piece.origin == (path, place + last.nbytes):
                last = _Piece(last.nbytes + piece.nbytes, origin=last.origin)
                continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


class _Writer:
    """Files on their way to the disk: one thread writes, another waits for the disk and renames."""

    def __init__(self, folder: StreamedFolder) -> None:
        self._folder = folder
        self._writing, self._closing = _Lane(), _Lane()
        self._open: set[int] = set()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._writing.stop(drop=True)
        self._closing.stop(drop=False)  # files written in full are worth keeping after Ctrl-C
        for handle in self._open:
            os.close(handle)

    def write(self, file: TensorFile, pieces: Iterable[_Piece]) -> None:
        """One file; it gets its name when every byte of it has reached the disk."""
        temporary = self._folder.path / f"{file.name}.partial"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._open.add(handle)
        size = 0
        for piece in pieces:
            if piece.given is not None:
                self._writing.put(_write_bytes, handle, size, memoryview(piece.given))
            elif piece.origin is not None:
                self._writing.put(_copy_bytes, handle, size, *piece.origin, piece.nbytes)
            else:
                _write_blocks(handle, size, piece, self._writing)
            size += piece.nbytes
        self._writing.finish()
        self._closing.finish()
        self._closing.put(self._close, handle, file, temporary, size)

    def _close(self, handle: int, file: TensorFile, temporary: Path, size: int) -> None:
        os.fsync(handle)
        self._open.remove(handle)
        os.close(handle)
        _check_unchanged(file)
        os.replace(temporary, self._folder.path / file.name)
        _sync(self._folder.path)
        self._folder.keep(file.name, size)
        logger.info("wrote %s (%.2f GB)", file.name, size / 1e9)

    def finish(self) -> None:
        self._writing.finish()
        self._closing.finish()


def _write_blocks(handle: int, offset: int, piece: _Piece, lane: _Lane) -> None:
    """Blocks of rows, each checked before a byte of it is written."""
    tensor = piece.tensor
    assert tensor is not None and piece.blocks is not None
    expected = f"{tensor.name!r} is {tensor.dtype} {list(tensor.shape)}"
    written = 0
    for block in piece.blocks():
        if not isinstance(block, Tensor):
            raise ExportError(f"{expected}, but its new contents came as {type(block).__name__}")
        nbytes = block.numel() * block.dtype.itemsize
        fits = block.ndim == len(tensor.shape) and tuple(block.shape[1:]) == tensor.shape[1:]
        if block.dtype != tensor.dtype or not fits or written + nbytes > piece.nbytes:
            raise ExportError(
                f"{expected}, but a block of its new contents is {block.dtype} {list(block.shape)}, "
                f"after {written} of {piece.nbytes} bytes"
            )
        if nbytes:
            lane.put(_write_bytes, handle, offset + written, _bytes_of(block), holds=nbytes)
        written += nbytes
    if written != piece.nbytes:
        raise ExportError(
            f"{expected}, {piece.nbytes} bytes; its new contents are {written} bytes only"
        )


def _check_unchanged(file: TensorFile) -> None:
    state = file.path.stat()
    if (state.st_size, state.st_mtime_ns) != file.stamp[:2]:
        raise ExportError(f"{file.path} was changed while it was copied: start again")


def _write_index(source: Checkpoint, folder: Path, extra: Sequence[NewTensor]) -> None:
    """The source's index, as it is or with the new tensors in it."""
    if source.index is None:
        return
    if not extra:
        content = (source.folder / INDEX).read_bytes()
        write_whole(folder / INDEX, content, error=ExportError)
        return
    index = json.loads(json.dumps(source.index))
    added = {
        "total_size": sum(new.nbytes for new in extra),
        "total_parameters": sum(math.prod(new.shape) for new in extra),
    }
    metadata = index.get("metadata")
    for key in added if isinstance(metadata, dict) else ():
        if isinstance(metadata.get(key), (int, float)):
            metadata[key] += added[key]
    for new in extra:
        index["weight_map"][new.name] = source.tensors[new.beside].file.name
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / INDEX, text, error=ExportError)
