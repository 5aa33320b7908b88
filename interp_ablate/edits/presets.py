"""Edits placed by rule: at every writer, in a band of layers, at chosen layers.

Knows: which sites a rule means, and their strengths. Does not know: how a plan is applied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Protocol

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.edit import Positions, is_number
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.sites import EMBEDDING_POINTS, Point, Site, sites_of


def everywhere(n_layers: int) -> tuple[Site, ...]:
    """The writers of a Llama-style stream: embed, and attn_out and mlp_out of every layer.

    Ablating a direction at all of them with strength 1 leaves nothing along it anywhere, and is what
    ablation at resid_pre, resid_mid and resid_post of every layer computes; it is exact in weights.
    `model.writers` gives them for any architecture (learned positions, norms after the projections).
    """
    points: tuple[Point, ...] = ("embed", "attn_out", "mlp_out")
    return sites_of(points, range(n_layers))


def band(
    direction: Direction,
    n_layers: int,
    *,
    attention: tuple[float, float],
    mlp: tuple[float, float],
    width: float,
    points: tuple[Point, Point] = ("attn_out", "mlp_out"),
) -> Plan:
    """Ablation of attention and MLP outputs with strengths that fall off linearly over the layers.

    Args:
        attention: (strength, centre layer) of the attention outputs.
        mlp: (strength, centre layer) of the MLP outputs.
        width: layers from a centre at which the strength reaches zero.
        points: attention's and MLP's; attn_proj and mlp_proj in post-norm blocks.

    The idea of one kernel of strengths a component is that of published abliteration searches; sites
    with strength 0 are left out.

    Raises:
        PlanError: a width that is not above 0, a strength below 0, something that is not finite, or a
            band that reaches no layer.
    """
    finite = all(is_number(n) and math.isfinite(n) for n in (*attention, *mlp, width))
    if not finite or width <= 0 or attention[0] < 0 or mlp[0] < 0:
        raise PlanError(
            "a band has two pairs (strength from 0, centre layer) and a width above 0, all finite; got "
            f"attention {attention}, mlp {mlp}, width {width}"
        )
    plan = Plan()
    for point, (peak, centre) in zip(points, (attention, mlp)):
        strengths = {
            layer: peak * max(0.0, 1 - abs(layer - centre) / width) for layer in range(n_layers)
        }
        reached = {Site(layer, point): value for layer, value in strengths.items() if value > 0}
        if reached:
            plan += Ablate(direction, reached, strength=tuple(reached.values()))
    if not plan.edits:
        raise PlanError(
            f"the band reaches none of {n_layers} layers: attention {attention} and mlp {mlp} (strength, "
            f"centre) with width {width:g}; move a centre to a layer, or widen it"
        )
    return plan


class HasWriters(Protocol):
    """A model as a layer choice sees it: the number of layers, and the sites that write to the stream."""

    @property
    def n_layers(self) -> int: ...
    @property
    def writers(self) -> tuple[Site, ...]: ...


Layers = int | str | Iterable[int] | None


def layers_of(n_layers: int, layers: Layers = None) -> tuple[int, ...]:
    """Layer numbers of a model: None for all, one number, a range or list, "10-20", or "20%-80%".

    Negative numbers count from the end; both ends of a text are included, and a share of the depth is
    rounded to the layer that it falls into.

    Raises:
        PlanError: a layer that the model lacks, one twice, none at all, something else.
    """
    if layers is None:
        return tuple(range(n_layers))
    if isinstance(layers, str):
        return _between(n_layers, layers)
    numbers = [layers] if isinstance(layers, int) else list(layers)
    wrong = [each for each in numbers if isinstance(each, bool) or not isinstance(each, int)]
    outside = [each for each in numbers if each not in wrong and not -n_layers <= each < n_layers]
    if wrong or outside or not numbers:
        raise PlanError(
            f"no layers {(wrong or outside or numbers)!r}: the model has 0 to {n_layers - 1}; give numbers, a "
            'range, "10-20" or "20%-80%"'
        )
    chosen = sorted(each % n_layers for each in numbers)
    if len(set(chosen)) != len(chosen):
        raise PlanError(f"a layer is named twice in {numbers}")
    return tuple(chosen)


def _between(n_layers: int, text: str) -> tuple[int, ...]:
    ends = re.fullmatch(r"\s*(\d+)(%?)\s*(?:-\s*(\d+)(%?))?\s*", text)
    if ends is None:
        raise PlanError(f'cannot read layers from {text!r}: write "12", "10-20" or "20%-80%"')
    first, last = ends[1], ends[3] or ends[1]
    numbers = [
        min(int(number) * n_layers // 100, n_layers - 1) if percent else int(number)
        for number, percent in ((first, ends[2]), (last, ends[4] if ends[3] else ends[2]))
    ]
    return layers_of(n_layers, range(numbers[0], numbers[1] + 1))


def ablate_layers(
    model: HasWriters,
    direction: Direction,
    layers: Layers = None,
    *,
    strength: float = 1.0,
    inputs: bool = False,
    positions: Positions = "all",
) -> Plan:
    """Directional ablation at chosen layers.

    What the layers write (attention and MLP outputs) loses the direction: exact in weights, so that what
    is measured can be exported. With `inputs` the stream that each layer reads loses it instead, as a
    layer wrapped with a hook on its input does it; that has no weight form unless it is every layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    chosen = set(layers_of(model.n_layers, layers))
    sites = (
        sites_of(("resid_pre",), sorted(chosen))
        if inputs
        else [s for s in model.writers if s.layer in chosen and s.point not in EMBEDDING_POINTS]
    )
    return Plan((Ablate(direction, sites, strength=strength, positions=positions),))


def add_to_layers(
    model: HasWriters,
    direction: Direction,
    layers: Layers = None,
    *,
    coefficient: float = 1.0,
    point: Point = "resid_pre",
    positions: Positions = "all",
) -> Plan:
    """Activation addition of coefficient x the raw direction at chosen layers; None is its own layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    own = direction.site.layer if layers is None else layers
    sites = sites_of((point,), list(layers_of(model.n_layers, own)))
    return Plan((Add(direction, sites, coefficient=coefficient, positions=positions),))
