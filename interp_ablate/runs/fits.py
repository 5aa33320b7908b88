"""Edits fitted by gradient for a run, kept in its folder.

Knows: which fits a run has. Does not know: the gradient.
"""

from __future__ import annotations

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.validation_bench import FIT_PROMPTS, bench_of
from interp_ablate.search.candidates import DirectionKey
from interp_ablate.search.gradient_fit import N_KEPT, FitData, NothingToFitError, fit_data, fit_edit
from interp_ablate.sites import Site

# Rounds of a fit: gradient steps, and how much a nat of KL weighs. First far enough, then ever cheaper.
FIT_ROUNDS = ((14, 120.0), (10, 160.0), (8, 160.0), (8, 160.0), (8, 160.0))


def fits_of(run: Run) -> dict[str, Ablate | Erase]:
    """The edits fitted so far, by name."""
    found = {}
    for path in sorted((run.out / "fits").glob("*.json")):
        (edit,) = Plan.load(path)
        assert isinstance(edit, (Ablate, Erase))
        found[path.stem] = edit
    return found


def fit_of(run: Run, source: DirectionKey, *, start: Direction | None = None) -> str:
    """The name of the edit fitted from a direction on (or from `start`); fitted unless it is there already.

    Fitted on the training prompts in rounds. Each after the first adds what the model says under the
    edit so far: other words for the same behaviour, and loops.
    """
    layer, point, position = source
    site = Site(layer, point)  # type: ignore[arg-type]
    direction = start or run.directions[site, position, MAIN_METHOD]
    name = f"{layer}-{point}-{position}-{direction.fingerprint[:8]}"
    path = run.out / "fits" / f"{name}.json"
    if not path.exists():
        edit = _fit(run, direction)
        if not any(edit.amounts):
            raise NothingToFitError(
                f"the fit from {direction.name} ended where it changes nothing: whatever makes the "
                "behaviour less likely costs more elsewhere"
            )
        Plan((edit,)).save(path)
    return name


def _fit(run: Run, direction: Direction) -> Ablate | Erase:
    model, train, scorer = run.model, run.split.train, bench_of(run).expression
    max_new_tokens = run.configuration.max_new_tokens
    positive, negative = train.positive[:FIT_PROMPTS], train.negative[:FIT_PROMPTS]
    name = f"layer {direction.site.layer}"
    if "fit_data" not in run.shared:
        with run.step("answers to training prompts", None):
            run.shared["fit_data"] = fit_data(
                ModelOutputs(model, positive, max_new_tokens=max_new_tokens),
                ModelOutputs(model, negative, max_new_tokens=N_KEPT),
                scorer,
            )

    data: FitData = run.shared["fit_data"]
    edit: Ablate | Erase | None = None
    for number, (steps, weight) in enumerate(FIT_ROUNDS, 1):
        if edit is not None:
            with run.step(f"answers under it, {name}", None):
                both = [
                    ModelOutputs(model, side, Plan((edit,)), max_new_tokens=max_new_tokens)
                    for side in (positive, negative)
                ]
                generate_outputs_together(both)
                data = data.with_answers(both[0], scorer).with_loops(both)
        with run.step(f"fit, round {number}, {name}", steps) as advance:
            edit = fit_edit(
                model,
                direction,
                model.writers,
                data,
                kl_weight=weight,
                steps=steps,
                start=edit,
                on_step=lambda: advance(1),
            )
    assert edit is not None
    return edit
