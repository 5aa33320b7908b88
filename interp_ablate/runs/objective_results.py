"""A search's own objectives in its results: limits of the choice, the unedited model's numbers, the test's.

Knows: how objectives are told in selected.json. Does not know: how they are scored, or how a page shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.scoring.behaviour import Behaviour
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.objective_scores import ObjectiveScores
from interp_ablate.search.objectives import Objective
from interp_ablate.search.optimism import Judged, optimism
from interp_ablate.search.rules import RuleInput
from interp_ablate.search.trials import Trial
from interp_ablate.stats.intervals import SHARE, mean_interval


def limits_of(scores: ObjectiveScores, max_kl: float) -> tuple[float, tuple[Objective, ...]]:
    """The KL limit of a choice, the smaller of the run's and the objective's; and the other objectives with one."""
    limited = [each for each in scores.objectives if each.limit is not None]
    of_kl = [each.limit for each in limited if each.measure == "kl" and each.limit is not None]
    return min([max_kl, *of_kl]), tuple(each for each in limited if each.measure != "kl")


def unedited_scores(bench: ValidationBench) -> dict[str, float]:
    """The unedited model's own text scores, and its numbers in the objectives."""
    both = (bench.positive, bench.negative)
    values = bench.objectives.values(bench.expression, both, both)
    return bench.unedited_text_scores() | {name: fmean(each) for name, each in values.items()}


def tested_objectives(
    scores: ObjectiveScores,
    behaviour: Behaviour,
    edited: tuple[ModelOutputs, ModelOutputs],
    unedited: tuple[ModelOutputs, ModelOutputs],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Of each objective of one's own: its mean over test prompts before and after the edit, with 95% intervals."""
    before, after = (scores.values(behaviour, on, unedited) for on in (unedited, edited))
    results = []
    for each in scores.own:
        row: dict[str, Any] = {"name": each.name, "measure": each.text, "side": each.prompts}
        for when, values in (("before", before[each.column]), ("after", after[each.column])):
            row[when] = fmean(values)
            row[f"interval_{when}"] = mean_interval(values, bounds=SHARE, seed=seed)
        results.append(row)
    return results


def optimism_of(
    tried: Sequence[Trial],
    rule: str,
    by: RuleInput,
    scores: ObjectiveScores,
    unedited: Mapping[str, float],
    max_kl: float,
    repetition_slack: float,
) -> dict[str, Any] | None:
    """How much the choice among these trials flatters itself (`optimism`); None where too little tells it.

    The limits are those of the choice. Repetition is that of answers to positive prompts; where trials ended answers
    early (`ValidationBench.objectives_of`) they have none, and it is no limit here.
    """
    at_most = {
        "positive_repetition": unedited["positive_repetition"] + repetition_slack,
        "empty": unedited["empty"],
    }
    plans = [dict(trial.by_prompt) for trial in tried if trial.status == "ok" and trial.by_prompt]
    at_most = {k: most for k, most in at_most.items() if all(k in plan for plan in plans)}
    for each in limits_of(scores, max_kl)[1]:
        assert each.limit is not None
        sign = -1 if each.maximize else 1
        at_most[f"{sign} {each.column}"] = sign * each.limit
        for plan in plans:
            plan[f"{sign} {each.column}"] = [sign * value for value in plan.get(each.column, ())]
    of_negative = {each.column for each in scores.objectives if each.prompts == "negative"}
    signed = {f"{sign} {column}" for column in of_negative for sign in (-1, 1)}
    negative = frozenset({"kl"} | of_negative | signed)
    return optimism(plans, Judged(rule, by, max_kl, at_most, negative))


def n_of(bench: ValidationBench, objective: Objective) -> int:
    """Prompts that an objective is a mean over."""
    return len((bench.negative if objective.prompts == "negative" else bench.positive).rows)
