"""The trials of a run folder: its log, where they are scored, its table.

Knows: what a run and a search share. Does not know: which trials are proposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pandas as pd

from interp_ablate.jobs.executors import Executor
from interp_ablate.jobs.ray_executor import RayExecutor
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.search_objectives import objective_scores
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.search.edit_space import EditSpace
from interp_ablate.search.trial_table import to_frame
from interp_ablate.search.trials import Batch, Trial, TrialLog, run_trials, score_trials


@dataclass(frozen=True)
class TrialSession:
    """An open log of trials and what scores them."""

    run: Run
    log: TrialLog
    space: EditSpace
    executor: Executor[Batch, list[Trial]] | None

    @property
    def n_workers(self) -> int:
        """How many batches are scored at once."""
        return self.executor.n_workers if self.executor else 1

    def score(self, name: str, trials: Sequence[Trial]) -> list[Trial]:
        """The trials, finished, in order, as a step of its own name."""
        with self.run.step(name, len(trials)) as advance:
            return self.run_trials(trials, advance)

    def run_trials(
        self, trials: Sequence[Trial], advance: Callable[[int], None], *, batch_size: int = 1
    ) -> list[Trial]:
        """The trials, finished, in order; those that the log holds are not scored again."""
        return run_trials(
            trials,
            self.space,
            self.run.bench,
            self.log,
            executor=self.executor,
            batch_size=batch_size,
            on_trial=lambda _: advance(1),
        )

    def write_table(self, screened: pd.DataFrame | None, trials: Sequence[Trial]) -> pd.DataFrame:
        """trials.csv: the race, then what the folder's log holds of other trials, then these."""
        own = {trial.key for trial in trials}
        others = [
            trial
            for trial in self.log.done.values()
            if trial.stage != "screen" and trial.key not in own
        ]
        frames = [screened] if screened is not None else []
        frames += [to_frame(part) for part in (others, trials) if part]
        table = pd.concat(frames, ignore_index=True)
        table = table.assign(trial=range(len(table)))
        self.run.write("trials.csv", table)
        self.run.record(trials_made_by=self.log.made_by)
        return table


@contextmanager
def trial_session(run: Run, search: SearchSettings | None = None) -> Iterator[TrialSession]:
    """The log, in one process at a time, and the workers, for the length of a block.

    Args:
        search: whose objectives the trials are scored by, and whose control's directions they take.

    Raises:
        RunError: another process works in this folder.
    """
    log = TrialLog(run.out / "trials.jsonl", run.identity())
    with log.open(), _executor(run, search) as executor:
        run.bench  # noqa: B018  (made first: its progress is no trial's)
        control = None if search is None else search.control
        yield TrialSession(run, log, run.edit_space(control=control), executor)


def _executor(
    run: Run, search: SearchSettings | None
) -> Executor[Batch, list[Trial]] | nullcontext[None]:
    """Ray's workers where the run asks for them; None scores trials in this process."""
    if run.ray is None:
        return nullcontext()
    make = functools.partial(make_worker, run.configuration, str(run.out.resolve()), search)
    return RayExecutor(make, run.ray)


def make_worker(
    configuration: Configuration, out: str, search: SearchSettings | None = None
) -> Callable[[Batch], list[Trial]]:
    """What scores trials in a process of its own, with a model of its own; it writes no file."""
    run = Run(out, configuration)
    if search is not None:
        # the session's own process made them before, with the permission that they need
        run.bench.score_by(objective_scores(run, search, own_code=True))
    return functools.partial(score_trials, run.bench)
