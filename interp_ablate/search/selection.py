"""Selection: which trial to keep, and what the limits removed.

Knows: the rule of Arditi et al., limits before a named rule (`rules`), the Pareto front.
Does not know: models, prompts or plans; it reads tables of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.display import shortened
from interp_ablate.errors import RunError
from interp_ablate.search.objectives import Objective
from interp_ablate.search.rules import RULES, RuleInput
from interp_ablate.settings import DEFAULT_RULE, MAX_KL, suggestion
from interp_ablate.storage.incoming_files import check_file, incoming_text, parse_json

# How published evaluation files name what the trials here call behaviour, addition and kl.
PUBLISHED_COLUMNS = {
    "refusal_score": "target_log_odds",
    "steering_score": "addition",
    "kl_div_score": "kl",
}


def read_evaluations(path: str | Path) -> pd.DataFrame:
    """A table of evaluations: JSON (a list of rows), JSONL or CSV.

    Raises:
        RunError: no such file, or not a table.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            check_file(path, RunError)
            return pd.read_csv(path)
        text = incoming_text(path)
        rows = (
            [parse_json(line) for line in text.splitlines() if line.strip()]
            if (path.suffix == ".jsonl")
            else parse_json(text)
        )
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("expected a list of objects")
        return pd.DataFrame(rows)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read evaluations from {path}: {error}") from error


@dataclass(frozen=True)
class Selection:
    """The row a rule chose (None: no candidate passed), how many each limit removed, in order.

    `relax` says in words what would let candidates through.
    """

    rule: str
    row: dict[str, Any] | None
    considered: int
    kept: int
    removed: dict[str, int] = field(default_factory=dict)
    relax: str = ""

    @property
    def trial(self) -> dict[str, Any] | None:
        """The row as plain data: None where the table has nothing."""
        if self.row is None:
            return None
        return {k: (None if pd.isna(v) else v) for k, v in self.row.items()}

    def limits(self) -> dict[str, Any]:
        """Plain data for reports."""
        return {
            "considered": self.considered,
            "removed": self.removed,
            "kept": self.kept,
            "relax": self.relax,
        }


