"""The objectives of a search in a run folder: their scorers made, and checked before any work.

Knows: where judges keep replies, which objective is the behaviour itself. Does not know: trials or proposers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.scoring.behaviour import Behaviour, ScoredBehaviour
from interp_ablate.scoring.expressions import ExpressionTextScorer
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.search.objective_scores import ObjectiveScores
from interp_ablate.search.objectives import Objective, parse_objectives
from interp_ablate.search.trial_table import COLUMNS


def objective_scores(run: Run, search: SearchSettings) -> ObjectiveScores:
    """The search's objectives with their scorers; a file of Python runs, because the settings name it.

    Raises:
        RunError: a name that the table of trials has, a scorer that cannot be made, a judge whose trials would be
            scored by several processes.
    """
    objectives = parse_objectives(search.objective, columns=COLUMNS)
    scorers = {each.name: _scorer(run, each, search) for each in objectives if not each.is_built_in}
    return ObjectiveScores.of(objectives, scorers, run.expression)


def _scorer(run: Run, objective: Objective, search: SearchSettings) -> Behaviour:
    judge = objective.measure.startswith("judge:")
    if judge and run.ray is not None:
        raise RunError("a judge's replies are kept by one process: leave --executor ray out")
    rubrics = search.rubrics
    rubric = rubrics.get(objective.name, rubrics.get("", run.configuration.rubric))
    scorer = make_scorer(
        objective.measure,
        rubric=rubric if judge else None,
        cache=Path(run.out) / f"replies_{objective.name}.jsonl",
        endpoint=run.endpoint,
        own_code=True,
    )
    if isinstance(scorer, ExpressionTextScorer):
        return scorer.expressions
    return ScoredBehaviour(scorer)


def identity_of(scores: ObjectiveScores) -> list[Any]:
    """What a folder's search is for, as JSON: each objective, with what its scorer depends on."""
    kept: list[Any] = []
    for each in scores.objectives:
        own = scores.scorers.get(each.name)
        named = replace(each, measure="...").text if own is not None else each.text
        kept.append(named if own is None else [named, own.identity])
    return kept
