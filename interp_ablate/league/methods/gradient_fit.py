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
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods import difference_in_means
from interp_ablate.league.task import LeagueTask
from interp_ablate.runs.fits import FitPrompts, fitted_in_rounds
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.gradient_fit import NothingToFitError


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
    """The edit after as many rounds as the budget has; the first one is always done."""
    prompts = FitPrompts(task.model, task.train, task.max_new_tokens)
    rounds = fitted_in_rounds(prompts, prompts.data(scorer), scorer, start)
    edit = next(rounds)
    while task.seconds_left > 0 and (better := next(rounds, None)) is not None:
        edit = better
    return edit


METHOD = LeagueMethod(
    "gradient_fit",
    _fit,
    "weights",
    "Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420, with unlikelihood, Welleck et al. 2019",
)
