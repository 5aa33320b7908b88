"""Steering along a persona vector: the choice of a layer and a coefficient, and the curve over coefficients.

Knows: plans by condition, and means over questions. Does not know: how a direction is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from interp_ablate.directions.direction import Direction, random_directions
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.jobs.bars import Progress
from interp_ablate.models.model import Model, check_model
from interp_ablate.persona.persona import Persona, addition_plan
from interp_ablate.persona.rollouts import Rollout, RolloutRequest, run_rollouts
from interp_ablate.persona.settings import DEFAULTS, STEERING, ExtractionConfig, SteeringConfig
from interp_ablate.persona.traits import first_evaluation_questions
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.intervals import SCORE, mean_estimate

CURVE_COLUMNS = (
    "condition", "coefficient", "score", "score_low", "score_high", "coherence", "coherence_low",
    "coherence_high", "questions", "answers", "no_verdict",
)  # fmt: skip


def choose_layer(
    model: Model,
    directions: Sequence[Direction],
    questions: Sequence[str],
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: ExtractionConfig = DEFAULTS,
    listener: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Find the layer and coefficient whose steered answers score highest and are coherent.

    Returns the chosen row, all rows (LAYER_COLUMNS), and the unsteered answers' row. Answers are greedy,
    without a system prompt. Ties go to the smaller coefficient, then to the earlier layer.

    Raises:
        RunError: no candidate has coherent answers with a verdict.
        InterpAblateError: no directions, questions or coefficients.
    """
    if not directions or not questions or not settings.coefficients:
        raise InterpAblateError(
            f"{len(directions)} directions, {len(questions)} questions, {len(settings.coefficients)} "
            "coefficients: choosing a layer needs some of each"
        )
    plans: dict[str, Plan | None] = {"unsteered": None}
    rows = []
    for coefficient in settings.coefficients:
        for item in directions:
            site = item.site
            row = {"layer": site.layer, "site": str(site), "norm": float(item.norm)}
            rows.append({**row, "coefficient": float(coefficient)})
            plans[_name(rows[-1])] = addition_plan(item, coefficient)
    answers = run_rollouts(
        model,
        steering_requests(plans, questions),
        path,
        scorer=scorer,
        coherence=coherence,
        sampling=replace(settings.sampling, temperature=0.0, seed=0),
        listener=listener,
    )
    means = {name: summary(group) for name, group in by_condition(answers).items()}
    table = [{**row, **means[_name(row)], "chosen": False} for row in rows]
    usable = [
        row
        for row in table
        if row["score"] is not None
        and 2 * row["no_verdict"] <= row["answers"]
        and (row["coherence"] or 0.0) >= settings.min_coherence
    ]
    if not usable:
        raise RunError(_nothing_usable(table, settings))
    chosen = max(usable, key=lambda row: (row["score"], -row["coefficient"], -row["layer"]))
    chosen["chosen"] = True
    return chosen, table, means["unsteered"]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['site']} {row['coefficient']:g}"


def _nothing_usable(table: Sequence[Mapping[str, Any]], settings: ExtractionConfig) -> str:
    best = max(row["coherence"] or 0.0 for row in table)
    return (
        "no layer gives coherent answers of which most have a verdict (coherence of at least "
        f"{settings.min_coherence:g}; the best has {best:.0f}) with coefficients "
        f"{', '.join(f'{c:g}' for c in settings.coefficients)}: give smaller --coefficients, or other "
        "--layers"
    )


def steering_requests(
    plans: Mapping[str, Plan | None], questions: Sequence[str], *, samples: int = 1
) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            {"condition": name, "question": number, "sample": sample}, Prompt(question), plan
        )
        for name, plan in plans.items()
        for number, question in enumerate(questions)
        for sample in range(samples)
    ]


def by_condition(answers: Iterable[Rollout]) -> dict[str, list[Rollout]]:
    """The answers of every condition, in the order in which they come."""
    groups: dict[str, list[Rollout]] = {}
    for answer in answers:
        groups.setdefault(answer.key["condition"], []).append(answer)
    return groups


def summary(answers: Sequence[Rollout]) -> dict[str, Any]:
    """Means over questions with 95% intervals; answers without a verdict are counted, not averaged."""
    return {
        **_mean_by_question("score", answers),
        **_mean_by_question("coherence", answers),
        "questions": len({answer.key["question"] for answer in answers}),
        "answers": len(answers),
        "no_verdict": sum(answer.score is None for answer in answers),
    }


def _mean_by_question(name: str, answers: Sequence[Rollout]) -> dict[str, float | None]:
    """The mean over questions of the mean over each one's answers, with its interval."""
    by_question: dict[int, list[float]] = {}
    for answer in answers:
        value = getattr(answer, name)
        if value is not None:
            by_question.setdefault(answer.key["question"], []).append(value)
    means = [sum(values) / len(values) for values in by_question.values()]
    if not means:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    estimate = mean_estimate(means, bounds=SCORE)
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def steer(
    model: Model,
    persona: Persona,
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    settings: SteeringConfig = STEERING,
    listener: Progress | None = None,
    replace_other: bool = False,
) -> list[Rollout]:
    """Answer evaluation questions (no system prompt) with the vector added, coefficient by coefficient.

    The controls are random directions of the same norm at the same site. `curve` makes a table of the
    answers; they are stored in `path` as they come.

    Args:
        replace_other: answers under other settings give way; by default they are refused.

    Raises:
        DirectionError: the persona is of a model of another shape.
        PromptError: more questions than the trait has.
    """
    check_model(model)
    persona.check(model)
    questions = first_evaluation_questions(persona.trait, settings.questions)
    controls = random_directions(persona.direction, settings.controls)
    directions = {"persona": persona.direction}
    directions |= {f"random {i}": control for i, control in enumerate(controls)}
    # at coefficient 0 nothing is added, whatever the direction
    plans: dict[str, Plan | None] = {"persona 0": None} if 0 in settings.coefficients else {}
    for name, direction in directions.items():
        plans |= {f"{name} {c:g}": addition_plan(direction, c) for c in settings.coefficients if c}
    return run_rollouts(
        model,
        steering_requests(plans, questions, samples=settings.samples),
        path,
        scorer=scorer,
        coherence=coherence,
        sampling=settings.sampling,
        listener=listener,
        replace_other=replace_other,
    )


def curve(answers: Sequence[Rollout]) -> pd.DataFrame:
    """Tabulate trait score and coherence by direction and coefficient (CURVE_COLUMNS), with intervals."""
    rows = []
    for name, group in by_condition(answers).items():
        condition, _, coefficient = name.rpartition(" ")
        rows.append({"condition": condition, "coefficient": float(coefficient), **summary(group)})
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    measured = [name for name in CURVE_COLUMNS if name.startswith(("score", "coherence"))]
    frame[measured] = frame[measured].astype(float)  # None, where there is no verdict, is NaN
    return frame.sort_values(["condition", "coefficient"], kind="stable").reset_index(drop=True)