def _require(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    if not isinstance(frame, pd.DataFrame):
        raise RunError(
            f"plans are chosen from a table (pandas.DataFrame) with a row a plan; got {shortened(repr(frame))} "
            f"({type(frame).__name__})"
        )
    names = {old: new for old, new in PUBLISHED_COLUMNS.items() if new not in frame}
    renamed = frame.rename(columns=names)
    missing = [column for column in columns if column not in renamed]
    if missing or renamed.empty:
        raise RunError(
            f"cannot select: {'no rows' if not missing else 'no column ' + ', '.join(missing)}; "
            f"needed are {', '.join(columns)} (or the published names {', '.join(PUBLISHED_COLUMNS)}); "
            f"there are {shortened(', '.join(map(str, frame.columns)), 400) or 'none'}"
        )
    for column in columns:
        if not pd.api.types.is_numeric_dtype(renamed[column]):
            renamed[column] = pd.to_numeric(renamed[column], errors="coerce")
    return renamed


def _apply(
    frame: pd.DataFrame, limits: dict[str, pd.Series]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows that pass every limit, and how many rows each limit removed of those left by the ones before."""
    alive = pd.Series(True, index=frame.index)
    removed = {}
    for name, passes in limits.items():
        removed[name] = int((alive & ~passes).sum())
        alive &= passes
    return frame[alive], removed


def _advice(frame: pd.DataFrame, limits: dict[str, pd.Series]) -> str:
    """Which single limit, if dropped, lets most candidates through."""
    freed = {}
    for name in limits:
        others = pd.Series(True, index=frame.index)
        for other, passes in limits.items():
            if other != name:
                others &= passes
        freed[name] = int(others.sum())
    best = max(freed, key=lambda name: freed[name])
    if freed[best] == 0:
        return "no single limit is to blame: relax several, or use other layers, sites or prompts"
    return f"without the limit '{best}' {freed[best]} candidates would pass"


def _choose(
    rule: str,
    frame: pd.DataFrame,
    limits: dict[str, pd.Series],
    take: Callable[[pd.DataFrame], Any],
) -> Selection:
    """What `take` takes among the rows within the limits: it returns the index of one."""
    kept, removed = _apply(frame, limits)
    if kept.empty:
        return Selection(rule, None, len(frame), 0, removed, _advice(frame, limits))
    return Selection(rule, _plain(kept.loc[[take(kept)]]), len(frame), len(kept), removed)


def arditi(
    frame: pd.DataFrame,
    *,
    n_layers: int,
    max_kl: float = MAX_KL,
    min_addition: float = 0.0,
    prune_layers: float = 0.2,
) -> Selection:
    """The published rule: the lowest score under ablation among candidates that pass the limits.

    Limits: finite scores, layer < int((1 - prune_layers) * n_layers), KL <= max_kl, score under
    addition >= min_addition. Source: Arditi et al. 2024, https://arxiv.org/abs/2406.11717.

    Raises:
        RunError: missing columns, no rows, n_layers below 1.
    """
    if n_layers < 1:
        raise RunError(f"n_layers must be at least 1; got {n_layers}")
    rows = _require(frame, ["layer", "target_log_odds", "addition", "kl"])
    scores = rows[["target_log_odds", "addition", "kl"]]
    last = int(n_layers * (1 - prune_layers))
    limits = {
        "not finite": np.isfinite(scores).all(axis=1),
        f"layer >= {last}": rows["layer"] < last,
        f"kl > {max_kl:g}": rows["kl"] <= max_kl,
        f"addition < {min_addition:g}": rows["addition"] >= min_addition,
    }
    return _choose("arditi", rows, limits, lambda kept: kept["target_log_odds"].idxmin())


def choose_plan(
    frame: pd.DataFrame,
    rule: str = DEFAULT_RULE,
    by: RuleInput | None = None,
    *,
    max_kl: float = MAX_KL,
    at_most: Mapping[str, float] | None = None,
    limits: Sequence[Objective] = (),
) -> Selection:
    """The plan that a rule of `RULES` takes among those within the limits.

    `kl_high`, an upper bound of the mean KL (`upper_bound`), is held against the limit where the table has it: a
    plan chosen at the limit on few prompts would exceed it on others half of the time.

    Args:
        by: the effect that plans are compared by.
        at_most: limits of other columns, such as repetition.
        limits: objectives with limits of their own.

    Raises:
        RunError: an unknown rule, missing columns, no rows.
    """
    if rule not in RULES:
        raise RunError(
            f"unknown rule {rule!r}{suggestion(rule, RULES)}: accepted are {', '.join(RULES)}"
        )
    by = by or RuleInput()
    rows = _require(frame, [by.column, "kl", *(at_most or {}), *(each.column for each in limits)])
    passes = _limits(rows, by.column, max_kl, at_most or {}, limits)
    return _choose(rule, rows, passes, lambda kept: RULES[rule](kept, by))


def _limits(
    rows: pd.DataFrame,
    column: str,
    max_kl: float,
    at_most: Mapping[str, float],
    limits: Sequence[Objective],
) -> dict[str, pd.Series]:
    upper = rows["kl_high"] if "kl_high" in rows else rows["kl"]
    passes = {
        "not finite": np.isfinite(rows[[column, "kl"]]).all(axis=1),
        f"kl > {max_kl:g} (upper bound)": upper <= max_kl,
    }
    others = [(f"{name} > {most:.3g}", rows[name] <= most) for name, most in at_most.items()]
    for each in limits:
        text = f"{each.name} {'<' if each.maximize else '>'} {each.limit:.3g}"
        others.append((text, rows[each.column].map(each.excess) <= 0))
    for text, within in others:  # two that read the same, of other columns, hold both
        passes[text] = passes[text] & within if text in passes else within
    return passes


def _plain(one: pd.DataFrame) -> dict[str, Any]:
    """A table's only row as plain data."""
    (row,) = one.to_dict("records")
    return {str(k): v.item() if isinstance(v, np.generic) else v for k, v in row.items()}


def pareto_front(
    frame: pd.DataFrame, *, objectives: Sequence[str | Objective] = ("target_log_odds", "kl")
) -> pd.DataFrame:
    """Rows that no other row beats: none is at least as good in every objective and better in one.

    Args:
        objectives: columns that are made small, or objectives with a direction of their own.
    """
    columns = [each if isinstance(each, str) else each.column for each in objectives]
    rows = _require(frame, columns)
    signs = [-1.0 if not isinstance(each, str) and each.maximize else 1.0 for each in objectives]
    values = rows[columns].to_numpy(float) * signs
    finite = np.isfinite(values).all(axis=1)
    keep = []
    for i, value in enumerate(values):
        no_worse = (values <= value).all(axis=1) & finite
        better = (values < value).any(axis=1)
        keep.append(bool(finite[i] and not (no_worse & better).any()))
    return rows[keep].sort_values(columns, ascending=[sign > 0 for sign in signs], kind="stable")


def spread_out(front: pd.DataFrame, objectives: Sequence[Objective], n: int) -> pd.DataFrame:
    """At most `n` rows of a front, those that are furthest from their neighbours; each objective's ends stay.

    By the crowding distance of NSGA-II (Deb et al. 2002, https://doi.org/10.1109/4235.996017).
    """
    if len(front) <= n:
        return front
    distance = np.zeros(len(front))
    for each in objectives:
        values = front[each.column].to_numpy(float)
        order = np.argsort(values, kind="stable")
        width = values[order[-1]] - values[order[0]]
        if width > 0:
            distance[order[[0, -1]]] = np.inf
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / width
    kept = np.sort(np.argsort(-distance, kind="stable")[:n])
    return front.iloc[kept]
