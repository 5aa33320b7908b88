"""The table of trials: its columns, written and read.

Knows: trials' columns. Does not know: how they were scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.search.edit_space import COMPONENT_SCALES, KERNEL, PLAIN, source_of
from interp_ablate.search.trials import Trial
from interp_ablate.storage.tables import corrupt_row, read_table

# What a table of trials must have.
TRIAL_COLUMNS = (
    "trial", "stage", "layer", "point", "position", "target_log_odds", "addition", "kl", "status",
)  # fmt: skip
_PLACE = ("method", "layer", "point", "position")
_FIT = ("fit", *COMPONENT_SCALES)
# From the kind of an edit to its parameters.
PARAMS = {"ablate": _PLACE, "band": (*_PLACE, "rank", *KERNEL), "fitted": _FIT}
SCORES = (
    "target_log_odds",
    "unedited_answer_logprob",
    "addition",
    "kl",
    "kl_high",
    "expression_rate",
    "negative_expression_rate",
    "repetition",
    "positive_repetition",
    "length",
    "empty",
    "no_answer",
    "target_log_odds_baseline",
    "unedited_answer_logprob_baseline",
    "addition_baseline",
)
_WHOLE = ("prompts", "number", "rank")
_NUMBERS = ("layer", "rank", *KERNEL, *COMPONENT_SCALES, *_WHOLE[:2], *SCORES, "seconds", "trial")
COLUMNS = (
    "trial", "stage", "edit", "control", *_PLACE, "rank", *KERNEL, *_FIT, "prompts", "number", *SCORES, "status",
    "reason", "seconds",
)  # fmt: skip
"""The columns that every table of trials has; a search's own objectives come behind them."""


def read_trials(path: str | Path) -> pd.DataFrame:
    """The trials of a run or search, with scores as numbers (NaN where a trial has none).

    Raises:
        RunError: a corrupt table, with its line.
    """
    frame = read_table(path, TRIAL_COLUMNS, numbers=_NUMBERS)
    for name in frame.columns.difference(COLUMNS):  # objectives of one search
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    unknown = ~frame["status"].isin(("ok", "failed"))
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise corrupt_row(
            path, row, f"its status is {frame['status'].iloc[row]!r}, not ok or failed"
        )
    return frame


def to_frame(trials: Sequence[Trial]) -> pd.DataFrame:
    """Trials as a table, one row each, in order; what a trial does not have is missing.

    A fitted edit's place is that of the direction it was fitted from.
    """
    rows = []
    for i, trial in enumerate(trials):
        layer, point, position = source_of(trial.params)
        place = {"method": PLAIN, "layer": layer, "point": point, "position": position}
        params = dict.fromkeys(("rank", *KERNEL, *_FIT)) | place | trial.params
        head = {"trial": i, "stage": trial.stage, "edit": params.pop("edit")}
        head["control"] = params.pop("control", None)
        scores = {name: trial.scores.get(name, math.nan) for name in SCORES}
        tail = {"status": trial.status, "reason": trial.reason, "seconds": round(trial.seconds, 3)}
        own = {"prompts": trial.prompts, "number": trial.number}
        objectives = {name: value for name, value in trial.scores.items() if name not in SCORES}
        rows.append({**head, **params, **own, **scores, **tail, **objectives})
    return pd.DataFrame(rows)


def params_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's parameters from its row of the table; what is missing there is none of them."""
    names = ("edit", "control", *PARAMS[row["edit"]])
    params = {
        name: row[name]
        for name in names
        if name in row and not (row[name] in ("", None) or row[name] != row[name])
    }
    if "position" in params:
        params["position"] = str(params["position"])
    for name in ("layer", "rank"):
        if name in params and params[name] == int(params[name]):
            params[name] = int(params[name])
    return params
