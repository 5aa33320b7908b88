"""Projections of activations on directions, as a tidy table.

Knows: which position goes with which direction, labels, prompts, tokens, units. Does not know: how activations were collected
or directions estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from interp_ablate.activations.activations import Activations
from interp_ablate.activations.token_activations import TokenActivations
from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.errors import DirectionError

if TYPE_CHECKING:
    import pandas as pd

Unit = Literal["activation", "norm"]


def project(
    activations: Activations | TokenActivations,
    directions: Direction | Iterable[Direction],
    *,
    unit: Unit = "activation",
) -> pd.DataFrame:
    """The scalar products of activations with directions: a row for each prompt, direction and position.

    Each direction is projected on at its own site: at its own position where that was collected, else at
    every collected position, and of `TokenActivations` at every token. Dtypes and devices take care of themselves;
    the products are float64.

    Columns: layer, point, position (of `TokenActivations` the place in the prompt's row, from 0); `token`, the text of
    the token that was read ("" for a mean); for `TokenActivations` `part` (template, prompt, thought, response);
    `label` (positive, negative, or "" where the prompts were no contrast set); `prompt`, its text or number;
    projection; unit; `direction`, its name.

    Args:
        unit: "activation" leaves the products on the unit vector as they are; "norm" divides them by the
            direction's norm: 1 is then the distance of the means of a difference in means.

    Raises:
        DirectionError: no direction, one of another d_model, an unknown unit, a norm of 0.
        InterpAblateError: a direction's site was not collected.
    """
    import pandas as pd

    items = as_directions(directions)
    if not items or unit not in get_args(Unit):
        raise DirectionError(
            f"project needs directions and a unit of {', '.join(get_args(Unit))}; got {len(items)} "
            f"directions and {unit!r}"
        )
    tables = []
    places = _places_of(activations)
    for item in items:
        for about, parts in places(item):
            values = torch.cat([item @ x for x in parts])
            if unit == "norm":
                if not item.norm > 0:
                    raise DirectionError(
                        f"{item.name} has the norm {item.norm}: use unit='activation'"
                    )
                values = values / item.norm
            table = {
                "layer": item.site.layer,
                "point": item.site.point,
                **about,
                "projection": values.tolist(),
                "unit": unit,
                "direction": item.name,
            }
            tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


# What a projection's rows are of, as columns, and the activations, in parts [row, d_model].
Places = Iterator[tuple[dict[str, Any], Sequence[Tensor]]]


def _places_of(activations: Activations | TokenActivations) -> Callable[[Direction], Places]:
    """A function that gives the places at which a direction is projected on."""
    if isinstance(activations, TokenActivations):
        every = activations
        columns = every.token_columns()
        columns["prompt"] = [every.prompts[i] for i in columns.pop("prompt")]
        columns = {name: columns[name] for name in ("position", "token", "part", "label", "prompt")}
        return lambda item: iter([(columns, every.at(item.site))])

    def places(item: Direction) -> Places:
        own = item.position in activations.positions
        for position in (item.position,) if own else activations.positions:
            x = activations.at(item.site, position)
            yield (
                {
                    "position": position,
                    "token": activations.tokens_at(position),
                    "label": activations.label_names,
                    "prompt": activations.prompts or range(len(x)),
                },
                [x],
            )

    return places
