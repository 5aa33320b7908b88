"""Searching: a whole search in a run folder, from directions to the chosen plan's test numbers.

Knows: what is done once (screening, fits) and by one process, the study's folder, the files that are left.
Does not know: what a parameter means (`search` does), how trials survive a kill (`study` does), or flags.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
from filelock import lock_descriptor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.models.forward import DECODED_ROWS
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.final_test import random_controls, report_on_test
from interp_ablate.runs.fits import fit_of, fits_of
from interp_ablate.runs.run_folder import Run, identity
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.runs.stages import most_separating
from interp_ablate.runs.validation_bench import bench_of
from interp_ablate.search.candidates import DirectionKey, Trial, along_control_direction, screening
from interp_ablate.search.edit_space import (
    LAYERS,
    OBJECTIVES,
    POINT,
    EditSpace,
    initial_trials,
    plan_of,
    score,
    score_together,
    space_of,
)
from interp_ablate.search.gradient_fit import NothingToFitError
from interp_ablate.search.journal import Journal
from interp_ablate.search.race import layers_apart, race_directions, rank_directions
from interp_ablate.search.selection import least_behaviour_under_kl
from interp_ablate.search.study.opening import open_study
from interp_ablate.search.study.study import Study
from interp_ablate.search.sweep import run_trials
from interp_ablate.sites import Site

N_SOURCES = 3  # promising layers that bands start at
N_STRONG = 6  # finalists beside the front
AT_ONCE = 3  # trials whose answers are written in one batch
LEAST_SECONDS = 60.0  # of trials, whatever the preparation took


def run_search(run: Run, search: SearchSettings) -> None:
    """Search plans and test the best; the same call again goes on where it was.

    Several processes may search one folder: the first does what is done once, the others wait for it.

    Raises:
        RunError: a search of other settings in this folder, or no plan that could be scored.
    """
    begin = time.monotonic()
    with _alone(run):
        run.stage("directions")
        bench_of(run)
        ground = _ground(run, search)
        layers = _prepared(run, search, ground)
    if search.fits:
        ground.fits = fits_of(run)
    bench = bench_of(run)
    seconds = 60 * search.minutes - (time.monotonic() - begin)
    with open_study(
        run.out / "search",
        identity={**identity(run), "control": search.control, "fits": sorted(ground.fits)},
        space=space_of(ground),
        objectives=dict.fromkeys(OBJECTIVES, "minimize"),
        seed=run.configuration.seed,
        sampler=search.sampler,  # type: ignore[arg-type]
    ) as study:
        for params in initial_trials(ground, layers):
            study.enqueue(params, note="prior")
        with run.step("search", search.trials) as advance:
            study.run(
                lambda params: score(params, ground, bench),
                together=lambda some: score_together(some, ground, bench),
                at_once=max(1, min(AT_ONCE, DECODED_ROWS // len(bench.positive.rows))),
                n_trials=search.trials,
                seconds=max(seconds, LEAST_SECONDS),
                on_trial=lambda _: advance(1),
            )
        _report(run, search, ground, study)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """One process at a time: what is done once is there when the next one comes."""
    run.begin()
    with open(run.out / "search.lock", "ab") as file:
        lock_descriptor(file.fileno())
        yield


def _prepared(run: Run, search: SearchSettings, ground: EditSpace) -> list[float]:
    """Screened layers, the best first; the fitted edits are in the folder. A control has the middle ones."""
    depth = run.model.n_layers - 1
    if search.control is not None:
        sources: Sequence[DirectionKey] = [(round(0.7 * depth), POINT, _position(run))]
    else:
        journal = Journal(run.out / "trials.jsonl", identity(run))
        with journal.open() as done:
            sources = rank_directions(_screened(run, journal, done))
    if search.fits:
        for source in layers_apart(sources):
            try:
                # a control's fit starts from its own direction at that layer
                own = ground.directions(MAIN_METHOD)[Site(source[0], POINT)]
                fit_of(run, source, start=own if search.control else None)
            except NothingToFitError as error:
                run.note(str(error))
    if search.control is not None:
        return [0.5 * depth, 0.7 * depth, 0.9 * depth]
    return [float(layer) for layer, _, _ in sources[:N_SOURCES]]


def _screened(run: Run, journal: Journal, done: dict[str, Trial]) -> pd.DataFrame:
    """The layers a plan of the search may take, at full strength."""
    from_layer = LAYERS[0] * (run.model.n_layers - 1)
    at_point = [d for d in run.directions.of(MAIN_METHOD) if d.site.point == POINT]
    deep = [d for d in at_point if d.site.layer >= from_layer]
    candidates = screening(deep or at_point)
    with run.step("screen directions", None):
        table = race_directions(
            bench_of(run),
            candidates,
            lambda small, some: run_trials(small, run.directions, some, journal, done),
        )
    run.write("screening.csv", table)
    return table


def _position(run: Run) -> str:
    return run.activations("train").positions[0]


def _ground(run: Run, search: SearchSettings) -> EditSpace:
    return EditSpace(
        run.activations("train"),
        run.model.writers,
        position=_position(run),
        control=search.control,
        seed=run.configuration.seed,
    )


# ---- what is left ---------------------------------------------------------------------------------


def _report(run: Run, search: SearchSettings, ground: EditSpace, study: Study) -> None:
    """search.csv (every trial), front.csv and finalists.csv, their plans, selected.json, generations.jsonl."""
    table = study.trials()
    run.write("search.csv", table)
    done = table[table["state"] == "COMPLETE"]
    if done.empty:
        reasons = [reason for reason in table["reason"] if reason] if len(table) else []
        raise RunError(
            "no plan of the search could be scored"
            + (f"; the first failed with: {reasons[0]}" if reasons else ": give it more --minutes")
        )
    params = {outcome.number: outcome.params for outcome in study.outcomes()}
    front, unedited = study.front(), _unedited(run)
    tolerance = 0.5 / run.configuration.n_validation
    strong = _strongest(done, run.configuration.max_kl, tolerance)
    finalists = _confirmed(
        run,
        pd.concat([front, strong], ignore_index=True).drop_duplicates("number"),
        lambda number: plan_of(params[number], ground),
    )
    run.write("front.csv", finalists[finalists["number"].isin(front["number"])])
    choice = least_behaviour_under_kl(
        finalists,
        max_kl=run.configuration.max_kl,
        at_most={name: unedited[name] for name in ("repetition_of_all", "empty")},
        tolerance=tolerance,
    )

    def plans(row: dict[str, Any]) -> tuple[Plan, Direction, list[tuple[str, Plan]]]:
        plan = plan_of(params[int(row["number"])], ground)
        added = most_separating(run.directions.of(MAIN_METHOD))
        return plan, added, _controls(run, plan, added)

    report_on_test(run, choice, plans, control=search.control, validation_baseline=unedited)
    for stage in ("export", "plot", "report"):
        run.state["stages"].pop(stage, None)
    run.begin()


def _unedited(run: Run) -> dict[str, float]:
    """The unedited model's scores, under the names of the trials' and the finalists' tables."""
    bench = bench_of(run)
    return {
        **bench.objectives(None),
        "repetition_of_all": bench.repetition,
        **bench.beside(None),
    }


