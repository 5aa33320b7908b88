"""The chosen plan on the test split, beside controls.

Knows: the choice on validation prompts, the report on test prompts. Does not know: how plans were proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError
from interp_ablate.evaluation.float32_kl import first_token_kl_floor, float32_first_token_kl
from interp_ablate.evaluation.metrics import (
    answer_metrics,
    behaviour_left,
    continuation_scores,
    unanswered,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.model import Model
from interp_ablate.prompts.chat_format import described
from interp_ablate.runs.fits import Step
from interp_ablate.runs.kept_answers import answers_of, unedited_answers
from interp_ablate.runs.nearest_plans import keep_nearest
from interp_ablate.runs.objective_results import (
    limits_of,
    n_of,
    optimism_of,
    tested_objectives,
    unedited_scores,
)
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.search_settings import SearchSettings
from interp_ablate.scoring.behaviour import Behaviour, lacking
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.derived_edits import (
    control_plan,
    random_directions,
    scaled_to_kl,
    shuffled_labels_direction,
)
from interp_ablate.search.edit_space import PLAIN, plan_of
from interp_ablate.search.objectives import leading
from interp_ablate.search.rules import RuleInput
from interp_ablate.search.selection import Selection, choose_plan
from interp_ablate.search.trial_table import params_of
from interp_ablate.search.trials import Trial
from interp_ablate.settings import DEFAULT_RULE
from interp_ablate.stats.intervals import AT_LEAST_0, SHARE, Bounds, mean_interval

# Validation prompts on which controls get the chosen plan's KL, and the KL below which there is nothing to match.
KL_PROMPTS, LEAST_KL = 16, 1e-6
ADDITION_COEFFICIENTS = (1.0, 1.5, 2.0, 3.0)
# The smallest coefficient that reaches this rate on validation prompts is taken.
ADDITION_TARGET = 0.75


def choose_and_test(
    run: Run,
    finalists: pd.DataFrame,
    *,
    repetition_slack: float = 0.0,
    search: SearchSettings | None = None,
    tried: Sequence[Trial] = (),
) -> None:
    """Choose on validation scores and test the choice, if any: selected.json and generations.jsonl.

    Args:
        finalists: rows of the table of trials, with text scores.
        repetition_slack: how much more than the unedited model's a plan's answers may repeat themselves.
        search: that the finalists come from; None: a run.
        tried: the plans that were chosen among, with their numbers by prompt: what the optimism is estimated from.
    """
    c, bench = run.configuration, run.bench.finalists or run.bench
    control = None if search is None else search.control
    unedited, validation = unedited_scores(bench), unedited_scores(run.bench)
    max_kl, limited = limits_of(bench.objectives, c.max_kl)
    lead = leading(bench.objectives.objectives)
    by = RuleInput(lead.column, lead.maximize, n_of(bench, lead), unedited.get(lead.column))
    if lead.measure != "expressions" or lead.maximize:
        by = replace(by, soft=None)  # which is of the behaviour, where that is made small
    choice = choose_plan(
        finalists,
        DEFAULT_RULE if search is None else search.rule,
        by,
        max_kl=max_kl,
        at_most={
            "repetition": unedited["repetition"] + repetition_slack,
            "empty": unedited["empty"],
        },
        limits=limited,
    )
    told = optimism_of(
        tried, choice.rule, by, bench.objectives, validation, max_kl, repetition_slack
    )
    selected: dict[str, Any] = {
        "rule": choice.rule,
        "optimism": told,
        "limits": choice.limits(),
        "plan": None,
        "control": control,
        "chosen_by": "run" if search is None else "search",
        "objectives": [each.text for each in bench.objectives.objectives],
        "validation_baseline": validation,
        "validation_prompts": run.bench.n_prompts,
        "finalist_prompts": None if bench is run.bench else bench.n_prompts,
    }
    run.record(no_plan=choice.row is None)
    if choice.row is None:
        generations = unedited_answers(run.bench.expression, run.bench.positive, run.bench.negative)
        selected["nearest"] = keep_nearest(run, finalists, by, control)
        run.note(f"no candidate passed the limits: {choice.removed}; {choice.relax}")
    else:
        tested, generations = _tested(run, choice, control)
        selected |= tested
    run.write("generations.jsonl", generations)
    run.write("selected.json", selected)


def _tested(
    run: Run, choice: Selection, control: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What selected.json says of a chosen trial, and the texts behind it."""
    assert choice.row is not None
    c, space = run.configuration, run.edit_space(control=control)
    params = params_of(choice.row)
    plan, source = plan_of(params, space), space.source(params)
    train = run.activations("train")
    directions = random_directions(source, seed=c.seed)
    assert train.labels is not None
    try:
        null = shuffled_labels_direction(
            train.at(source.site, source.position),
            train.labels,
            source,
            orthogonal=params.get("method", PLAIN) != PLAIN,
            seed=c.seed,
        )
        if null is not None:
            directions.append(("shuffled labels", null))
    except DirectionError as error:
        run.note(f"no shuffled-labels control: {error}")
    addition = addition_plan(run.bench, source, run.step)
    outputs = TestOutputs.of(run.model, run.split.test, plan, addition, c.max_new_tokens)
    controls = _controls(run, plan, directions)
    test = measure_on_test(outputs, run.bench.expression, controls, run.step, seed=c.seed)
    test["how"] = _how(run)
    test["objectives"] = tested_objectives(
        run.bench.objectives,
        run.bench.expression,
        (outputs.ablated_positive, outputs.ablated_negative),
        (outputs.positive, outputs.negative),
        seed=c.seed,
    )
    sides = (outputs.positive, outputs.ablated_positive, outputs.negative, outputs.ablated_negative)
    cut = [int(unanswered(side).sum()) for side in sides]
    if any(cut):
        run.note(
            f"{sum(cut)} of the test split's answers are none: a thought began and did not end. {cut[1]} of them are "
            "of positive prompts under the plan, where no answer counts as one with the behaviour; elsewhere it "
            "counts as one without"
        )
    selected = {
        "plan": plan.to_dict(),
        "addition_plan": addition.to_dict(),
        "trial": choice.trial,
        "test": test,
    }
    generations = answers_of(run.bench.expression, outputs.conditions, split="test")
    if none := lacking(generations):
        run.note(
            f"{none} of the test split's answers have no verdict by {run.bench.expression.name} (generations.jsonl "
            "says why). They count as answers without the behaviour"
        )
    return selected, generations


