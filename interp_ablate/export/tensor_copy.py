"""Tensor copy: a safetensors folder written again, tensor by tensor, some of them edited.

Knows: bytes on disk, folders that grow in hidden places and survive a kill, how edited, new and copied
tensors make a file. Does not know: plans, models, which tensor means what, or why one is edited.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.export.card import MANIFEST
from interp_ablate.export.tensor_files import (
    HEADER_NAMES,
    INDEX,
    PER_ITEM,
    Checkpoint,
    TensorFile,
    TensorInfo,
    TensorSource,
    read_up_to,
)
from interp_ablate.files import write_whole

logger = logging.getLogger(__name__)

JOURNAL = ".interp_ablate.partial.jsonl"
JOURNAL_FORMAT = "interp_ablate.partial/1"
WAITING = 128 << 20  # bytes of finished blocks that may wait for the disk
COPY = 64 << 20  # bytes asked of the kernel at once
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
        for text in read_up_to(self.journal, 0, os.fstat(self.journal).st_size).splitlines():
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
    check_place(
        out, overwrite=overwrite, source=source.folder, files=[f.path for f in source.files]
    )
    try:
        journal = _lock(hidden)
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error.strerror or error}") from error
    try:
        folder = StreamedFolder(hidden, journal)
        folder.begin(f"{source.fingerprint} {fingerprint}")
        yield folder
        check_place(
            out, overwrite=overwrite, source=source.folder, files=[f.path for f in source.files]
        )
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


def check_place(
    out: str | Path,
    *,
    overwrite: bool,
    source: str | Path | None = None,
    files: Iterable[Path] = (),
) -> None:
    """Refuse to write over a source, over what is there, or (with overwrite) over what is no export.

    Raises:
        ExportError: says which, and what to do.
    """
    out = Path(out)
    real = Path(os.path.realpath(out))
    for path in (*([Path(source)] if source else ()), *files):
        there = Path(os.path.realpath(path))
        if real == there or real in there.parents:
            raise ExportError(f"{out} holds the source {path}: choose another place to write to")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ExportError(f"{out} exists: choose another --out, or pass overwrite (--force)")
    is_export = (out / MANIFEST).is_file()
    if out.is_dir() and any(out.iterdir()) and not is_export:
        raise ExportError(
            f"{out} holds files that are no export (no {MANIFEST}): they would be lost. Remove "
            "the folder yourself, or choose another --out"
        )


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
    old = out.with_name(f".{out.name}.replaced-by-interp-ablate")
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
