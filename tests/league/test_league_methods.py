"""The methods of the league on a tiny model: each fits, detects, and gives plans whose strength 0 changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import D_MODEL, N_LAYERS, make, tiny

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import separation
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.registry import METHODS, method_named, method_names
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.models.architectures import architecture_of
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.derived_edits import strength_at_kl
from interp_ablate.sites import Site, sites_of
from interp_ablate.weights.weight_form import writers_only_form

ANYTHING = ExpressionScorer((), patterns=("",))  # every answer expresses it
POSITIONS = ("-1", "-2")


def contrast(part: int, n: int = 8) -> ContrastSet:
    """Prompts that end differently, which a random model tells apart."""
    numbers = range(part * 100, part * 100 + n)
    return ContrastSet.from_texts(
        [f"fetch number {i} now" for i in numbers], [f"name number {i} please" for i in numbers]
    )


@pytest.fixture(scope="module")
def task() -> LeagueTask:
    model = make(eos_token_id=None)
    train, validation = contrast(0), contrast(1)
    places = sites_of(("resid_post",), range(N_LAYERS))
    collected = [collect(model, part, places, POSITIONS) for part in (train, validation)]
    return LeagueTask(
        model=model,
        behaviour="anything",
        train=train,
        validation=validation,
        activations=collected[0],
        held_out=collected[1],
        scorer=ANYTHING,
        seed=0,
        seconds=60.0,
        max_kl=0.1,
        max_new_tokens=6,
    )


@pytest.fixture(scope="module")
def fitted(task: LeagueTask) -> dict[str, FittedMethod]:
    found = {}
    for name, method in METHODS.items():
        task.begin()
        found[name] = method.fit(around_zero(task) if name == "opposite_signs" else task)
    return found


def around_zero(task: LeagueTask) -> LeagueTask:
    """The same task where the two sets lie on both sides of zero at every layer, as no random model has them."""
    middle = task.activations.values.mean(0)
    return replace(
        task, activations=replace(task.activations, values=task.activations.values - middle)
    )


def test_a_cone_takes_as_many_steps_as_its_budget_holds(task: LeagueTask) -> None:
    for seconds, steps in ((1e6, 6), (0.0, 2)):
        assert METHODS["concept_cone"].fit(replace(task, seconds=seconds)).about["steps"] == steps


def test_a_layer_filter_that_nothing_passes_says_so(task: LeagueTask) -> None:
    with pytest.raises(InterpAblateError, match="one side of zero"):
        METHODS["opposite_signs"].fit(task)


def test_names_are_those_of_the_methods_and_controls_come_last() -> None:
    names = method_names()
    assert set(METHODS) <= set(names)
    controls = [name for name in names if name in METHODS and METHODS[name].is_control]
    assert controls == names[-len(controls) :] == ["random_direction", "shuffled_labels"]
    assert all(method.name == name for name, method in METHODS.items())


def test_an_unknown_method_is_told_what_there_is() -> None:
    with pytest.raises(RunError, match=r"unknown method of the league 'lad'.*difference_in_means"):
        method_named("lad")


@pytest.mark.parametrize("name", METHODS)
def test_strength_0_changes_nothing_and_strength_1_does(
    name: str, task: LeagueTask, fitted: dict[str, FittedMethod]
) -> None:
    for family in (fitted[name].removal, fitted[name].induction):
        if family is not None and name != "cast":  # which leaves the negative prompts alone
            assert task.kl(family(0.0)) == pytest.approx(0.0, abs=1e-6)
            assert task.kl(family(1.0)) > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_weights_method_has_a_weight_form(
    name: str, task: LeagueTask, fitted: dict[str, FittedMethod]
) -> None:
    config: Any = tiny()[0].config
    plan = fitted[name].removal(0.7)
    if METHODS[name].exactness == "weights":
        assert len(writers_only_form(plan, architecture_of(config), config)) == len(plan)


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].is_control])
def test_held_out_prompts_are_told_apart(
    name: str, task: LeagueTask, fitted: dict[str, FittedMethod]
) -> None:
    detector = Detector.of(fitted[name].detection)
    scores = detector.score(task.held_out.at(detector.site, detector.position))
    assert task.held_out.labels is not None
    found = separation(torch.as_tensor(scores).double(), task.held_out.labels)
    # a fit may read along anything that the model says; what is estimated must separate
    assert found.auc > (0.0 if name == "gradient_fit" else 0.85)


def test_leace_leaves_the_two_means_at_one_place(
    task: LeagueTask, fitted: dict[str, FittedMethod]
) -> None:
    """At strength 1 no linear probe can tell the training sets apart where it was fitted: their means coincide."""
    found = fitted["leace"]
    detector = Detector.of(found.detection)
    with task.model.applied(found.removal(1.0)):
        after = collect(task.model, task.train, [detector.site], ("-1",))
    score = detector.score(after.at(detector.site, "-1"))
    before = detector.score(task.activations.at(detector.site, "-1"))
    gap = [float(s[task.labels].mean() - s[~task.labels].mean()) for s in (before, score)]
    assert abs(gap[1]) < 1e-4 * abs(gap[0])


def test_a_spent_budget_still_tries_one_layer(task: LeagueTask) -> None:
    tried: list[Site] = []

    def fit(site: Site) -> FittedMethod:
        tried.append(site)
        return METHODS["difference_in_means"].fit(task)

    spent = replace(task, seconds=-1.0)
    best_of_sites(spent, fit)
    assert tried == [spent.sites[0]]


def test_reasons_are_told_where_nothing_can_be_fitted(task: LeagueTask) -> None:
    def fit(site: Site) -> FittedMethod:
        raise InterpAblateError(f"nothing at {site.layer}")

    with pytest.raises(InterpAblateError, match=f"nothing at {task.sites[0].layer}"):
        best_of_sites(task, fit)


def test_without_a_behaviour_the_layer_is_chosen_by_detection(task: LeagueTask) -> None:
    concept = replace(task, scorer=None)
    found = METHODS["lda"].fit(concept)
    merits = {
        site: concept.merit(replace(found, detection=_lda_at(concept, site)))
        for site in concept.sites
    }
    assert Detector.of(found.detection).site == max(merits, key=lambda site: merits[site] or 0.0)
    with pytest.raises(InterpAblateError, match="makes expressions unlikely"):
        METHODS["gradient_fit"].fit(concept)


def _lda_at(task: LeagueTask, site: Site) -> Any:
    from interp_ablate.directions.discriminants import lda

    return lda(*task.sides(site), site)


METHOD = """
from interp_ablate.league import FittedMethod, LeagueMethod, ablation
from interp_ablate.directions import difference_in_means

