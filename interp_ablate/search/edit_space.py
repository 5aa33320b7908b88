"""Search: plans drawn from a space of directions, kernels of strengths and fitted edits, and their scores.

Knows: what the parameters are, how they become a plan, what a plan scores. Does not know: who draws the
parameters or keeps the trials (`study` does), run folders, or the test prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.adjustments import interpolated, winsorized
from interp_ablate.directions.direction import Direction, random_direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.estimators import ESTIMATORS, estimate_with
from interp_ablate.directions.leace_eraser import leace
from interp_ablate.directions.mean_difference import estimate_directions, shuffled_labels
from interp_ablate.directions.subspaces import subspace
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.presets import band
from interp_ablate.errors import RunError
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.candidates import Fits, scaled
from interp_ablate.search.study.parameters import Choice, Float, Int, Space
from interp_ablate.sites import Point, Site

# What the search makes small; repetition is that of answers to positive prompts, where loops are.
OBJECTIVES = ("expression_rate", "kl", "repetition")
PLAIN, ORTHOGONAL = "difference_in_means", "difference_in_means_orthogonalized"
METHODS = (PLAIN, ORTHOGONAL, "winsorized", "pca", "subspace", "leace")
POINT: Point = "resid_post"
# Where layers, strengths and widths are drawn from; layers and widths as fractions of the depth.
LAYERS, _CENTRE, _WIDTH = (0.3, 1.0), (0.4, 1.0), (0.2, 1.6)
_ATTENTION, _MLP, _SCALE = (0.4, 2.0), (0.0, 1.5), (0.5, 1.3)


@dataclass(eq=False)
class EditSpace:
    """What plans are made of: labelled training activations, directions by method, fitted edits.

    `control`: "shuffled" estimates everything from shuffled labels; "random" takes one random direction
    at every layer, with the norms of the real ones.
    """

    train: Activations
    writers: tuple[Site, ...]
    position: str = "-1"
    fits: Fits = field(default_factory=dict)
    control: str | None = None
    seed: int = 0
    _known: dict[str, Directions] = field(default_factory=dict)
    _found: dict[tuple[str, Site, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = self.train.labels
        if labels is None:
            raise RunError("a search needs labelled activations: collect a ContrastSet")
        if self.control == "shuffled":
            labels = shuffled_labels(labels, seed=self.seed)
        sites = [site for site in self.train.sites if site.point == POINT]
        values = [self.train.at(site, self.position) for site in sites]
        self.train = Activations(
            torch.stack(values, 1)[:, None], tuple(sites), (self.position,), labels
        )

    @property
    def n_layers(self) -> int:
        return self.writers[-1].layer + 1

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that mean something here: a random direction has no principal axes."""
        return (PLAIN, ORTHOGONAL) if self.control == "random" else METHODS

    def directions(self, method: str) -> Directions:
        """Directions of a method at the end of every layer; estimated once."""
        if method not in self._known:
            self._known[method] = self._estimated(method)
        return self._known[method]

    def _estimated(self, method: str) -> Directions:
        if self.control == "random":
            plain = estimate_directions(self.train).of(PLAIN)
            one = random_direction(next(iter(plain)), seed=self.seed)
            items = [Direction(one.vector, d.norm, d.site, d.position, method) for d in plain]
            return Directions(tuple(items))
        if method in ESTIMATORS and method != PLAIN:
            return estimate_with(method, self.train)
        train = self.train
        if method == "winsorized":
            train = Activations(
                winsorized(train.values), train.sites, train.positions, train.labels
            )
            method = PLAIN
        return estimate_directions(train).of(method)

    def at(self, method: str, site: Site, rank: int = 1) -> Any:
        """A subspace or eraser at one site; fitted once."""
        key = (method, site, rank)
        if key not in self._found:
            values, labels = self.train.at(site, self.position), self.train.labels
            assert labels is not None
            both = (values[labels], values[~labels], site)
            made = leace(*both) if method == "leace" else subspace(*both, rank=rank)
            self._found[key] = made
        return self._found[key]


