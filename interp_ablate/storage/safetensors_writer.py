"""Tensor copy: a safetensors folder written again, tensor by tensor, some of them edited.

Knows: bytes on disk, folders that grow in hidden places and survive a kill, how edited, new and copied
tensors make a file. Does not know: plans, models, which tensor means what, or why one is edited.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.output_folder import StreamedFolder, WorkerThread, sync_to_disk
from interp_ablate.storage.safetensors_header import PER_ITEM, TensorFile, TensorInfo
from interp_ablate.storage.safetensors_reader import HEADER_NAMES, INDEX, Checkpoint, TensorSource
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)

COPY = 64 << 20  # bytes asked of the kernel at once
OPEN = 4  # files that may wait for their last bytes
# What the kernel says when it cannot copy between these two files, and reading and writing can.
_NO_KERNEL_COPY = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
}


Blocks: TypeAlias = Iterable[Tensor]
TensorEditor: TypeAlias = Callable[[TensorSource], Blocks]


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
    edit: Mapping[str, TensorEditor],
    extra: Sequence[NewTensor] = (),
    without: Collection[str] = (),
) -> Checkpoint:
    """Write the source's weight files again, tensor by tensor: some edited, some new, all else copied.

    The files have the source's names, tensors, order and metadata; so has the index. A header is made
    anew only for a file that gets new tensors; one that loses all its tensors is left out. Files that the folder's journal names are left alone.

    Args:
        edit: for a tensor's name, a function that reads it (whole or in blocks, in any number of passes)
            and yields its new contents as blocks of rows of the same dtype and, together, the same
            shape. A block is written later, by another thread: it must not be changed after the yield.
        extra: tensors that the source does not have.
        without: names of the source's tensors that are left out; a new one may have such a name.

    Returns the written files, opened again (so checked) in the hidden folder.

    Raises:
        ExportError: a name that is not there or there twice, blocks that do not fit, a source that is
            malformed or changed meanwhile, not enough room.
        OSError: the disk is full or broken (`streamed_folder` makes it an ExportError).
    """
    _check_names(source, edit, extra, without)
    homes: dict[Path, list[NewTensor]] = {}
    for new in extra:
        homes.setdefault(source.tensors[new.beside].file, []).append(new)
    # a file of which nothing is left would be one that the index does not name
    left = [
        f for f in source.files if f.path in homes or not f.tensors or f.tensors.keys() - {*without}
    ]
    files = [file for file in left if file.name not in folder.whole]
    _check_room(folder.path, files, extra)
    with _Writer(folder) as writer:
        for file in files:
            pieces = _pieces(source, file, edit, homes.get(file.path, ()), without)
            writer.write(file, _merged(pieces))
        writer.finish()
    _write_index(source, folder.path, extra, without)
    sync_to_disk(folder.path)
    return Checkpoint.open(folder.path)


def _check_names(
    source: Checkpoint,
    edit: Mapping[str, TensorEditor],
    extra: Sequence[NewTensor],
    without: Collection[str],
) -> None:
    for name in (*edit, *without, *(new.beside for new in extra)):
        source.source(name)
    taken = {"__metadata__", *source.tensors} - {*without}
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
    edit: Mapping[str, TensorEditor],
    extra: Sequence[NewTensor],
    without: Collection[str],
) -> Iterator[_Piece]:
    """The new file from its first byte to its last."""
    tensors: list[TensorInfo | NewTensor] = [
        tensor for name, tensor in file.tensors.items() if name not in without
    ]
    if extra or len(tensors) < len(file.tensors):
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
            kind, shape = HEADER_NAMES[tensor.dtype], list(tensor.shape)
            shape[-1:] = [size * PER_ITEM.get(kind, 1) for size in shape[-1:]]
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
        self._writing, self._closing = WorkerThread(), WorkerThread()
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
        if len(self._open) >= OPEN:
            self.finish()
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
        self._writing.put(self._hand_on, handle, file, temporary, size)

    def _hand_on(self, handle: int, file: TensorFile, temporary: Path, size: int) -> None:
        """In the writing thread, when all of a file is written: the next one is begun meanwhile."""
        self._closing.finish()
        self._closing.put(self._close, handle, file, temporary, size)

    def _close(self, handle: int, file: TensorFile, temporary: Path, size: int) -> None:
        os.fsync(handle)
        self._open.remove(handle)
        os.close(handle)
        _check_unchanged(file)
        os.replace(temporary, self._folder.path / file.name)
        sync_to_disk(self._folder.path)
        self._folder.keep(file.name, size)
        logger.info("wrote %s (%.2f GB)", file.name, size / 1e9)

    def finish(self) -> None:
        self._writing.finish()
        self._closing.finish()


def _write_blocks(handle: int, offset: int, piece: _Piece, lane: WorkerThread) -> None:
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


def _write_index(
    source: Checkpoint, folder: Path, extra: Sequence[NewTensor], without: Collection[str]
) -> None:
    """The source's index, as it is or with the new tensors in it and without those left out."""
    if source.index is None:
        return
    if not extra and not without:
        content = (source.folder / INDEX).read_bytes()
        write_atomic(folder / INDEX, content, error=ExportError)
        return
    index: Any = deepcopy(source.index)
    left = [source.tensors[name] for name in without]
    added = {
        "total_size": sum(new.nbytes for new in extra) - sum(info.nbytes for info in left),
        "total_parameters": sum(math.prod(new.shape) for new in extra)
        - sum(math.prod(info.shape) for info in left),
    }
    metadata = index.get("metadata")
    for key in added if isinstance(metadata, dict) else ():
        if isinstance(metadata.get(key), (int, float)):
            metadata[key] += added[key]
    for name in without:
        del index["weight_map"][name]
    for new in extra:
        index["weight_map"][new.name] = source.tensors[new.beside].file.name
    text = json_text(index, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / INDEX, text, error=ExportError)
