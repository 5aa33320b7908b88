"""A folder written under a temporary name and put in place when whole.

Knows: places, locks, journals. Does not know: contents.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from interp_ablate.errors import ExportError
from interp_ablate.storage.atomic_files import (
    folder_made,
    remove,
    remove_left_overs,
    temporary_beside,
)
from interp_ablate.storage.incoming_files import parse_json
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.storage.safetensors_header import read_up_to
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.storage.strict_json import json_text

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
                remove(entry)
        if not finished:
            os.ftruncate(self.journal, 0)
            self._write({"format": JOURNAL_FORMAT, "fingerprint": fingerprint})
        else:
            logger.info("%s: %d files are whole already", self.path, len(finished))
        self.whole = finished

    def _write(self, line: dict[str, Any]) -> None:
        # The line break comes first: a line that a kill cut short cannot swallow the next one.
        os.write(self.journal, b"\n" + json_text(line).encode() + b"\n")
        os.fsync(self.journal)

    def _finished(self, fingerprint: str) -> dict[str, int]:
        """Files of the journal that are still there with their size; none of another fingerprint."""
        lines = []
        for text in read_up_to(self.journal, 0, os.fstat(self.journal).st_size).splitlines():
            try:
                lines.append(parse_json(text))
            except ValueError:
                continue  # empty, or cut short by a kill
        if not lines or lines[0] != {"format": JOURNAL_FORMAT, "fingerprint": fingerprint}:
            return {}
        files = [line for line in lines[1:] if isinstance(line, dict)]
        sizes = {line.get("file"): line.get("size") for line in files}
        return {
            name: size
            for name, size in sizes.items()
            if isinstance(name, str)
            and (self.path / name).is_file()
            and (self.path / name).stat().st_size == size
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
    remove_left_overs(out.parent)
    if (out / JOURNAL).is_file() and not os.path.lexists(hidden):
        (out / JOURNAL).unlink()  # killed when all but this was done
    check_output_path(
        out, overwrite=overwrite, source=source.folder, files=[f.path for f in source.files]
    )
    stack = ExitStack()
    try:
        stack.enter_context(folder_made(out.parent))
        journal = _lock(hidden)
    except OSError as error:
        stack.close()
        raise ExportError(f"cannot write beside {out}: {error.strerror or error}") from error
    try:
        folder = StreamedFolder(hidden, journal)
        folder.begin(f"{source.fingerprint} {fingerprint}")
        yield folder
        check_output_path(
            out, overwrite=overwrite, source=source.folder, files=[f.path for f in source.files]
        )
        put_in_place(hidden, out)
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
        stack.close()


def check_output_path(
    out: str | Path,
    *,
    overwrite: bool,
    source: str | Path | None = None,
    files: Iterable[Path] = (),
) -> None:
    """Refuse to write over or into a source, over what is there, or (with overwrite) over what is no export.

    Raises:
        ExportError: says which, and what to do.
    """
    out = Path(out)
    real = Path(os.path.realpath(out))
    for path in (*([Path(source)] if source else ()), *files):
        place = Path(os.path.realpath(path))
        if real == place or real in place.parents:
            raise ExportError(f"{out} holds the source {path}: choose another place to write to")
        if source and path == Path(source) and place in real.parents:
            raise ExportError(
                f"{out} is inside the source {path}, which stays as it is: choose another place to write to"
            )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ExportError(f"{out} exists: choose another --out, or pass overwrite (--force)")
    if not out.is_dir():
        raise ExportError(
            f"{out} is a file, no export: it would be lost. Remove it yourself, or choose another --out"
        )
    is_export = (out / MANIFEST).is_file()
    if any(out.iterdir()) and not is_export:
        raise ExportError(
            f"{out} holds files that are no export (no {MANIFEST}): they would be lost. Remove "
            "the folder yourself, or choose another --out"
        )


def check_output_file(out: str | Path, *, overwrite: bool, ours: Callable[[bytes], bool]) -> None:
    """Refuse to write a file over what is there, or (with overwrite) over a file of another kind.

    Args:
        ours: whether a file that begins with these bytes is of the kind that is written.

    Raises:
        ExportError: says which, and what to do.
    """
    out = Path(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ExportError(f"{out} exists: choose another --out, or pass overwrite (--force)")
    beginning = b""
    if out.is_file():
        with open(out, "rb") as file:
            beginning = file.read(64)
    if not ours(beginning):
        raise ExportError(
            f"{out} is not what this command writes: it would be lost. Remove it yourself, or choose another "
            "--out"
        )


def _lock(hidden: Path) -> int:
    """The journal of a hidden folder, open and locked for this process.

    Raises:
        ExportError: another process holds it, or the folder was not made by `streamed_folder`.
        OSError: the place cannot be written.
    """
    while True:
        hidden.mkdir(exist_ok=True)
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


def put_in_place(folder: Path, out: Path) -> None:
    """`folder` becomes `out` and loses its journal; what was there before is removed last.

    Interrupted in between, the old folder is back; killed, it comes back with the next call (`remove_left_overs`).
    """
    old = temporary_beside(out, "old")
    if os.path.lexists(out):
        os.replace(out, old)
    try:
        os.replace(folder, out)
    except BaseException:
        if os.path.lexists(old):
            os.replace(old, out)
        raise
    (out / JOURNAL).unlink(missing_ok=True)
    sync_to_disk(out)
    sync_to_disk(out.parent)
    remove(old)


def sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
