"""Files of rows: JSON lines, JSON lists, CSV, parquet and folders of `datasets`, read and written as a stream.

Knows: formats, compression, the place of every row, a file's fingerprint, unchanged rows byte for byte.
Does not know: what a row says.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from interp_ablate.storage.atomic_files import atomic_path, hash_file
from interp_ablate.storage.json_rows import (
    BOM,
    FileRow,
    MalformedRow,
    OnMalformed,
    RawLine,
    RowFileError,
    json_lines,
    json_list,
    raw_lines,
)
from interp_ablate.storage.strict_json import json_text

Format = Literal["jsonl", "json", "csv", "parquet", "folder"]
Compression = Literal["", ".gz", ".zst"]

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSIONS: tuple[Compression, ...] = (".gz", ".zst")
UNITS: dict[Format, str] = {
    "jsonl": "line", "json": "entry", "csv": "line", "parquet": "row", "folder": "row",
}  # fmt: skip
ACCEPTED = (
    "a .jsonl file (one object a line), a .json file (one list of objects), either also as .gz or .zst, "
    "a .parquet file, or a folder written by datasets' save_to_disk"
)
BATCH = 1024  # rows of a parquet batch
_BUFFER = 1 << 20  # bytes
_DELIMITERS = ",;\t"
_LONGEST_CELL = 1 << 30  # characters
_LONGEST_FILE = 1 << 28  # bytes of a file that is read whole, decompressed


def decode_utf8(data: bytes, where: str) -> str:
    """The text of a file's bytes, without a byte order mark.

    Raises:
        RowFileError: bytes that are not UTF-8, with their line; NUL bytes.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowFileError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as "
            f"UTF-8, for example with iconv -f latin1 -t utf-8"
        ) from error
    if "\x00" in text:
        raise RowFileError(f"{where} holds NUL bytes (binary, or UTF-16): save it as UTF-8 text")
    return text


def compression_of(path: Path) -> Compression:
    """The compression that a file's name ends in."""
    return next((c for c in COMPRESSIONS if path.suffix.lower() == c), "")


