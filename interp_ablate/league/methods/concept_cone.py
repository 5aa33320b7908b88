"""Concept cone: two directions by gradient, each of which and every mixture of which carries the behaviour.

Knows: the method, its source, the steps that the budget holds. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.direction import Direction
from interp_ablate.league.fitted import FittedMethod, ablation
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods import difference_in_means
from interp_ablate.league.task import LeagueTask
from interp_ablate.runs.fits import FitPrompts
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.concept_cone import MIXTURES, ablation_loss, fit_cone
from interp_ablate.search.gradient_fit import FitData, NothingToFitError

RANK, STEPS, FEWEST = 2, 6, 2


def _fit(task: LeagueTask) -> FittedMethod:
    scorer = task.scorer
    if not isinstance(scorer, ExpressionScorer):
        raise NothingToFitError("a cone makes expressions unlikely, and this behaviour has none")
    start = difference_in_means.METHOD.fit(task).detection
    assert isinstance(start, Direction)
    data = FitPrompts(task.model, task.train, task.max_new_tokens).data(scorer)
    steps = _affordable(task, start, data)
    cone = fit_cone(task.model, start, data, rank=RANK, steps=steps, seed=task.seed)
    # the first basis vector is the one that started at the difference in means: its sign is known
    first = cone.directions[0]
    detection = first if first.cosine(start) >= 0 else -first
    about = {"layer": start.site.layer, "rank": RANK, "steps": steps, "loss": cone.losses[-1]}
    return FittedMethod(detection, ablation(cone.vectors, task.model.writers), about=about)


def _affordable(task: LeagueTask, start: Direction, data: FitData) -> int:
    """How many steps the rest of the budget holds, by the time that one of a step's directions takes."""
    before = task.seconds_left
    along = start.vector.float().to(task.model.device).requires_grad_(True)
    likely, kl = ablation_loss(task.model, along, data.some(0))
    (likely + kl.to(likely.device)).backward()
    step = (RANK + MIXTURES) * max(before - task.seconds_left, 1e-6)
    return min(max(int(task.seconds_left / step), FEWEST), STEPS)


METHOD = LeagueMethod(
    "concept_cone", _fit, "weights", "Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420"
)
