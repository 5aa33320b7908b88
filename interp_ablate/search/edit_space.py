"""The space of edits: directions, kernels of strengths and fitted edits, and the plans that they make.

Knows: the parameters, their ranges, how they become a plan. Does not know: who draws them, scores, run folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, TypeAlias

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
from interp_ablate.edits.plan import Plan, band
from interp_ablate.errors import RunError
from interp_ablate.search.derived_edits import scaled
from interp_ablate.search.parameters import Choice, Float, Int, ParameterSpace
from interp_ablate.sites import Point, Site

DirectionKey: TypeAlias = tuple[int, str, str]
"""Layer, point and position of a direction."""

PLAIN, ORTHOGONAL = "difference_in_means", "difference_in_means_orthogonalized"
# Bands whose every layer has its own orthogonalized direction; the drawn layer is where an addition's comes from.
BY_LAYER = "orthogonalized_by_layer"
METHODS = (PLAIN, ORTHOGONAL, "winsorized", "pca", "subspace", "leace", BY_LAYER)
POINT: Point = "resid_post"
COMPONENT_SCALES = ("attention_scale", "mlp_scale", "embed_scale")
KERNEL = ("attention_strength", "attention_layer", "mlp_strength", "mlp_layer", "width")
# Ranges of a kernel, layers and widths as fractions of the depth: one set for the bands that a sweep draws and
# for a search. They are the sweep's, whose seeded draws and the plans published from them stay what they
# were; the search's own were alike (attention 0.4 to 2.0, MLP 0.0 to 1.5, centre 0.4 to 1.0, width 0.2 to 1.6).
ATTENTION, MLP, CENTRE, WIDTH = (0.6, 2.2), (0.0, 1.4), (0.45, 0.95), (0.25, 1.5)
# Directions of a search come from these layers; fitted edits are taken at these multiples of their strengths.
LAYERS, SCALE = (0.3, 1.0), (0.5, 1.3)


@dataclass(eq=False)
class EditSpace:
    """What plans are made of: labelled training activations, directions by method, fitted edits.

    Raises:
        RunError: activations without labels.
    """

    activations: Activations
    writers: tuple[Site, ...]
    """Sites that write to the stream (`model.writers`)."""
    position: str = "-1"
    """Position of the directions that a search estimates."""
    saved: Directions | None = None
    """Plain and orthogonalized directions that are estimated already, at any site and position."""
    fits: dict[str, Ablate | Erase] = field(default_factory=dict)
    control: str | None = None
    """"shuffled" estimates everything from shuffled labels; "random" takes one random direction at every
    layer, with the norms of the real ones."""
    seed: int = 0
    _by_method: dict[str, Directions] = field(default_factory=dict)
    _by_site: dict[tuple[str, Site, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activations.labels is None:
            raise RunError("a search needs labelled activations: collect a ContrastSet")

    @cached_property
    def train(self) -> Activations:
        """The activations at the searched point and position."""
        labels = self.activations.labels
        assert labels is not None
        if self.control == "shuffled":
            labels = shuffled_labels(labels, seed=self.seed)
        sites = tuple(site for site in self.activations.sites if site.point == POINT)
        values = [self.activations.at(site, self.position) for site in sites]
        return Activations(torch.stack(values, 1)[:, None], sites, (self.position,), labels)

    @property
    def n_layers(self) -> int:
        return self.writers[-1].layer + 1

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers at whose end there is a direction, in order.

        Raises:
            RunError: there is none.
        """
        layers = sorted({direction.site.layer for direction in self.directions(PLAIN)})
        if not layers:
            raise RunError(
                f"a search draws directions at {POINT}, and there is none: collect that point at some layers"
            )
        return tuple(layers)

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that mean something here: a random direction has no principal axes."""
        return (PLAIN, ORTHOGONAL) if self.control == "random" else METHODS

    def directions(self, method: str) -> Directions:
        """Directions of a method at the end of every layer; estimated once."""
        if method not in self._by_method:
            self._by_method[method] = self._estimated(method)
        return self._by_method[method]

    def _estimated(self, method: str) -> Directions:
        if self.control == "random":
            plain = estimate_directions(self.train)
            one = random_direction(next(iter(plain)), seed=self.seed)
            items = [Direction(one.vector, d.norm, d.site, d.position, method) for d in plain]
            return Directions(tuple(items))
        if method in ESTIMATORS and method != PLAIN:
            return estimate_with(method, self.train)
        train = self.train
        if method == "winsorized":
            values = winsorized(train.values)
            train = Activations(values, train.sites, train.positions, train.labels)
            method = PLAIN
        return estimate_directions(train, orthogonalized_too=method == ORTHOGONAL).of(method)

    def at(self, method: str, site: Site, rank: int = 1) -> Any:
        """A subspace or eraser at one site; fitted once."""
        key = (method, site, rank)
        if key not in self._by_site:
            values, labels = self.train.at(site, self.position), self.train.labels
            assert labels is not None
            both = (values[labels], values[~labels], site)
            made = leace(*both) if method == "leace" else subspace(*both, rank=rank)
            self._by_site[key] = made
        return self._by_site[key]

    def direction(self, params: Mapping[str, Any]) -> Direction:
        """The direction of an ablation or a band; of methods of more than one vector the plain one.

        Of a band with a direction at each layer it is that of the drawn layer.

        Raises:
            DirectionError: none at this place.
        """
        method, layer = params["method"], params["layer"]
        method = {"subspace": PLAIN, "leace": PLAIN, BY_LAYER: ORTHOGONAL}.get(method, method)
        point, position = params.get("point", POINT), params.get("position", self.position)
        is_saved = method in (PLAIN, ORTHOGONAL) and layer == int(layer)
        if self.control is None and self.saved is not None and is_saved:
            return self.saved[Site(int(layer), point), position, method]
        return interpolated(self.directions(method), layer, point, method=None)

    def nearest_layer(self, layer: float) -> int:
        """Of the layers at whose end there is a direction, the one nearest to a depth in layers."""
        return min(self.layers, key=lambda each: abs(each - layer))

    def source(self, params: Mapping[str, Any]) -> Direction:
        """The plain saved direction that a plan comes from, or that is nearest to it: what is added.

        Raises:
            DirectionError: none at this place.
        """
        layer, point, position = source_of(params, self.position)
        assert self.saved is not None
        return self.saved[Site(layer, point), position, PLAIN]  # type: ignore[arg-type]


def fit_name(source: DirectionKey, direction: Direction) -> str:
    """What an edit fitted from a direction on is kept under."""
    return "-".join(map(str, (*source, direction.fingerprint[:8])))


def source_of(params: Mapping[str, Any], position: str = "-1") -> DirectionKey:
    """Layer, point and position of the direction that a plan comes from; the layer is the nearest one."""
    if params["edit"] == "fitted":
        layer, point, rest = params["fit"].split("-", 2)
        return int(layer), point, rest.rpartition("-")[0]
    layer = int(params["layer"] + 0.5)
    return layer, params.get("point", POINT), params.get("position", position)


def kernel_ranges(n_layers: int) -> dict[str, tuple[float, float]]:
    """From each parameter of a kernel to its range; layers and widths in layers."""
    layers = {"attention_layer": CENTRE, "mlp_layer": CENTRE, "width": WIDTH}
    scaled_ranges = {
        name: (low * n_layers, high * n_layers) for name, (low, high) in layers.items()
    }
    low, high = scaled_ranges["width"]
    scaled_ranges["width"] = (max(low, 1.0), high)  # narrower, a band between layers reaches none
    ranges = {"attention_strength": ATTENTION, "mlp_strength": MLP, **scaled_ranges}
    return {name: ranges[name] for name in KERNEL}


def parameter_space(space: EditSpace) -> ParameterSpace:
    """The parameters of a search's plans; depths are in layers."""
    if space.n_layers < 3:
        raise RunError(f"a search over layers needs three of them; the model has {space.n_layers}")
    drawn: dict[str, Any] = {"when": ("edit", "band")}
    parameters: list[Any] = [Choice("edit", ("band", "fitted") if space.fits else ("band",))]
    parameters += [Choice("method", space.methods, **drawn), _layer_parameter(space)]
    for name, limits in kernel_ranges(space.n_layers).items():
        parameters.append(Float(name, *limits, log=name == "width", **drawn))
    if "subspace" in space.methods:
        parameters.append(Int("rank", 2, 3, when=("method", "subspace")))
    if space.fits:
        fitted: dict[str, Any] = {"when": ("edit", "fitted")}
        parameters.append(Choice("fit", tuple(space.fits), **fitted))
        for name in COMPONENT_SCALES:
            least = 0.0 if name == "embed_scale" else SCALE[0]
            parameters.append(Float(name, least, SCALE[1], **fitted))
    return ParameterSpace(tuple(parameters))


