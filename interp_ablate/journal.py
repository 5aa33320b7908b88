"""Journal: finished trials on disk, one line each, in one process at a time.

Knows: torn lines, corrupt lines, other sweeps' journals, locks. Does not know: what a trial means.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_ablate.candidates import Trial
from interp_ablate.errors import RunError

HEADER = "interp_ablate.journal/1"


class Journal:
    """Finished trials on disk: a header line that says what was swept, then one JSON line a trial.

    Raises:
        RunError: another configuration's journal, a corrupt line (its number), or one in use by another
            process.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        # as it will be read back: JSON makes lists of tuples
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    @contextmanager
    def open(self) -> Iterator[dict[str, Trial]]:
        """Finished trials by candidate key; `append` works inside the block, in one process at a time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: closing must not write again what failed
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
        except OSError as error:
            raise RunError(f"cannot write the journal {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                ) from error
            self._file = file
            yield self._read()

    def _read(self) -> dict[str, Trial]:
        self._file.seek(0)
        data = self._file.read()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # the process was killed in the middle of this line: the trial never finished
            self._file.truncate(len(data) - len(torn))
        lines = whole.split(b"\n") if whole else []
        if not lines:
            self._write({"format": HEADER, **self.identity})
            return {}
        self._check_header(self._parse(lines[0], 1))
        trials = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                trial = Trial.from_dict(self._parse(line, number))
            except (TypeError, KeyError) as error:
                raise self._corrupt(number, error) from error
            trials[trial.candidate.key] = trial
        return trials

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise self._corrupt(number, error) from error
        if not isinstance(value, dict):
            raise self._corrupt(number, "not an object")
        return value

    def _corrupt(self, number: int, why: object) -> RunError:
        return RunError(
            f"corrupt journal {self.path}, line {number}: {why}. Delete that line (its trial is run "
            "again), or the file to start over"
        )

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != HEADER:
            raise self._corrupt(1, "not a journal of this package")
        other = [k for k, v in self.identity.items() if header.get(k) != v]
        if other:
            raise RunError(
                f"{self.path} is the journal of another sweep: {', '.join(other)} differ. Choose "
                "another --out, or delete it"
            )

    def _write(self, value: dict[str, Any]) -> None:
        left = json.dumps(value).encode() + b"\n"
        try:
            while left:  # a disk that is nearly full takes a part; asked for the rest, it says why
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write the journal {self.path}: {error.strerror}. Free space and run again: "
                "finished trials are kept"
            ) from error

    def append(self, trial: Trial) -> None:
        """Record a finished trial; on disk when this returns."""
        self._write(trial.to_dict())
