"""The gradient fit: an edit whose strengths and vectors are found by gradient, from the difference in means on.

Knows: the rounds within the budget. Does not know: the gradient, or how the method is judged.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, PerPrompt
from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods import difference_in_means
from interp_ablate.league.task import LeagueTask
from interp_ablate.runs.fits import FIT_ROUNDS
from interp_ablate.runs.validation_bench import FIT_PROMPTS
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.gradient_fit import N_KEPT, NothingToFitError, fit_data, fit_edit


def _fit(task: LeagueTask) -> FittedMethod:
    scorer = task.scorer
    if not isinstance(scorer, ExpressionScorer):
        raise NothingToFitError("a fit makes expressions unlikely, and this behaviour has none")
    start = difference_in_means.METHOD.fit(task).detection
    assert isinstance(start, Direction)
    edit = _fitted_edit(task, start, scorer)
    if not any(edit.amounts):
        raise NothingToFitError(f"the fit from {start.name} ended where it changes nothing")
    reading = edit.vectors[-1]

    def score(values: PerPrompt) -> Float[Tensor, " prompt"]:
        sign = 1.0 if float(reading @ start.vector) >= 0 else -1.0
        return sign * (as_float64(values) @ reading)

    return FittedMethod(
        Detector(start.site, start.position, score),
        lambda strength: Plan((edit.times(strength),)),
        about={"layer": start.site.layer},
    )


def _fitted_edit(task: LeagueTask, start: Direction, scorer: ExpressionScorer) -> Ablate | Erase:
    """The edit after as many rounds as the budget has; the first one is always done.

    Each round after the first adds what the model says under the edit so far, as in `runs.fits`.
    """

    def outputs(plan: Plan | None, negative_tokens: int) -> list[ModelOutputs]:
        sides = (task.train.positive, task.max_new_tokens), (task.train.negative, negative_tokens)
        return [
            ModelOutputs(task.model, side[:FIT_PROMPTS], plan, max_new_tokens=tokens)
            for side, tokens in sides
        ]

    positive, negative = outputs(None, N_KEPT)
    data = fit_data(positive, negative, scorer)
    edit: Ablate | Erase | None = None
    for steps, weight in FIT_ROUNDS:
        if edit is not None:
            if task.seconds_left <= 0:
                break
            both = outputs(Plan((edit,)), task.max_new_tokens)
            generate_outputs_together(both)
            data = data.with_answers(both[0], scorer).with_loops(both)
        edit = fit_edit(task.model, start, data, kl_weight=weight, steps=steps, start=edit)
    assert edit is not None
    return edit


METHOD = LeagueMethod(
    "gradient_fit",
    _fit,
    "weights",
    "Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420, with unlikelihood, Welleck et al. 2019",
)
