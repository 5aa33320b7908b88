"""Prompt files: the formats a contrast set is read from, and the place of every row in them.

Knows: text, JSONL, JSON, CSV, TSV and parquet files, folders, Hugging Face datasets and the bundled
sets; which column holds the prompts, which the labels.
Does not know: what a prompt or a usable set is (`prompts` does): each row goes to the caller's
`build(place, text, system)`. Imports the standard library alone until a format needs more.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interp_ablate.errors import PromptError
from interp_ablate.storage.bundled_data import bundled

logger = logging.getLogger(__name__)


PROMPT_COLUMNS = (
    "prompt", "text", "instruction", "question", "request", "query", "input", "sentence", "content",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "target", "side")
SYSTEM_COLUMNS = ("system", "system_prompt")
_LABELS = {
    **dict.fromkeys(("positive", "pos", "1", "1.0", "true"), True),
    **dict.fromkeys(("negative", "neg", "0", "0.0", "false"), False),
}


# A row and where it came from ("file.jsonl, line 3").
_Row = tuple[str, dict[str, Any]]
T = TypeVar("T")
# Makes whatever the caller wants from a row's place, text and own system text (None: it has none;
# else as the file has it, whatever its type).
Build = Callable[[str, str, Any], T]
Sides = tuple[list[T], list[T]]


def read_spec(
    spec: str | Path, build: Build[T], *, column: str | None = None, split: str | None = None
) -> tuple[str, str, Sides[T]]:
    """Name, source and both sides of what one `spec` stands for (see `ContrastSet.load`).

    Raises:
        PromptError: nothing there, or something that cannot be read as two sides.
    """
    text = str(spec)
    if text.startswith("hf:"):
        return text[3:], text, _labelled(_hub_rows(text, split), text, build, column)
    _refuse_split(text, split)
    if isinstance(spec, str) and text in bundled_names():
        file = bundled("contrast_sets", f"{text}.jsonl")
        rows = _jsonl_rows(_decode(file.read_bytes(), f"{text}.jsonl"), f"{text}.jsonl")
        return text, f"bundled:{text}", _labelled(rows, text, build, column)
    path = Path(spec)
    if os.path.isdir(path):
        files = (_side_file(path, "positive"), _side_file(path, "negative"))
        positive, negative = (read_side(file, build, column=column) for file in files)
        return path.resolve().name, text, (positive, negative)
    if not os.path.isfile(path):
        raise PromptError(_nothing_there(text))
    if path.suffix.lower() not in _READERS:
        raise PromptError(
            f"cannot read both sides from {path}: one file for both sides is "
            f"{', '.join(_READERS)} with a label column; text files come in two, "
            "positive=FILE and negative=FILE (--positive FILE --negative FILE)"
        )
    return path.stem, text, _labelled(_file_rows(path), text, build, column)


def read_side(
    spec: str | Path, build: Build[T], *, column: str | None = None, split: str | None = None
) -> list[T]:
    """Every prompt of one file or dataset, whatever its labels.

    Raises:
        PromptError: nothing there, or something that cannot be read.
    """
    text = str(spec)
    if text.startswith("hf:"):
        rows = _hub_rows(text, split)
    else:
        _refuse_split(text, split)
        path = Path(spec)
        if not os.path.isfile(path):
            folder = (
                f"{path} is a folder; " if os.path.isdir(path) else f"there is no file {path}; "
            )
            raise PromptError(
                f"{folder}one side is a text file with a prompt a line, a "
                f"{', '.join(_READERS)} file with a prompt column, or hf:owner/name"
            )
        if path.suffix.lower() in _TEXT_SUFFIXES:
            return [build(str(path), line, None) for line in _text_lines(path)]
        rows = _file_rows(path)
    chosen = _column(rows, text, column, PROMPT_COLUMNS)
    return [_built(row, chosen, build) for row in rows]


def bundled_names() -> tuple[str, ...]:
    """The contrast sets that come with the package."""
    return tuple(sorted(path.stem for path in bundled("contrast_sets").glob("*.jsonl")))


def _refuse_split(text: str, split: str | None) -> None:
    if split is not None:
        raise PromptError(
            f"split={split!r} was given for {text}: only Hugging Face datasets have "
            "splits; leave it out, or write hf:owner/name"
        )


def _side_file(folder: Path, side: str) -> Path:
    accepted = (".txt", *_READERS)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise PromptError(f"cannot list {folder}: {error.strerror}; check permissions") from error
    files = [f for f in entries if f.stem == side and f.suffix.lower() in accepted]
    if len(files) != 1:
        there = ", ".join(f.name for f in entries[:12]) or "nothing"
        raise PromptError(
            f"{folder} has {len(files)} files for the {side} side (it holds {there}): a folder "
            f"needs exactly one {side}.* and one of the other side, with {', '.join(accepted)}"
        )
    return files[0]


def _nothing_there(text: str) -> str:
    names = bundled_names()
    close = difflib.get_close_matches(text.lower(), names, n=2, cutoff=0.5)
    message = f"there is no file, folder or bundled set {text!r}: "
    if close:
        message += f"did you mean {' or '.join(close)}? "
    message += f"Bundled are {', '.join(names)}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        message += f"; for a dataset of the Hugging Face hub write hf:{text}"
    return message


def stem(spec: str | Path) -> str:
    return str(spec)[3:] if str(spec).startswith("hf:") else Path(spec).stem


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as "
            f"UTF-8, for example with iconv -f latin1 -t utf-8"
        ) from error
    if "\x00" in text:
        raise PromptError(f"{where} holds NUL bytes (binary, or UTF-16): save it as UTF-8 text")
    return text


def _text_lines(path: Path) -> list[str]:
    # Not str.splitlines, which also splits at characters that occur inside a prompt (U+2028, \f).
    lines = re.split(r"\r\n|\n|\r", _decode(_bytes(path), str(path)))
    kept = [line.strip() for line in lines if line.strip()]
    prompts = [line for line in kept if line != "#" and not line.startswith("# ")]
    if len(prompts) < len(kept):
        logger.info("%s: skipped %d comment lines", path, len(kept) - len(prompts))
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one prompt a line")
    return prompts


def _jsonl_rows(text: str, where: str) -> list[_Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{place} is not JSON ({error.msg} at character {error.pos + 1}): {line[:60]!r}; "
                "each line is one JSON object"
            ) from error
        rows.append((place, _object(value, place)))
    return rows


def _json_rows(text: str, where: str) -> list[_Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}, line {error.lineno} is not JSON ({error.msg}): the file is one JSON array "
            "of objects; one object a line is called .jsonl"
        ) from error
    if not isinstance(values, list):
        raise PromptError(f"{where} holds a JSON {type(values).__name__}, not an array of objects")
    places = (f"{where}, entry {number}" for number in range(1, len(values) + 1))
    return [(place, _object(value, place)) for place, value in zip(places, values, strict=True)]


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PromptError(
            f"{place} holds {json.dumps(value)[:60]}, not an object: write "
            '{"prompt": "...", "label": "positive"}'
        )
    return value


def _csv_rows(text: str, where: str) -> list[_Row]:
    delimiter = "\t" if where.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[_Row] = []
    header: list[str] = []
    try:
        for cells in reader:
            place = f"{where}, line {reader.line_num}"
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                raise PromptError(
                    f"{place} has {len(cells)} fields where the header has {len(header)} "
                    f"({', '.join(header)}): put prompts that hold a comma in double quotes"
                )
            else:
                rows.append((place, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise PromptError(f"{where}, line {reader.line_num} is not CSV: {error}") from error
    if header and not rows:
        raise PromptError(
            f"{where} has a header ({', '.join(header)}) and no row: add prompts, one a row"
        )
    return rows


def _parquet_rows(path: Path) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise PromptError(f"cannot read {path} as parquet: {error}") from error
    return [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist(), start=1)]


def _from_text(parse: Callable[[str, str], list[_Row]]) -> Callable[[Path], list[_Row]]:
    return lambda path: parse(_decode(_bytes(path), str(path)), str(path))


_TEXT_SUFFIXES = ("", ".txt", ".text")
_READERS: dict[str, Callable[[Path], list[_Row]]] = {
    ".jsonl": _from_text(_jsonl_rows),
    ".json": _from_text(_json_rows),
    ".csv": _from_text(_csv_rows),
    ".tsv": _from_text(_csv_rows),
    ".parquet": _parquet_rows,
}


def _file_rows(path: Path) -> list[_Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(
            f"cannot read {path}: known are .txt (a prompt a line) and {', '.join(_READERS)}"
        )
    return reader(path)


def _hub_rows(text: str, split: str | None) -> list[_Row]:
    """The rows of `hf:owner/name` or `hf:owner/name:configuration`."""
    import datasets

    name, _, configuration = text[3:].partition(":")
    if not name:
        raise PromptError(f"{text!r} names no dataset: write hf:owner/name")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # datasets, hub, http and builder errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise PromptError(
            f"cannot load the dataset {name!r} from the Hugging Face hub "
            f"({type(error).__name__}: {reason}): check the "
            "name, the connection and HF_HUB_OFFLINE, or give a local file"
        ) from error
    splits = list(found)
    chosen = split or (splits[0] if len(splits) == 1 else "train")
    if chosen not in splits:
        raise PromptError(
            f"{text} has no split {chosen!r}: it has {', '.join(splits)}; pass split="
        )
    table = found[chosen]
    names = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
        and {name.casefold() for name in feature.names} <= set(_LABELS)
    }
    rows = []
    for number, row in enumerate(table, start=1):
        # -1 stands for "no label" and stays as it is: it is then refused.
        named = {c: names[c][row[c]] for c in names if row[c] is not None and row[c] >= 0}
        rows.append((f"{text} ({chosen}), row {number}", {**row, **named}))
    return rows


# --------------------------------------------------------------------------------- rows to prompts


def _columns(rows: Sequence[_Row]) -> list[str]:
    return list(dict.fromkeys(key for _, row in rows for key in row))


def _column(rows: Sequence[_Row], where: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    """The prompt column: the wanted one, or the first usual one that there is."""
    there = _columns(rows)
    if not rows:
        raise PromptError(f"{where} holds no prompt: a contrast needs prompts on both sides")
    found = [c for c in ((wanted,) if wanted is not None else usual) if c in there]
    if not found:
        missing = f"column {wanted!r}" if wanted is not None else f"column {', '.join(usual)}"
        raise PromptError(
            f"{where} has no {missing}: its columns are {', '.join(there) or 'none'}; "
            "name the one with the prompts by column="
        )
    return found[0]


def _labelled(rows: list[_Row], where: str, build: Build[T], wanted: str | None) -> Sides[T]:
    """Both sides of rows with a label column, or with the columns `positive` and `negative`."""
    there = _columns(rows)
    labels = [column for column in LABEL_COLUMNS if column in there]
    if rows and not labels and {"positive", "negative"} <= set(there) and wanted is None:
        return (
            [_built(row, "positive", build) for row in rows],
            [_built(row, "negative", build) for row in rows],
        )
    column = _column(rows, where, wanted, PROMPT_COLUMNS)
    if not labels:
        raise PromptError(
            f"{where} has no label column ({', '.join(LABEL_COLUMNS)}): its columns are "
            f"{', '.join(there)}; add one with positive / negative, or give one source for "
            "each side with positive= and negative="
        )
    sides: Sides[T] = ([], [])
    for row in rows:
        sides[0 if _label(row, labels[0]) else 1].append(_built(row, column, build))
    if not sides[0] or not sides[1]:
        raise PromptError(
            f"{where} is one-sided: column {labels[0]!r} labels {len(sides[0])} prompts positive "
            f"and {len(sides[1])} negative; a contrast needs both"
        )
    return sides


def _label(row: _Row, column: str) -> bool:
    place, values = row
    label = _LABELS.get(str(values.get(column)).strip().casefold())
    if label is None:
        raise PromptError(
            f"{place}: label {values.get(column)!r} in column {column!r}: accepted are positive, "
            "pos, 1, true and negative, neg, 0, false"
        )
    return label


def _built(row: _Row, column: str, build: Build[T]) -> T:
    place, values = row
    text = values.get(column)
    if not isinstance(text, str) or not text.strip():
        came = "an empty prompt" if column in values else f"no {column!r}"
        if text is not None and not isinstance(text, str):
            came = f"{type(text).__name__} {str(text)[:40]!r} as the prompt"
        raise PromptError(
            f"{place}: {came} (it has {', '.join(map(str, values))}): every row needs some text in "
            f"{column!r}; mend or remove the row"
        )
    own = next((values[c] for c in SYSTEM_COLUMNS if values.get(c) not in (None, "")), None)
    return build(place, text, own)
