"""Representational independence of two directions: whether ablating one changes how the stream lies along the other.

Knows: cosines of activations with a direction, layer by layer, under plans. Does not know: behaviours or answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Site

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("layer", "point", "along", "ablated", "cosine", "cosine_ablated", "change", "n")


def representational_independence(
    model: Model,
    first: Direction,
    second: Direction,
    prompts: PromptLike | Sequence[PromptLike],
    *,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """How much ablating one of two directions changes the stream's cosines with the other, at every layer, both ways.

    A row a layer and way: layer and point; `along`, the direction that is read, and `ablated`, the one removed at every
    writer ("first" or "second"); the mean cosine of the last token's activation with the one that is read, without and
    with the ablation; `change`, the root of the mean squared difference over prompts; n prompts. Two directions are
    representationally independent where `change` is 0 at every layer both ways. Orthogonal ones need not be: what
    one writes, a later layer may read and write along the other. The worst case is `table["change"].max()`; a random
    direction in place of one shows what chance changes.
    Source: Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420.

    Raises:
        DirectionError: directions of another d_model than the model's, or parallel ones.
        ModelError: NaN or infinity in activations.
    """
    import pandas as pd

    check_model(model)
    named = {"first": first, "second": second}
    for name, item in named.items():
        if len(item.vector) != model.d_model:
            raise DirectionError(
                f"the {name} direction has d_model {len(item.vector)}, the model {model.d_model}"
            )
    if abs(first.cosine(second)) > 1 - 1e-9:
        raise DirectionError(
            "the two directions are parallel: ablating one removes the other, and nothing is left to compare"
        )
    sites = (
        *(Site(layer, "resid_pre") for layer in range(model.n_layers)),
        Site(model.n_layers - 1, "resid_post"),
    )
    texts: Any = prompts
    before = collect(model, texts, sites, batch_size=batch_size).values[:, 0]
    rows: list[dict[str, Any]] = []
    for along, ablated in (("first", "second"), ("second", "first")):
        with model.applied(Plan((Ablate(named[ablated], model.writers),))):
            after = collect(model, texts, sites, batch_size=batch_size).values[:, 0]
        cosines = [_cosines(values, named[along]) for values in (before, after)]
        for i, site in enumerate(sites):
            old, new = (each[:, i] for each in cosines)
            change = float((new - old).square().mean().sqrt())
            about = (site.layer, site.point, along, ablated, float(old.mean()), float(new.mean()))
            rows.append(dict(zip(COLUMNS, (*about, change, len(old)))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _cosines(
    values: Float[Tensor, "prompt site d_model"], direction: Direction
) -> Float[Tensor, "prompt site"]:
    """Cosines with the direction; 0 of activations that are zero."""
    wide = values.double()
    return (wide @ direction.vector.to(wide.device)) / wide.norm(dim=-1).clamp(
        min=torch.finfo(torch.float64).tiny
    )
