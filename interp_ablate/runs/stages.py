"""Experiment: what each stage of a run does, from activations to the report.

Knows: the order of measurements, which split serves which of them, what goes into which file. Does not
know: how a stage is skipped or resumed (`pipeline` does), or any flag or terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.estimators import comparison
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import Empty
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.final_test import measure_controls, report_on_test
from interp_ablate.runs.fits import fits_of
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.validation_bench import bench_of
from interp_ablate.search.candidates import Candidate
from interp_ablate.search.selection import least_behaviour_under_kl


def run_collect(run: Run) -> None:
    """Activations of the training and validation prompts."""
    split, _ = run.split, run.model  # loading has its own progress
    for part in ("train", "validation"):
        prompts = getattr(split, part)
        total = len(prompts.positive) + len(prompts.negative)
        with run.step(f"collect {part}", total) as advance:
            run.activations(part, advance)


def run_directions(run: Run) -> None:
    """Directions of the training prompts, their separation on validation prompts, projections of both."""
    train, validation = run.activations("train"), run.activations("validation")
    source = json.dumps(
        {"model": run.model.fingerprint, "contrast": run.contrast_set.fingerprint}, sort_keys=True
    )
    directions = estimate_directions(train, validation, source=source)
    directions.save(run.out / "directions.safetensors")
    run.__dict__.pop("directions", None)
    main = directions.of(MAIN_METHOD)
    run.state["directions"] = {"count": len(main), "left_out": directions.left_out}
    none = [key for key in directions.left_out if not key.endswith("orthogonalized")]
    if none:
        run.note(
            f"{len(none)} of {len(main) + len(none)} sites have no direction and are left out: "
            + ", ".join(none)
        )
    best = most_separating(main)
    table = comparison(train, validation, best.site, best.position)
    run.write("estimators.csv", table.assign(site=str(best.site), position=best.position))
    run.write("projections.csv", _projections(run, main, train, validation))


def most_separating(directions: Iterable[Direction]) -> Direction:
    """The direction that best separates validation prompts."""
    measured = [item for item in directions if item.separation is not None]
    return max(measured, key=lambda item: item.separation.d_prime if item.separation else 0.0)


def _projections(run: Run, directions: Any, train: Any, validation: Any) -> pd.DataFrame:
    tables = []
    several = len(train.positions) > 1
    for split, activations in (("train", train), ("validation", validation)):
        part = getattr(run.split, split)
        texts = [prompt.text for prompt in (*part.positive, *part.negative)]
        labels = ["positive" if label else "negative" for label in activations.labels.tolist()]
        for item in directions:
            values = activations.at(item.site, item.position).double() @ item.vector
            table = pd.DataFrame(
                {
                    "layer": item.site.layer,
                    "point": item.site.point,
                    "split": split,
                    "label": labels,
                    "prompt": texts,
                    "projection": values.tolist(),
                }
            )
            tables.append(table.assign(position=item.position) if several else table)
    return pd.concat(tables, ignore_index=True)


def run_evaluate(run: Run) -> None:
    """Choose on validation, then report once on the test split, beside controls treated the same way."""
    from interp_ablate.search.trial_table import read_trials

    c = run.configuration
    trials = read_trials(run.out / "trials.csv")
    finals = trials[trials["stage"] == "finalist"]
    bench = bench_of(run)
    choice = least_behaviour_under_kl(
        finals,
        max_kl=c.max_kl,
        at_most={
            "repetition": bench.repetition + 0.1,
            "empty": float(Empty()(bench.positive, bench.positive).mean()),
        },
        tolerance=0.5 / c.n_validation,
    )

    def plans(row: dict[str, Any]) -> tuple[Plan, Direction, list[tuple[str, Plan]]]:
        candidate, fits, writers = Candidate.from_row(row), fits_of(run), run.model.writers
        direction = run.directions[candidate.site, candidate.position, candidate.method]
        controls = [
            (name, candidate.control(other, writers, fits))
            for name, other in measure_controls(run, candidate)
        ]
        added = run.directions[candidate.site, candidate.position]
        return candidate.plan(direction, writers, fits), added, controls

    report_on_test(run, choice, plans)


def run_export(run: Run) -> None:
    """The chosen plan as a certified checkpoint in export/."""
    from interp_ablate.export.checkpoint import export_checkpoint

    selected = json.loads((run.out / "selected.json").read_text(encoding="utf-8"))
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


def run_plot(run: Run) -> None:
    """Every figure that the folder has data for."""
    from interp_ablate.plots.run_figures import save_figures

    with run.step("figures", None):
        save_figures(run.out)


def run_report(run: Run) -> None:
    """report.html."""
    from interp_ablate.runs.report import write_report

    write_report(run.out)
