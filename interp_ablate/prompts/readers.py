"""Prompt files: text files, tables, folders, Hugging Face datasets and the bundled sets, read as two sides.

Knows: which column holds the prompts, and which the labels. Does not know: what a usable set is.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import PromptError
from interp_ablate.jobs.bars import quiet_libraries, waiting
from interp_ablate.prompts.messages import is_chat, message_of
from interp_ablate.prompts.prompt import Prompt, as_prompt
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.incoming_files import parse_json
from interp_ablate.storage.json_rows import MalformedRow, RowFileError
from interp_ablate.storage.row_files import (
    COMPRESSIONS,
    SUFFIXES,
    Format,
    RowFile,
    compression_of,
    load_dataset_folder,
)

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = (
    "prompt", "text", "instruction", "question", "request", "query", "input", "sentence", "content",
    *CHAT_COLUMNS,
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "target", "side")
SYSTEM_COLUMNS = ("system", "system_prompt")
_LABELS = {
    **dict.fromkeys(("positive", "pos", "1", "1.0", "true"), True),
    **dict.fromkeys(("negative", "neg", "0", "0.0", "false"), False),
}

_SIDES = ("positive", "negative")
_TEXT_SUFFIXES = ("", ".txt", ".text")
_TABLES: dict[str, Format] = {".csv": "csv", ".tsv": "csv"}
_FORMATS = (*SUFFIXES, *_TABLES)

# A row and where it came from ("file.jsonl, line 3").
_Row = tuple[str, dict[str, Any]]
Sides = tuple[list[Prompt], list[Prompt]]


@dataclass(frozen=True)
class Reading:
    """How prompt files are read."""

    column: str | None = None
    """The prompt column; by default the first there is of PROMPT_COLUMNS."""
    split: str | None = None
    """Of an `hf:` dataset; by default the only one, or `train`."""
    system: str | None = None
    """For every prompt without its own system prompt."""
    comments: bool = False
    """Lines of text files that begin with `# `, or are `#`, are comments and no prompts."""


AS_THEY_ARE = Reading()


def read_spec(spec: str | Path, how: Reading = AS_THEY_ARE) -> tuple[str, str, Sides]:
    """Read the name, the source and both sides of a contrast set from one `spec` (see `ContrastSet.load`).

    Raises:
        PromptError: nothing there, or something that cannot be read as two sides.
    """
    text = str(spec)
    if text.startswith("hf:"):
        return text[3:], text, _labelled(_hub_rows(text, how.split), text, how)
    _refuse_split(text, how.split)
    if isinstance(spec, str) and text in bundled_names():
        rows = _file_rows(bundled("contrast_sets", f"{text}.jsonl"))
        return text, f"bundled:{text}", _labelled(rows, text, how)
    path = Path(spec)
    if os.path.isdir(path) and not _is_dataset(path):
        files = (_side_file(path, "positive"), _side_file(path, "negative"))
        positive, negative = (read_side(file, how) for file in files)
        return path.resolve().name, text, (positive, negative)
    if not os.path.exists(path):
        raise PromptError(_nothing_there(text))
    if os.path.isfile(path) and _suffix(path) not in _FORMATS:
        raise PromptError(
            f"cannot read both sides from {path}: one file for both sides is "
            f"{', '.join(_FORMATS)} with a label column; text files come in two, "
            "positive=FILE and negative=FILE (--positive FILE --negative FILE)"
        )
    return _stem(path), text, _labelled(_file_rows(path), text, how)


def read_side(spec: str | Path, how: Reading = AS_THEY_ARE) -> list[Prompt]:
    """Read every prompt of one file or dataset, whatever its labels.

    Raises:
        PromptError: nothing there, or something that cannot be read.
    """
    text = str(spec)
    if text.startswith("hf:"):
        rows = _hub_rows(text, how.split)
    else:
        _refuse_split(text, how.split)
        path = Path(spec)
        if not (os.path.isfile(path) or _is_dataset(path)):
            folder = (
                f"{path} is a folder; " if os.path.isdir(path) else f"there is no file {path}; "
            )
            raise PromptError(
                f"{folder}one side is a text file with a prompt a line, a "
                f"{', '.join(_FORMATS)} file with a prompt column (each also as .gz or .zst), a folder "
                "written by datasets' save_to_disk, or hf:owner/name"
            )
        if os.path.isfile(path) and _suffix(path) in _TEXT_SUFFIXES:
            place = str(path)
            return [_prompt(place, line, None, how) for line in _text_lines(path, how.comments)]
        rows = _file_rows(path)
    column = _column(rows, text, how.column, PROMPT_COLUMNS)
    return [prompt for row in rows for prompt in _prompts(row, column, how)]


def is_one_side(path: Path) -> bool:
    """True for a text file, or a table without labels: a list of prompts and no contrast set.

    Raises:
        PromptError: a table that cannot be read.
    """
    if not os.path.isfile(path) and not _is_dataset(path):
        return False
    if os.path.isfile(path) and _suffix(path) in _TEXT_SUFFIXES:
        return True
    columns = set(_columns(_file_rows(path)))
    return not columns & set(LABEL_COLUMNS) and not set(_SIDES) <= columns


def bundled_names() -> tuple[str, ...]:
    """The contrast sets that come with the package."""
    return tuple(sorted(path.stem for path in bundled("contrast_sets").glob("*.jsonl")))


def _refuse_split(text: str, split: str | None) -> None:
    if split is not None:
        raise PromptError(
            f"split={split!r} was given for {text}: only Hugging Face datasets have "
            "splits; leave it out, or write hf:owner/name"
        )


def _inner(path: Path) -> Path:
    """The path without the ending of a compression."""
    return Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path


def _suffix(path: Path) -> str:
    return _inner(path).suffix.lower()


def _stem(path: Path) -> str:
    return _inner(path).stem


def _is_dataset(path: Path) -> bool:
    """True for a folder that `datasets` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _side_file(folder: Path, side: str) -> Path:
    accepted = (".txt", *_FORMATS)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise PromptError(f"cannot list {folder}: {error.strerror}; check permissions") from error
    files = [
        entry
        for entry in entries
        if _stem(entry) == side and (_suffix(entry) in accepted or _is_dataset(entry))
    ]
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
    """The name of a file or dataset, for the set that is made of it."""
    return str(spec)[3:] if str(spec).startswith("hf:") else _stem(Path(spec))