@dataclass(frozen=True)
class RowFile:
    """A file or folder of rows. `at` finds the format by the name and the first bytes."""

    path: Path
    format: Format
    compression: Compression = ""

    @classmethod
    def at(cls, path: str | Path, tables: Mapping[str, Format] = {}) -> RowFile:
        """Open a file by its suffix and first bytes, or a folder.

        A .json file that starts with an object is read as JSON lines, as many published sets are so named.

        Args:
            tables: further suffixes that the caller reads.

        Raises:
            RowFileError: nothing there, a suffix that is not known, an unreadable or empty file.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, "folder")
        if not path.is_file():
            raise RowFileError(f"there is no file or folder {path}: give {ACCEPTED}")
        compression = compression_of(path)
        inner = Path(path.stem) if compression else path
        format = {**SUFFIXES, **tables}.get(inner.suffix.lower())
        if format is None or (compression and format == "parquet"):
            raise RowFileError(f"cannot read {path} by its name: give {ACCEPTED}")
        if path.stat().st_size == 0:
            raise RowFileError(f"{path} is empty: at least one row is needed")
        if format == "json" and _first_byte(cls(path, format, compression)) == b"{":
            format = "jsonl"
        return cls(path, format, compression)

    def text(self) -> str:
        """The whole file as text, decompressed.

        Raises:
            RowFileError: it cannot be read, or is not UTF-8.
        """
        with _binary(self) as stream:
            data = stream.read(_LONGEST_FILE + 1)
        if len(data) > _LONGEST_FILE:
            raise RowFileError(
                f"{self.path} holds more than {_LONGEST_FILE} bytes, which only .jsonl and .parquet files may: "
                "they are read row by row"
            )
        return decode_utf8(data, str(self.path))

    @property
    def suffix(self) -> str:
        """The suffix of a file in the same format: a `datasets` folder is written as parquet."""
        if self.format in ("parquet", "folder"):
            return ".parquet"
        inner = Path(self.path.stem) if self.compression else self.path
        return (".jsonl" if self.format == "jsonl" else inner.suffix) + self.compression

    def place(self, number: int) -> str:
        """The place of a row, as messages name it."""
        return f"{self.path}, {UNITS[self.format]} {number}"

    def fingerprint(self) -> str:
        """SHA-256 of the bytes on disk; for a folder, of its files in the order of their names."""
        digest = hashlib.sha256()
        paths = [self.path]
        if self.format == "folder":
            paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        try:
            for path in paths:
                if self.format == "folder":
                    name = path.relative_to(self.path).as_posix().encode()
                    digest.update(b"%d:%s:%d:" % (len(name), name, path.stat().st_size))
                hash_file(digest, path)
        except OSError as error:
            raise self.unreadable(error) from error
        return digest.hexdigest()

    def rows(
        self, malformed: OnMalformed | None = None, *, required: bool = True
    ) -> Iterator[FileRow]:
        """Every row in order. One is in memory at a time, or one batch of a parquet file.

        A blank line is no row; a byte order mark is skipped.

        Args:
            malformed: is called with rows that cannot be used, which are then left out.
            required: a file without any row is an error (where `malformed` is not given).

        Raises:
            RowFileError: without `malformed`, the first row that is not one JSON object in UTF-8 with keys
                that occur once; with it or not, what leaves no next row to go on with (a JSON list that
                breaks off, a damaged archive or parquet file), and a file without any row.
        """
        empty = True
        for row in _READERS[self.format](self, malformed or self._raise):
            empty = False
            yield row
        if empty and required and malformed is None:
            raise RowFileError(f"{self.path} holds no row: at least one is needed")

    def unread(self, number: int = 0, at: int = 0) -> Iterator[RawLine | FileRow | MalformedRow]:
        """The rows in order: those of JSON lines as lines that are not read yet, others as `rows` gives them.

        Args:
            number: lines to leave out, which end at byte `at`; of JSON lines that are not compressed.

        Raises:
            RowFileError: what leaves no next row to go on with.
        """
        if self.format == "jsonl":
            with _binary(self) as stream:
                if at:
                    stream.seek(at)
                yield from raw_lines(stream, self.path, number=number, at=at)
            return
        faults: list[MalformedRow] = []
        for row in self.rows(faults.append):
            yield from faults
            faults.clear()
            yield row
        yield from faults

    def _raise(self, fault: MalformedRow) -> None:
        raise RowFileError(f"{self.place(fault.number)}: {fault.why}")

    def unreadable(self, error: Exception) -> RowFileError:
        """The error that says that the file itself cannot be read."""
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        kind = " as parquet" if self.format == "parquet" else ""
        return RowFileError(
            f"cannot read {self.path}{kind}: {why}; is it complete, and not damaged?"
        )


def _first_byte(file: RowFile) -> bytes:
    with _binary(file) as stream:
        return stream.read(4096).removeprefix(BOM).lstrip()[:1]


@contextmanager
def _binary(file: RowFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read."""
    with ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(open(file.path, "rb"))
            if file.compression == ".gz":
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            elif file.compression == ".zst":
                import pyarrow

                raw = stack.enter_context(pyarrow.CompressedInputStream(stream, "zstd"))
                stream = io.BufferedReader(raw, _BUFFER)
            yield stream
        except (OSError, EOFError, zlib.error) as error:
            raise file.unreadable(error) from error


def _jsonl_rows(file: RowFile, malformed: OnMalformed) -> Iterator[FileRow]:
    with _binary(file) as stream:
        yield from json_lines(stream, file.path, malformed)


def _json_rows(file: RowFile, malformed: OnMalformed) -> Iterator[FileRow]:
    with _binary(file) as stream:
        yield from json_list(stream, file.path, malformed)