def fit(task):
    direction = difference_in_means(*task.sides(task.sites[0]), task.sites[0])
    return FittedMethod(direction, ablation(direction, task.model.writers))

METHOD = LeagueMethod("mine", fit, "weights", "nowhere")
"""


def test_another_package_registers_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: LeagueTask
) -> None:
    (tmp_path / "my_method.py").write_text(METHOD, encoding="utf-8")
    info = tmp_path / "my_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[interp_ablate.league_methods]\nmine = my_method:METHOD\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" in method_names()
    method = method_named("mine")
    assert isinstance(method, LeagueMethod)
    assert method.fit(task).removal(1.0).d_model == D_MODEL


def test_angular_steering_never_turns_past_its_angle(fitted: dict[str, FittedMethod]) -> None:
    """Beyond strength 1 a rotation's KL oscillates: its families say so, those of a linear edit have no end."""
    assert fitted["angular_steering"].greatest_strength == 1.0
    assert fitted["difference_in_means"].greatest_strength == float("inf")


def test_cast_works_where_its_condition_is_met_and_nowhere_else(
    task: LeagueTask, fitted: dict[str, FittedMethod]
) -> None:
    """Its threshold tells validation prompts apart, is read no later than it works, and decides alone."""
    found = fitted["cast"]
    (edit,) = found.removal(1.0)
    assert found.about["f1"] == 1.0 and found.about["condition_layer"] <= found.about["layer"]
    assert edit.hooks_only and found.induction is None
    assert task.kl(found.removal(1.0)) == pytest.approx(0.0, abs=1e-6)
    edited = task.positive.with_plan(found.removal(1.0)).first_logprobs
    assert not torch.allclose(edited, task.positive.first_logprobs, atol=1e-3)
    untouched = task.positive.with_plan(found.removal(0.0)).first_logprobs
    assert torch.allclose(untouched, task.positive.first_logprobs, atol=1e-4)
    # no KL ends it: the strength at any KL is the greatest
    _, strength = strength_at_kl(found.removal, 0.1, task.kl, greatest=found.greatest_strength) or (
        None,
        0,
    )
    assert strength == pytest.approx(1.0)
