"""A folder written under a temporary name and put in place when whole.

Knows: places, locks, journals. Does not know: contents.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from interp_ablate.errors import ExportError
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.storage.safetensors_header import read_up_to
from interp_ablate.storage.safetensors_reader import Checkpoint

logger = logging.getLogger(__name__)


JOURNAL = ".interp_ablate.partial.jsonl"
JOURNAL_FORMAT = "interp_ablate.partial/1"
WAITING = 128 << 20  # bytes of finished blocks that may wait for the disk


class WorkerThread:
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
        finished = self._finished(fingerprint)
        for entry in self.path.iterdir():
            if entry.name not in finished and entry.name != JOURNAL:
                _remove(entry)
        if not finished:
            os.ftruncate(self.journal, 0)
            self._write({"format": JOURNAL_FORMAT, "fingerprint": fingerprint})
        else:
            logger.info("%s: %d files are whole already", self.path, len(finished))
        self.whole = finished

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
    check_output_path(
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
        check_output_path(
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


def check_output_path(
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
        place = Path(os.path.realpath(path))
        if real == place or real in place.parents:
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
            locked = lock_descriptor(handle, blocking=False)
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): keep other processes away", hidden, error)
            locked = True
        if not locked:
            os.close(handle)
            raise ExportError(f"another process is writing {hidden}: wait for it")
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
    sync_to_disk(out)
    sync_to_disk(out.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """A file, a link or a folder with all in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
