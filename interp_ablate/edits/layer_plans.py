"""Plans that give every layer a direction of its own.

Knows: which writers a layer has, one direction for each. Does not know: how directions were estimated, hooks or weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import one_per_layer
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import HasWriters, Plan, n_layers_of, written_by
from interp_ablate.errors import PlanError
from interp_ablate.sites import Point


def ablate_by_layer(
    model: HasWriters,
    directions: Iterable[Direction],
    *,
    strength: float = 1.0,
    point: Point | None = None,
    norm_preserving: bool = False,
) -> Plan:
    """Every layer's own direction ablated from what that layer writes (attention and MLP outputs).

    Exact in weights. One edit a layer; layers without a direction are left alone, and so are the embeddings, so that
    a direction is not gone from the stream: each layer stops writing its own. With `norm_preserving` and
    `biprojected_directions` it is norm-preserving biprojected abliteration (Lai 2025,
    https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration).

    Args:
        directions: the first of each layer at one point is taken.
        point: default resid_post where there is one, else the first direction's.
        norm_preserving: as for `Ablate`.

    Raises:
        DirectionError: no direction, or none at that point.
        PlanError: a direction of a layer that the model lacks.
    """
    count = n_layers_of(model)
    items = one_per_layer(directions, point)
    edits = []
    for item in items:
        sites = written_by(model, (item.site.layer,))
        if not sites:
            raise PlanError(
                f"a direction is of layer {item.site.layer}, and the model has layers 0 to "
                f"{count - 1}: estimate it for this model"
            )
        edits.append(Ablate(item, sites, strength=strength, norm_preserving=norm_preserving))
    return Plan(tuple(edits))