@dataclass(frozen=True)
class Control:
    """The chosen plan along another direction."""

    name: str
    plan: Plan
    factor: float | None = None
    """Of its strengths, where they are scaled until its KL is that of the chosen plan."""

    @property
    def matched(self) -> str:
        """What it shares with the chosen plan."""
        return "strength" if self.factor is None else "KL"


def _controls(run: Run, plan: Plan, directions: Sequence[tuple[str, Direction]]) -> list[Control]:
    """The plan along other directions: of equal strength, and of equal KL on validation prompts."""
    unedited = run.bench.negative.head(KL_PROMPTS)

    def kl_of(candidate: Plan) -> float:
        return float(float32_first_token_kl(unedited, [candidate])[0].mean())

    equal = [Control(name, control_plan(plan, other)) for name, other in directions]
    kl, scaled = kl_of(plan), []
    with run.step("controls of equal KL", len(equal)) as advance:
        for control in equal if kl > LEAST_KL else ():
            found = scaled_to_kl(control.plan, kl, kl_of)
            if found is not None:
                scaled.append(Control(control.name, *found))
            advance(1)
    return equal + scaled


def addition_plan(bench: ValidationBench, direction: Direction, step: Step) -> Plan:
    """Addition at the direction's own site, with the smallest coefficient that induces the behaviour."""
    best, best_rate = ADDITION_COEFFICIENTS[0], -1.0
    with step("addition coefficient", len(ADDITION_COEFFICIENTS)) as advance:
        for coefficient in ADDITION_COEFFICIENTS:
            plan = Plan((Add(direction, direction.site, coefficient=coefficient),))
            rate = float(bench.expression(bench.negative.with_plan(plan), bench.negative).mean())
            advance(1)
            if rate > best_rate:
                best, best_rate = coefficient, rate
            if rate >= ADDITION_TARGET:
                break
    return Plan((Add(direction, direction.site, coefficient=best),))


@dataclass(frozen=True)
class TestOutputs:
    """What the model does on the test prompts: unedited, under the plan, under the addition."""

    __test__ = False  # no test of pytest's

    positive: ModelOutputs
    negative: ModelOutputs
    ablated_positive: ModelOutputs
    ablated_negative: ModelOutputs
    added: ModelOutputs
    """Negative prompts under the addition."""

    @classmethod
    def of(
        cls, model: Model, test: Any, plan: Plan, addition: Plan, max_new_tokens: int
    ) -> TestOutputs:
        positive, negative = (
            ModelOutputs(model, prompts, max_new_tokens=max_new_tokens)
            for prompts in (test.positive, test.negative)
        )
        ablated = positive.with_plan(plan), negative.with_plan(plan)
        return cls(positive, negative, *ablated, negative.with_plan(addition))

    @property
    def conditions(self) -> tuple[tuple[str, str, ModelOutputs], ...]:
        """Each with its name and the set of its prompts."""
        return (
            ("baseline", "positive", self.positive),
            ("ablated", "positive", self.ablated_positive),
            ("baseline", "negative", self.negative),
            ("ablated", "negative", self.ablated_negative),
            ("added", "negative", self.added),
        )


