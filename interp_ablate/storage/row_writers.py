"""Writing rows in the format of the file that they came from.

Knows: formats and compression, unchanged rows byte for byte. Does not know: what a row says.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.json_rows import RowFileError
from interp_ablate.storage.row_files import BATCH, Format, RowFile, load_dataset_folder

WriteRow = Callable[[dict[str, Any], "bytes | None"], None]
"""Takes a row's values, and its own bytes where it is unchanged."""


def as_json(values: dict[str, Any], like: bytes | None = None) -> bytes:
    """A row as JSON text; with \\u escapes where `like`, the row it was made of, is plain ASCII.

    What JSON has no form for (a table's times, decimals, bytes) is written as Python shows it.
    """
    plain = like is not None and like.isascii()
    text = json.dumps(values, ensure_ascii=plain, default=str)
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
        schema = pyarrow.parquet.read_schema(file.path)
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
