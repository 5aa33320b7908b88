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
from interp_ablate.scoring.behaviour import Behaviour, behaviour_of
from interp_ablate.scoring.own_function import is_own_function
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.search.objective_scores import ObjectiveScores
from interp_ablate.search.objectives import Objective, parse_objectives
from interp_ablate.search.trial_table import COLUMNS


def objective_scores(
    run: Run, search: SearchSettings, *, own_code: bool = False
) -> ObjectiveScores:
    """The search's objectives with their scorers.

    Args:
        own_code: whether an objective may be a file of Python; true only where a person named it, not a file of others.

    Raises:
        RunError: a name that the table of trials has, a scorer that cannot be made, a file of Python that may not
            run, a judge whose trials would be scored by several processes.
    """
    objectives = parse_objectives(search.objective, columns=COLUMNS)
    scorers = {
        each.name: _scorer(run, each, search, own_code)
        for each in objectives
        if not each.is_built_in
    }
    return ObjectiveScores.of(objectives, scorers, run.expression)


def _scorer(run: Run, objective: Objective, search: SearchSettings, own_code: bool) -> Behaviour:
    if is_own_function(objective.measure) and not own_code:
        raise RunError(
            f"the objective {objective.text} is a file of Python, and is run only where a person names it: give "
            "`interp-ablate search` this --objective and the run's other settings (`reproduce` without --from-prompts "
            "needs no objective). In Python pass objective_scores(run, search, own_code=True)"
        )
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
        own_code=own_code,
    )
    return behaviour_of(scorer)


def identity_of(scores: ObjectiveScores) -> list[Any]:
    """What a folder's search is for, as JSON: each objective, with what its scorer depends on."""
    kept: list[Any] = []
    for each in scores.objectives:
        own = scores.scorers.get(each.name)
        named = replace(each, measure="...").text if own is not None else each.text
        kept.append(named if own is None else [named, own.identity])
    return kept
