"""A run of a concept: what is measured of two sets of prompts where nothing says how a behaviour would look.

Directions, held-out probes and projections are those of any run. Beside them stand what writes the direction,
and what ablating or adding each layer's direction does to the next token. No plan is chosen and nothing exported.

Knows: when a run is one of a concept, its tables. Does not know: trials, plans or exports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from interp_ablate.circuits.attribution import attribute
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import most_separating, one_per_layer
from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.metrics import first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.kept_answers import unedited_answers
from interp_ablate.runs.run_folder import Run
from interp_ablate.runs.validation_bench import target_of
from interp_ablate.search.by_layer import Job, LayerSweep
from interp_ablate.sites import RESIDUAL_POINTS

N_SHUFFLED = 2  # directions of shuffled labels a layer, beside which effects stand
MAKES_IT_ONE = (
    "To make it a run of a behaviour, say how its answers look: --expressions NAME_OR_FILE (a built-in list, "
    "or a file with a phrase a line) or --scorer (a lexicon, a classifier, a judge, a function of yours), on prompts "
    "whose answers show it"
)
WITHOUT_BEHAVIOUR = (
    "no --expressions or --scorer were given, and the prompts are no bundled set that has some: this is a run of a concept "
    "(directions, held-out probes, projections, attribution, effects by layer), without a plan and an export. "
    f"{MAKES_IT_ONE}"
)


def is_concept(run: Run) -> bool:
    """True if nothing says how the behaviour looks, or the unedited model was found not to show it."""
    return not run.names_behaviour or bool(run.state.get("no_behaviour"))


def found_no_behaviour(run: Run) -> bool:
    """Whether no unedited answer to a positive validation prompt shows the behaviour; kept in run.json."""
    if "no_behaviour" not in run.state:
        outputs = _unedited(run)
        n, rate = len(outputs.rows), float(run.expression(outputs, outputs).mean())
        if rate == 0:  # before it is recorded, so that a call that is killed does both again
            run.write("generations.jsonl", unedited_answers(run.expression, outputs))
        run.record(no_behaviour=rate == 0)
        if rate == 0:
            run.note(
                f"none of the {n} unedited answers to positive validation prompts shows the behaviour: there is "
                "nothing to remove, and this is a run of a concept (directions, held-out probes, projections, "
                f"attribution, effects by layer), without a plan and an export. {MAKES_IT_ONE}"
            )
        run.save()
    return bool(run.state["no_behaviour"])


def _unedited(run: Run) -> ModelOutputs:
    """The unedited model's outputs on the positive validation prompts."""
    try:
        return run.bench.positive
    except InterpAblateError:  # no target tokens
        prompts = run.split.validation.positive
        outputs = ModelOutputs(run.model, prompts, max_new_tokens=run.configuration.max_new_tokens)
        if float(run.expression(outputs, outputs).mean()):
            raise
        return outputs


def run_concept(run: Run) -> None:
    """attribution.csv and layer_effects.csv, of validation prompts."""
    if not run.names_behaviour:
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
    """The layer sweep of validation prompts: each layer's direction ablated at all writers, added at its site.

    The target tokens are those that training prompts tell; without any, the KL stands alone.
    """
    scores: dict[str, Any] = {"kl_first_token": first_token_kl}
    try:
        target, records = target_of(run.model, run.split.train)
    except InterpAblateError as error:
        run.note(f"effects by layer have no log-odds: {str(error).partition('.')[0]}")
    else:
        run.record(target_tokens=records)
        scores = {"target_log_odds": target, **scores}
    items = one_per_layer(directions)
    sweep = LayerSweep.of(run.model, items, run.split.validation, scores, N_SHUFFLED)
    with run.step("effects by layer", len(items)) as advance:

        def jobs() -> Iterator[Job]:
            for item in items:
                yield item, "ablate", "writers"
                yield item, "add", "site"
                advance(1)

        return sweep.table(jobs())