def measure_on_test(
    outputs: TestOutputs,
    scorer: Behaviour,
    controls: Sequence[Control],
    step: Step,
    *,
    seed: int,
) -> dict[str, Any]:
    """Everything that is reported of the test split: means, 95% intervals, controls."""
    with step("test split", 7 + len(controls)) as advance:
        values = _values(outputs, scorer, advance)
        on_positive = [outputs.positive.with_plan(control.plan) for control in controls]
        generate_outputs_together(on_positive)
        kls = float32_first_token_kl(outputs.negative, [control.plan for control in controls])
        results = []
        for control, answered, kl in zip(controls, on_positive, kls):
            rates = scorer(answered, outputs.positive)
            results.append(_control(control, rates, kl))
            advance(1)
    floor, dtype = first_token_kl_floor(outputs.negative)
    most = outputs.positive.max_new_tokens
    intervals = {
        name: mean_interval(value.double().numpy(), bounds=_bounds_of(name, most), seed=seed)
        for name, value in values.items()
    }
    return {
        **{name: float(value.double().mean()) for name, value in values.items()},
        "intervals": intervals,
        "kl_floor": floor,
        "kl_dtype": dtype,
        "n": {"positive": len(outputs.positive.rows), "negative": len(outputs.negative.rows)},
        "controls": results,
    }


def _bounds_of(measure: str, max_new_tokens: int) -> Bounds:
    """What a measure of one prompt can be: a KL, a perplexity, a number of tokens, or a share."""
    if measure.startswith(("kl", "perplexity")):
        return AT_LEAST_0
    return (0.0, max_new_tokens) if measure.startswith("length") else SHARE


def _values(
    outputs: TestOutputs, scorer: Behaviour, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """A number a prompt for every measure; in seven steps."""
    base_p, base_n = outputs.positive, outputs.negative
    new_p, new_n, added = outputs.ablated_positive, outputs.ablated_negative, outputs.added
    generate_outputs_together([base_p, base_n, new_p, new_n, added])
    values: dict[str, torch.Tensor] = {}
    for name, on, base in (
        ("behaviour_before", base_p, base_p),
        ("behaviour_after", new_p, base_p),
        ("negative_before", base_n, base_n),
        ("negative_after", new_n, base_n),
        ("addition_after", added, base_n),
    ):
        values[name] = (
            behaviour_left(scorer, on, base) if name == "behaviour_after" else scorer(on, base)
        )
        advance(1)
    assert new_n.plan is not None
    (values["kl_first_token"],) = float32_first_token_kl(base_n, [new_n.plan])
    with in_float32(base_n.model.tl):
        values |= continuation_scores(new_n.answered(), base_n.answered())
    advance(1)
    for when, positive, negative in (("before", base_p, base_n), ("after", new_p, new_n)):
        of_positive, of_negative = (
            {name: torch.tensor(column) for name, column in answer_metrics(side).items()}
            for side in (positive, negative)
        )
        values[f"positive_repetition_{when}"] = of_positive["repetition"]
        values[f"positive_empty_{when}"] = of_positive["empty"]
        values[f"positive_no_answer_{when}"] = unanswered(positive)
        values[f"repetition_{when}"] = of_negative["repetition"]
        values[f"length_{when}"] = of_negative["length"]
    advance(1)
    return values


def _control(control: Control, rates: Tensor, kl: Tensor) -> dict[str, Any]:
    return {
        "name": control.name + (", equal KL" if control.matched == "KL" else ""),
        "matched": control.matched,
        "strength_factor": control.factor,
        "behaviour_after": float(rates.double().mean()),
        "interval": mean_interval(rates.double().numpy(), bounds=SHARE),
        "kl_first_token": float(kl.mean()),
    }


def _how(run: Run) -> dict[str, str]:
    """How the numbers of the test split were measured, for the model card."""
    splits = (run.split.train, run.split.validation, run.split.test)
    counts = [f"{len(part.positive)} + {len(part.negative)}" for part in splits]
    return {
        **described(run.model.chat_format),
        "contrast set": run.split.train.name,
        "train, validation, test prompts": ", ".join(counts),
        "decoding": f"greedy, {run.configuration.max_new_tokens} new tokens",
        "behaviour": "share of answers in which a listed expression is found"
        if isinstance(run.bench.expression, ExpressionScorer)
        else f"mean over answers of the score by {run.bench.expression.name}, over 100",
        "KL": "weights in float32 where memory holds them",
        "controls": "the same edit along other directions, of equal strength and of equal KL (on validation prompts)",
        "intervals": "95%: exact for rates, studentized bootstrap over prompts for means",
    }