def space_of(ground: EditSpace) -> Space:
    """The parameters of a plan; depths are in layers."""
    if ground.n_layers < 3:
        raise RunError(f"a search over layers needs three of them; the model has {ground.n_layers}")

    def deep(name: str, share: tuple[float, float], **more: Any) -> Float:
        low, high = (_depth(ground, each) for each in share)
        return Float(name, low, high, **more)

    drawn: dict[str, Any] = {"when": ("edit", "band")}
    parameters: list[Any] = [Choice("edit", ("band", "fitted") if ground.fits else ("band",))]
    parameters += [
        Choice("method", ground.methods, **drawn),
        deep("layer", LAYERS, **drawn),
        Float("attention_strength", *_ATTENTION, **drawn),
        deep("attention_layer", _CENTRE, **drawn),
        Float("mlp_strength", *_MLP, **drawn),
        deep("mlp_layer", _CENTRE, **drawn),
        deep("width", _WIDTH, log=True, **drawn),
    ]
    if "subspace" in ground.methods:
        parameters.append(Int("rank", 2, 3, when=("method", "subspace")))
    if ground.fits:
        fitted: dict[str, Any] = {"when": ("edit", "fitted")}
        parameters += [
            Choice("fit", tuple(ground.fits), **fitted),
            Float("attention_scale", *_SCALE, **fitted),
            Float("mlp_scale", *_SCALE, **fitted),
            Float("embed_scale", 0.0, _SCALE[1], **fitted),
        ]
    return Space(tuple(parameters))


def _depth(ground: EditSpace, share: float) -> float:
    """A share of the depth in layers, as the space holds it."""
    return round(share * (ground.n_layers - 1), 3)


def plan_of(params: Mapping[str, Any], ground: EditSpace) -> Plan:
    """The plan that parameters of `space_of` stand for.

    Raises:
        PlanError: a band that reaches no layer.
        DirectionError: nothing to estimate at this layer.
    """
    if params["edit"] == "fitted":
        return _scaled_by_component(ground.fits[params["fit"]], params)
    method, layer = params["method"], params["layer"]
    attention, mlp = (site.point for site in ground.writers[-2:])
    flat = method if method not in ("subspace", "leace") else PLAIN
    direction = interpolated(ground.directions(flat), layer, POINT, method=None)
    kernel = band(
        direction,
        ground.n_layers,
        attention=(params["attention_strength"], params["attention_layer"]),
        mlp=(params["mlp_strength"], params["mlp_layer"]),
        width=params["width"],
        points=(attention, mlp),
    )
    if flat == method:
        return kernel
    found = ground.at(method, direction.site, params.get("rank", 1))
    return Plan(tuple(_along(found, method, edit) for edit in kernel))


def _along(found: Any, method: str, edit: Any) -> Ablate | Erase:
    """A kernel's strengths along something of more than one vector.

    Of LEACE the linear part only, which takes what is read to zero: kept at its centre, it would need biases.
    """
    if method == "leace":
        return Erase(found.write, found.read, edit.sites, strength=edit.amounts, label=found.name)
    return Ablate(found.vectors, edit.sites, strength=edit.amounts, label=found.name)


def _scaled_by_component(edit: Ablate | Erase, params: Mapping[str, Any]) -> Plan:
    """A fitted edit with other strengths, relative to its own, at attention, MLP and embedding."""
    parts = []
    for name in ("embed", "attn", "mlp"):
        places = [i for i, site in enumerate(edit.sites) if name in site.point]
        if not places:
            continue
        factor = params[f"{'attention' if name == 'attn' else name}_scale"]
        some = scaled(edit, factor, places)
        if some is not None:
            parts.append(some)
    return Plan(tuple(parts))


def score(params: Mapping[str, Any], ground: EditSpace, bench: ValidationBench) -> dict[str, float]:
    """What the bench says of a plan: expression rate, KL, repetition, length."""
    return score_together([params], ground, bench)[0]


def score_together(
    some: Sequence[Mapping[str, Any]], ground: EditSpace, bench: ValidationBench
) -> list[dict[str, float]]:
    """`score` of several plans, whose answers are written in one batch."""
    return bench.objectives_of([plan_of(params, ground) for params in some])


def initial_trials(ground: EditSpace, layers: Sequence[float]) -> list[dict[str, Any]]:
    """Where to begin: every fitted edit as it is and a little weaker, wide bands at promising layers."""
    found: list[dict[str, Any]] = []
    for scale in (1.0, 0.85, 0.7):
        for name in ground.fits:
            scales = dict.fromkeys(("attention_scale", "mlp_scale", "embed_scale"), scale)
            found.append({"edit": "fitted", "fit": name, **scales})
    for layer in layers:
        found.append(
            {
                "edit": "band",
                "method": ORTHOGONAL,
                "layer": min(max(float(layer), _depth(ground, LAYERS[0])), _depth(ground, 1)),
                "attention_strength": 1.0,
                "attention_layer": _depth(ground, 0.7),
                "mlp_strength": 0.5,
                "mlp_layer": _depth(ground, 0.7),
                "width": _depth(ground, 0.6),
            }
        )
    return found
