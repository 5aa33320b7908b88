"""Lines: an append-only file of JSON objects that survives a kill, in one process at a time.

Knows: a header that says what the file is of, torn last lines, corrupt lines, other files' headers, locks,
full disks. Does not know: what a line means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from interp_ablate.errors import RunError


class JsonlLog:
    """A header line `{"format": ..., **identity}`, then one JSON object a line; every append is on disk.

    Args:
        kind: what a message calls the file ("journal").
        identity: what the lines are of; a file with another identity is refused.
        lost: what happens to a line that is deleted by hand ("its trial is run again").

    Raises:
        RunError: another identity's file, a corrupt line (its number), one in use by another process, a
            place that cannot be written.
    """

    def __init__(
        self, path: str | Path, identity: dict[str, Any], *, kind: str, format: str, lost: str
    ) -> None:
        self.path, self.kind, self.format, self.lost = Path(path), kind, format, lost
        # as it will be read back: JSON makes lists of tuples
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    @contextmanager
    def open(self) -> Iterator[list[dict[str, Any]]]:
        """What the file holds; `append` works inside the block."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: closing must not write again what failed
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
        except OSError as error:
            raise RunError(f"cannot write the {self.kind} {self.path}: {error.strerror}") from error
        with file:
            try:
                locked = lock_descriptor(file.fileno(), blocking=False)
            except OSError as error:
                raise RunError(
                    f"{self.path} cannot be locked ({error}): choose an --out on another file system"
                ) from error
            if not locked:
                raise RunError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                )
            self._file = file
            yield self._read()

    def append(self, value: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns.

        Raises:
            RunError: the disk is full, or the place went away; what was there is kept.
        """
        left = json.dumps(value).encode() + b"\n"
        try:
            while left:  # a disk that is nearly full takes a part; asked for the rest, it says why
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write the {self.kind} {self.path}: {error.strerror}. Free space and run "
                "again: finished lines are kept"
            ) from error

    def corrupt(self, number: int, why: object) -> RunError:
        """The error for line `number` (the header is line 1)."""
        return RunError(
            f"corrupt {self.kind} {self.path}, line {number}: {why}. Delete that line ({self.lost}), "
            "or the file to start over"
        )

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # the process was killed in the middle of this line: it never finished
            self._file.truncate(len(data) - len(torn))
        lines = whole.split(b"\n") if whole else []
        if not lines:
            self.append({"format": self.format, **self.identity})
            return []
        self._check_header(self._parse(lines[0], 1))
        return [self._parse(line, number) for number, line in enumerate(lines[1:], 2)]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise self.corrupt(number, error) from error
        if not isinstance(value, dict):
            raise self.corrupt(number, "not an object")
        return value

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != self.format:
            raise self.corrupt(1, f"not a {self.kind} of this package")
        other = [k for k, v in self.identity.items() if header.get(k) != v]
        if other:
            raise RunError(
                f"{self.path} is the {self.kind} of other work: {', '.join(other)} differ. Choose "
                "another --out, or delete it"
            )
