"""Plans of every weights-class method, on every architecture: weights == a plain oracle, and certified exports.

The methods' directions are estimated from the model itself. Every declared architecture is compared in memory under
each; every architecture is exported and read again under one, in turn, so that each method is exported many times.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_architectures import (
    DECLARED,
    EVERY,
    EXPERTS,
    ROWS,
    close,
    edited,
    is_norm_preserving,
    logits_of,
    moved,
    oracle,
    plain,
)
from tiny import N_LAYERS, PARTS, rows_of, shared, source_of, unit
from transformers import AutoModelForCausalLM

from interp_ablate import (
    Ablate,
    Activations,
    Directions,
    Model,
    Plan,
    Site,
    collect,
    export_checkpoint,
)
from interp_ablate.directions.biprojection import biprojected_directions
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.directions.opposite_signs import with_opposite_signs
from interp_ablate.directions.residualizing import residualized_directions
from interp_ablate.directions.self_organizing_map import som_directions
from interp_ablate.edits.layer_plans import ablate_by_layer
from interp_ablate.search.concept_cone import ConceptCone

METHODS = ("som", "residualized", "biprojected", "opposite signs", "cone")
LAST = Site(N_LAYERS - 1, "resid_post")


def model_of(kind: str) -> Model:
    """The plain transformers model; where no entry names the writers, the Bridge, which finds them."""
    return shared(kind, "hf" if kind in DECLARED else "bridge")


@cache
def activations(kind: str) -> Activations:
    """resid_post of every layer on two sets of rows, which differ in their last token."""
    rows = [[*row, 40 if i < 8 else 90] for i, row in enumerate(rows_of(*range(5, 21), seed=3))]
    sites = [Site(layer, "resid_post") for layer in range(N_LAYERS)]
    found = collect(model_of(kind), rows, sites)
    return replace(found, labels=torch.arange(len(rows)) < 8)


@cache
def plan_of(kind: str, method: str) -> Plan:
    model, found = model_of(kind), activations(kind)
    plain_directions = estimate_directions(found)
    labels, values = found.labels, found.at(LAST)
    assert labels is not None
    if method == "som":
        som = som_directions(values[labels], values[~labels], LAST)
        assert len(som.directions) > 1
        return Plan((Ablate(som.vectors, model.writers),))
    if method == "residualized":
        protected = estimate_directions(replace(found, labels=torch.arange(16) % 2 < 1))
        clean = residualized_directions(plain_directions, {"parity": protected})
        return Plan((Ablate(clean[LAST], model.writers),))
    if method == "biprojected":
        by_layer = biprojected_directions(plain_directions[LAST], found)
        assert len(by_layer) == N_LAYERS
        return ablate_by_layer(model, by_layer, norm_preserving=True)
    if method == "opposite signs":
        kept = with_opposite_signs(plain_directions, centred(found))
        return ablate_by_layer(model, kept, strength=0.8)
    cone = ConceptCone(unit(5, k=3), Directions(plain_directions.items)[LAST], (0.0,))
    return Plan((Ablate(cone.vectors, model.writers),))


def centred(found: Activations) -> Activations:
    """The same activations with their middle at zero, so that every layer passes the filter."""
    return replace(found, values=found.values - found.values.mean(0))


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.parametrize("method", METHODS)
def test_weights_equal_the_oracle(kind: str, method: str) -> None:
    plan, source = plan_of(kind, method), source_of(kind)
    want = oracle(source, kind, plan)
    assert moved(want, plain(kind, False)) > 1e-2
    close(logits_of(edited(source, plan)[0]), want)


SAMPLED = [
    (kind, method)
    for i, kind in enumerate(EVERY)
    for method in (METHODS[i % len(METHODS)],)
    # the hooks that an export is held against know no norm-preserving edit of fused experts
    if not (kind in EXPERTS and method == "biprojected")
]


def test_the_sample_has_every_method() -> None:
    assert {method for _, method in SAMPLED} == set(METHODS)


@pytest.mark.parametrize(("kind", "method"), SAMPLED)
def test_exports_are_certified_and_reload(kind: str, method: str, tmp_path: Path) -> None:
    model, plan = shared(kind), plan_of(kind, method)
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 1e-2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(logits_of(reloaded), oracle(source_of(kind), kind, plan))
    assert is_norm_preserving(plan) == (method == "biprojected")
    assert set(plan.sites) <= set(PARTS[kind].writers)
