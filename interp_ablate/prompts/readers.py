"""Prompt files: text files, tables, folders, Hugging Face datasets and the bundled sets, read as two sides.

Knows: which column holds the prompts, and which the labels. Does not know: what a usable prompt or set is.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from interp_ablate.errors import PromptError
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.json_rows import RowFileError
from interp_ablate.storage.row_files import Format, RowFile, decode_utf8

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

_TEXT_SUFFIXES = ("", ".txt", ".text")
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip

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
    """Read the name, the source and both sides of a contrast set from one `spec` (see `ContrastSet.load`).

    Raises:
        PromptError: nothing there, or something that cannot be read as two sides.
    """
    text = str(spec)
    if text.startswith("hf:"):
        return text[3:], text, _labelled(_hub_rows(text, split), text, build, column)
    _refuse_split(text, split)
    if isinstance(spec, str) and text in bundled_names():
        rows = _file_rows(bundled("contrast_sets", f"{text}.jsonl"))
        return text, f"bundled:{text}", _labelled(rows, text, build, column)
    path = Path(spec)
    if os.path.isdir(path):
        files = (_side_file(path, "positive"), _side_file(path, "negative"))
        positive, negative = (read_side(file, build, column=column) for file in files)
        return path.resolve().name, text, (positive, negative)
    if not os.path.isfile(path):
        raise PromptError(_nothing_there(text))
    if path.suffix.lower() not in _FORMATS:
        raise PromptError(
            f"cannot read both sides from {path}: one file for both sides is "
            f"{', '.join(_FORMATS)} with a label column; text files come in two, "
            "positive=FILE and negative=FILE (--positive FILE --negative FILE)"
        )
    return path.stem, text, _labelled(_file_rows(path), text, build, column)


def read_side(
    spec: str | Path, build: Build[T], *, column: str | None = None, split: str | None = None
) -> list[T]:
    """Read every prompt of one file or dataset, whatever its labels.

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
                f"{', '.join(_FORMATS)} file with a prompt column, or hf:owner/name"
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
    accepted = (".txt", *_FORMATS)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise PromptError(f"cannot list {folder}: {error.strerror}; check permissions") from error
    files = [f for f in entries if f.stem == side and f.suffix.lower() in accepted]
    if len(files) != 1:
        listing = ", ".join(f.name for f in entries[:12]) or "nothing"
        raise PromptError(
            f"{folder} has {len(files)} files for the {side} side (it holds {listing}): a folder "
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


def _text_lines(path: Path) -> list[str]:
    try:
        text = decode_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except RowFileError as error:
        raise PromptError(str(error)) from error
    # Not str.splitlines, which also splits at characters that occur inside a prompt (U+2028, \f).
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    prompts = [line for line in lines if line != "#" and not line.startswith("# ")]
    if len(prompts) < len(lines):
        logger.info("%s: skipped %d comment lines", path, len(lines) - len(prompts))
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one prompt a line")
    return prompts


def _file_rows(path: Path) -> list[_Row]:
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        raise PromptError(
            f"cannot read {path}: known are .txt (a prompt a line) and {', '.join(_FORMATS)}"
        )
    file = RowFile(path, format)
    try:
        return [(file.place(row.number), row.values) for row in file.rows(required=False)]
    except RowFileError as error:
        raise PromptError(str(error)) from error


def _hub_rows(text: str, split: str | None) -> list[_Row]:
    """The rows of `hf:owner/name` or `hf:owner/name:configuration`."""
    import datasets

    name, _, configuration = text[3:].partition(":")
    if not name:
        raise PromptError(f"{text!r} names no dataset: write hf:owner/name")
    try:
        dataset = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # datasets, hub, http and builder errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise PromptError(
            f"cannot load the dataset {name!r} from the Hugging Face hub "
            f"({type(error).__name__}: {reason}): check the "
            "name, the connection and HF_HUB_OFFLINE, or give a local file"
        ) from error
    splits = list(dataset)
    chosen = split or (splits[0] if len(splits) == 1 else "train")
    if chosen not in splits:
        raise PromptError(
            f"{text} has no split {chosen!r}: it has {', '.join(splits)}; pass split="
        )
    table = dataset[chosen]
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


def _columns(rows: Sequence[_Row]) -> list[str]:
    return list(dict.fromkeys(key for _, row in rows for key in row))


def _column(rows: Sequence[_Row], where: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    """The prompt column: the wanted one, or the first usual one that there is."""
    columns = _columns(rows)
    if not rows:
        raise PromptError(f"{where} holds no prompt: a contrast needs prompts on both sides")
    usable = [c for c in ((wanted,) if wanted is not None else usual) if c in columns]
    if not usable:
        missing = f"column {wanted!r}" if wanted is not None else f"column {', '.join(usual)}"
        raise PromptError(
            f"{where} has no {missing}: its columns are {', '.join(columns) or 'none'}; "
            "name the one with the prompts by column="
        )
    return usable[0]


def _labelled(rows: list[_Row], where: str, build: Build[T], wanted: str | None) -> Sides[T]:
    """Both sides of rows with a label column, or with the columns `positive` and `negative`."""
    columns = _columns(rows)
    labels = [column for column in LABEL_COLUMNS if column in columns]
    if rows and not labels and {"positive", "negative"} <= set(columns) and wanted is None:
        return (
            [_built(row, "positive", build) for row in rows],
            [_built(row, "negative", build) for row in rows],
        )
    column = _column(rows, where, wanted, PROMPT_COLUMNS)
    if not labels:
        raise PromptError(
            f"{where} has no label column ({', '.join(LABEL_COLUMNS)}): its columns are "
            f"{', '.join(columns)}; add one with positive / negative, or give one source for "
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
