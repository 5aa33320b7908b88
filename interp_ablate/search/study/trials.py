"""One trial of a study, as its table has it.

Knows: columns. Does not know: Optuna.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# --------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class TrialRecord:
    """One trial as a study has it. `state` is Optuna's: COMPLETE, FAIL, RUNNING or WAITING.

    `copied_from`: the trial of the same parameters whose scores these are.
    """

    number: int
    state: str
    params: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""
    note: str = ""
    copied_from: int | None = None


TRIAL_COLUMNS = ("number", "state", "seconds", "reason", "note", "copied_from")
