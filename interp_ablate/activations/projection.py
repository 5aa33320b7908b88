"""Projections of activations on directions, as a tidy table.

Knows: which position goes with which direction, labels, prompts, tokens, units. Does not know: how activations were collected
or directions estimated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError

if TYPE_CHECKING:
    import pandas as pd

Unit = Literal["activation", "norm"]
COLUMNS = (
    "layer", "point", "position", "token", "label", "prompt", "projection", "unit", "direction",
)  # fmt: skip


def project(
    activations: Activations,
    directions: Direction | Iterable[Direction],
    *,
    unit: Unit = "activation",
) -> pd.DataFrame:
    """The scalar products of activations with directions: a row for each prompt, direction and position.

    Each direction is projected on at its own site: at its own position where that was collected, else at
    every collected position. Dtypes and devices take care of themselves; the products are float64.

    Columns: layer, point, position; `token`, the text of the token that was read ("" for a mean); `label`
    (positive, negative, or "" where the prompts were no contrast set); `prompt`, its text or number;
    projection; unit; `direction`, its name.

    Args:
        unit: "activation" leaves the products on the unit vector as they are; "norm" divides them by the
            direction's norm: 1 is then the distance of the means of a difference in means.

    Raises:
        DirectionError: no direction, one of another d_model, an unknown unit, a norm of 0.
        InterpAblateError: a direction's site was not collected.
    """
    import pandas as pd

    items = [directions] if isinstance(directions, Direction) else list(directions)
    if not items or unit not in get_args(Unit):
        raise DirectionError(
            f"project needs directions and a unit of {', '.join(get_args(Unit))}; got {len(items)} "
            f"directions and {unit!r}"
        )
    tables = []
    for item in items:
        own = item.position in activations.positions
        for position in (item.position,) if own else activations.positions:
            values = item @ activations.at(item.site, position)
            if unit == "norm":
                if not item.norm > 0:
                    raise DirectionError(
                        f"{item.name} has the norm {item.norm}: use unit='activation'"
                    )
                values = values / item.norm
            table = {
                "layer": item.site.layer,
                "point": item.site.point,
                "position": position,
                "token": activations.tokens_at(position),
                "label": activations.label_names,
                "prompt": activations.prompts or range(len(values)),
                "projection": values.tolist(),
                "unit": unit,
                "direction": item.name,
            }
            tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)
