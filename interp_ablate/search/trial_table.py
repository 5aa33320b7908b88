"""The table of trials: its columns, written and read.

Knows: trials' columns. Does not know: how they were scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.candidates import Trial
from interp_ablate.storage.tables import corrupt_row, read_table

TRIAL_COLUMNS = (
    "trial", "stage", "layer", "point", "position", "behaviour", "addition", "kl", "status",
)  # fmt: skip


def read_trials(path: str | Path) -> pd.DataFrame:
    """The trials of a sweep, with scores as numbers (NaN where a trial has none).

    Raises:
        RunError: a corrupt table, with its line.
    """
    numbers = (
        "trial", "layer", "behaviour", "unedited_answer_logprob", "addition", "kl", "kl_high", "expression_rate",
        "repetition", "length", "attention_strength", "attention_layer", "mlp_strength",
        "mlp_layer", "width", "scale", "prompts", "seconds", "behaviour_baseline", "unedited_answer_logprob_baseline",
        "addition_baseline",
    )  # fmt: skip
    frame = read_table(path, TRIAL_COLUMNS, numbers=numbers)
    unknown = ~frame["status"].isin(("ok", "failed"))
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise corrupt_row(
            path, row, f"its status is {frame['status'].iloc[row]!r}, not ok or failed"
        )
    return frame


SCORES = (
    "behaviour",
    "unedited_answer_logprob",
    "addition",
    "kl",
    "kl_high",
    "expression_rate",
    "negative_expression_rate",
    "repetition",
    "length",
    "empty",
)


def to_frame(trials: Sequence[Trial], bench: ValidationBench | None = None) -> pd.DataFrame:
    """Trials as a table, one row each, in order; missing scores are NaN.

    With the bench, the unedited model's scores stand beside (`behaviour_baseline`,
    `unedited_answer_logprob_baseline`, `addition_baseline`).
    """
    rows = []
    for i, trial in enumerate(trials):
        scores = {name: trial.scores.get(name, math.nan) for name in SCORES}
        tail = {"status": trial.status, "reason": trial.reason, "seconds": round(trial.seconds, 3)}
        place = asdict(trial.candidate)
        rows.append({"trial": i, **place, **scores, **tail})
    frame = pd.DataFrame(rows)
    if bench is not None:
        for name, value in bench.baseline.items():
            frame[name] = value
    return frame
