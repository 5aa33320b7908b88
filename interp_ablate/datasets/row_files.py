"""Chat files: rows in and out of JSONL, JSON, parquet and `datasets` folders, as a stream.

Knows: encodings, compression, line and entry numbers, malformed rows, a file's fingerprint, writing rows
back in the form they came. Does not know: what a row says (`chat_data`). Standard library alone until a
format needs more.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from interp_ablate.errors import InterpAblateError
from interp_ablate.storage.atomic_files import atomic_path, hash_file

Format = Literal["jsonl", "json", "parquet", "folder"]
Compression = Literal["", ".gz", ".zst"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS: tuple[Compression, ...] = (".gz", ".zst")
UNITS: dict[Format, str] = {"jsonl": "line", "json": "entry", "parquet": "row", "folder": "row"}
ACCEPTED = (
    "a .jsonl file (one object a line), a .json file (one list of objects), either also as .gz or .zst, "
    "a .parquet file, or a folder written by datasets' save_to_disk"
)
_CHUNK = 1 << 20  # characters that a .json list is read by
_LARGEST = 1 << 28  # characters of one entry of a .json list: more is taken for a missing quote
_ROWS = 1024  # rows of a parquet batch


class ChatError(InterpAblateError):
    """Chat data that cannot be read, understood or written."""


@dataclass(frozen=True)
class FileRow:
    """One object of a file: its number there (from 1), its values, and its own bytes, if it is JSON."""

    number: int
    values: dict[str, Any]
    line: bytes | None = None


@dataclass(frozen=True)
class Malformed:
    """A row that cannot be used: where, why, and what there was."""

    number: int
    why: str
    line: bytes


# Called with every row that cannot be used; without one, the first such row is an error.
OnMalformed = Callable[[Malformed], None]


@dataclass(frozen=True)
class ChatFile:
    """A file or folder of rows, known by its name and first bytes; `at` makes one."""

    path: Path
    format: Format
    compression: Compression = ""

    @classmethod
    def at(cls, path: str | Path) -> ChatFile:
        """What is there.

        A .json file that starts with an object is read as JSON lines, as many published sets are so named.

        Raises:
            ChatError: nothing there, a suffix that is not known, an unreadable or empty file.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, "folder")
        if not path.is_file():
            raise ChatError(f"there is no file or folder {path}: chat data is {ACCEPTED}")
        compression: Compression = next((c for c in COMPRESSIONS if path.suffix.lower() == c), "")
        inner = Path(path.stem) if compression else path
        format = SUFFIXES.get(inner.suffix.lower())
        if format is None or (compression and format == "parquet"):
            raise ChatError(f"cannot read {path} by its name: chat data is {ACCEPTED}")
        if path.stat().st_size == 0:
            raise ChatError(f"{path} is empty: chat data needs at least one row")
        if format == "json" and _first_byte(cls(path, format, compression)) == b"{":
            format = "jsonl"
        return cls(path, format, compression)

    @property
    def suffix(self) -> str:
        """The suffix of a file that `writing` writes: a `datasets` folder is written as parquet."""
        if self.format in ("parquet", "folder"):
            return ".parquet"
        inner = Path(self.path.stem) if self.compression else self.path
        return (".jsonl" if self.format == "jsonl" else inner.suffix) + self.compression

    def place(self, number: int) -> str:
        """Where a row is, for a message."""
        return f"{self.path}, {UNITS[self.format]} {number}"

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes as they are on disk (of a folder: of its files in name order)."""
        found = hashlib.sha256()
        paths = [self.path]
        if self.format == "folder":
            paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        try:
            for path in paths:
                if self.format == "folder":
                    name = path.relative_to(self.path).as_posix().encode()
                    found.update(b"%d:%s:%d:" % (len(name), name, path.stat().st_size))
                hash_file(found, path)
        except OSError as error:
            raise self._unreadable(error) from error
        return found.hexdigest()

    def rows(self, malformed: OnMalformed | None = None) -> Iterator[FileRow]:
        """Every row in order; one is in memory at a time (of parquet, one batch).

        A blank line is no row; a byte order mark is skipped.

        Raises:
            ChatError: without `malformed`, the first row that is not one JSON object in UTF-8 with keys
                that occur once; with it or not, what leaves no next row to go on with (a JSON list that
                breaks off, a damaged archive or parquet file), and a file without any row.
        """
        empty = True
        for row in _READERS[self.format](self, malformed or self._raise):
            empty = False
            yield row
        if empty and malformed is None:
            raise ChatError(f"{self.path} holds no row: chat data needs at least one")

    @contextmanager
    def writing(self, path: str | Path) -> Iterator[Callable[[dict[str, Any], bytes | None], None]]:
        """A function that writes a row (values, and its own bytes where it is unchanged) to `path`.

        The file has this one's format and is there when the block ends well, whole, or not at all.

        Raises:
            ChatError: the place cannot be written, the disk is full, values that do not fit the schema.
        """
        try:
            with (
                atomic_path(Path(path)) as temporary,
                _WRITERS[self.format](self, temporary) as write,
            ):
                yield write
        except OSError as error:
            raise ChatError(
                f"cannot write {path}: {error.strerror or error}. Free space or choose another place"
            ) from error

    def _raise(self, fault: Malformed) -> None:
        raise ChatError(f"{self.place(fault.number)}: {fault.why}")

    def _unreadable(self, error: Exception) -> ChatError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        return ChatError(f"cannot read {self.path}: {why}; is it complete, and not damaged?")


# ---- JSON ------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKey(
            f"the key {again!r} is there twice in one object: readers differ in which one they take; "
            "remove one"
        )
    return found


class _RepeatedKey(ValueError):
    pass


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_BOM = codecs.BOM_UTF8


def _first_byte(file: ChatFile) -> bytes:
    with _binary(file) as stream:
        return stream.read(4096).removeprefix(_BOM).lstrip()[:1]


@contextmanager
def _binary(file: ChatFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read."""
    with ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(open(file.path, "rb"))
            if file.compression == ".gz":
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            elif file.compression == ".zst":
                import io

                import pyarrow

                raw = stack.enter_context(pyarrow.CompressedInputStream(stream, "zstd"))
                stream = io.BufferedReader(raw, _CHUNK)
            yield stream
        except (OSError, EOFError, zlib.error) as error:
            raise file._unreadable(error) from error


