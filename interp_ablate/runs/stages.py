"""The stages of a run: what each does, from activations to the report.

Knows: the order of measurements, which split serves which, which file each leaves. Does not know: flags or terminals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pandas as pd

from interp_ablate.activations.activations import Activations
from interp_ablate.activations.projection import project
from interp_ablate.directions.direction_set import Directions, most_separating
from interp_ablate.directions.estimators import comparison, control_separations
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.edits.plan import Plan
from interp_ablate.runs.concept import found_no_behaviour, is_concept, run_concept
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.final_test import choose_and_test
from interp_ablate.runs.fits import load_fitted_edits
from interp_ablate.runs.run_folder import CONCEPT_STAGES, NEEDS, STAGES, Run, read_selected
from interp_ablate.runs.trial_session import trial_session
from interp_ablate.search.edit_space import DirectionKey
from interp_ablate.search.gradient_fit import NothingToFitError
from interp_ablate.search.grid import ScreenedGrid
from interp_ablate.search.trial_table import read_trials
from interp_ablate.search.trials import TrialLog
from interp_ablate.sites import Site

# How much more than the unedited model a chosen plan's answers may repeat themselves.
REPETITION_SLACK = 0.1


def do_stage(run: Run, name: str) -> bool:
    """Do one stage with those it needs; returns False where it was already done."""
    if run.is_done(name):
        return False
    for needed in NEEDS[name]:
        do_stage(run, needed)
    start = time.perf_counter()
    STAGE_FUNCTIONS[name](run)
    run.finish(name, time.perf_counter() - start)
    return True


def do_all(run: Run) -> list[str]:
    """Every stage that is not done yet: of a behaviour, or of a concept where there is none to choose by.

    Returns the stages done now.
    """
    if is_concept(run):
        return [name for name in CONCEPT_STAGES if do_stage(run, name)]
    run.check_export()
    done = [name for name in STAGES[:2] if do_stage(run, name)]
    stages = CONCEPT_STAGES if found_no_behaviour(run) else STAGES
    return done + [name for name in stages[2:] if do_stage(run, name)]


def run_collect(run: Run) -> None:
    """Activations of the training and validation prompts."""
    run.model  # noqa: B018  (loading has its own progress, and may fail: nothing is written before)
    with run.begun():
        for part in ("train", "validation"):
            prompts = getattr(run.split, part)
            total = len(prompts.positive) + len(prompts.negative)
            with run.step(f"collect {part}", total) as advance:
                run.activations(part, advance)


def run_directions(run: Run) -> None:
    """Directions of the training prompts, their separation on validation prompts, projections of both."""
    train, validation = run.activations("train"), run.activations("validation")
    source = json.dumps(
        {"model": run.model.fingerprint, "contrast": run.contrast_set.fingerprint}, sort_keys=True
    )
    directions = estimate_directions(train, validation, orthogonalized_too=True, source=source)
    run.keep_directions(directions)
    main = directions.of(MAIN_METHOD)
    run.record(directions={"count": len(main), "left_out": directions.left_out})
    none = [key for key in directions.left_out if not key.endswith("orthogonalized")]
    if none:
        run.note(
            f"{len(none)} of {len(main) + len(none)} sites have no direction and are left out: "
            + ", ".join(none)
        )
    best = most_separating(main)
    table = comparison(train, validation, best.site, best.position)
    run.write("estimators.csv", table.assign(site=str(best.site), position=best.position))
    controls = control_separations(train, validation, main, seed=run.configuration.seed)
    run.write("separation_controls.csv", controls)
    splits = {"train": train, "validation": validation}
    tables = [_projections(main, activations, name) for name, activations in splits.items()]
    run.write("projections.csv", pd.concat(tables, ignore_index=True))


def _projections(directions: Directions, activations: Activations, split: str) -> pd.DataFrame:
    """Each prompt's projection on each direction; the position is a column where there are several."""
    columns = ["layer", "point", "split", "label", "prompt", "projection"]
    several = ["position"] if len(activations.positions) > 1 else []
    return project(activations, directions).assign(split=split)[columns + several]


def run_sweep(run: Run) -> None:
    """Screen every direction, refine bands and a fitted edit, score the finalists' text."""
    with trial_session(run) as session:

        def fit(source: DirectionKey) -> str | None:
            layer, point, position = source
            start = run.directions[Site(layer, point), position, MAIN_METHOD]  # type: ignore[arg-type]
            try:
                name = run.fitter.fit(source, start)
            except NothingToFitError as error:
                run.note(str(error))
                return None
            session.space.fits = load_fitted_edits(run.out / "fits")
            return name

        grid = ScreenedGrid(
            run.directions.of(MAIN_METHOD),
            run.model.n_layers,
            run.bench.n_prompts,
            fit,
            max_kl=run.configuration.max_kl,
            seed=run.configuration.seed,
        )
        session.write_table(*grid.propose(session.score))


def run_evaluate(run: Run) -> None:
    """Choose on validation, then report once on the test split, beside controls treated the same way."""
    trials = read_trials(run.out / "trials.csv")
    of_concept = trials["control"].fillna("") == ""  # not of a search's control directions
    finalists = trials[(trials["stage"] == "finalist") & of_concept]
    with TrialLog(run.out / "trials.jsonl", run.identity()).open() as log:
        tried = [trial for trial in log.done.values() if trial.stage == "finalist"]
    of_run = [trial for trial in tried if not trial.params.get("control")]
    choose_and_test(run, finalists, repetition_slack=REPETITION_SLACK, tried=of_run)


def run_export(run: Run) -> None:
    """The chosen plan as a certified checkpoint in export/."""
    from interp_ablate.export.checkpoint import export_checkpoint
    from interp_ablate.export.model_card import add_run
    from interp_ablate.runs.recipe import recipe_of

    selected = read_selected(run.out)
    if selected["plan"] is None:
        return
    prompts = [*run.split.test.positive[:4], *run.split.test.negative[:4]]
    with run.step("export and verify", None):
        export_checkpoint(
            run.model,
            Plan.from_dict(selected["plan"]),
            run.out / "export",
            prompts=prompts,
            report=selected["test"],
            overwrite=True,
        )
        if recipe := recipe_of(run.out):
            add_run(run.out / "export", recipe)


def run_plot(run: Run) -> None:
    """Every figure that the folder has data for."""
    from interp_ablate.plots.run_figures import save_figures

    with run.step("figures", None):
        save_figures(run.out)


def run_report(run: Run) -> None:
    """report.html."""
    from interp_ablate.runs.report import write_report

    write_report(run.out)


STAGE_FUNCTIONS: dict[str, Callable[[Run], None]] = {
    "collect": run_collect,
    "directions": run_directions,
    "concept": run_concept,
    "sweep": run_sweep,
    "evaluate": run_evaluate,
    "export": run_export,
    "plot": run_plot,
    "report": run_report,
}
