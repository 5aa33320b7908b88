"""Search: every draw of the space is a plan of this model, at the strengths that the kernels say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import D_MODEL, N_LAYERS, rows_of, shared, tiny, unit

from interp_ablate import Ablate, Model, Plan, Site, collect, everywhere
from interp_ablate.activations.activations import Activations
from interp_ablate.directions.adjustments import winsorized
from interp_ablate.directions.estimators import ESTIMATORS, estimate_with
from interp_ablate.directions.leace_eraser import leace
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.directions.subspaces import subspace
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.plan import band
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import TargetLogOdds
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.derived_edits import scaled
from interp_ablate.search.edit_space import (
    BY_LAYER,
    METHODS,
    ORTHOGONAL,
    PLAIN,
    POINT,
    EditSpace,
    initial_params,
    kernel_ranges,
    parameter_space,
    plan_of,
    source_of,
)
from interp_ablate.search.parameters import Float, Int

pytest.importorskip("concept_erasure")
WRITERS = everywhere(N_LAYERS)
SITES = [Site(layer, POINT) for layer in range(N_LAYERS)]
STRENGTHS = [0.1 * (1 + i) for i in range(len(WRITERS))]
FITS: dict[str, Ablate | Erase] = {
    "a": Erase(unit(1) + 0.5 * unit(2), unit(1), WRITERS, strength=STRENGTHS),
    "b": Ablate(unit(3), WRITERS, strength=0.8),
}
PARAMS: dict[str, Any] = {
    "edit": "band",
    "method": PLAIN,
    "layer": 1.4,
    "attention_strength": 1.3,
    "attention_layer": 1.4,
    "mlp_strength": 0.6,
    "mlp_layer": 1.75,
    "width": 1.5,
}
KERNEL: dict[str, Any] = {"attention": (1.3, 1.4), "mlp": (0.6, 1.75), "width": 1.5}


def activations(n_layers: int = N_LAYERS, *, points: Sequence[str] = (POINT,)) -> Activations:
    """Two groups of prompts with a gap of their own at every site."""
    sites = tuple(Site(layer, p) for layer in range(n_layers) for p in points)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(24) % 2 == 0
    values = torch.randn(24, 2, len(sites), D_MODEL, generator=generator)
    gaps = torch.stack([unit(20 + i).float() for i in range(len(sites))])
    gaps = gaps + unit(19).float()  # neighbours agree, as in a model
    values += labels[:, None, None, None] * 4 * gaps
    return Activations(values, sites, ("-2", "-1"), labels)


def ground_of(fits: dict[str, Any] | None = None, **options: Any) -> EditSpace:
    return EditSpace(activations(), WRITERS, fits=FITS if fits is None else fits, **options)


class Drawing:
    """What a sampler does, without one: uniform draws, or one of the bounds."""

    def __init__(self, seed: int, *, edges: bool = False) -> None:
        self.random, self.edges = random.Random(seed), edges

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return self.random.choice((low, high)) if self.edges else self.random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return self.random.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.random.choice(choices)


# --------------------------------------------------------------------------------- the space


@pytest.mark.parametrize("edges", (False, True))
@pytest.mark.parametrize("control", (None, "shuffled", "random"))
def test_every_draw_is_a_plan(control: str | None, edges: bool) -> None:
    """Inside its space, of the model's width, at its writers; each draw survives JSON."""
    ground = ground_of(control=control)
    space, seen = parameter_space(ground), set()
    for seed in range(120):
        params = space.suggest(Drawing(seed, edges=edges))
        assert space.admit(params) == params
        seen.add(params.get("method", params["edit"]))
        plan = plan_of(params, ground)
        assert plan.d_model == D_MODEL and set(plan.sites) <= set(WRITERS)
        assert Plan.from_dict(plan.to_dict()) == plan
        assert all(torch.isfinite(edit.vectors).all() for edit in plan)
    assert seen == {*ground.methods, "fitted"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_the_model(method: str) -> None:
    model = shared()
    ground = EditSpace(activations(), model.writers)
    params = PARAMS | {"method": method} | ({"rank": 2} if method == "subspace" else {})
    assert parameter_space(ground).admit(params) == params
    rows = rows_of(9, 12)
    plain = model.logits(rows)
    with model.applied(plan_of(params, ground)):
        edited = model.logits(rows)
    assert torch.isfinite(edited).all() and (edited - plain).abs().max() > 1e-2


def test_parameters_outside_are_refused() -> None:
    space = parameter_space(ground_of())
    top = N_LAYERS - 1
    assert space.admit(PARAMS) == PARAMS
    for change, said in (
        ({"layer": top + 0.01}, "layer"),
        ({"layer": 0.1}, "layer"),
        ({"attention_strength": 0.1}, "attention_strength"),
        ({"mlp_strength": -0.1}, "mlp_strength"),
        ({"attention_layer": 2.9}, "attention_layer"),
        ({"width": 0.0}, "width"),
        ({"method": "lda"}, "method"),
        ({"edit": "add"}, "edit"),
        ({"rank": 2}, "rank exists only when method is 'subspace'"),
        ({"embed_scale": 1.0}, "embed_scale exists only when edit is 'fitted'"),
        ({"colour": 1}, "unknown parameters: colour"),
        ({"method": "subspace", "rank": 4}, "rank"),
    ):
        with pytest.raises(RunError, match=said):
            space.admit(PARAMS | change)
    fitted = {"edit": "fitted", "fit": "a", "attention_scale": 1.0, "mlp_scale": 1.0}
    assert space.admit(fitted | {"embed_scale": 0.0})
    for change in ({"fit": "c"}, {"attention_scale": 0.1}, {"mlp_scale": 2.0}, {"width": 1.0}):
        with pytest.raises(RunError, match=next(iter(change))):
            space.admit(fitted | change)


def test_depths_are_in_layers() -> None:
    """The same fractions of another depth; strengths and scales do not depend on it."""
    few, many = (
        parameter_space(EditSpace(activations(n), everywhere(n), fits=FITS)) for n in (7, 21)
    )
    assert {"attention_layer", "mlp_layer", "width"} < set(kernel_ranges(21))
    factors = {"layer": 20 / 6}
    factors |= dict.fromkeys(("attention_layer", "mlp_layer", "width"), 3)
    for a, b in zip(few.parameters, many.parameters):
        assert a.name == b.name
        if isinstance(a, Float) and isinstance(b, Float):
            factor = factors.get(a.name, 1)
            assert (b.low, b.high) == pytest.approx((factor * a.low, factor * a.high), abs=2e-3)
    layer = next(p for p in many.parameters if p.name == "layer")
    assert isinstance(layer, Float) and layer.high == 20


def test_without_fits_there_is_no_choice_of_edit() -> None:
    space = parameter_space(ground_of(fits={}))
    assert "fit" not in space.names and "attention_scale" not in space.names
    assert space.parameters[0].choices == ("band",)  # type: ignore[union-attr]
    assert {p.name for p in parameter_space(ground_of()).parameters} - set(space.names) == {
        "fit",
        "attention_scale",
        "mlp_scale",
        "embed_scale",
    }
    ranks = next(p for p in space.parameters if p.name == "rank")
    assert isinstance(ranks, Int) and ranks.when == ("method", "subspace")


@pytest.mark.parametrize("layers", ((1, 2), (2,), (0,), (0, 3), (1, 3, 4), (3, 4, 5)))
@pytest.mark.parametrize("control", (None, "shuffled", "random"))
def test_only_layers_with_directions_are_drawn(
    layers: tuple[int, ...], control: str | None
) -> None:
    """Of a run of some layers: no trial fails because there is no direction where it was drawn."""
    every = activations(6)
    sites = tuple(Site(layer, POINT) for layer in layers)
    values = torch.stack([every.at(site, "-1") for site in sites], 1)[:, None]
    some = Activations(values, sites, ("-1",), every.labels)
    ground = EditSpace(some, everywhere(6), control=control)
    assert ground.layers == layers
    space = parameter_space(ground)
    for edges in (False, True):
        for seed in range(20):
            assert plan_of(space.suggest(Drawing(seed, edges=edges)), ground).sites
    for params in initial_params(ground, (0, 2.5, 5)):
        assert space.admit(params) == params and plan_of(params, ground).sites


@pytest.mark.parametrize("n_layers", (3, 4, 5, 30))
def test_every_drawn_band_reaches_a_layer(n_layers: int) -> None:
    ground = EditSpace(activations(n_layers), everywhere(n_layers))
    space = parameter_space(ground)
    for edges in (False, True):
        for seed in range(100):
            assert plan_of(space.suggest(Drawing(seed, edges=edges)), ground).sites


# --------------------------------------------------------------------------------- the plans


def strengths(plan: Plan) -> list[tuple[tuple[Site, ...], tuple[float, ...]]]:
    return [(edit.sites, edit.amounts) for edit in plan]


def _by_site(plan: Plan) -> list[tuple[Site, float]]:
    return [pair for sites, amounts in strengths(plan) for pair in zip(sites, amounts)]


@pytest.mark.parametrize("method", METHODS)
def test_strengths_are_the_bands(method: str) -> None:
    """Of the edit at each site, whatever is edited there."""
    ground = ground_of()
    plan = plan_of(PARAMS | {"method": method, "rank": 3}, ground)
    want = band(ground.directions(PLAIN)[SITES[1]], N_LAYERS, **KERNEL)
    assert _by_site(plan) == _by_site(want)
    if method == BY_LAYER:
        return
    assert [edit.sites[0].point for edit in plan] == ["attn_out", "mlp_out"]
    # by hand: a triangle of half width 1.5 around layer 1.4
    attention = dict(zip(plan.edits[0].sites, plan.edits[0].amounts))
    assert attention == pytest.approx(
        {Site(i, "attn_out"): 1.3 * (1 - abs(i - 1.4) / 1.5) for i in range(3)}
    )


@pytest.mark.parametrize("layer", (1.0, 1.4, 1.8, 2.0))
def test_directions_are_those_of_a_fractional_layer(layer: float) -> None:
    found = estimate_directions(activations())
    low, share = int(layer), layer - int(layer)
    vector = (1 - share) * found[SITES[low], "-1"].vector
    if share:
        vector = vector + share * found[SITES[low + 1], "-1"].vector
    plan = plan_of(PARAMS | {"layer": layer}, ground_of())
    for edit in plan:
        assert isinstance(edit, Ablate)
        torch.testing.assert_close(edit.vectors[0], vector / vector.norm(), rtol=0, atol=1e-10)


def test_a_band_by_layer_has_each_layers_own_direction() -> None:
    """By hand: layer 0, which no search draws, included; a layer without a direction takes the nearest one's."""
    found = estimate_directions(activations(), orthogonalized_too=True).of(ORTHOGONAL)
    params = PARAMS | {"method": BY_LAYER}
    plan = plan_of(params, ground_of())
    assert len(plan) > 3
    for edit in plan:
        (site,) = edit.sites
        torch.testing.assert_close(
            edit.vectors[0], found[Site(site.layer, POINT), "-1"].vector, rtol=0, atol=1e-10
        )
    every = activations()
    some = replace(every, sites=every.sites[1:], values=every.values[:, :, 1:])
    first = next(iter(plan_of(params, EditSpace(some, WRITERS))))
    assert first.sites[0].layer == 0
    torch.testing.assert_close(
        first.vectors[0], found[Site(1, POINT), "-1"].vector, rtol=0, atol=1e-10
    )
    assert BY_LAYER not in ground_of(control="random").methods


@pytest.mark.parametrize("method", (PLAIN, ORTHOGONAL, "winsorized", "pca"))
def test_each_method_is_its_estimator(method: str) -> None:
    train = replace(activations(), positions=("-1",), values=activations().values[:, 1:])
    if method == "winsorized":
        clipped = replace(train, values=winsorized(train.values))
        want = estimate_directions(clipped)
    elif method in ESTIMATORS and method != PLAIN:
        want = estimate_with(method, train)
    else:
        want = estimate_directions(train, orthogonalized_too=True).of(method)
    found = ground_of().directions(method)
    others = [ground_of().directions(m) for m in (PLAIN, "pca") if m != method]
    for site in SITES:
        torch.testing.assert_close(found[site].vector, want[site].vector, rtol=0, atol=1e-10)
        for other in others:
            assert (other[site].vector - found[site].vector).norm() > 1e-6


@pytest.mark.parametrize("layer", (1.4, 1.6))
def test_a_subspace_and_an_eraser_are_of_the_nearest_layer(layer: float) -> None:
    ground, train = ground_of(), activations()
    site = SITES[round(layer)]
    values = train.at(site, "-1")
    both = values[train.labels], values[~train.labels]  # type: ignore[operator]
    for rank in (2, 3):
        plan = plan_of(PARAMS | {"method": "subspace", "layer": layer, "rank": rank}, ground)
        want = subspace(*both, site, rank=rank)
        for edit in plan:
            assert isinstance(edit, Ablate) and edit.vectors.shape == (rank, D_MODEL)
            torch.testing.assert_close(edit.vectors, want.vectors, rtol=0, atol=1e-8)  # type: ignore[union-attr]
    plan = plan_of(PARAMS | {"method": "leace", "layer": layer}, ground)
    eraser = leace(*both, site)
    for edit in plan:
        assert isinstance(edit, Erase)
        got = torch.outer(edit.write, edit.read)
        want_map = torch.outer(eraser.write, eraser.read)  # type: ignore[union-attr]
        torch.testing.assert_close(got, want_map, rtol=0, atol=1e-8)


def test_the_position_is_the_one_that_was_asked_for() -> None:
    vectors = {}
    for position in ("-2", "-1"):
        ground = ground_of(position=position)
        want = estimate_directions(activations())[SITES[1], position].vector
        vectors[position] = plan_of(PARAMS | {"layer": 1.0}, ground).edits[0].vectors[0]
        torch.testing.assert_close(vectors[position], want, rtol=0, atol=1e-10)
    assert (vectors["-1"] - vectors["-2"]).norm() > 1e-3


def test_points_that_are_not_searched_do_not_matter() -> None:
    wide = activations(points=("resid_pre", POINT))
    train = replace(wide, values=wide.values[:, :, 1::2], sites=tuple(SITES))
    one, other = EditSpace(wide, WRITERS), EditSpace(train, WRITERS)
    assert plan_of(PARAMS, one) == plan_of(PARAMS, other)


def test_fitted_edits_are_scaled_by_component() -> None:
    ground = ground_of()
    scales = {"attention_scale": 0.5, "mlp_scale": 1.25, "embed_scale": 0.9}
    params = {"edit": "fitted", "fit": "a", **scales}
    factors = {"embed": 0.9, "attn_out": 0.5, "mlp_out": 1.25}
    plan = plan_of(params, ground)
    amounts = {site: amount for e in plan for site, amount in zip(e.sites, e.amounts)}
    want = {s: factors[s.point] * a for s, a in zip(WRITERS, STRENGTHS)}
    assert amounts == pytest.approx(want, abs=1e-6)
    for edit in plan:
        assert isinstance(edit, Erase)
        torch.testing.assert_close(edit.vectors, FITS["a"].vectors, rtol=0, atol=1e-12)
    without = plan_of(params | {"embed_scale": 0.0}, ground)
    assert set(without.sites) == set(WRITERS) - {Site(0, "embed")}
    flat = plan_of(params | {"fit": "b"} | dict.fromkeys(scales, 1.0), ground)
    model, rows = shared(), rows_of(9, 12)
    with model.applied(flat):
        got = model.logits(rows)
    with model.applied(FITS["b"]):
        torch.testing.assert_close(got, model.logits(rows), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ("gemma2", "gpt2"))
def test_plans_are_at_the_writers_of_the_model(kind: str) -> None:
    """Projections before a norm; learned positions beside the embedding."""
    model = shared(kind)
    fits = {"a": Erase(unit(1) + 0.5 * unit(2), unit(1), model.writers, strength=0.5)}
    ground = EditSpace(activations(), model.writers, fits=fits)
    scales = {"attention_scale": 0.5, "mlp_scale": 1.0, "embed_scale": 0.8}
    plan = plan_of({"edit": "fitted", "fit": "a", **scales}, ground)
    assert plan.sites == tuple(sorted(model.writers))
    amounts = {site: amount for e in plan for site, amount in zip(e.sites, e.amounts)}
    for site, amount in amounts.items():
        share = 0.8 if "embed" in site.point else 0.5 if "attn" in site.point else 1.0
        assert amount == pytest.approx(0.5 * share)
    for method in METHODS:
        drawn = plan_of(PARAMS | {"method": method, "rank": 2}, ground)
        assert set(drawn.sites) <= set(model.writers)
        with model.applied(drawn):
            assert torch.isfinite(model.logits(rows_of(9))).all()


# --------------------------------------------------------------------------------- controls


def test_a_random_control_is_one_direction_with_the_real_norms() -> None:
    ground, real = ground_of(control="random", seed=4), ground_of()
    assert set(ground.methods) == {PLAIN, ORTHOGONAL}
    assert parameter_space(ground).admit(PARAMS)
    with pytest.raises(RunError, match="method"):
        parameter_space(ground).admit(PARAMS | {"method": "pca"})
    found = [ground.directions(PLAIN)[site] for site in SITES]
    plain = [real.directions(PLAIN)[site] for site in SITES]
    assert all(torch.equal(d.vector, found[0].vector) for d in found)
    assert [d.norm for d in found] == pytest.approx([d.norm for d in plain])
    assert all(abs(float(d.vector @ found[0].vector)) < 0.6 for d in plain)
    edits = [plan_of(PARAMS | {"layer": layer}, ground).edits[0] for layer in (1.0, 1.4, 2.0)]
    for edit in edits:
        torch.testing.assert_close(edit.vectors, edits[0].vectors, rtol=0, atol=1e-12)
    assert strengths(plan_of(PARAMS, ground)) == strengths(plan_of(PARAMS, real))
    other = ground_of(control="random", seed=5).directions(PLAIN)[SITES[0]]
    again = ground_of(control="random", seed=4).directions(PLAIN)[SITES[0]]
    assert torch.equal(again.vector, found[0].vector)
    assert abs(float(other.vector @ found[0].vector)) < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_shuffled_control_estimates_everything_from_shuffled_labels(method: str) -> None:
    """With as many of each label, nothing of the gap between the two is found."""
    real, null = ground_of(), ground_of(control="shuffled", seed=1)
    assert null.train.labels is not None and real.train.labels is not None
    assert int(null.train.labels.sum()) == int(real.train.labels.sum())
    assert not torch.equal(null.train.labels, real.train.labels)
    assert torch.equal(null.train.values, real.train.values)
    assert null.methods == METHODS
    params = PARAMS | {"method": method, "rank": 2, "layer": 1.0}
    truth = unit(20 + 1) + unit(19)  # what was put in at layer 1

    def along(ground: EditSpace) -> float:
        edit = next(e for e in plan_of(params, ground) if any(s.layer == 1 for s in e.sites))
        vectors = edit.vectors if isinstance(edit, Ablate) else edit.write[None]
        return float((vectors @ truth).norm() / truth.norm())

    assert along(real) > 0.75
    if method not in ("pca", "subspace"):  # the largest spread is the gap, whatever labels say
        assert along(null) < along(real) - 0.1
    again = ground_of(control="shuffled", seed=1)
    assert plan_of(params, again) == plan_of(params, null) != plan_of(params, real)


def test_a_search_needs_labels() -> None:
    with pytest.raises(RunError, match="labelled activations"):
        EditSpace(replace(activations(), labels=None), WRITERS)


# --------------------------------------------------------------------------------- priors and scores


@pytest.mark.parametrize("n_layers", (3, 4, 12, 22, 24, 26, 30, 32))
@pytest.mark.parametrize("control", (None, "random"))
def test_priors_are_in_the_space(n_layers: int, control: str | None) -> None:
    """At every depth, also for layers near the embedding, where no direction is searched."""
    ground = EditSpace(activations(n_layers), everywhere(n_layers), fits=FITS, control=control)
    space, layers = parameter_space(ground), (0, n_layers // 2, n_layers - 1, n_layers + 3)
    found = initial_params(ground, layers)
    for params in found:
        assert space.admit(params) == params
        assert plan_of(params, ground).sites
    bands = [params for params in found if params["edit"] == "band"]
    narrow = [params for params in bands if params["method"] == BY_LAYER]
    assert len(narrow) == (0 if control else 3)
    wide = [params for params in bands if params["method"] != BY_LAYER]
    assert len(wide) == len(layers)
    assert wide[1]["layer"] == n_layers // 2 and wide[2]["layer"] == n_layers - 1


def test_priors_begin_with_every_fitted_edit_as_it_is() -> None:
    ground = ground_of()
    found = initial_params(ground, [3, 4])
    assert [p["edit"] for p in found[:6]] == [
        "fitted",
        "band",
        "fitted",
        "band",
        "fitted",
        "band",
    ]
    found = initial_params(ground, [])
    assert [p["fit"] for p in found[:2]] == ["a", "b"]
    assert {p["edit"] for p in found} == {"fitted"} and len(found) == 8
    for params in found[:2]:
        plan, edit = plan_of(params, ground), FITS[params["fit"]]
        amounts = {site: amount for e in plan for site, amount in zip(e.sites, e.amounts)}
        assert amounts == pytest.approx(dict(zip(edit.sites, edit.amounts)))
    weaker = plan_of(found[2], ground)
    half = scaled(FITS["a"], found[2]["mlp_scale"])
    assert half is not None
    got = {site: amount for e in weaker for site, amount in zip(e.sites, e.amounts)}
    assert got == pytest.approx(dict(zip(half.sites, half.amounts)), abs=1e-6)
    assert initial_params(ground_of(fits={}), []) == []


def test_objectives_are_the_benchs_scores_of_the_plan() -> None:
    model = shared(eos_token_id=None)
    bench = ValidationBench(
        model,
        rows_of(9, 12, 14),
        rows_of(10, 13, seed=2),
        target=TargetLogOdds((70,)),
        expression=ExpressionScorer((), patterns=("[a-m]",)),
        max_new_tokens=6,
    )
    ground = EditSpace(activations(), model.writers, fits=FITS)
    plan = plan_of(PARAMS, ground)
    [got], whole = bench.objectives_of([plan]), bench.score(plan, generate=True)
    assert set(got) == {
        "expression_rate",
        "positive_repetition",
        "empty",
        "no_answer",
        "kl",
        "kl_high",
    }
    assert got == pytest.approx({name: whole[name] for name in got})
    assert got["kl"] > 1e-3
    # several at once, each as alone
    fitted = {"edit": "fitted", "fit": "a"}
    fitted |= dict.fromkeys(("attention_scale", "mlp_scale", "embed_scale"), 0.7)
    some = [PARAMS, fitted, {**PARAMS, "method": "subspace", "rank": 2}]
    plans = [plan_of(params, ground) for params in some]
    for one, each in zip(bench.objectives_of(plans), plans):
        assert one == pytest.approx(bench.objectives_of([each])[0])


def test_the_source_of_a_plan_is_the_nearest_direction() -> None:
    assert source_of(PARAMS) == (1, POINT, "-1")
    assert source_of({**PARAMS, "layer": 1.6, "position": "-2"}) == (2, POINT, "-2")
    fitted = {"edit": "fitted", "fit": "21-resid_mid--1-0123abcd"}
    assert source_of(fitted) == (21, "resid_mid", "-1")
    fitted["fit"] = "4-resid_post-response_mean-0123abcd"
    assert source_of(fitted) == (4, "resid_post", "response_mean")


def test_saved_directions_are_taken_as_they_are() -> None:
    """At any site and position; between layers they are estimated."""
    every = activations(points=("resid_pre", POINT))
    saved = estimate_directions(every, orthogonalized_too=True)
    ground = EditSpace(every, WRITERS, saved=saved)
    place = {**PARAMS, "layer": 2, "point": "resid_pre", "position": "-2"}
    for method in (PLAIN, ORTHOGONAL):
        want = saved[Site(2, "resid_pre"), "-2", method]
        assert ground.direction({**place, "method": method}) is want
    assert ground.source({**place, "method": "pca"}) is saved[Site(2, "resid_pre"), "-2", PLAIN]
    between = ground.direction({**PARAMS, "layer": 1.4})
    low, high = (saved[site, "-1", PLAIN].vector for site in SITES[1:3])
    vector = 0.6 * low + 0.4 * high
    torch.testing.assert_close(between.vector, vector / vector.norm(), rtol=0, atol=1e-10)


def test_the_ground_of_a_models_own_activations() -> None:
    """As the activations of a run come: collected at several points, with a contrast's labels."""
    from interp_ablate import ContrastSet, Prompt
    from interp_ablate.sites import sites_of

    model: Model = shared(eos_token_id=None)
    contrast = ContrastSet(
        "it",
        tuple(Prompt(f"bring {i} now") for i in range(8)),
        tuple(Prompt(f"tell {i}, or not") for i in range(8)),
        source="made here",
    )
    points = ("resid_pre", "resid_mid", "resid_post")
    train = collect(model, contrast, sites_of(points, range(N_LAYERS)))  # type: ignore[arg-type]
    ground = EditSpace(train, model.writers)
    assert ground.n_layers == N_LAYERS == tiny()[0].config.num_hidden_layers
    for method in METHODS:
        plan = plan_of(PARAMS | {"method": method, "rank": 2}, ground)
        with model.applied(plan):
            assert torch.isfinite(model.logits(rows_of(9))).all()
