"""Journal: finished trials on disk, one line each, in one process at a time.

Knows: how a trial is a line, and which lines are the same candidate's. Does not know: what a trial
means, or how lines survive a kill (`lines`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_ablate.search.candidates import Trial
from interp_ablate.storage.jsonl_log import JsonlLog

HEADER = "interp_ablate.journal/1"


class Journal:
    """Finished trials on disk: a header line that says what was swept, then one JSON line a trial.

    Raises:
        RunError: another configuration's journal, a corrupt line (its number), or one in use by another
            process.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.lines = JsonlLog(
            path, identity, kind="journal", format=HEADER, lost="its trial is run again"
        )

    @property
    def path(self) -> Path:
        return self.lines.path

    @contextmanager
    def open(self) -> Iterator[dict[str, Trial]]:
        """Finished trials by candidate key; `append` works inside the block, in one process at a time."""
        with self.lines.open() as lines:
            trials = {}
            for number, line in enumerate(lines, 2):
                try:
                    trial = Trial.from_dict(line)
                except (TypeError, KeyError) as error:
                    raise self.lines.corrupt(number, error) from error
                trials[trial.candidate.key] = trial
            yield trials

    def append(self, trial: Trial) -> None:
        """Record a finished trial; on disk when this returns."""
        self.lines.append(trial.to_dict())