def _layer_parameter(space: EditSpace) -> Float | Choice:
    """Where a direction may come from: layers that have one, of the searched depths where any of them is there.

    A range, fractional layers included, where the layers follow one another; else each of them.
    """
    low, high = (_depth(space, share) for share in LAYERS)
    layers = [layer for layer in space.layers if low <= layer <= high] or list(space.layers)
    if layers != list(range(layers[0], layers[-1] + 1)):
        return Choice("layer", tuple(layers), when=("edit", "band"))
    start = low if layers[0] - 1 in space.layers else layers[0]
    return Float("layer", start, layers[-1], when=("edit", "band"))


def _drawn_layer(space: EditSpace, layer: float) -> float:
    """The drawn layer that is nearest to one."""
    parameter = _layer_parameter(space)
    if isinstance(parameter, Choice):
        return min(parameter.choices, key=lambda each: abs(each - layer))  # type: ignore[operator, return-value, arg-type]
    return min(max(float(layer), parameter.low), parameter.high)


def _depth(space: EditSpace, share: float) -> float:
    """A share of the depth in layers, as the space holds it."""
    return round(share * (space.n_layers - 1), 3)


def plan_of(params: Mapping[str, Any], space: EditSpace) -> Plan:
    """The plan that parameters stand for.

    "ablate" is full strength at every writer of the stream; "band" gives attention and MLP outputs strengths
    that fall off linearly from a centre layer (see `edits.plan.band`); "fitted" is an edit found by gradient
    (see `gradient_fit`), times a factor at attention, MLP and embedding.

    Raises:
        PlanError: a band that reaches no layer.
        DirectionError: nothing to estimate at this layer.
    """
    if params["edit"] == "fitted":
        return _scaled_by_component(space.fits[params["fit"]], params)
    direction = space.direction(params)
    if params["edit"] == "ablate":
        return Plan((Ablate(direction, space.writers),))
    attention, mlp = (site.point for site in space.writers[-2:])
    kernel = band(
        direction,
        space.n_layers,
        attention=(params["attention_strength"], params["attention_layer"]),
        mlp=(params["mlp_strength"], params["mlp_layer"]),
        width=params["width"],
        points=(attention, mlp),
    )
    method = params["method"]
    if method == BY_LAYER:
        return Plan(tuple(each for edit in kernel for each in _each_its_own(edit, space)))
    if method not in ("subspace", "leace"):
        return kernel
    vectors = space.at(method, direction.site, params.get("rank", 1))
    return Plan(tuple(_along(vectors, method, edit) for edit in kernel))


