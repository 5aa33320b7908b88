"""A run of a concept: what is measured of two sets of prompts where nothing says how a behaviour would look.

Directions, held-out probes and projections are those of any run. Beside them stand what writes the direction,
and what ablating or adding each layer's direction does to the next token. No plan is chosen and nothing exported.

Knows: when a run is one of a concept, its tables. Does not know: trials, plans or exports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from interp_ablate.circuits.attribution import attribute
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import most_separating
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.metrics import TargetLogOdds, find_target_tokens, first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.run_folder import Run
from interp_ablate.scoring.expression_lists import EXPRESSIONS_OF_CONTRAST
from interp_ablate.sites import RESIDUAL_POINTS
from interp_ablate.stats.intervals import AT_LEAST_0, Estimate, difference_estimate, mean_estimate

MAKES_IT_ONE = (
    "To make it a run of a behaviour, say how its answers look: --expressions NAME_OR_FILE (a built-in list, "
    "or a file with a phrase a line), on prompts whose answers show it"
)
WITHOUT_BEHAVIOUR = (
    "no --expressions were given, and the prompts are no bundled set that has some: this is a run of a concept "
    "(directions, held-out probes, projections, attribution, effects by layer), without a plan and an export. "
    f"{MAKES_IT_ONE}"
)


def is_concept(run: Run) -> bool:
    """True if nothing says how the behaviour looks, or the unedited model was found not to show it."""
    c = run.configuration
    named = c.expressions is not None or (
        bool(c.contrast) and run.contrast_set.name in EXPRESSIONS_OF_CONTRAST
    )
    return not named or bool(run.state.get("no_behaviour"))


def found_no_behaviour(run: Run) -> bool:
    """Whether no unedited answer to a positive validation prompt shows the behaviour; kept in run.json."""
    if "no_behaviour" not in run.state:
        n, rate = _unedited_rate(run)
        run.record(no_behaviour=rate == 0)
        if rate == 0:
            run.note(
                f"none of the {n} unedited answers to positive validation prompts shows the behaviour: there is "
                "nothing to remove, and this is a run of a concept (directions, held-out probes, projections, "
                f"attribution, effects by layer), without a plan and an export. {MAKES_IT_ONE}"
            )
        run.save()
    return bool(run.state["no_behaviour"])


def _unedited_rate(run: Run) -> tuple[int, float]:
    """How many positive validation prompts there are, and how often their answers show the behaviour."""
    try:
        outputs = run.bench.positive
    except InterpAblateError:  # no target tokens
        prompts = run.split.validation.positive
        outputs = ModelOutputs(run.model, prompts, max_new_tokens=run.configuration.max_new_tokens)
        if float(run.expression(outputs, outputs).mean()):
            raise
    return len(outputs.rows), float(run.expression(outputs, outputs).mean())


def run_concept(run: Run) -> None:
    """attribution.csv and layer_effects.csv, of validation prompts."""
    if run.configuration.expressions is None and not run.state.get("no_behaviour"):
        run.note(WITHOUT_BEHAVIOUR)
    run.record(concept=True)
    directions = list(run.directions.of(MAIN_METHOD))
    run.write("attribution.csv", _attribution(run, directions))
    run.write("layer_effects.csv", _layer_effects(run, directions))


def attributable(directions: Iterable[Direction]) -> list[Direction]:
    """The directions that were read in the residual stream at one token, and whose separation was measured."""
    return [
        item
        for item in directions
        if item.site.point in RESIDUAL_POINTS
        and item.position.lstrip("-").isdigit()
        and item.separation is not None
    ]


def _attribution(run: Run, directions: list[Direction]) -> pd.DataFrame:
    """What writes the direction that separates best, among those read in the stream at one token."""
    measured = attributable(directions)
    if not measured:
        run.note("no attribution: no direction was read in the residual stream at one token")
        return pd.DataFrame(columns=["term", "kind", "layer", "module", "index", "difference"])
    best = most_separating(measured)
    prompts = run.split.validation
    total = len(prompts.positive) + len(prompts.negative)
    with run.step("attribution", total) as advance:
        result = attribute(run.model, prompts, best, on_batch=advance)
    run.record(attribution={"direction": best.name, "whole": result.whole, "error": result.error})
    return result.to_frame()


def _layer_effects(run: Run, directions: list[Direction]) -> pd.DataFrame:
    """Next-token effects of ablating each direction at all writers, and of adding it at its site.

    Ablation is measured on positive validation prompts, addition on negative ones: the change of the target
    tokens' log-odds (mean, 95% interval), and the KL from the unedited model in nats.
    """
    train, validation = run.split.train, run.split.validation
    target = _target(run, train)
    sides = {
        "ablate": ModelOutputs(run.model, validation.positive),
        "add": ModelOutputs(run.model, validation.negative),
    }
    rows: list[dict[str, Any]] = []
    with run.step("effects by layer", len(directions)) as advance:
        for item in directions:
            plans = {
                "ablate": Plan((Ablate(item, run.model.writers),)),
                "add": Plan((Add(item, item.site),)),
            }
            for edit, outputs in sides.items():
                rows.append(_effect(item, edit, outputs, plans[edit], target))
            advance(1)
    return pd.DataFrame(rows)


def _target(run: Run, train: Any) -> TargetLogOdds | None:
    """The tokens with which answers to positive training prompts begin more often; None where there are none."""
    first = [
        ModelOutputs(run.model, side).first_logprobs for side in (train.positive, train.negative)
    ]
    try:
        targets = find_target_tokens(*first)
    except InterpAblateError as error:
        run.note(f"effects by layer have no log-odds: {str(error).partition('.')[0]}")
        return None
    run.record(
        target_tokens=[
            {"id": i, "text": run.model.decode([i]), "p_positive": p, "p_negative": q}
            for i, p, q in targets
        ]
    )
    return TargetLogOdds(tuple(token for token, _, _ in targets))


def _effect(
    item: Direction, edit: str, unedited: ModelOutputs, plan: Plan, target: TargetLogOdds | None
) -> dict[str, Any]:
    edited = unedited.with_plan(plan)
    odds = Estimate(float("nan"))
    if target is not None:
        before, after = target(unedited, unedited), target(edited, unedited)
        odds = difference_estimate(before.tolist(), after.tolist())
    kl = mean_estimate(first_token_kl(edited, unedited).tolist(), bounds=AT_LEAST_0)
    return {
        "layer": item.site.layer, "point": item.site.point, "position": item.position, "edit": edit,
        "log_odds_change": odds.value, "log_odds_low": odds.low, "log_odds_high": odds.high,
        "kl": kl.value, "kl_low": kl.low, "kl_high": kl.high, "n": len(unedited.rows),
    }  # fmt: skip