def _strongest(done: pd.DataFrame, max_kl: float, tolerance: float) -> pd.DataFrame:
    """Trials within the KL limit that leave the least of the behaviour, those nearest to the limit first.

    A weaker plan with the same rate beats them in the front, and is likelier to fail on other prompts.
    """
    inside = done[done["kl_high"] <= max_kl]
    if inside.empty:
        return inside
    least = inside["expression_rate"].min() + tolerance
    return inside[inside["expression_rate"] <= least].nlargest(N_STRONG, "kl")


def _confirmed(run: Run, chosen: pd.DataFrame, plan: Callable[[int], Plan]) -> pd.DataFrame:
    """Plans saved, and the scores that trials leave out (`Bench.beside`), in finalists.csv.

    What an earlier report found for the same trials is kept.
    """
    bench, path, known = bench_of(run), run.out / "finalists.csv", {}
    names = ["unedited_answer_logprob", "negative_expression_rate", "negative_repetition"]
    if path.exists():
        table = pd.read_csv(path).set_index("number")
        known = {int(number): row for number, row in table[names].to_dict("index").items()}
    found = []
    with run.step("finalists, answers to negative prompts", len(chosen)) as advance:
        for number in map(int, chosen["number"]):
            edit, place = plan(number), run.out / "plans" / f"{number}.json"
            same = place.exists() and Plan.load(place).fingerprint == edit.fingerprint
            found.append((same and known.get(number)) or bench.beside(edit))
            edit.save(place)
            advance(1)
    table = pd.concat([chosen.reset_index(drop=True), pd.DataFrame(found)], axis=1)
    sides = len(bench.positive.rows), len(bench.negative.rows)
    both = sides[0] * table["repetition"] + sides[1] * table["negative_repetition"]
    table["repetition_of_all"] = both / sum(sides)
    run.write("finalists.csv", table)
    return table


def _controls(run: Run, plan: Plan, like: Direction) -> list[tuple[str, Plan]]:
    """The chosen plan turned to write along random directions, all its strengths kept."""
    edits = [edit for edit in plan if isinstance(edit, (Ablate, Erase))]
    return [
        (name, Plan(tuple(along_control_direction(edit, other) for edit in edits)))
        for name, other in random_controls(run, like)
    ]


def summary(run: Run) -> str:
    """The front as text, a line a plan."""
    front = pd.read_csv(run.out / "front.csv")
    lines = ["trial  rate    KL      repetition"]
    for _, row in front.iterrows():
        lines.append(
            f"{int(row['number']):5d}  {row['expression_rate']:.3f}   {row['kl']:.4f}  {row['repetition']:.3f}"
        )
    return "\n".join(lines)
