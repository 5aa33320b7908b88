"""The files of a filter's result: whole or not there at all; of JSON lines, parts that a later run goes on with.

Knows: parts of files and how far they are certain. Does not know: what is written, or why.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from interp_ablate.errors import RunError
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.row_files import RowFile, as_json, writing_rows

WHY, MALFORMED = "why.jsonl", "malformed.jsonl"


Row = tuple[dict[str, Any], "bytes | None"]
"""A row's values, and its own bytes where it is unchanged."""


class Outputs(Protocol):
    """Files that are being written."""

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        """Rows for a file of rows."""
        ...

    def line(self, name: str, data: bytes) -> None:
        """A line for WHY or MALFORMED."""
        ...


@contextmanager
def atomic_outputs(out: Path, source: RowFile, names: list[str]) -> Iterator[Outputs]:
    """Files in the format of `source`, each there when the block ends well."""
    with ExitStack() as stack:
        rows = {name: stack.enter_context(writing_rows(out / name, source)) for name in names}
        lines = {
            WHY: stack.enter_context(_Bytes(out / WHY)),
            MALFORMED: stack.enter_context(_Bytes(out / MALFORMED, always=False)),
        }
        yield _Atomic(rows, lines)


class _Atomic:
    def __init__(self, writers: Mapping[str, Any], lines: Mapping[str, _Bytes]) -> None:
        self.writers, self.lines = writers, lines

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        for values, line in rows:
            self.writers[name](values, line)

    def line(self, name: str, data: bytes) -> None:
        self.lines[name].write(data)


class PartialOutputs:
    """Files of JSON lines that grow under hidden names, and outlive a kill.

    After an error nothing is left of them; after an interrupt or a kill they wait for the next run.

    Args:
        sizes: bytes of each that are certain, of an earlier run; what lies behind is cut off.
    """

    def __init__(self, out: Path, names: list[str], sizes: Mapping[str, int]) -> None:
        self.out, self.names = out, [*names, WHY, MALFORMED]
        self.sizes = sizes
        self.files: dict[str, Any] = {}

    def __enter__(self) -> PartialOutputs:
        try:
            for name in self.names:
                file = self.files[name] = open(part_of(self.out, name), "ab", buffering=1 << 20)
                file.truncate(self.sizes.get(name, 0))
        except OSError as error:
            raise self._cannot(name, error) from error
        return self

    def rows(self, name: str, rows: Iterable[Row]) -> None:
        lines = (as_json(values) + b"\n" if line is None else line for values, line in rows)
        self.line(name, b"".join(lines))

    def line(self, name: str, data: bytes) -> None:
        try:
            self.files[name].write(data)
        except OSError as error:
            raise self._cannot(name, error) from error

    def secure(self) -> dict[str, int]:
        """Put on disk what was written; the bytes of each file."""
        try:
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot(str(file.name), error) from error
        return {name: file.tell() for name, file in self.files.items()}

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Give the files their names, or remove them."""
        name = ""
        try:
            for name in self.files:
                self.files[name].close()
            for name in self.files if kind is None else ():
                part = part_of(self.out, name)
                if name == MALFORMED and part.stat().st_size == 0:
                    part.unlink()
                    (self.out / name).unlink(missing_ok=True)  # an earlier run's
                else:
                    os.replace(part, self.out / name)
        except OSError as failure:
            kind = kind or OSError
            raise self._cannot(name, failure) from failure
        finally:
            if kind is not None and issubclass(kind, Exception):
                for name in self.names:
                    part_of(self.out, name).unlink(missing_ok=True)

    def _cannot(self, name: str, error: OSError) -> RunError:
        return RunError(f"cannot write {self.out / name}: {error.strerror}. Free space")


def part_of(out: Path, name: str) -> Path:
    """The place of a file that is not whole yet."""
    return out / f".{name}.part"


class _Bytes:
    """A file that is written as the run goes, whole or not at all; `always=False`: only if anything is."""

    def __init__(self, path: Path, *, always: bool = True) -> None:
        self.path, self.always = path, always
        self.stack = ExitStack()
        self.file: Any = None

    def __enter__(self) -> _Bytes:
        if self.always:
            self.write(b"")
        return self

    def write(self, data: bytes) -> None:
        try:
            if self.file is None:
                place = self.stack.enter_context(atomic_path(self.path))
                self.file = self.stack.enter_context(open(place, "wb"))  # noqa: SIM115  (the stack closes)
            self.file.write(data)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}. Free space") from error

    def __exit__(self, *error: Any) -> None:
        try:
            self.stack.__exit__(*error)
        except OSError as failure:
            raise RunError(f"cannot write {self.path}: {failure.strerror}. Free space") from failure
        if self.file is None and error[0] is None:
            self.path.unlink(missing_ok=True)  # an earlier run's
