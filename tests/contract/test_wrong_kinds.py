"""Something of the wrong kind given to a public function: one message that says what came and what is accepted."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import shared, tiny, unit

import interp_ablate
from interp_ablate import (
    Ablate,
    Activations,
    ContrastSet,
    Direction,
    Directions,
    Model,
    Plan,
    Prompt,
    Site,
)
from interp_ablate.activations.projection import project
from interp_ablate.circuits.attribution import attribute
from interp_ablate.circuits.lens import logit_lens
from interp_ablate.circuits.reading import reading_weights
from interp_ablate.directions.adjustments import interpolated, winsorized
from interp_ablate.directions.beside import cosine_table, principal_angles
from interp_ablate.directions.biprojection import biprojected_directions
from interp_ablate.directions.direction import (
    as_vector,
    cosine_similarities,
    orthogonalized,
    random_direction,
)
from interp_ablate.directions.direction_set import most_separating, write_directions
from interp_ablate.directions.estimators import comparison, control_separations, estimate_with
from interp_ablate.directions.mean_difference import difference_in_means, estimate_directions
from interp_ablate.directions.opposite_signs import mean_projections, with_opposite_signs
from interp_ablate.directions.residualizing import residualized, residualized_directions
from interp_ablate.directions.rotation_planes import steering_plane
from interp_ablate.edits.joint import ablate_by_site, ablate_sets, jointly
from interp_ablate.edits.layer_plans import ablate_by_layer
from interp_ablate.edits.plan import ablate_layers, add_to_layers, band
from interp_ablate.errors import DirectionError, InterpAblateError, PromptError
from interp_ablate.plots import (
    attribution_bars,
    attribution_map,
    cosine_similarity,
    cosines_beside,
    evaluation_changes,
    evaluation_divergences,
    evaluation_shares,
    layer_effects,
    pareto,
    projections,
    readout_by_layer,
    search_front,
    separation_by_layer,
    steering_by_layer,
    steering_curve,
    sweep_heatmap,
    token_heatmap,
)  # fmt: skip
from interp_ablate.plots.directions import distinct_directions
from interp_ablate.prompts.linting import lint
from interp_ablate.search.by_layer import layer_sweep
from interp_ablate.search.concept_cone import fit_cone
from interp_ablate.search.concept_inversion import cosmic
from interp_ablate.search.condition_choice import best_condition
from interp_ablate.search.derived_edits import control_plan, scaled_to_kl
from interp_ablate.search.selection import choose_plan, pareto_front
from interp_ablate.search.trials import run_trials

SITE = Site(1, "resid_post")
ONE = Direction(unit(), 1.0, SITE)
SET = Directions((ONE, Direction(unit(1), 1.0, Site(2, "resid_post"))))
PLAN = Plan((Ablate(unit(), SITE),))
PAIRS = ContrastSet.from_texts(["a b", "c d"], ["e f", "g h"])
LABELS = torch.tensor([True, False])
HELD: Any = Activations(torch.eye(2, 32)[:, None, None], (SITE,), ("-1",), labels=LABELS)
WRONG = {
    "texts": ["a", "b"], "None": None, "a plan": PLAN, "an edit": PLAN.edits[0], "a number": 3, "a text": "abc",
    "a dict": {"a": 1}, "a matrix": torch.zeros(2, 2), "a set": SET, "a direction": ONE,
}  # fmt: skip
A_PLAN, A_SET, A_DIRECTION = ("a plan", "an edit"), ("a set",), ("a direction",)
EITHER = (*A_SET, *A_DIRECTION)


def model() -> Any:
    return shared("llama_gqa", "hf")


# A function of the thing given, and what of `WRONG` it takes.
CALLS: Mapping[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "ablate_by_layer": (lambda x: ablate_by_layer(model(), x), EITHER),
    "ablate_by_site": (ablate_by_site, ()),
    "ablate_by_site, of a site": (lambda x: ablate_by_site({SITE: x}), A_DIRECTION),
    "ablate_sets": (lambda x: ablate_sets(model(), x), ()),
    "ablate_layers": (lambda x: ablate_layers(model(), x), A_DIRECTION),
    "add_to_layers": (lambda x: add_to_layers(model(), x), A_DIRECTION),
    "band": (lambda x: band(x, 3, attention=(1, 1), mlp=(1, 1), width=2), A_DIRECTION),
    "jointly": (jointly, A_PLAN),
    "residualized": (lambda x: residualized(x, [ONE]), A_DIRECTION),
    "residualized, protected": (lambda x: residualized(ONE, x), EITHER),
    "residualized_directions": (lambda x: residualized_directions(x, {"a": SET}), EITHER),
    "residualized_directions, protected": (lambda x: residualized_directions(SET, x), ()),
    "residualized_directions, of a name": (
        lambda x: residualized_directions(SET, {"a": x}),
        EITHER,
    ),
    "cosine_similarities": (cosine_similarities, EITHER),
    "cosine_table": (cosine_table, EITHER),
    "principal_angles": (lambda x: principal_angles(x, ONE), EITHER),
    "as_vector": (as_vector, A_DIRECTION),
    "cosine": (ONE.cosine, A_DIRECTION),
    "orthogonalized": (lambda x: orthogonalized(x, unit(2)), A_DIRECTION),
    "orthogonalized, against": (lambda x: orthogonalized(ONE, x), ()),
    "random_direction": (lambda x: random_direction(x, seed=0), A_DIRECTION),
    "most_separating": (most_separating, EITHER),
    "write_directions": (lambda x: write_directions(x, "x.txt"), ()),
    "interpolated": (lambda x: interpolated(x, 1.5, "resid_post"), A_SET),
    "steering_plane": (lambda x: steering_plane(x, SET), A_DIRECTION),
    "steering_plane, candidates": (lambda x: steering_plane(ONE, x), A_SET),
    "biprojected_directions": (lambda x: biprojected_directions(x, HELD), A_DIRECTION),
    "mean_projections": (lambda x: mean_projections(x, HELD), A_DIRECTION),
    "with_opposite_signs": (lambda x: with_opposite_signs(x, HELD), ()),
    "project": (lambda x: project(HELD, x), A_DIRECTION),
    "choose_plan": (choose_plan, ()),
    "pareto_front": (pareto_front, ()),
    "run_trials": (lambda x: run_trials(x, None, None, None), ()),  # type: ignore[arg-type]
    "control_plan": (lambda x: control_plan(x, ONE), A_PLAN),
    "control_plan, along": (lambda x: control_plan(PLAN, x), A_DIRECTION),
    "scaled_to_kl": (lambda x: scaled_to_kl(x, 0.1, lambda plan: 0.1), A_PLAN),
    "layer_sweep": (lambda x: layer_sweep(model(), x, PAIRS), EITHER),
    "cosmic": (lambda x: cosmic(model(), x, PAIRS, max_kl=None, depth=1), EITHER),
    "best_condition": (lambda x: best_condition(model(), PAIRS, x), EITHER),
    "fit_cone": (lambda x: fit_cone(model(), x, None), A_DIRECTION),  # type: ignore[arg-type]
    "monitor": (lambda x: model().monitor("a", x), EITHER),
    "attribute": (lambda x: attribute(model(), "a", x), A_DIRECTION),
    "logit_lens": (lambda x: logit_lens(model(), x), A_DIRECTION),
    "reading_weights": (lambda x: reading_weights(model(), x), A_DIRECTION),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_message_in_place_of_a_raw_error(name: str) -> None:
    call, takes = CALLS[name]
    for kind, given in WRONG.items():
        if kind in takes:
            continue
        with pytest.raises(InterpAblateError) as caught:
            call(given)
        assert len(str(caught.value)) > 30, kind


NO_ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "estimate_directions": estimate_directions,
    "estimate_directions, held out": lambda x: estimate_directions(HELD, x),
    "estimate_with": lambda x: estimate_with("pca", x),
    "comparison": lambda x: comparison(x, HELD, SITE),
    "control_separations": lambda x: control_separations(x, HELD, [ONE]),
    "biprojected_directions": lambda x: biprojected_directions(ONE, x),
    "mean_projections": lambda x: mean_projections(ONE, x),
    "cosine_table": lambda x: cosine_table(ONE, activations=x),
    "difference_in_means": lambda x: difference_in_means(x, torch.eye(2), SITE),
}


@pytest.mark.parametrize("name", NO_ACTIVATIONS)
def test_what_is_no_activations_is_one_message(name: str) -> None:
    for kind, given in {**WRONG, "a contrast set": PAIRS, "an array": np.eye(2)}.items():
        if given is None and name in ("cosine_table", "estimate_directions, held out"):
            continue
        if kind == "a matrix" and name == "difference_in_means":
            continue
        with pytest.raises(DirectionError, match="activations"):
            NO_ACTIVATIONS[name](given)


NO_MODEL: Mapping[str, Callable[[], Any]] = {
    "None": lambda: None, "a name": lambda: "smollm2", "a folder": lambda: Path("models"), "a dict": lambda: {"a": 1},
    "a Hugging Face model": lambda: tiny()[0], "a tokenizer": lambda: tiny()[1], "TransformerLens'": lambda: model().tl,
    "directions": lambda: SET, "a class": lambda: Model,
}  # fmt: skip
# What the package itself makes, with a model that was checked; names of files and servers; what is no Model's model.
_NOT_GIVEN = {
    "LeagueTask",
    "Endpoint",
    "ClassifierScorer",
    "EditedCheckpoint",
    "Persona",
    "band",
    "budget",
}


def taking_models() -> list[Any]:
    """Every public function, and method of a public class, with an argument that is a Model; and that argument."""
    package = Path(interp_ablate.__file__).parent
    found = {}
    for stub in sorted(package.rglob("__init__.pyi")):
        door = importlib.import_module(".".join(stub.parent.relative_to(package.parent).parts))
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            for each in node.names if isinstance(node, ast.ImportFrom) else ():
                thing = getattr(door, each.name)
                if each.name in _NOT_GIVEN or not callable(thing):
                    continue
                own = vars(thing).values() if isinstance(thing, type) else ()
                parts = [f for f in own if inspect.isfunction(f) and f.__name__[0] != "_"]
                for call in (thing, *parts):
                    try:
                        parameters = inspect.signature(call).parameters
                    except (TypeError, ValueError):
                        continue
                    for name, one in parameters.items():
                        if re.match(r"(Model|HasWriters)\b", str(one.annotation)):
                            found[f"{call.__qualname__}, {name}"] = (call, name)
    assert len(found) > 40
    return [pytest.param(*each, id=name) for name, each in found.items()]


@pytest.mark.parametrize(("call", "name"), taking_models())
def test_what_is_no_model_is_one_message(call: Any, name: str) -> None:
    """It is looked at first: the other arguments, None here, are not reached."""
    for kind, given in NO_MODEL.items():
        needed = {
            key: None for key, one in inspect.signature(call).parameters.items() if one.default is one.empty
            and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        }  # fmt: skip
        with pytest.raises(InterpAblateError, match=r"a Model.* is needed, as load_model"):
            call(**{**needed, name: given()})
            raise AssertionError(kind)


@pytest.mark.parametrize("draw", [separation_by_layer, cosine_similarity, distinct_directions])
def test_what_is_no_direction_is_not_drawn(draw: Any) -> None:
    for kind in ("texts", "None", "a plan", "a number", "a text", "a dict", "a matrix"):
        with pytest.raises(InterpAblateError, match="Direction"):
            draw(WRONG[kind])


TABLES = (
    projections, cosines_beside, attribution_bars, attribution_map, evaluation_shares, evaluation_changes,
    evaluation_divergences, readout_by_layer, layer_effects, token_heatmap, partial(sweep_heatmap, value="kl"), pareto, search_front,
    steering_by_layer, steering_curve,
)  # fmt: skip


@pytest.mark.parametrize("draw", TABLES)
def test_what_is_no_table_is_not_drawn(draw: Any) -> None:
    for given in WRONG.values():
        with pytest.raises(InterpAblateError, match=r"a table \(pandas.DataFrame\)"):
            draw(given)


def test_what_is_no_tensor_is_not_winsorized() -> None:
    for kind in ("None", "a plan", "a number", "a text", "a set"):
        with pytest.raises(DirectionError, match="a float tensor"):
            winsorized(WRONG[kind])


NO_CONTRAST: Mapping[str, Callable[[Any], Any]] = {
    "cosmic": lambda x: cosmic(model(), SET, x),
    "best_condition": lambda x: best_condition(model(), x, SET),
    "layer_sweep": lambda x: layer_sweep(model(), SET, x),
    "lint": lint,
}


@pytest.mark.parametrize("name", NO_CONTRAST)
def test_what_is_no_contrast_set_is_one_message(name: str) -> None:
    for given in (*WRONG.values(), HELD, Prompt("a")):
        with pytest.raises(PromptError, match="a ContrastSet is needed"):
            NO_CONTRAST[name](given)


def test_the_message_says_what_came_and_what_is_accepted() -> None:
    for call in (cosine_similarities, pareto_front, lambda x: control_plan(PLAN, x)):
        with pytest.raises(InterpAblateError, match="abc") as caught:
            call("abc")
        said = str(caught.value)
        assert any(word in said for word in ("Direction", "DataFrame"))
    with pytest.raises(InterpAblateError, match=r"got Plan\(1 edits.*\(Plan\)"):
        add_to_layers(model(), PLAN)  # type: ignore[arg-type]


def test_what_is_accepted_is_taken() -> None:
    as_one = residualized_directions([ONE], {"a": Direction(unit(3), 1.0, SITE)})  # type: ignore[arg-type, dict-item]
    assert len(as_one) == 1
    assert len(ablate_by_layer(model(), (each for each in SET))) == 2
    assert scaled_to_kl(PLAN.edits[0], 0.1, lambda plan: 0.1)  # type: ignore[arg-type]
    assert as_vector(unit().numpy()).tolist() == unit().tolist()
