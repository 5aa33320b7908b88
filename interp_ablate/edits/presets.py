"""Edits placed by rule: at every writer, or in a band of layers.

Knows: sites and strengths. Does not know: vectors.
"""

from __future__ import annotations

import math

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.edit import is_number
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.sites import Point, Site, sites_of


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
