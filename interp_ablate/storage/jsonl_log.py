"""Lines: an append-only file of JSON objects that survives a kill, in one process at a time.

Knows: a header that says what the file is of, torn last lines, corrupt lines, other files' headers, locks,
full disks. Does not know: what a line means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from interp_ablate import __version__
from interp_ablate.errors import RunError
from interp_ablate.storage.atomic_files import folder_made
from interp_ablate.storage.incoming_files import check_file, parse_json
from interp_ablate.storage.json_shapes import misfit
from interp_ablate.storage.strict_json import as_read_back, json_text


class JsonlLog:
    """A header line `{"format": ..., **identity}`, then one JSON object a line; every append is on disk.

    The header is written with the first line: a log without lines binds nobody, and is removed when it is closed.

    Args:
        kind: what a message calls the file ("journal").
        identity: what the lines are of; a file with another identity is refused.
        lost: what happens to a line that is deleted by hand ("its trial is run again").
        shape: of a line (see `json_shapes`).
        any_version: lines may be of another version of this package; by default the version is identity.
        replace: lines of other work give way when the first of this one is written.

    Raises:
        RunError: another identity's file, a corrupt line (its number), one in use by another process, a
            place that cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        identity: dict[str, Any],
        *,
        kind: str,
        format: str,
        lost: str,
        shape: Any = object,
        any_version: bool = False,
        replace: bool = False,
    ) -> None:
        self.path, self.kind, self.format, self.lost = Path(path), kind, format, lost
        self._shape = shape
        made_by = {} if any_version else {"interp-ablate": __version__}
        # as it will be read back: JSON makes lists of tuples
        self.identity: dict[str, Any] = as_read_back({**made_by, **identity})
        self._replace = replace
        self._begun = False  # whether the header is there

    @contextmanager
    def open(self) -> Iterator[list[dict[str, Any]]]:
        """What the file holds; `append` works inside the block."""
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_made(self.path.parent))
                self._file = stack.enter_context(self._locked())
            except OSError as error:
                raise RunError(
                    f"cannot write the {self.kind} {self.path}: {error.strerror}"
                ) from error
            stack.callback(self._remove_empty)
            yield self._read()

    def _locked(self) -> Any:
        """The file, open and locked for this process.

        Raises:
            OSError: the place cannot be written.
        """
        while True:
            if self.path.exists():
                check_file(self.path, RunError)
            # unbuffered: closing must not write again what failed
            file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (the caller's stack closes it)
            try:
                locked = lock_descriptor(file.fileno(), blocking=False)
            except OSError as error:
                file.close()
                raise RunError(
                    f"{self.path} cannot be locked ({error}): choose an --out on another file system"
                ) from error
            if not locked:
                file.close()
                raise RunError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                )
            if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(file.fileno())):
                return file
            file.close()  # its owner removed it in between

    def _remove_empty(self) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            with suppress(OSError):  # Windows removes no open file: an empty one does no harm
                self.path.unlink()

    def append(self, value: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns.

        Raises:
            RunError: the disk is full, or the place went away; what was there is kept.
        """
        self._write(value)

    def begin(self) -> None:
        """Write the header, which tells whose folder it is, where the first line has not done so."""
        if not self._begun:
            self._write()

    def _write(self, *values: dict[str, Any]) -> None:
        header = [] if self._begun else [{"format": self.format, **self.identity}]
        left = b"".join(json_text(line).encode() + b"\n" for line in (*header, *values))
        try:
            if not self._begun:
                self._file.truncate(0)
            while left:  # a disk that is nearly full takes a part; asked for the rest, it says why
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot write the {self.kind} {self.path}: {error.strerror}. Free space and run "
                "again: finished lines are kept"
            ) from error
        self._begun = True

    def corrupt(self, number: int, why: object) -> RunError:
        """The error for line `number` (the header is line 1)."""
        return RunError(
            f"corrupt {self.kind} {self.path}, line {number}: {why}. Delete that line ({self.lost}), "
            "or the file to start over"
        )

    def _read(self) -> list[dict[str, Any]]:
        """The lines after the header; blank ones are passed over, a last one that a kill cut short is removed."""
        self._file.seek(0)
        data = self._file.read()
        *lines, last = data.split(b"\n")
        values = {n: self._parse(line, n) for n, line in enumerate(lines, 1) if line.strip()}
        torn = self._is_torn(last, first=not values)
        if last.strip() and not torn:  # whole but for its line break
            values[len(lines) + 1] = self._parse(last, len(lines) + 1)
        self._begun = bool(values) and self._is_same(*next(iter(values.items())), len(values) == 1)
        if not self._begun:
            return []
        if torn:
            self._file.truncate(len(data) - len(last))
        elif last:
            self._file.write(b"\n")
        lines = list(values.items())[1:]
        for number, value in lines:
            if (place := misfit(value, self._shape)) is not None:
                raise self.corrupt(number, f"its {place} is not there, or of another kind")
        return [value for _, value in lines]

    def _is_torn(self, line: bytes, *, first: bool) -> bool:
        """Whether the end of a file is the beginning of a line that was never finished."""
        text = line.decode(errors="replace")
        start = json.dumps({"format": self.format})[:-1] if first else "{"
        if not text or not (text.startswith(start) or start.startswith(text)):
            return False
        try:
            json.JSONDecoder().raw_decode(text)
        except RecursionError:
            return False
        except ValueError:
            return True
        return False

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = parse_json(line, finite=True)
        except ValueError as error:
            several = getattr(error, "msg", "") == "Extra data"
            why = "its line breaks are gone: put one after each object" if several else error
            raise self.corrupt(number, why) from error
        if not isinstance(value, dict):
            raise self.corrupt(number, "not an object")
        return value

    def _is_same(self, number: int, header: dict[str, Any], alone: bool) -> bool:
        """Whether the header is of this work; of other work it is refused, unless it has no lines or is replaced."""
        if header.get("format") != self.format:
            raise self.corrupt(number, f"not a {self.kind} of this package")
        other = [k for k, v in self.identity.items() if header.get(k) != v]
        if other and not alone and not self._replace:
            raise RunError(
                f"{self.path} is the {self.kind} of other work: {', '.join(other)} differ. Choose "
                "another --out, or delete it"
            )
        return not other
