"""Prompts: two sets that differ in one concept, read, checked, split once and rendered.

Knows: the file formats a contrast set is read from, what makes a set unusable, how it is split into
three parts that share nothing, which faults of a set a direction would pick up (`lint`), and how a
prompt becomes a model's input through a tokenizer's chat template.
Does not know: any model, activation or direction; nothing here imports torch or transformers, and
a tokenizer is whatever behaves like one of Hugging Face's. It does not print: findings are data.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import math
import os
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from interp_ablate.errors import PromptError

logger = logging.getLogger(__name__)

Severity = Literal["error", "warning", "info"]
# Anything with `chat_template`, `apply_chat_template` and `__call__(text, add_special_tokens=)`.
Tokenizer = Any

PROMPT_COLUMNS = (
    "prompt", "text", "instruction", "question", "request", "query", "input", "sentence", "content",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "target", "side")
SYSTEM_COLUMNS = ("system", "system_prompt")
_LABELS = {
    **dict.fromkeys(("positive", "pos", "1", "1.0", "true"), True),
    **dict.fromkeys(("negative", "neg", "0", "0.0", "false"), False),
}
_SHOWN = 3  # how many offending prompts a message quotes


# --------------------------------------------------------------------------------- the nouns


@dataclass(frozen=True)
class Prompt:
    """One instruction, and the system prompt that goes with it.

    `system=None` leaves the system turn to the chat template (which may insert its own default);
    `system=""` is an explicit, empty system turn.

    Raises:
        PromptError: the text is not a string, is blank, or cannot be encoded as UTF-8.
    """

    text: str
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.system, (str, type(None))):
            raise PromptError(
                f"a prompt is text with an optional system text, got {self.text!r} "
                f"({type(self.text).__name__}) and {self.system!r}: pass strings"
            )
        if not self.text.strip():
            raise PromptError("an empty prompt: every prompt needs some text; remove the blank one")
        try:
            f"{self.system}{self.text}".encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {_quote(self)} is not valid Unicode ({error.reason}): "
                "remove the lone surrogate, most often half of an emoji"
            ) from error


@dataclass(frozen=True)
class ContrastSet:
    """Two sets of prompts that differ in one concept; in `positive` the concept is present.

    `source` says where the prompts came from; `duplicates` are those that `load` dropped because
    their side already had them, kept so that `lint` can report them.

    Raises:
        PromptError: a side is empty, holds something else than prompts, or shares a prompt with the
            other side (compared without regard to case and white space, system prompt included).
    """

    name: str
    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    source: str
    duplicates: tuple[Prompt, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            prompts = tuple(getattr(self, side))
            wrong = [prompt for prompt in prompts if not isinstance(prompt, Prompt)]
            if wrong:
                raise PromptError(
                    f"{self.name}: the {side} side holds {type(wrong[0]).__name__} {wrong[0]!r}, "
                    "not prompts: wrap it in Prompt(...), or use ContrastSet.from_texts"
                )
            object.__setattr__(self, side, prompts)
        if not self.positive or not self.negative:
            raise PromptError(
                f"{self.name} ({self.source}): {len(self.positive)} positive and "
                f"{len(self.negative)} negative prompts: a contrast needs at least one of each"
            )
        others = {normalised(prompt) for prompt in self.negative}
        shared = _distinct(p for p in self.positive if normalised(p) in others)
        if shared:
            raise PromptError(
                f"{self.name} ({self.source}): {len(shared)} prompts are in both sets, such as "
                f"{_quote(*shared)}: a prompt either has the concept or not; remove it from one set"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the prompts of both sides in their order; name and source do not count."""
        sides = [[[p.text, p.system] for p in side] for side in (self.positive, self.negative)]
        return hashlib.sha256(json.dumps(sides, ensure_ascii=True).encode()).hexdigest()

    @classmethod
    def from_texts(
        cls,
        positive: Iterable[str],
        negative: Iterable[str],
        *,
        name: str = "texts",
        system: str | None = None,
        source: str = "memory",
    ) -> ContrastSet:
        """Two lists of strings as a contrast set, all with the same system prompt.

        Raises:
            PromptError: see `Prompt` and `ContrastSet`.
        """
        sides = [tuple(Prompt(text, system) for text in texts) for texts in (positive, negative)]
        return cls(name, sides[0], sides[1], source)

    @classmethod
    def load(
        cls,
        spec: str | Path | None = None,
        *,
        positive: str | Path | None = None,
        negative: str | Path | None = None,
        column: str | None = None,
        split: str | None = None,
        system: str | None = None,
        name: str | None = None,
    ) -> ContrastSet:
        """Read a contrast set.

        `spec` is one of: a bundled name (see `bundled_names`; to read a folder of that name write
        `./name`), a folder holding `positive.*` and `negative.*`, one .jsonl / .json / .csv / .tsv
        / .parquet file, or a Hugging Face dataset written `hf:owner/name` (or
        `hf:owner/name:configuration`). A single file or dataset has a prompt column (`column`, or
        the first there is of PROMPT_COLUMNS) and a label column (the first there is of
        LABEL_COLUMNS; positive, pos, 1, true / negative, neg, 0, false), or the two columns
        `positive` and `negative`, a matched pair a row. An optional column `system` (or
        `system_prompt`) gives prompts their own system prompts.

        Instead of `spec`, `positive` and `negative` each give one side: a file of one of those
        formats, a text file, or an `hf:` dataset, of which every row is taken. In text files each
        line is a prompt; blank lines and comments (`#` alone, or `# ` at the start of the line)
        are skipped, but `#include ...` is a prompt. `column` says nothing about text files.

        `split` is that of an `hf:` dataset (left out: the only one, or `train`). `system` is given
        to every prompt without its own. Prompts that their own side already had (normalised) are
        dropped with a logged warning.

        Raises:
            PromptError: nothing, or something unreadable, at the given place; a malformed line or
                row (named); a missing column; text that is not UTF-8; an unreachable hub; a set
                that `ContrastSet` refuses.
        """
        options = _Options(column=column, split=split, system=system)
        if spec is None and positive is not None and negative is not None:
            sides = (_read_side(positive, options), _read_side(negative, options))
            found = f"{_stem(positive)}-vs-{_stem(negative)}"
            source = f"{positive} | {negative}"
        elif spec is not None and positive is None and negative is None:
            found, source, sides = _read_spec(spec, options)
        else:
            given = {"spec": spec, "positive": positive, "negative": negative}
            came = [f"{key}={value}" for key, value in given.items() if value is not None]
            raise PromptError(
                f"got {' and '.join(came) or 'no contrast set'}: give either one contrast set (a "
                f"bundled name: {', '.join(bundled_names())}; a file, a folder, hf:owner/name), or "
                "both positive= and negative="
            )
        return _deduplicated(name or found, sides, source)

    def split(
        self, n_train: int = 64, n_validation: int = 32, n_test: int = 32, *, seed: int = 0
    ) -> Split:
        """Three parts without a common prompt; the numbers are prompts of each side.

        Prompts are ordered by a hash of the seed and their own normalised text: the same on every
        platform, whatever their order in the file. The test part is taken first, then validation,
        then train, so that other sizes of the later ones leave the test part as it is. Where both
        sides have the same length and no duplicates, prompt i of one is taken to match prompt i of
        the other, and the two stay in the same part; otherwise duplicates are dropped and each
        side is split alone.

        Raises:
            PromptError: a size below 1 (three sets are three), or more than a side has.
        """
        sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
        for key, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PromptError(
                    f"{key}={size!r}: the prompts that make a direction, select it and report it "
                    "are three different sets, each of at least 1 prompt a side"
                )
        positive, negative = _ordered(self, seed)
        available = min(len(positive), len(negative))
        if sum(sizes.values()) > available:
            raise PromptError(_too_few(self, len(positive), len(negative), sizes))
        parts, start = {}, 0
        for part, size in (("test", n_test), ("validation", n_validation), ("train", n_train)):
            chosen = slice(start, start + size)
            source = f"{self.source} [{part}, seed {seed}]"
            parts[part] = ContrastSet(self.name, positive[chosen], negative[chosen], source)
            start += size
        return Split(**parts)

    def shuffled_labels(self, seed: int = 0) -> ContrastSet:
        """The same prompts with labels that carry no information: a control for a direction.

        So many prompts change sides that both sides hold the same share of former positives: half
        of each where the sides are equally long (matched pairs then swap their two members).
        Duplicates are dropped first.

        Raises:
            PromptError: a side has fewer than two different prompts.
        """
        positive, negative = _ordered(self, f"shuffled labels {seed}")
        n_positive, n_negative = len(positive), len(negative)
        if min(n_positive, n_negative) < 2:
            raise PromptError(
                f"{self.name}: {n_positive} positive and {n_negative} negative prompts: shuffling "
                "labels needs at least 2 different prompts on each side"
            )
        n_swapped = round(n_positive * n_negative / (n_positive + n_negative))
        return ContrastSet(
            f"{self.name}-shuffled-{seed}",
            negative[:n_swapped] + positive[n_swapped:],
            positive[:n_swapped] + negative[n_swapped:],
            f"{self.source} [labels shuffled, seed {seed}]",
        )


