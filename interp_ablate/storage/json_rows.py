"""Rows of JSON: one object a line, or one list of objects, read as a stream.

Knows: line and entry numbers, and what is wrong with a row. Does not know: files, or what a row says.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from interp_ablate.errors import InterpAblateError

BOM = codecs.BOM_UTF8
_CHUNK = 1 << 20  # characters that a .json list is read by
LONGEST = 1 << 26  # bytes of a line, characters of an entry of a list: more is taken for a mistake


class RowFileError(InterpAblateError):
    """Rows that cannot be read, understood or written."""


class FileRow(NamedTuple):
    """One object of a file."""

    number: int
    """Its line, entry or row in the file, from 1."""
    values: dict[str, Any]
    line: bytes | None = None
    """Its own bytes, if it comes from JSON and is unchanged."""


class RawLine(NamedTuple):
    """A line that is to be one object, not yet read."""

    number: int
    """Its line in the file, from 1."""
    line: bytes
    end: int = 0
    """Bytes of the file (decompressed) up to its end."""

    def read(self) -> FileRow:
        """The row in the line.

        Raises:
            ValueError: what is wrong with it, as a message to a person.
        """
        return FileRow(self.number, _values(self.line), self.line)


@dataclass(frozen=True)
class MalformedRow:
    """A row that cannot be used."""

    number: int
    why: str
    line: bytes
    """The bytes that stand there."""


OnMalformed = Callable[[MalformedRow], None]
"""Called with every row that cannot be used."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the key {again!r} is there twice in one object: readers differ in which one they take; "
            "remove one"
        )
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _values(line: bytes) -> dict[str, Any]:
    """The object in one line.

    Raises:
        ValueError: what is wrong with the line, as a message to a person.
    """
    try:
        values = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{line[error.start]:02x} at {error.start + 1} is not UTF-8: save the file as UTF-8, "
            "for example with iconv -f latin1 -t utf-8"
        ) from error
    except json.JSONDecodeError as error:
        cut = "" if line.endswith((b"}", b"\n")) else " (the file ends inside it: was it cut off?)"
        raise ValueError(
            f"this is not JSON ({error.msg} at character {error.pos + 1}): {_shown(line)}; each line is one "
            f"object{cut}"
        ) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object: {_shown(line)}")
    return values


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Text:
    """The characters of a JSON list, a part at a time."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.lines, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on, at least as much as the buffer holds, so that a long entry is not scanned over and over."""
        if self.ended:
            return False
        self.lines += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        if len(self.buffer) > LONGEST:
            raise self.fault(f"one entry is longer than {LONGEST} characters: a quote is missing")
        data = self.stream.read(max(_CHUNK, len(self.buffer)))
        self.ended = not data
        try:
            self.buffer += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise RowFileError(
                f"{self.path}: byte 0x{error.object[error.start]:02x} is not UTF-8 "
                f"(some lines after line {self.lines}): save the file as UTF-8"
            ) from error
        return True

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self.more():
                return ""

    def place(self, position: int | None = None) -> str:
        """The file and the line of a position in the buffer, by default of the next character."""
        line = self.lines + self.buffer.count("\n", 0, self.at if position is None else position)
        return f"{self.path}, line {line}"

    def fault(self, why: str) -> RowFileError:
        return RowFileError(f"{self.place()}: {why}")

    def entry(self) -> tuple[Any, str]:
        """The value that starts here, and its text."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                open_ended = "Unterminated" in error.msg or error.pos >= len(self.buffer) - 16
                if open_ended and self.more():
                    continue
                cut = "; the file ends in the middle of an entry" if open_ended else ""
                raise RowFileError(
                    f"{self.place(error.pos)} is not JSON ({error.msg}){cut}"
                ) from error
            except RecursionError as error:
                raise self.fault("nested too deeply") from error
            except ValueError as error:  # a key twice, a number of thousands of digits
                raise self.fault(str(error)) from error
            if end == len(self.buffer) and not isinstance(value, (dict, list, str)) and self.more():
                continue  # a number may go on
            text, self.at = self.buffer[self.at : end], end
            return value, text


def json_lines(stream: BinaryIO, path: Path, malformed: OnMalformed) -> Iterator[FileRow]:
    """One object a line. A blank line is no row; a byte order mark is skipped.

    Raises:
        RowFileError: UTF-16, or a line longer than LONGEST.
    """
    for raw in raw_lines(stream, path):
        try:
            row = raw.read()
        except ValueError as error:
            malformed(MalformedRow(raw.number, str(error), raw.line))
            continue
        yield row


def raw_lines(stream: BinaryIO, path: Path, *, number: int = 0, at: int = 0) -> Iterator[RawLine]:
    """The lines that `json_lines` reads.

    Args:
        number: lines that were read before, up to byte `at`, where the stream stands.

    Raises:
        RowFileError: as `json_lines`.
    """
    while line := stream.readline(LONGEST + 1):
        number, at = number + 1, at + len(line)
        if len(line) > LONGEST:
            raise RowFileError(
                f"{path}, line {number} is longer than {LONGEST} bytes: line breaks are missing, or this is "
                "no file of rows"
            )
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise RowFileError(f"{path} is UTF-16: save it as UTF-8")
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            yield RawLine(number, line, at)


def json_list(stream: BinaryIO, path: Path, malformed: OnMalformed) -> Iterator[FileRow]:
    """The objects of one list, each as soon as it is read.

    Raises:
        RowFileError: something else than a list, or a list that breaks off.
    """
    text = _Text(path, stream)
    if text.peek() != "[":
        if not text.buffer:
            return
        raise text.fault(
            "this is not an array, and so not a list of objects (one object a line is .jsonl)"
        )
    text.at += 1
    number, following = 0, text.peek()
    if following == "]":
        text.at += 1
    while following != "]":
        number += 1
        values, source = text.entry()
        line = source.encode(errors="surrogatepass")
        if isinstance(values, dict):
            yield FileRow(number, values, line)
        else:
            why = f"a JSON {type(values).__name__}, not an object: {_shown(line)}"
            malformed(MalformedRow(number, why, line))
        following = text.peek()
        if following not in (",", "]"):
            what = repr(following) if following else "the end of the file"
            raise text.fault(f"{what} after entry {number}, where , or ] belongs")
        text.at += 1
    if text.peek():
        raise text.fault("something follows the list")
