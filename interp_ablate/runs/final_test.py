"""The chosen plan on the test split, beside controls.

Knows: the report on test. Does not know: how the plan was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from interp_ablate.directions.direction import Direction, orthogonalized, random_direction
from interp_ablate.directions.mean_difference import difference_in_means, shuffled_labels
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError
from interp_ablate.evaluation.metrics import (
    Empty,
    FirstTokenKL,
    Length,
    Repetition,
    continuation_scores,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.validation_bench import bench_of
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.candidates import Candidate
from interp_ablate.search.selection import Selection
from interp_ablate.stats.intervals import bootstrap_interval

N_RANDOM_CONTROLS = 2
# Measures that are shares of prompts; the others are means of real numbers.
RATES = (
    "positive_empty_before",
    "positive_empty_after",
    "behaviour_before",
    "behaviour_after",
    "negative_before",
    "negative_after",
    "addition_after",
)
ADDITION_COEFFICIENTS = (1.0, 1.5, 2.0, 3.0)
# The smallest coefficient that reaches this rate on validation prompts is taken.
ADDITION_TARGET = 0.75


def report_on_test(
    run: Run,
    choice: Selection,
    plans: Callable[[dict[str, Any]], tuple[Plan, Direction, list[tuple[str, Plan]]]],
    **more: Any,
) -> None:
    """Test what was chosen, if anything was: selected.json (with `more`) and generations.jsonl.

    Args:
        plans: from the chosen row to its plan, the direction to add, and control plans by name.
    """
    selected: dict[str, Any] = {
        "rule": choice.rule,
        "limits": choice.limits(),
        "plan": None,
        **more,
    }
    generations: list[dict[str, Any]] = []
    run.state["no_plan"] = choice.row is None
    if choice.row is None:
        run.note(f"no candidate passed the limits: {choice.removed}; {choice.relax}")
    else:
        plan, direction, controls = plans(choice.row)
        addition = _addition_plan(run, direction)
        test, generations = _measure_on_test(run, plan, addition, controls)
        selected |= {"plan": plan.to_dict(), "addition_plan": addition.to_dict()}
        selected |= {"trial": choice.trial, "test": test}
    run.write("generations.jsonl", generations)
    run.write("selected.json", selected)


def _addition_plan(run: Run, direction: Direction) -> Plan:
    """Addition at the direction's own site, with the smallest coefficient that induces the behaviour."""
    bench = bench_of(run)
    best, best_rate = ADDITION_COEFFICIENTS[0], -1.0
    with run.step("addition coefficient", len(ADDITION_COEFFICIENTS)) as advance:
        for coefficient in ADDITION_COEFFICIENTS:
            plan = Plan((Add(direction, direction.site, coefficient=coefficient),))
            rate = float(bench.expression(bench.negative.with_plan(plan), bench.negative).mean())
            advance(1)
            if rate > best_rate:
                best, best_rate = coefficient, rate
            if rate >= ADDITION_TARGET:
                break
    return Plan((Add(direction, direction.site, coefficient=best),))


