"""Screening: the samples of a training set that would push a model along a direction, ranked and set apart.

Knows: thresholds, and splitting a file row for row. Does not know: how a sample is measured, how results are
drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.datasets.chat_reader import read_samples, writing_samples
from interp_ablate.datasets.screening_measure import last_exchange
from interp_ablate.errors import RunError
from interp_ablate.storage.atomic_files import atomic_path, write_atomic
from interp_ablate.storage.row_files import RowFile
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)

SHOWN, EXCERPT = 500, 160  # rows of the ranked table that quote their texts, characters of a quote


@dataclass(frozen=True)
class Threshold:
    """Samples above `amount`, or above that quantile of a set of values, are flagged.

    The set is a clean reference, if there is one. Else it is the screened data itself, of which a quantile
    flags the same share, whatever the data holds.

    Raises:
        RunError: no finite number, a quantile outside 0 to 1.
    """

    amount: float
    quantile: bool = False

    def __post_init__(self) -> None:
        inside = 0 < self.amount < 1 if self.quantile else math.isfinite(self.amount)
        if not inside:
            raise RunError(
                f"{self} is no threshold: give a number in the units of the projection (1.5), or a "
                "quantile between 0 and 1 (q0.99)"
            )

    def __str__(self) -> str:
        return f"{'q' if self.quantile else ''}{self.amount:g}"

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read `1.5` as a value, `q0.99` as a quantile.

        Raises:
            RunError: something else.
        """
        number = text.strip().removeprefix("q")
        try:
            return cls(float(number), text.strip().startswith("q"))
        except ValueError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"{text!r} is no threshold: give a number in the units of the projection (1.5), or a "
                "quantile between 0 and 1 (q0.99)"
            ) from error

    def value(self, values: Sequence[float] | np.ndarray) -> float:
        """The number above which a sample is flagged, `values` being the set a quantile is of.

        Raises:
            RunError: a quantile of no value.
        """
        if not self.quantile:
            return self.amount
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        if not finite.size:
            raise RunError(f"the threshold {self} is a quantile of nothing: no sample has a value")
        if finite.size * (1 - self.amount) < 1:
            logger.warning(
                "the threshold %s of %d values is hardly more than their largest: a reference of %d "
                "samples would do",
                self, finite.size, math.ceil(10 / (1 - self.amount)),
            )  # fmt: skip
        return float(np.quantile(finite, self.amount))


@dataclass(frozen=True)
class Screening:
    """The result of `screen_file`."""

    table: pd.DataFrame
    """One row a sample, in the order of rank."""
    threshold: float
    """The number above which samples are flagged."""
    summary: dict[str, Any]
    """The contents of screening.json."""


def screen_file(
    table: pd.DataFrame,
    data: str | Path,
    out: str | Path,
    *,
    by: str,
    threshold: Threshold,
    reference: pd.DataFrame | None = None,
    layout: str | None = None,
) -> Screening:
    """Rank and flag measured samples, and write the file's rows in parts, each as it came.

    `out` gets flagged.* and kept.* (and unscored.*, the samples without a value, if there are any) in the
    data's own format, ranked.csv, and screening.json.

    Args:
        table: made by `measure_samples`; samples are ranked by its column `by`.
        reference: the same of a clean set, of which `threshold` is then a quantile.

    Raises:
        RunError: a threshold that flags by a quantile of nothing; a place that cannot be written.
        RowFileError: data that changed since it was measured.
    """
    out = Path(out)
    values = table[by].to_numpy(float)
    limit = threshold.value(values if reference is None else reference[by].to_numpy(float))
    parts = np.where(np.isnan(values), "unscored", np.where(values > limit, "flagged", "kept"))
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
    quoted = {int(table["number"].iloc[i]) for i in order[:SHOWN]}
    texts = _split(data, out, dict(zip(table["number"].tolist(), parts)), quoted, layout)
    ranked = table.assign(part=parts).iloc[order].reset_index(drop=True)
    ranked.insert(0, "rank", range(1, len(ranked) + 1))
    for place, name in enumerate(("prompt", "answer")):
        ranked[name] = [texts.get(number, ("", ""))[place] for number in ranked["number"]]
    _write_table(ranked, out / "ranked.csv")
    summary = _summary(parts, values, by, threshold, limit)
    if reference is not None:
        clean = reference[by].to_numpy(float)
        summary["reference"] = {
            "samples": len(reference),
            "above": int((clean > limit).sum()),
            "quantiles": _quantiles(clean),
        }
        summary["threshold"]["of"] = "reference" if threshold.quantile else "value"
    save_summary(summary, out)
    return Screening(ranked, limit, summary)


def _summary(
    parts: np.ndarray, values: np.ndarray, by: str, threshold: Threshold, limit: float
) -> dict[str, Any]:
    return {
        "samples": len(parts),
        **{name: int((parts == name).sum()) for name in ("flagged", "kept", "unscored")},
        "by": by,
        "threshold": {
            "asked": str(threshold),
            "value": limit,
            "of": "data" if threshold.quantile else "value",
        },
        "quantiles": _quantiles(values),
    }


def save_summary(summary: dict[str, Any], out: str | Path) -> None:
    """Write `screening.json`."""
    text = json_text(summary, indent=1) + "\n"
    write_atomic(Path(out) / "screening.json", text)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {}
    return {f"{q:g}": float(np.quantile(finite, q)) for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)}


def _split(
    data: str | Path, out: Path, parts: dict[int, str], quoted: set[int], layout: str | None
) -> dict[int, tuple[str, str]]:
    """Write each row to its part's file, and return the beginnings of some prompts and answers."""
    names = ["flagged", "kept"] + (["unscored"] if "unscored" in parts.values() else [])
    suffix = RowFile.at(data).suffix
    texts = {}
    with ExitStack() as stack:
        write = {
            name: stack.enter_context(writing_samples(out / f"{name}{suffix}", data))
            for name in names
        }
        for sample in read_samples(data, layout=layout):
            write[parts[sample.number]](sample)
            exchange = last_exchange(sample) if sample.number in quoted else None
            if exchange is not None:
                texts[sample.number] = _quote(exchange.prompt.text), _quote(exchange.answer)
    return texts


def _quote(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= EXCERPT else flat[: EXCERPT - 3] + "..."


def _write_table(frame: pd.DataFrame, path: Path) -> None:
    try:
        with atomic_path(path) as temporary:
            frame.to_csv(temporary, index=False)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Free space or choose another place"
        ) from error
