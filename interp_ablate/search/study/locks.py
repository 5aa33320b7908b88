"""Locks and journals that survive a kill.

Knows: files. Does not know: trials.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from interp_ablate.errors import RunError

# --------------------------------------------------------------------------------- locks and files


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A failure of the disk as this package's error."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the study {folder}: {error.strerror or error}. Free space or choose "
            "another place, and run again: finished trials are kept"
        ) from error


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """One process at a time inside the block; the system lets go of a killed one's lock."""
    with open(path, "ab") as file:
        lock_descriptor(file.fileno())
        yield


def _mend(journal: Path) -> None:
    """Cut off a line that was never finished; the caller holds the lock that every writer takes."""
    with open(journal, "rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


class AppendLock:
    """Optuna's lock around each append to its journal file.

    Optuna's own locks are files that a killed process leaves behind: the next one waits 30 seconds, or
    for ever where the path is relative. Here the system frees the lock, and what the killed process
    left of a line is cut off before another writes behind it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name("append.lock")
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        with ExitStack() as stack:
            file = stack.enter_context(open(self._path, "ab"))
            lock_descriptor(file.fileno())
            _mend(self._journal)
            stack.pop_all()
        self._file = file
        return True

    def release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def check_lines(journal: Path) -> None:
    with open(journal, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict) or not {"op_code", "worker_id"} <= value.keys():
                    raise ValueError("not a line of Optuna's journal")
            except ValueError as error:
                raise RunError(
                    f"corrupt study {journal}, line {number}: {error}. The lines after it count on "
                    "it: put the file back from a copy, or search again in another folder"
                ) from error


class WorkerFile:
    """A file that this process holds locked: while it does, its running trial is its own."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._path = folder / self.name
        self._file = open(self._path, "ab")  # noqa: SIM115  (held open until close)
        lock_descriptor(self._file.fileno())

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        if not self.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def living_workers(folder: Path) -> set[str]:
    """Workers whose files are locked; the files of the others are removed."""
    living = set()
    for path in folder.iterdir():
        try:
            with open(path, "rb") as file:
                if lock_descriptor(file.fileno(), blocking=False):
                    path.unlink(missing_ok=True)
                else:
                    living.add(path.name)
        except FileNotFoundError:  # it has just closed
            continue
    return living