def _jsonl_rows(file: ChatFile, malformed: OnMalformed) -> Iterator[FileRow]:
    with _binary(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ChatError(f"{file.path} is UTF-16: save it as UTF-8")
                line = line.removeprefix(_BOM)
            if not line or line.isspace():
                continue
            try:
                values = _values(line)
            except ValueError as error:
                malformed(Malformed(number, str(error), line))
                continue
            yield FileRow(number, values, line)


def _values(line: bytes) -> dict[str, Any]:
    """One line's object.

    Raises:
        ValueError: a sentence that says what is wrong with it.
    """
    try:
        found = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{line[error.start]:02x} at {error.start + 1} is not UTF-8: save the file as UTF-8, "
            "for example with iconv -f latin1 -t utf-8"
        ) from error
    except json.JSONDecodeError as error:
        cut = "" if line.endswith((b"}", b"\n")) else " (the file ends inside it: was it cut off?)"
        raise ValueError(
            f"not JSON ({error.msg} at character {error.pos + 1}): {_shown(line)}; each line is one "
            f"object{cut}"
        ) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, not an object: {_shown(line)}")
    return found


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Text:
    """The characters of a JSON list, a part at a time."""

    def __init__(self, file: ChatFile, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.lines, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on; at least as much as there is, so that a long entry is not scanned over and over."""
        if self.ended:
            return False
        self.lines += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :], 0
        if len(self.buffer) > _LARGEST:
            raise self.fault(f"one entry is longer than {_LARGEST} characters: a quote is missing")
        data = self.stream.read(max(_CHUNK, len(self.buffer)))
        self.ended = not data
        try:
            self.buffer += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise ChatError(
                f"{self.file.path}: byte 0x{error.object[error.start]:02x} is not UTF-8 "
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

    def fault(self, why: str, position: int | None = None) -> ChatError:
        line = self.lines + self.buffer.count("\n", 0, self.at if position is None else position)
        return ChatError(f"{self.file.path}, line {line}: {why}")

    def entry(self) -> tuple[Any, str]:
        """The value that starts here, and its text."""
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                open_ended = "Unterminated" in error.msg or error.pos >= len(self.buffer) - 16
                if open_ended and self.more():
                    continue
                cut = "; the file ends in the middle of an entry" if open_ended else ""
                raise self.fault(f"not JSON ({error.msg}){cut}", error.pos) from error
            except _RepeatedKey as error:
                raise self.fault(str(error)) from error
            except RecursionError as error:
                raise self.fault("nested too deeply") from error
            if end == len(self.buffer) and not isinstance(found, (dict, list, str)) and self.more():
                continue  # a number may go on
            text, self.at = self.buffer[self.at : end], end
            return found, text


def _json_rows(file: ChatFile, malformed: OnMalformed) -> Iterator[FileRow]:
    with _binary(file) as stream:
        text = _Text(file, stream)
        if text.peek() != "[":
            raise text.fault("the file is not a list of objects (one object a line is .jsonl)")
        text.at += 1
        number = 0
        if text.peek() == "]":
            text.at += 1
        else:
            while True:
                number += 1
                values, source = text.entry()
                line = source.encode(errors="surrogatepass")
                if isinstance(values, dict):
                    yield FileRow(number, values, line)
                else:
                    why = f"a JSON {type(values).__name__}, not an object: {_shown(line)}"
                    malformed(Malformed(number, why, line))
                following = text.peek()
                if following not in (",", "]"):
                    what = repr(following) if following else "the end of the file"
                    raise text.fault(f"{what} after entry {number}, where , or ] belongs")
                text.at += 1
                if following == "]":
                    break
        if text.peek():
            raise text.fault("something follows the list")


# ---- tables ----------------------------------------------------------------------------------------


def _parquet_rows(file: ChatFile, malformed: OnMalformed) -> Iterator[FileRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield FileRow(number, values)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise file._unreadable(error) from error


def _dataset(file: ChatFile) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(file.path))
    except (OSError, ValueError) as error:
        raise ChatError(
            f"{file.path} is a folder, but not one of datasets: give {ACCEPTED}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        raise ChatError(
            f"{file.path} holds the splits {', '.join(found)}: give one of them, such as "
            f"{file.path / next(iter(found), 'train')}"
        )
    return found


def _folder_rows(file: ChatFile, malformed: OnMalformed) -> Iterator[FileRow]:
    for number, values in enumerate(_dataset(file), 1):
        yield FileRow(number, values)


# ---- out -------------------------------------------------------------------------------------------

Write = Callable[[dict[str, Any], "bytes | None"], None]


def as_json(values: dict[str, Any], like: bytes | None = None) -> bytes:
    """A row as JSON text; with \\u escapes where `like`, the row it was made of, is plain ASCII.

    What JSON has no form for (a table's times, decimals, bytes) is written as Python shows it.
    """
    plain = like is not None and like.isascii()
    text = json.dumps(values, ensure_ascii=plain, default=str)
    return text.encode(errors="surrogatepass")


@contextmanager
def _binary_out(file: ChatFile, path: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        stream: Any = stack.enter_context(open(path, "wb"))
        if file.compression == ".gz":  # without a time, so that the same rows give the same bytes
            stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=stream, mtime=0))
        elif file.compression == ".zst":
            import pyarrow

            stream = stack.enter_context(pyarrow.CompressedOutputStream(stream, "zstd"))
        yield stream


@contextmanager
def _jsonl_out(file: ChatFile, path: Path) -> Iterator[Write]:
    with _binary_out(file, path) as stream:
        ended = True

        def write(values: dict[str, Any], line: bytes | None) -> None:
            nonlocal ended
            if not ended:  # the last line of a file need not end, but here something follows it
                stream.write(b"\n")
            line = as_json(values) + b"\n" if line is None else line
            stream.write(line)
            ended = line.endswith(b"\n")

        yield write


@contextmanager
def _json_out(file: ChatFile, path: Path) -> Iterator[Write]:
    with _binary_out(file, path) as stream:
        between = b"[\n"

        def write(values: dict[str, Any], line: bytes | None) -> None:
            nonlocal between
            stream.write(between + (as_json(values) if line is None else line.strip()))
            between = b",\n"

        yield write
        stream.write(b"\n]\n" if between == b",\n" else b"[]\n")


@contextmanager
def _parquet_out(file: ChatFile, path: Path) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    if file.format == "parquet":
        schema = pyarrow.parquet.read_schema(file.path)
    else:
        schema = _dataset(file).features.arrow_schema
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as table:

        def flush() -> None:
            try:
                table.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            except pyarrow.ArrowException as error:
                raise ChatError(
                    f"rows that do not fit the columns of {file.path}: {error}"
                ) from error
            rows.clear()

        def write(values: dict[str, Any], line: bytes | None) -> None:
            rows.append(values)
            if len(rows) >= _ROWS:
                flush()

        yield write
        flush()


_READERS: dict[Format, Callable[[ChatFile, OnMalformed], Iterator[FileRow]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "parquet": _parquet_rows,
    "folder": _folder_rows,
}
_WRITERS: dict[Format, Any] = {
    "jsonl": _jsonl_out,
    "json": _json_out,
    "parquet": _parquet_out,
    "folder": _parquet_out,
}
