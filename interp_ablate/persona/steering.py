"""Steering along a persona vector: the layer, the coefficients, the curve.

Knows: layers and coefficients. Does not know: extraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from interp_ablate.directions.direction import Direction, random_direction
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.jobs.progress import Progress
from interp_ablate.models.model import Model
from interp_ablate.persona.answers import Rollout, RolloutRequest
from interp_ablate.persona.persona import Persona, addition_plan
from interp_ablate.persona.rollouts import run_rollouts
from interp_ablate.persona.settings import DEFAULTS, ExtractionConfig, SamplingConfig
from interp_ablate.persona.traits import split_questions
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.stats.intervals import mean_estimate

GREEDY = SamplingConfig(temperature=0.0)
COEFFICIENTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
CURVE_COLUMNS = (
    "condition", "coefficient", "score", "score_low", "score_high", "coherence", "coherence_low",
    "coherence_high", "questions", "answers", "no_verdict",
)  # fmt: skip


# ---- steering -------------------------------------------------------------------------------------


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
    """The layer and coefficient whose steered answers score highest and are coherent.

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
            place = {"layer": site.layer, "site": str(site), "norm": float(item.norm)}
            rows.append({**place, "coefficient": float(coefficient)})
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
    found = {name: summary([a for a in answers if a.key["condition"] == name]) for name in plans}
    table = [{**row, **found[_name(row)], "chosen": False} for row in rows]
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
    return chosen, table, found["unsteered"]


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


def summary(answers: Sequence[Rollout]) -> dict[str, Any]:
    """Means over questions with 95% intervals; answers without a verdict are counted, not averaged."""
    return {
        **_mean("score", answers, lambda answer: answer.score),
        **_mean("coherence", answers, lambda answer: answer.coherence),
        "questions": len({answer.key["question"] for answer in answers}),
        "answers": len(answers),
        "no_verdict": sum(answer.score is None for answer in answers),
    }


def _mean(
    name: str, answers: Sequence[Rollout], read: Callable[[Rollout], float | None]
) -> dict[str, float | None]:
    """The mean over questions of the mean over each one's answers; bootstrapped over questions."""
    by_question: dict[int, list[float]] = {}
    for answer in answers:
        value = read(answer)
        if value is not None:
            by_question.setdefault(answer.key["question"], []).append(value)
    means = [sum(values) / len(values) for values in by_question.values()]
    if not means:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    estimate = mean_estimate(means, fewest=1)
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def steer(
    model: Model,
    persona: Persona,
    path: str | Path,
    *,
    scorer: TextScorer,
    coherence: TextScorer | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    questions: int | None = None,
    controls: int = 1,
    samples: int = 1,
    sampling: SamplingConfig = GREEDY,
    listener: Progress | None = None,
) -> list[Rollout]:
    """Answers to evaluation questions (no system prompt) with the vector added, coefficient by coefficient.

    Beside the persona's direction as many random directions of the same norm at the same site as
    `controls` says. `curve` makes a table of the answers; they are stored in `path` as they come.

    Args:
        questions: how many of the trait's evaluation questions; default all.
        samples: of each question, where `sampling` has a temperature.

    Raises:
        InterpAblateError: no coefficients, twice the same one, or too many questions.
    """
    if not coefficients or len(set(coefficients)) < len(coefficients) or controls < 0:
        raise InterpAblateError(
            f"coefficients {', '.join(f'{c:g}' for c in coefficients) or 'none'}, {controls} controls: give "
            "different coefficients, and 0 controls or more"
        )
    persona.check(model)
    count = len(persona.trait.evaluation_questions) if questions is None else questions
    asked = split_questions(persona.trait, making=1, choosing=1, reporting=count).reporting
    plans = _steering_plans(persona.direction, coefficients, controls)
    return run_rollouts(
        model,
        steering_requests(plans, asked, samples=samples),
        path,
        scorer=scorer,
        coherence=coherence,
        sampling=sampling,
        listener=listener,
    )


def _steering_plans(
    direction: Direction, coefficients: Sequence[float], controls: int
) -> dict[str, Plan | None]:
    """Plans by condition and coefficient; at 0 nothing is added, whatever the direction."""
    directions = {"persona": direction}
    for seed in range(controls):
        directions[f"random {seed}"] = random_direction(direction, seed=seed)
    plans: dict[str, Plan | None] = {"persona 0": None} if 0 in coefficients else {}
    for name, one in directions.items():
        plans |= {f"{name} {c:g}": addition_plan(one, c) for c in coefficients if c}
    return plans


def curve(answers: Sequence[Rollout]) -> pd.DataFrame:
    """Trait score and coherence by direction and coefficient (CURVE_COLUMNS), intervals over questions."""
    rows = []
    for name in dict.fromkeys(answer.key["condition"] for answer in answers):
        condition, _, coefficient = name.rpartition(" ")
        here = [answer for answer in answers if answer.key["condition"] == name]
        rows.append({"condition": condition, "coefficient": float(coefficient), **summary(here)})
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    measured = [name for name in CURVE_COLUMNS if name.startswith(("score", "coherence"))]
    frame[measured] = frame[measured].astype(float)  # None, where there is no verdict, is NaN
    return frame.sort_values(["condition", "coefficient"], kind="stable").reset_index(drop=True)
