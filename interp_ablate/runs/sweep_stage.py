"""The sweep stage of a run: candidates, trials, executor.

Knows: a run's trials. Does not know: how a trial is scored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd

from interp_ablate.jobs.executors import Executor
from interp_ablate.jobs.ray_executor import executor_of
from interp_ablate.runs.configuration import MAIN_METHOD, Configuration
from interp_ablate.runs.fits import fit_of, fits_of
from interp_ablate.runs.run_folder import Run, identity
from interp_ablate.runs.stages import (
    run_collect,
    run_directions,
    run_evaluate,
    run_export,
    run_plot,
    run_report,
)
from interp_ablate.runs.validation_bench import bench_of
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.candidates import Candidate, Trial, screening
from interp_ablate.search.gradient_fit import NothingToFitError
from interp_ablate.search.journal import Journal
from interp_ablate.search.race import layers_apart, race_directions, rank_directions
from interp_ablate.search.sweep import bands, finalists, fitted, run_trial, run_trials
from interp_ablate.search.trial_table import to_frame


def run_sweep(run: Run) -> None:
    """Screen every direction, refine bands and a fitted edit, score the finalists' text; journalled."""
    journal = Journal(run.out / "trials.jsonl", identity(run))
    c = run.configuration
    with journal.open() as done, _executor(run) as executor:
        bench = bench_of(run)

        def trials_of(
            name: str, candidates: Sequence[Candidate], bench: ValidationBench = bench
        ) -> list[Trial]:
            with run.step(name, len(candidates)) as advance:
                return run_trials(
                    bench,
                    run.directions,
                    candidates,
                    journal,
                    done,
                    fits=fits_of(run),
                    executor=executor,
                    on_trial=lambda _: advance(1),
                )

        screened = race_directions(
            bench,
            screening(run.directions.of(MAIN_METHOD)),
            lambda small, some: trials_of(
                f"screen, {len(small.positive.rows)} prompts", some, small
            ),
        )
        sources = rank_directions(screened)
        trials = trials_of("bands of strengths", bands(sources, run.model.n_layers, seed=c.seed))
        for source in layers_apart(sources):
            try:
                name = fit_of(run, source)
            except NothingToFitError as error:
                run.note(str(error))
                break
            trials += trials_of(f"fitted, layer {source[0]}", fitted(source, name))
        trials += trials_of("finalists", finalists(trials, max_kl=c.max_kl))
    table = pd.concat([screened, to_frame(trials, bench)], ignore_index=True)
    run.write("trials.csv", table.assign(trial=range(len(table))))


@contextmanager
def _executor(run: Run) -> Iterator[Executor[Candidate, Trial] | None]:
    """Where trials are scored: here, or by the executor that `run.shared` asks for."""
    settings = dict(run.shared.get("executor") or {})
    if settings.pop("name", "local") == "local":
        yield None
        return
    make = functools.partial(make_worker, run.configuration, str(run.out.resolve()))
    with executor_of("ray", make, **settings) as executor:
        yield executor


def make_worker(configuration: Configuration, out: str) -> Callable[[Candidate], Trial]:
    """What scores candidates in a process of its own, with a model of its own.

    It reads the run's folder (directions, activations, fitted edits), which must be there for every
    worker, and writes nothing into it.
    """
    run = Run(out, configuration, work=WORK.__getitem__)
    bench = bench_of(run)

    def work(candidate: Candidate) -> Trial:
        small = bench if candidate.prompts is None else bench.head(candidate.prompts)
        fits = fits_of(run) if candidate.fit is not None else None
        return run_trial(small, run.directions, candidate, fits)

    return work


WORK: dict[str, Callable[[Run], None]] = {
    "collect": run_collect,
    "directions": run_directions,
    "sweep": run_sweep,
    "evaluate": run_evaluate,
    "export": run_export,
    "plot": run_plot,
    "report": run_report,
}
