"""Edits named by layers alone, for those who think in layers.

Knows: which sites a layer choice means. Does not know: how a plan is applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.edit import Positions
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.sites import EMBEDDING_POINTS, Point, Site, sites_of


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