@dataclass(frozen=True)
class Split:
    """The prompts that make a direction, those that select it, and those that report it."""

    train: ContrastSet
    validation: ContrastSet
    test: ContrastSet


def normalised(prompt: Prompt) -> str:
    """The key under which two prompts are the same: case, Unicode form and white space folded."""
    parts = (prompt.system or "", prompt.text)
    return "\x1f".join(
        " ".join(unicodedata.normalize("NFC", part).casefold().split()) for part in parts
    )


def bundled_names() -> tuple[str, ...]:
    """The contrast sets that come with the package."""
    files = resources.files("interp_ablate").joinpath("data").iterdir()
    return tuple(sorted(f.name.removesuffix(".jsonl") for f in files if f.name.endswith(".jsonl")))


def _quote(*prompts: Prompt) -> str:
    shown = [repr(p.text if len(p.text) <= 80 else p.text[:77] + "...") for p in prompts]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


def _distinct(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(normalised(prompt), prompt)
    return tuple(first.values())


def _repeated(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """What `_distinct` leaves out."""
    seen: set[str] = set()
    repeated = []
    for prompt in prompts:
        key = normalised(prompt)
        if key in seen:
            repeated.append(prompt)
        seen.add(key)
    return tuple(repeated)


def _ordered(
    contrast: ContrastSet, seed: int | str
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Both sides without duplicates in the order of the seed, pairs kept together (see `split`)."""

    def rank(*prompts: Prompt) -> str:
        key = "\x1e".join((str(seed), *map(normalised, prompts)))
        return hashlib.sha256(key.encode()).hexdigest()

    positive, negative = _distinct(contrast.positive), _distinct(contrast.negative)
    no_duplicates = (positive, negative) == (contrast.positive, contrast.negative)
    if no_duplicates and len(positive) == len(negative):
        pairs = sorted(zip(positive, negative, strict=True), key=lambda pair: rank(*pair))
        return tuple(p for p, _ in pairs), tuple(n for _, n in pairs)
    return tuple(sorted(positive, key=rank)), tuple(sorted(negative, key=rank))


def _too_few(contrast: ContrastSet, n_positive: int, n_negative: int, sizes: dict[str, int]) -> str:
    asked, available = sum(sizes.values()), min(n_positive, n_negative)
    sums = " + ".join(f"{key}={size}" for key, size in sizes.items())
    message = (
        f"{contrast.name}: {n_positive} positive and {n_negative} negative different prompts, but "
        f"{sums} asks for {asked} of each: "
    )
    if available < 3:
        return message + "three disjoint parts need at least 3 of each; add prompts"
    fit = {key: max(1, size * available // asked) for key, size in sizes.items()}
    while sum(fit.values()) > available:
        fit[max(fit, key=lambda key: fit[key])] -= 1
    return message + "pass " + ", ".join(f"{k}={v}" for k, v in fit.items()) + ", or add prompts"


def _deduplicated(
    name: str, sides: tuple[Sequence[Prompt], Sequence[Prompt]], source: str
) -> ContrastSet:
    dropped: list[Prompt] = []
    kept = []
    for label, side in zip(("positive", "negative"), sides, strict=True):
        repeated = _repeated(side)
        if repeated:
            logger.warning(
                "%s: dropped %d duplicates of %d %s prompts, such as %s",
                name, len(repeated), len(side), label, _quote(*repeated),
            )  # fmt: skip
        dropped += repeated
        kept.append(_distinct(side))
    return ContrastSet(name, kept[0], kept[1], source, tuple(dropped))


# --------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Options:
    column: str | None
    split: str | None
    system: str | None


# A row and where it came from ("file.jsonl, line 3").
_Row = tuple[str, dict[str, Any]]
_Sides = tuple[list[Prompt], list[Prompt]]


def _read_spec(spec: str | Path, options: _Options) -> tuple[str, str, _Sides]:
    """Name, source and both sides of what one `spec` stands for."""
    text = str(spec)
    if text.startswith("hf:"):
        return text[3:], text, _labelled(_hub_rows(text, options), text, options)
    _refuse_split(text, options)
    if isinstance(spec, str) and text in bundled_names():
        file = resources.files("interp_ablate").joinpath("data", f"{text}.jsonl")
        rows = _jsonl_rows(_decode(file.read_bytes(), f"{text}.jsonl"), f"{text}.jsonl")
        return text, f"bundled:{text}", _labelled(rows, text, options)
    path = Path(spec)
    if os.path.isdir(path):
        files = (_side_file(path, "positive"), _side_file(path, "negative"))
        sides = (_read_side(files[0], options), _read_side(files[1], options))
        return path.resolve().name, text, sides
    if not os.path.isfile(path):
        raise PromptError(_nothing_there(text))
    if path.suffix.lower() not in _READERS:
        raise PromptError(
            f"cannot read both sides from {path}: one file for both sides is "
            f"{', '.join(_READERS)} with a label column; text files come in two, "
            "positive=FILE and negative=FILE (--positive FILE --negative FILE)"
        )
    return path.stem, text, _labelled(_file_rows(path), text, options)


def _read_side(spec: str | Path, options: _Options) -> list[Prompt]:
    """Every prompt of one file or dataset, whatever its labels."""
    text = str(spec)
    if text.startswith("hf:"):
        rows = _hub_rows(text, options)
    else:
        _refuse_split(text, options)
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
            return _text_prompts(path, options)
        rows = _file_rows(path)
    column = _column(rows, text, options.column, PROMPT_COLUMNS)
    prompts = [_prompt(row, column, options) for row in rows]
    if not prompts:
        raise PromptError(f"{text} holds no prompt: a contrast needs prompts on both sides")
    return prompts


def _refuse_split(text: str, options: _Options) -> None:
    if options.split is not None:
        raise PromptError(
            f"split={options.split!r} was given for {text}: only Hugging Face datasets have "
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


def _stem(spec: str | Path) -> str:
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


def _text_prompts(path: Path, options: _Options) -> list[Prompt]:
    # Not str.splitlines, which also splits at characters that occur inside a prompt (U+2028, \f).
    lines = re.split(r"\r\n|\n|\r", _decode(_bytes(path), str(path)))
    kept = [line.strip() for line in lines if line.strip()]
    prompts = [line for line in kept if line != "#" and not line.startswith("# ")]
    if len(prompts) < len(kept):
        logger.info("%s: skipped %d comment lines", path, len(kept) - len(prompts))
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one prompt a line")
    return [Prompt(line, options.system) for line in prompts]


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


def _hub_rows(text: str, options: _Options) -> list[_Row]:
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
    chosen = options.split or (splits[0] if len(splits) == 1 else "train")
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


def _labelled(rows: list[_Row], where: str, options: _Options) -> _Sides:
    """Both sides of rows with a label column, or with the columns `positive` and `negative`."""
    there = _columns(rows)
    labels = [column for column in LABEL_COLUMNS if column in there]
    if rows and not labels and {"positive", "negative"} <= set(there) and options.column is None:
        return (
            [_prompt(row, "positive", options) for row in rows],
            [_prompt(row, "negative", options) for row in rows],
        )
    column = _column(rows, where, options.column, PROMPT_COLUMNS)
    if not labels:
        raise PromptError(
            f"{where} has no label column ({', '.join(LABEL_COLUMNS)}): its columns are "
            f"{', '.join(there)}; add one with positive / negative, or give one source for "
            "each side with positive= and negative="
        )
    sides: _Sides = ([], [])
    for row in rows:
        sides[0 if _label(row, labels[0]) else 1].append(_prompt(row, column, options))
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


def _prompt(row: _Row, column: str, options: _Options) -> Prompt:
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
    try:
        return Prompt(text, own if own is not None else options.system)
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error


# --------------------------------------------------------------------------------- lint


@dataclass(frozen=True)
class Finding:
    """One thing that `lint` has to say; `examples` are some of the prompts or words it is about."""

    kind: str
    severity: Severity
    message: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class LintReport:
    """What a direction made from this set might carry beside the concept.

    AUCs are the chance that a random positive prompt scores above a random negative one: 0.5 =
    tells nothing, 1 (or 0) = separates fully; NaN where there are too few prompts.
    `length_difference` is the difference of mean word counts, positive minus negative, over the
    pooled standard deviation.
    `lengths` is side -> words/characters -> mean/median/min/max; `telling_words` is side -> words.
    """

    name: str
    findings: tuple[Finding, ...]
    bag_of_words_auc: float
    length_auc: float
    length_difference: float
    lengths: dict[str, dict[str, dict[str, float]]]
    telling_words: dict[str, tuple[str, ...]]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: NaN becomes None."""
        plain = asdict(self)
        for key in ("bag_of_words_auc", "length_auc", "length_difference"):
            plain[key] = None if math.isnan(plain[key]) else plain[key]
        return plain


NEAR_DUPLICATE = 0.85  # Jaccard index of two prompts' word sets
# One character of a script written without spaces, or a word with its apostrophes.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:'[^\W{_CJK}]+)*")


def lint(contrast: ContrastSet) -> LintReport:
    """Faults of a contrast set that a direction made from it would pick up.

    Reports exact and near duplicates inside a side (Jaccard index of the word sets at least
    NEAR_DUPLICATE), leaks between the sides, length imbalance, and how well a bag of words alone
    separates the sides (five-fold cross-validated logistic regression; near duplicates and matched
    pairs stay in one fold). Prompts with different system prompts are not duplicates; lengths and
    bags of words include the system prompt.
    """
    prompts = contrast.positive + contrast.negative
    words = [_words(f"{prompt.system or ''}\n{prompt.text}") for prompt in prompts]
    labels = [True] * len(contrast.positive) + [False] * len(contrast.negative)
    near = _near_pairs(prompts)
    auc = _bag_of_words_auc(words, labels, _groups(contrast, near))
    telling = _telling_words(words, labels)
    n_words = [float(len(w)) for w in words]
    length_auc, difference = _auc(n_words, labels), _standardised_difference(n_words, labels)
    findings = [
        *_duplicate_findings(contrast, near),
        *_length_findings(contrast, length_auc, difference),
        *_word_findings(auc, telling),
        *_size_findings(contrast),
    ]
    findings.sort(key=lambda finding: ("error", "warning", "info").index(finding.severity))
    lengths = {
        "positive": _lengths(contrast.positive, words[: len(contrast.positive)]),
        "negative": _lengths(contrast.negative, words[len(contrast.positive) :]),
    }
    return LintReport(contrast.name, tuple(findings), auc, length_auc, difference, lengths, telling)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold().replace("’", "'"))


def _near_pairs(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Index pairs i < j of prompts that are nearly the same under the same system prompt."""
    import numpy as np
    from scipy.sparse import csr_matrix

    words = [_words(prompt.text) for prompt in prompts]
    vocabulary = {word: i for i, word in enumerate(sorted({w for ws in words for w in ws}))}
    columns = [vocabulary[word] for ws in words for word in sorted(set(ws))]
    sizes = np.array([len(set(ws)) for ws in words])
    rows = np.repeat(np.arange(len(words)), sizes)
    matrix = csr_matrix(
        (np.ones(len(columns)), (rows, columns)), shape=(len(words), max(1, len(vocabulary)))
    )
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(words), 512):  # a block of rows at a time: memory stays linear
        shared = (matrix[start : start + 512] @ matrix.T).toarray()
        union = sizes[start : start + 512, None] + sizes[None, :] - shared
        left, right = np.nonzero(shared >= NEAR_DUPLICATE * np.maximum(union, 1))
        found = ((start + int(i), int(j)) for i, j in zip(left, right, strict=True))
        pairs += [(i, j) for i, j in found if i < j and prompts[i].system == prompts[j].system]
    return pairs


def _matched(contrast: ContrastSet) -> bool:
    return len(contrast.positive) == len(contrast.negative)


def _groups(contrast: ContrastSet, near: Sequence[tuple[int, int]]) -> list[int]:
    """A group for each prompt: near duplicates, and prompts of a matched pair, share theirs."""
    n_positive = len(contrast.positive)
    parent = list(range(n_positive + len(contrast.negative)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    pairs = [(i, n_positive + i) for i in range(n_positive)] if _matched(contrast) else []
    for i, j in [*near, *pairs]:
        parent[root(i)] = root(j)
    return [root(i) for i in range(len(parent))]


def _bag_of_words_auc(
    words: Sequence[Sequence[str]], labels: Sequence[bool], groups: Sequence[int]
) -> float:
    """AUC of the pooled held-out scores; NaN where five-fold validation is not possible."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    y = np.array(labels)
    if min(y.sum(), (~y).sum()) < 5 or len(set(groups)) < 5 or not any(words):
        return math.nan
    scores = np.zeros(len(y))
    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(len(y)), y, groups):
        if len(test) == 0 or y[train].all() or not y[train].any():
            continue  # one group holds a whole side: nothing to learn from the rest
        seen = [words[i] for i in train]
        if not any(seen):
            continue
        vectorizer = CountVectorizer(analyzer=list)
        features = vectorizer.fit_transform(seen)
        model = LogisticRegression(max_iter=1000).fit(features, y[train])
        scores[test] = model.decision_function(vectorizer.transform([words[i] for i in test]))
    return _auc(scores.tolist(), labels)


def _telling_words(
    words: Sequence[Sequence[str]], labels: Sequence[bool], n: int = 8
) -> dict[str, tuple[str, ...]]:
    """The words that weigh most in a logistic regression on all prompts, for each side."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    if not any(words):
        return {"positive": (), "negative": ()}
    vectorizer = CountVectorizer(analyzer=list)
    features = vectorizer.fit_transform(words)
    weights = LogisticRegression(max_iter=1000).fit(features, labels).coef_[0]
    ranked = sorted(zip(weights.tolist(), vectorizer.get_feature_names_out(), strict=True))
    least = max(1e-6, 0.05 * float(abs(weights).max()))
    return {
        "positive": tuple(str(word) for weight, word in ranked[::-1][:n] if weight >= least),
        "negative": tuple(str(word) for weight, word in ranked[:n] if weight <= -least),
    }


def _auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _standardised_difference(values: Sequence[float], labels: Sequence[bool]) -> float:
    """Cohen's d: difference of means over the pooled standard deviation; NaN below 2 a side."""
    labelled = list(zip(values, labels, strict=True))
    sides = [[value for value, label in labelled if label is side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        return math.nan
    difference = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
    degrees = [len(side) - 1 for side in sides]
    pooled = math.sqrt(
        sum(k * statistics.variance(side) for k, side in zip(degrees, sides, strict=True))
        / sum(degrees)
    )
    if pooled:
        return difference / pooled
    return math.copysign(math.inf, difference) if difference else 0.0


def _lengths(
    prompts: Sequence[Prompt], words: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    def summary(values: Sequence[int]) -> dict[str, float]:
        return {
            "mean": float(statistics.fmean(values)),
            "median": float(statistics.median(values)),
            "min": float(min(values)),
            "max": float(max(values)),
        }

    characters = [len(prompt.system or "") + len(prompt.text) for prompt in prompts]
    return {"words": summary([len(w) for w in words]), "characters": summary(characters)}


def _duplicate_findings(contrast: ContrastSet, near: Sequence[tuple[int, int]]) -> list[Finding]:
    prompts = contrast.positive + contrast.negative
    n_positive = len(contrast.positive)
    findings = []
    repeated = _repeated(contrast.positive) + _repeated(contrast.negative) + contrast.duplicates
    if repeated:
        text = f"{len(repeated)} prompts repeat one of their own side; each counts once in a split"
        findings.append(Finding("duplicate", "warning", text, _examples(repeated)))
    kinds: dict[str, list[tuple[int, int]]] = {kind: [] for kind in _NEAR_KINDS}
    for i, j in near:
        if (i < n_positive) == (j < n_positive):
            if normalised(prompts[i]) != normalised(prompts[j]):
                kinds["near-duplicate"].append((i, j))
        elif _words(prompts[i].text) == _words(prompts[j].text):
            kinds["leak"].append((i, j))
        elif _matched(contrast) and j == n_positive + i:
            kinds["matched-pair"].append((i, j))
        else:
            kinds["near-leak"].append((i, j))
    for kind, pairs in kinds.items():
        severity, text = _NEAR_KINDS[kind]
        shown = tuple(f"{prompts[i].text} | {prompts[j].text}" for i, j in pairs[:5])
        if pairs:
            findings.append(Finding(kind, severity, f"{len(pairs)} {text}", shown))
    return findings


_NEAR_KINDS: dict[str, tuple[Severity, str]] = {
    "leak": ("error", "prompts are in both sets but for punctuation: remove them from one"),
    "near-leak": ("warning", "unmatched pairs across the sets are nearly the same: keep one"),
    "near-duplicate": ("warning", "pairs within a side are nearly the same: keep one of each"),
    "matched-pair": ("info", "matched pairs differ in a word or two, which is what pairs are for"),
}


def _examples(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.text for prompt in prompts[:5])


def _length_findings(contrast: ContrastSet, auc: float, difference: float) -> list[Finding]:
    if abs(auc - 0.5) < 0.15 and not abs(difference) >= 0.5:
        return []
    longer = "positive" if auc > 0.5 or difference > 0 else "negative"
    by_length = sorted(getattr(contrast, longer), key=lambda prompt: -len(prompt.text))
    text = (
        f"the {longer} prompts are longer (word count alone: AUC {auc:.2f}, difference "
        f"{difference:+.2f} standard deviations): a direction may carry length; match the lengths"
    )
    return [Finding("length", "warning", text, _examples(by_length)[:3])]


def _word_findings(auc: float, telling: dict[str, tuple[str, ...]]) -> list[Finding]:
    if math.isnan(auc):
        text = "too few different prompts to measure how well words alone separate the sets"
        return [Finding("bag-of-words", "info", text)]
    shown = tuple(f"{side}: {', '.join(words)}" for side, words in telling.items() if words)
    text = f"a bag of words alone separates the sets with AUC {auc:.2f}"
    if auc >= 0.9:
        text += ": a direction may carry these words rather than the concept; vary the wording"
        return [Finding("bag-of-words", "warning", text, shown)]
    return [Finding("bag-of-words", "info", text, shown)] if auc >= 0.7 else []


def _size_findings(contrast: ContrastSet) -> list[Finding]:
    n_positive, n_negative = len(_distinct(contrast.positive)), len(_distinct(contrast.negative))
    findings = []
    counts = f"{n_positive} positive and {n_negative} negative different prompts"
    if max(n_positive, n_negative) > 2 * min(n_positive, n_negative):
        findings.append(Finding("imbalance", "warning", f"{counts}: more than two to one"))
    if min(n_positive, n_negative) < 128:
        text = f"{counts}: the default split (64 + 32 + 32) needs 128 of each; pass smaller sizes"
        findings.append(Finding("size", "info", text))
    shares = [
        statistics.fmean(prompt.system is not None for prompt in side)
        for side in (contrast.positive, contrast.negative)
    ]
    if abs(shares[0] - shares[1]) > 0.1:
        text = (
            f"{shares[0]:.0%} of the positive and {shares[1]:.0%} of the negative prompts have a "
            "system prompt: a direction may carry its presence; give both sides one"
        )
        findings.append(Finding("system", "warning", text))
    return findings


# --------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Rendered:
    """A model's input as text; `templated` says that special tokens are already in it."""

    text: str
    templated: bool


def render(
    prompt: Prompt, tokenizer: Tokenizer, *, template: str | None = None, response: str = ""
) -> Rendered:
    """A prompt as the model's input, ready for the answer; `response` follows verbatim.

    `template` is None (the tokenizer's chat template, or raw text where it has none), "none" (raw
    text), or the Jinja text of a chat template. A template that refuses or drops the system role
    gets the system text at the start of the user turn, before a blank line; raw text likewise.

    Raises:
        PromptError: the template fails, or drops the prompt's text.
    """
    folded = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
    if template == "none" or (template is None and not getattr(tokenizer, "chat_template", None)):
        return Rendered(folded + response, templated=False)
    user = {"role": "user", "content": prompt.text}
    text: str | None = None
    if prompt.system is not None:
        messages = [{"role": "system", "content": prompt.system}, user]
        text, _ = _apply_template(messages, tokenizer, template)
        if text is not None and (prompt.system.strip() not in text or _lost(prompt, text)):
            text = None
    if text is None:
        text, reason = _apply_template([{"role": "user", "content": folded}], tokenizer, template)
        if text is None:
            raise PromptError(
                f"the chat template cannot render {_quote(prompt)}: {reason}; mend it, or pass "
                'template="none" for raw text'
            )
    if _lost(prompt, text):
        raise PromptError(
            f"the chat template dropped the prompt {_quote(prompt)} and gave {text[:60]!r}: it "
            'must be Jinja text that writes the content of `messages`; "none" stands for raw text'
        )
    return Rendered(text + response, templated=True)


def _lost(prompt: Prompt, text: str) -> bool:
    return prompt.text.strip() not in text


def _apply_template(
    messages: list[dict[str, str]], tokenizer: Tokenizer, template: str | None
) -> tuple[str | None, str]:
    """The rendered text, or None and the template's complaint."""
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        return None, f"{type(error).__name__}: {error}"
    return str(text), ""


def encode(
    prompt: Prompt, tokenizer: Tokenizer, *, template: str | None = None, response: str = ""
) -> list[int]:
    """Token ids of the rendered prompt, with one BOS at most and open at the end.

    Templated text holds its special tokens already and gets no others. Raw text gets those that
    the tokenizer puts in front; what it would append (an EOS, a SEP) is left out, because
    the answer is still to come.

    Raises:
        PromptError: see `render`; or nothing is left after tokenization.
    """
    rendered = render(prompt, tokenizer, template=template, response=response)
    plain = list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
    if not plain:
        raise PromptError(f"the tokenizer made no token of {_quote(prompt)}: remove the prompt")
    if rendered.templated:
        return plain
    ids = list(tokenizer(rendered.text, add_special_tokens=True)["input_ids"])
    starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
    start = next(starts, None)
    if start is not None:
        ids = ids[: start + len(plain)]
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


# Different in length, first and last characters, so that only the template is common to all.
_INSTRUCTIONS = ("Name a colour", "What is seven times eight?", "Hi!", "Write about rain.", "x = 1")


def suffix_length(
    tokenizer: Tokenizer, *, template: str | None = None, system: str | None = None
) -> int:
    """How many tokens follow the instruction in a rendered prompt, at least 1.

    Positions -1 .. -suffix_length are then the same tokens for every prompt, "after the
    instruction"; in raw text nothing follows, and position -1 is the prompt's own last token.

    Raises:
        PromptError: see `encode`.
    """
    encoded = [encode(Prompt(text, system), tokenizer, template=template) for text in _INSTRUCTIONS]
    length = 0
    while length < min(map(len, encoded)) and len({ids[-1 - length] for ids in encoded}) == 1:
        length += 1
    return max(1, length)