def _each_its_own(edit: Any, space: EditSpace) -> Iterator[Ablate]:
    """A kernel's strengths, each along its own layer's orthogonalized direction, or the nearest one that there is."""
    for site, amount in zip(edit.sites, edit.amounts):
        own = Site(space.nearest_layer(site.layer), POINT)
        yield Ablate(space.directions(ORTHOGONAL)[own], site, strength=amount)


def _along(vectors: Any, method: str, edit: Any) -> Ablate | Erase:
    """A kernel's strengths along something of more than one vector.

    Of LEACE the linear part only, which takes what is read to zero: kept at its centre, it would need biases.
    """
    if method == "leace":
        return Erase(
            vectors.write, vectors.read, edit.sites, strength=edit.amounts, label=vectors.name
        )
    return Ablate(vectors.vectors, edit.sites, strength=edit.amounts, label=vectors.name)


def _scaled_by_component(edit: Ablate | Erase, params: Mapping[str, Any]) -> Plan:
    """A fitted edit with other strengths; parts of the same factor stay one edit."""
    by_factor: dict[float, list[int]] = {}
    for i, site in enumerate(edit.sites):
        name = "embed" if "embed" in site.point else "attention" if "attn" in site.point else "mlp"
        by_factor.setdefault(params[f"{name}_scale"], []).append(i)
    parts = (scaled(edit, factor, places) for factor, places in by_factor.items())
    return Plan(tuple(part for part in parts if part is not None))


def initial_params(space: EditSpace, layers: Sequence[float]) -> list[dict[str, Any]]:
    """Where a search begins: fitted edits as they are, weaker and stronger, and bands, in turn.

    In turn, as a search of few minutes gets no further, and either kind may be the one that helps. Bands are
    narrow ones with a direction at each layer, and wide ones along the directions of promising layers.
    """
    fitted = [
        {"edit": "fitted", "fit": name, **dict.fromkeys(COMPONENT_SCALES, scale)}
        for scale in (1.0, 0.7, 1.2, 0.85)
        for name in space.fits
    ]
    wide = [_band(space, ORTHOGONAL, layer, 1.0, 0.5, 0.7, 0.6) for layer in layers]
    narrow = [
        _band(space, BY_LAYER, layer, attention, mlp, centre, WIDTH[0])
        for layer in (layers[:1] if BY_LAYER in space.methods else ())
        for attention, mlp, centre in ((1.0, 1.25, 0.66), (1.0, 0.9, 0.7), (1.2, 1.3, 0.72))
    ]
    return _in_turn(fitted, _in_turn(narrow, wide))


def _in_turn(*kinds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind, then the next of each, as long as there are any."""
    return [params for row in zip_longest(*kinds) for params in row if params is not None]


def _band(
    space: EditSpace,
    method: str,
    layer: float,
    attention: float,
    mlp: float,
    centre: float,
    width: float,
) -> dict[str, Any]:
    """A band's parameters; the centre and the width are shares of the depth, held inside the space."""

    ranges = kernel_ranges(space.n_layers)

    def held(name: str, share: float) -> float:
        low, high = ranges[name]
        return min(max(_depth(space, share), low), high)

    return {
        "edit": "band",
        "method": method,
        "layer": _drawn_layer(space, layer),
        "attention_strength": attention,
        "attention_layer": held("attention_layer", centre),
        "mlp_strength": mlp,
        "mlp_layer": held("mlp_layer", centre),
        "width": held("width", width),
    }