def _text_lines(path: Path, comments: bool) -> list[str]:
    try:
        text = RowFile(path, "jsonl", compression_of(path)).text()
    except RowFileError as error:
        raise PromptError(str(error)) from error
    # Not str.splitlines, which also splits at characters that occur inside a prompt (U+2028, \f).
    prompts = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if comments:
        prompts = [line for line in prompts if line != "#" and not line.startswith("# ")]
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one prompt a line")
    return prompts


def _file_rows(path: Path) -> list[_Row]:
    """The rows of a file; a bare text among them is a row with a `text`."""
    rows: list[_Row] = []

    def bare_text(row: MalformedRow) -> None:
        try:
            value = parse_json(row.line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise RowFileError(f"{file.place(row.number)}: {row.why}")
        rows.append((file.place(row.number), {"text": value}))

    try:
        if os.path.isdir(path):
            return _table_rows(load_dataset_folder(RowFile(path, "folder")), str(path))
        whole = _two_lists(path)
        if whole is not None:
            return [(str(path), whole)]
        file = RowFile.at(path, tables=_TABLES)
        for row in file.rows(bare_text, required=False):
            rows.append((file.place(row.number), row.values))
    except RowFileError as error:
        raise PromptError(str(error)) from error
    return rows


def _two_lists(path: Path) -> dict[str, Any] | None:
    """The one object of a .json file that holds both sides as lists."""
    if path.suffix.lower() != ".json":
        return None
    try:
        value = parse_json(RowFile(path, "json").text())
    except (ValueError, RecursionError, RowFileError):
        return None  # read as rows, which names the line
    lists = isinstance(value, dict) and all(isinstance(value.get(side), list) for side in _SIDES)
    return value if lists else None


def _hub_rows(text: str, split: str | None) -> list[_Row]:
    """The rows of `hf:owner/name` or `hf:owner/name:configuration`."""
    import datasets

    name, _, configuration = text[3:].partition(":")
    if not name:
        raise PromptError(f"{text!r} names no dataset: write hf:owner/name")
    try:
        with quiet_libraries(), waiting("download"):
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
    return _table_rows(dataset[chosen], f"{text} ({chosen})")


def _table_rows(table: Any, where: str) -> list[_Row]:
    """The rows of a table of `datasets`; labels that it names go by their names."""
    import datasets

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
        rows.append((f"{where}, row {number}", {**row, **named}))
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


def _labelled(rows: list[_Row], where: str, how: Reading) -> Sides:
    """Both sides of rows with a label column, or with the columns `positive` and `negative`."""
    columns = _columns(rows)
    labels = [column for column in LABEL_COLUMNS if column in columns]
    sides: Sides = ([], [])
    if rows and not labels and set(_SIDES) <= set(columns) and how.column is None:
        for row in rows:
            for side, column in zip(sides, _SIDES):
                side += _prompts(row, column, how)
        return sides
    column = _column(rows, where, how.column, PROMPT_COLUMNS)
    if not labels:
        raise PromptError(
            f"{where} has no label column ({', '.join(LABEL_COLUMNS)}): its columns are "
            f"{', '.join(columns)}; add one with positive / negative, or give one source for "
            "each side with positive= and negative="
        )
    for row in rows:
        sides[0 if _label(row, labels[0]) else 1].extend(_prompts(row, column, how))
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


def _prompts(row: _Row, column: str, how: Reading) -> list[Prompt]:
    """The prompt in a row's column, or those of a list there.

    Of a chat the answer at its end is left out, as it is no part of the prompt.
    """
    place, values = row
    value = values.get(column)
    several = isinstance(value, list) and column in _SIDES and not is_chat(value)
    own = next((values[c] for c in SYSTEM_COLUMNS if values.get(c) not in (None, "")), None)
    prompts = []
    for each in value if several else [value]:  # type: ignore[union-attr]
        if not (is_chat(each) or (isinstance(each, str) and each.strip())):
            came = "an empty prompt" if column in values else f"no {column!r}"
            if each is not None and not isinstance(each, str):
                came = f"{type(each).__name__} {str(each)[:40]!r} as the prompt"
            raise PromptError(
                f"{place}: {came} (it has {', '.join(map(str, values))}): every row needs some text, or "
                f"a chat, in {column!r}; mend or remove the row"
            )
        prompts.append(_prompt(place, each, own, how))
    return prompts


def _prompt(place: str, value: Any, own: Any, how: Reading) -> Prompt:
    """A prompt of a text or a chat, with the row's own system prompt or the one for all."""
    try:
        if is_chat(value):
            chat = [message_of(entry, f"message {i}") for i, entry in enumerate(value, 1)]
            while chat and chat[-1].role == "assistant":
                chat.pop()
            value = [message.as_dict for message in chat]
        return as_prompt(value, how.system if own is None else own)
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error
