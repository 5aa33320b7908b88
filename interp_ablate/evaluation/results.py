"""The rows of an evaluation, and the files they are written to.

Knows: rows, tables, formats. Does not know: how a number was measured.
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from interp_ablate.errors import RunError
from interp_ablate.stats.intervals import (
    AT_LEAST_0,
    SCORE,
    SHARE,
    UNBOUNDED,
    Bounds,
    Estimate,
    difference_estimate,
    mean_estimate,
    mean_interval,
)
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.strict_json import json_text

FORMAT = "interp_ablate evaluation 1"

Unit = Literal["share", "score", "nats", "perplexity", "bits", "tokens", "metric"]
_BOUNDS: dict[Unit, Bounds] = {
    "share": SHARE,
    "score": SCORE,
    "metric": UNBOUNDED,
}  # of every other unit: at least 0


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
    bounds = _BOUNDS.get(unit, AT_LEAST_0)
    return ComparisonRow(
        measure,
        on,
        unit,
        len(pairs),
        mean_estimate(first, bounds=bounds),
        mean_estimate(second, bounds=bounds),
        difference_estimate(first, second, bounds=bounds) if comparable else None,
        missing,
    )


Sums = tuple[np.ndarray, np.ndarray]  # the numerators and the denominators, one a unit


def ratio_row(
    measure: str, on: str, unit: Unit, before: Sums, after: Sums, *, comparable: bool = True
) -> ComparisonRow:
    """A ratio of sums over units (nats a token, bits a byte; perplexity is exp of the first).

    The intervals are those of the mean of each unit's influence on the ratio.
    """
    exp: Callable[[float], float] = float
    if unit == "perplexity":
        exp = lambda x: math.exp(min(x, 700.0))  # noqa: E731  (beyond it is no float)
    ratios, influences = [], []
    for numerators, denominators in (before, after):
        ratio = float(numerators.sum() / denominators.sum())
        ratios.append(ratio)
        influences.append((numerators - ratio * denominators) / denominators.mean())

    def estimate(ratio: float, influence: np.ndarray) -> Estimate:
        return Estimate(exp(ratio), *map(exp, mean_interval(ratio + influence) or ()))

    b, a = map(estimate, ratios, influences)
    slopes = [each.value if unit == "perplexity" else 1.0 for each in (b, a)]
    moved = a.value - b.value + slopes[1] * influences[1] - slopes[0] * influences[0]
    change = mean_estimate(moved)
    return ComparisonRow(measure, on, unit, len(before[0]), b, a, change if comparable else None)


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
        text = json_text(self.to_dict(), indent=1, ensure_ascii=False)
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
