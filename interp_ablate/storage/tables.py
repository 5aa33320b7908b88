"""Tables and JSON read back from a folder, with errors that name the line.

Knows: columns and rows. Does not know: what they mean.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.storage.incoming_files import (
    check_file,
    incoming_object,
    incoming_text,
    parse_json,
    shortened,
)
from interp_ablate.storage.json_shapes import LEFT_BEHIND, misfit

_AGAIN = "delete it and run the stage that wrote it again"
_WHOLE = ("layer", "trial")  # whole numbers of a table
_MAX_TABLE = 1 << 31  # bytes
MAX_LAYERS = 1000
"""No model has more of them, nor of heads in one; a figure has room for so many."""


def read_table(
    path: str | Path,
    columns: Sequence[str],
    *,
    numbers: Sequence[str] = (),
    complete: bool = False,
) -> pd.DataFrame:
    """A CSV of the run folder; `layer` and `trial` become integers where they are whole, the columns of `numbers` floats.

    With `complete`, a row without a finite value in one of `numbers` is corrupt.

    Raises:
        RunError: not a CSV, missing columns, or a value that is not a number: with its line.
    """
    path = Path(path)
    check_file(path, RunError, limit=_MAX_TABLE)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:  # ParserError and EmptyDataError are ValueErrors
        raise RunError(
            f"cannot read {path}: {str(error).strip()}. "
            "Delete it and run the stage that wrote it again"
        ) from error
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise RunError(
            f"{path} line 1 lacks the columns {', '.join(missing)}: expected {', '.join(columns)}; "
            "delete it and run the stage that wrote it again"
        )
    for name in [name for name in numbers if name in frame.columns]:
        text = frame[name].fillna("").str.strip()
        values = pd.to_numeric(text, errors="coerce").astype(float)
        absent = text.str.lower().isin(("", "nan", "none", "null"))
        needed = complete or name in _WHOLE
        bad = ~np.isfinite(values) if needed else values.isna() & ~absent
        if name == "layer":
            bad |= ~values.between(-1, MAX_LAYERS)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise corrupt_row(path, row, f"{name} is {shortened(text.iloc[row])!r}, no such number")
        whole = name in _WHOLE and (values % 1 == 0).all()  # a search draws between layers
        frame[name] = values.astype(int) if whole else values
    return frame


def corrupt_row(path: str | Path, row: int, fault: str) -> RunError:
    """An error naming the line of a CSV's data row (a quoted field may span lines)."""
    with open(path, newline="", encoding="utf-8") as stream:
        reader, seen, start = csv.reader(stream), -1, 1
        for record in reader:
            seen += bool(record)
            if seen == row + 1:
                break
            start = reader.line_num + 1
    return RunError(
        f"{path} is corrupt at line {start}: {fault}. "
        "Delete it and run the stage that wrote it again"
    )


def read_json(path: str | Path) -> dict[str, Any] | None:
    """A JSON object of the run folder; None where there is no such file.

    Raises:
        RunError: the file is not JSON, with its line, not an object, or one of another shape.
    """
    path = Path(path)
    return incoming_object(path, advice=_AGAIN) if os.path.lexists(path) else None


def read_lines(path: str | Path) -> list[dict[str, Any]] | None:
    """The objects of a JSON-lines file; None where there is no such file.

    Raises:
        RunError: a line that is not a JSON object, with its number.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return None
    lines = incoming_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, finite=True)
        except ValueError as error:
            raise RunError(f"{path} is corrupt at line {number}: {error}") from error
        if not isinstance(record, dict):
            raise RunError(f"{path} is corrupt at line {number}: expected a JSON object")
        if (place := misfit(record, LEFT_BEHIND.get(path.name, object))) is not None:
            raise RunError(f"{path} is corrupt at line {number}: {place} is of another kind")
        records.append(record)
    return records