def _csv_rows(file: RowFile, malformed: OnMalformed) -> Iterator[FileRow]:
    """Rows under a header, between whose cells are commas, semicolons or tabs."""
    text = file.text()
    header_line = text.lstrip().partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    csv.field_size_limit(_LONGEST_CELL)  # Python's own limit is 131072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    empty = True
    try:
        for cells in reader:
            if cells and not header:
                header = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(header):
                raise RowFileError(
                    f"{file.place(reader.line_num)} has {len(cells)} fields where the header has "
                    f"{len(header)} ({', '.join(header)}): put texts that hold a comma in double quotes"
                )
            elif cells:
                empty = False
                yield FileRow(reader.line_num, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise RowFileError(f"{file.place(reader.line_num)} is not CSV: {error}") from error
    if header and empty:
        raise RowFileError(
            f"{file.path} has a header ({', '.join(header)}) and no row: add some, one a line"
        )


def _parquet_rows(file: RowFile, malformed: OnMalformed) -> Iterator[FileRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield FileRow(number, values)
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise file.unreadable(error) from error


def load_dataset_folder(file: RowFile) -> Any:
    """The table of a folder that `datasets` wrote.

    Raises:
        RowFileError: another folder, or one that holds several splits.
    """
    import datasets

    try:
        table = datasets.load_from_disk(str(file.path))
    except (OSError, ValueError) as error:
        raise RowFileError(
            f"{file.path} is a folder, but not one of datasets: give {ACCEPTED}"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        raise RowFileError(
            f"{file.path} holds the splits {', '.join(table)}: give one of them, such as "
            f"{file.path / next(iter(table), 'train')}"
        )
    return table


def _folder_rows(file: RowFile, malformed: OnMalformed) -> Iterator[FileRow]:
    import pyarrow

    try:
        for number, values in enumerate(load_dataset_folder(file), 1):
            yield FileRow(number, values)
    except (OSError, pyarrow.ArrowException) as error:
        raise file.unreadable(error) from error


_READERS: dict[Format, Callable[[RowFile, OnMalformed], Iterator[FileRow]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "folder": _folder_rows,
}


WriteRow = Callable[[dict[str, Any], "bytes | None"], None]
"""Takes a row's values, and its own bytes where it is unchanged."""


def as_json(values: dict[str, Any], like: bytes | None = None) -> bytes:
    """A row as JSON text; with \\u escapes where `like`, the row it was made of, is plain ASCII.

    What JSON has no form for (a table's times, decimals, bytes) is written as Python shows it, NaN as null.
    """
    plain = like is not None and like.isascii()
    text = json_text(values, ensure_ascii=plain, default=str)
    return text.encode(errors="surrogatepass")


@contextmanager
def _binary_out(file: RowFile, path: Path) -> Iterator[Any]:
    with ExitStack() as stack:
        stream: Any = stack.enter_context(open(path, "wb"))
        if file.compression == ".gz":  # without a time, so that the same rows give the same bytes
            stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=stream, mtime=0))
        elif file.compression == ".zst":
            import pyarrow

            stream = stack.enter_context(pyarrow.CompressedOutputStream(stream, "zstd"))
        yield stream


@contextmanager
def _jsonl_out(file: RowFile, path: Path) -> Iterator[WriteRow]:
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
def _json_out(file: RowFile, path: Path) -> Iterator[WriteRow]:
    with _binary_out(file, path) as stream:
        between = b"[\n"

        def write(values: dict[str, Any], line: bytes | None) -> None:
            nonlocal between
            stream.write(between + (as_json(values) if line is None else line.strip()))
            between = b",\n"

        yield write
        stream.write(b"\n]\n" if between == b",\n" else b"[]\n")


@contextmanager
def _parquet_out(file: RowFile, path: Path) -> Iterator[WriteRow]:
    import pyarrow
    import pyarrow.parquet

    if file.format == "parquet":
        try:
            schema = pyarrow.parquet.read_schema(file.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise file.unreadable(error) from error
    else:
        schema = load_dataset_folder(file).features.arrow_schema
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as table:

        def flush() -> None:
            try:
                table.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            except pyarrow.ArrowException as error:
                raise RowFileError(
                    f"rows that do not fit the columns of {file.path}: {error}"
                ) from error
            rows.clear()

        def write(values: dict[str, Any], line: bytes | None) -> None:
            rows.append(values)
            if len(rows) >= BATCH:
                flush()

        yield write
        flush()


_WRITERS: dict[Format, Any] = {
    "jsonl": _jsonl_out,
    "json": _json_out,
    "parquet": _parquet_out,
    "folder": _parquet_out,
}


@contextmanager
def writing_rows(path: str | Path, like: RowFile) -> Iterator[WriteRow]:
    """A function that writes a row to `path`, in the format of the file `like`.

    The file is there when the block ends well, whole, or not at all.

    Raises:
        RowFileError: the place cannot be written, the disk is full, values that do not fit the schema.
    """
    try:
        with (
            atomic_path(Path(path)) as temporary,
            _WRITERS[like.format](like, temporary) as write,
        ):
            yield write
    except OSError as error:
        raise RowFileError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another place"
        ) from error