def _measure_on_test(
    run: Run, plan: Plan, addition: Plan, control_plans: Sequence[tuple[str, Plan]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that is reported of the test split, and the texts behind it."""
    model, test, c = run.model, run.split.test, run.configuration
    scorer = bench_of(run).expression

    with run.step("test split", 7 + len(control_plans)) as advance:
        sides = {"positive": test.positive, "negative": test.negative}
        base_p, base_n = (
            ModelOutputs(model, prompts, max_new_tokens=c.max_new_tokens)
            for prompts in sides.values()
        )
        new_p, new_n, added = (
            base_p.with_plan(plan),
            base_n.with_plan(plan),
            base_n.with_plan(addition),
        )
        generate_outputs_together([base_p, base_n, new_p, new_n, added])
        values: dict[str, torch.Tensor] = {}
        for name, here, base in (
            ("behaviour_before", base_p, base_p),
            ("behaviour_after", new_p, base_p),
            ("negative_before", base_n, base_n),
            ("negative_after", new_n, base_n),
            ("addition_after", added, base_n),
        ):
            values[name] = scorer(here, base)
            advance(1)
        values["kl_first_token"] = FirstTokenKL()(new_n, base_n)
        values |= continuation_scores(new_n, base_n)
        advance(1)
        for name, here in (("before", base_p), ("after", new_p)):
            values[f"positive_repetition_{name}"] = Repetition()(here, base_p)
            values[f"positive_empty_{name}"] = Empty()(here, base_p)
        for name, here in (("before", base_n), ("after", new_n)):
            values[f"repetition_{name}"] = Repetition()(here, base_n)
            values[f"length_{name}"] = Length()(here, base_n)
        advance(1)
        controls = []
        for name, control in control_plans:
            controls.append(_control(run, name, control, base_p, base_n))
            advance(1)
    result: dict[str, Any] = {name: float(value.double().mean()) for name, value in values.items()}
    result["intervals"] = {
        name: list(
            bootstrap_interval(value.double().numpy(), seed=c.seed, proportion=name in RATES)
        )
        for name, value in values.items()
    }
    result["n"] = {side: len(prompts) for side, prompts in sides.items()}
    result["controls"] = controls
    result["how"] = _how(run)
    texts = [("baseline", "positive", base_p), ("ablated", "positive", new_p)]
    texts += [
        ("baseline", "negative", base_n),
        ("ablated", "negative", new_n),
        ("added", "negative", added),
    ]
    return result, [
        row for name, side, e in texts for row in _texts(name, side, sides[side], e, scorer)
    ]


def _how(run: Run) -> dict[str, str]:
    """How the numbers of the test split were measured, for the model card."""
    c = run.configuration
    splits = (run.split.train, run.split.validation, run.split.test)
    counts = [f"{len(part.positive)} + {len(part.negative)}" for part in splits]
    return {
        "contrast set": run.split.train.name,
        "train, validation, test prompts": ", ".join(counts),
        "decoding": f"greedy, {c.max_new_tokens} new tokens",
        "behaviour": "share of answers in which a listed expression is found",
        "intervals": "95%: exact for rates, bootstrap over prompts for means",
    }


def _texts(
    condition: str,
    side: str,
    prompts: Sequence[Any],
    evidence: ModelOutputs,
    scorer: ExpressionScorer,
) -> list[dict[str, Any]]:
    rows = []
    for prompt, text in zip(prompts, evidence.texts):
        matches = scorer.matches(text)
        rows.append(
            {
                "label": side,
                "prompt": prompt.text,
                "condition": condition,
                "text": text,
                "expressed": scorer.outcome(text) == "expressed",
                "matches": [match.expression for match in matches],
            }
        )
    return rows


def measure_controls(run: Run, candidate: Candidate) -> list[tuple[str, Direction]]:
    """Random directions of equal norm, and the direction of shuffled labels, for the chosen plan."""
    site, position = candidate.site, candidate.position
    direction = run.directions[site, position, candidate.method]
    seed = run.configuration.seed
    found = random_controls(run, direction)
    train = run.activations("train")
    values, labels = train.at(site, position), train.labels
    shuffled = shuffled_labels(labels, seed=seed)
    null = difference_in_means(
        values[shuffled], values[~shuffled], site, position=position, method="shuffled_labels"
    )
    if null is not None:
        try:
            if candidate.method != MAIN_METHOD:
                null = orthogonalized(null, values[~shuffled].double().mean(0))
            found.append(("shuffled labels", null))
        except DirectionError as error:
            run.note(f"no shuffled-labels control: {error}")
    return found


def random_controls(run: Run, like: Direction) -> list[tuple[str, Direction]]:
    """Random directions of equal norm, by name; the same ones for one seed."""
    seeds = [1000 * run.configuration.seed + i for i in range(N_RANDOM_CONTROLS)]
    return [(f"random {i}", random_direction(like, seed=seed)) for i, seed in enumerate(seeds)]


def _control(
    run: Run, name: str, plan: Plan, base_positive: ModelOutputs, base_negative: ModelOutputs
) -> dict[str, Any]:
    on_positive, on_negative = base_positive.with_plan(plan), base_negative.with_plan(plan)
    rates = bench_of(run).expression(on_positive, base_positive).double()
    return {
        "name": name,
        "behaviour_after": float(rates.mean()),
        "interval": list(bootstrap_interval(rates.numpy(), proportion=True)),
        "kl_first_token": float(FirstTokenKL()(on_negative, base_negative).mean()),
    }
