"""The rows of an evaluation, and the files they are written to.

Knows: rows, tables, formats. Does not know: how a number was measured.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from interp_ablate.errors import RunError
from interp_ablate.stats.intervals import (
    FEWEST,
    RESAMPLES,
    Estimate,
    difference_estimate,
    mean_estimate,
)
from interp_ablate.storage.atomic_files import write_atomic

FORMAT = "interp_ablate evaluation 1"

Unit = Literal["share", "score", "nats", "perplexity", "bits", "tokens", "metric"]


@dataclass(frozen=True)
class ComparisonRow:
    """One measure before and after."""

    measure: str
    on: str
    """The text, prompts or task that it was measured on."""
    unit: Unit
    n: int
    """Prompts, windows or items that count; the intervals are over these."""
    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None
    """after - before, of the pairs; None where the two cannot be compared."""
    missing: int = 0
    """Prompts left out, because there is no verdict on one of the two answers."""

    def to_dict(self) -> dict[str, Any]:
        estimates = {key: getattr(self, key) for key in ("before", "after", "difference")}
        return asdict(self) | {k: v and v.to_list() for k, v in estimates.items()}


def paired_row(
    measure: str,
    on: str,
    unit: Unit,
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    comparable: bool = True,
) -> ComparisonRow:
    """Means before and after over the units that have both, and their difference.

    Raises:
        RunError: lists of different lengths.
    """
    if len(before) != len(after):
        raise RunError(f"{measure}: {len(before)} units before and {len(after)} after do not pair")
    pairs = [(b, a) for b, a in zip(before, after) if b is not None and a is not None]
    missing = len(before) - len(pairs)
    if not pairs:
        return ComparisonRow(measure, on, unit, 0, None, None, None, missing)
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    rate = {*first, *second} <= {0.0, 1.0}
    return ComparisonRow(
        measure,
        on,
        unit,
        len(pairs),
        mean_estimate(first, proportion=rate),
        mean_estimate(second, proportion=rate),
        difference_estimate(first, second, proportion=rate) if comparable else None,
        missing,
    )


Sums = tuple[np.ndarray, np.ndarray]  # the numerators and the denominators, one a unit


def ratio_row(
    measure: str, on: str, unit: Unit, before: Sums, after: Sums, *, comparable: bool = True
) -> ComparisonRow:
    """A ratio of sums over units (nats a token, bits a byte; perplexity is exp of the first).

    The bootstrap draws units, the same ones before and after.
    """
    scale: Callable[[Any], Any] = np.exp if unit == "perplexity" else (lambda x: x)

    def value(sums: Sums, drawn: Any = slice(None)) -> np.ndarray:
        return scale(sums[0][drawn].sum(-1) / sums[1][drawn].sum(-1))

    n = len(before[0])
    first, second = float(value(before)), float(value(after))
    ends: list[list[float]] = [[], [], []]
    if n >= FEWEST:
        generator, drawn = np.random.default_rng(0), []
        block = max(1, 4_000_000 // n)
        for start in range(0, RESAMPLES, block):
            size = (min(block, RESAMPLES - start), n)
            units = generator.integers(0, n, size)
            drawn.append((value(before, units), value(after, units)))
        before_all, after_all = (np.concatenate(side) for side in zip(*drawn))
        draws = (before_all, after_all, after_all - before_all)
        ends = [np.quantile(x, [0.025, 0.975]).tolist() for x in draws]
    b, a, change = (Estimate(v, *e) for v, e in zip((first, second, second - first), ends))
    return ComparisonRow(measure, on, unit, n, b, a, change if comparable else None)


@dataclass(frozen=True)
class Evaluation:
    """The table of a comparison, with the numbers and answers behind it."""

    before: str
    after: str
    rows: tuple[ComparisonRow, ...]
    notes: tuple[str, ...]
    """They say how the rows were measured."""
    settings: dict[str, Any]
    items: tuple[dict[str, Any], ...] = ()
    """The two numbers of every prompt, window or item (measure, on, item, before, after)."""
    answers: tuple[dict[str, Any], ...] = ()
    """Every prompt with both answers."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "before": self.before,
            "after": self.after,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
            "settings": self.settings,
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("torch", "transformers")},
            },
        }

    def save(self, folder: str | Path) -> None:
        """evaluation.json, evaluation.csv, evaluation.md, items.csv and answers.csv in `folder`.

        Raises:
            RunError: the place cannot be written.
        """
        folder = Path(folder)
        ends = ("", "_low", "_high")
        table = []
        for row in self.rows:
            flat = {"measure": row.measure, "on": row.on, "unit": row.unit, "n": row.n}
            for key in ("before", "after", "difference"):
                estimate = getattr(row, key)
                values = estimate.to_list() if estimate else [None] * 3
                flat |= {f"{key}{end}": value for end, value in zip(ends, values)}
            table.append({**flat, "missing": row.missing})
        for name, rows in (
            ("evaluation.csv", table),
            ("items.csv", self.items),
            ("answers.csv", self.answers),
        ):
            if rows:
                write_atomic(folder / name, _csv(rows))
        write_atomic(folder / "evaluation.md", as_markdown(self))
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(folder / "evaluation.json", text)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def number(value: float, unit: Unit) -> str:
    """Format a value for the tables."""
    places = {"perplexity": 2, "score": 1, "tokens": 1}.get(unit, 3)
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _cell(estimate: Estimate | None, unit: Unit, *, signed: bool = False) -> str:
    if estimate is None:
        return ""
    sign = "+" if signed and estimate.value > 0 else ""
    text = sign + number(estimate.value, unit)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low, unit)}, {number(estimate.high, unit)}]"


def cells(evaluation: Evaluation) -> list[list[str]]:
    """The table: a heading, then a line a row."""
    table = [["measure", "on", "n", "before", "after", "difference"]]
    for row in evaluation.rows:
        left_out = f" ({row.missing} without verdict)" if row.missing else ""
        table.append(
            [
                row.measure,
                row.on,
                f"{row.n or ''}{left_out}",
                _cell(row.before, row.unit),
                _cell(row.after, row.unit),
                _cell(row.difference, row.unit, signed=True),
            ]
        )
    return table


def as_text(evaluation: Evaluation) -> str:
    """The table in columns, and the notes."""
    table = cells(evaluation)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
    head = f"before: {evaluation.before}\nafter:  {evaluation.after}\n"
    return "\n".join([head, lines[0], "-" * len(lines[0]), *lines[1:], "", *evaluation.notes])


def as_markdown(evaluation: Evaluation) -> str:
    """The same as a page of Markdown, with the figure."""
    lines = ["| " + " | ".join(line) + " |" for line in cells(evaluation)]
    rule = "|---" * len(cells(evaluation)[0]) + "|"
    notes = [f"- {note}" for note in evaluation.notes]
    title = f"# {evaluation.after} against {evaluation.before}"
    caption = "95% intervals in brackets; a difference is after - before, of pairs."
    figure = "![before and after](figures/evaluation.png)"
    return "\n".join(
        [title, "", lines[0], rule, *lines[1:], "", caption, "", *notes, "", figure, ""]
    )
