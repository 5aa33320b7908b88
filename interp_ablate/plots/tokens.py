"""A text's projections as a heat map, tokens by layers.

Knows: how it is drawn. Does not know: any model, or how a projection was computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_ablate.activations.token_html import layer_shares
from interp_ablate.errors import RunError
from interp_ablate.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_ablate.activations.token_view import TokenProjections

TOKEN_COLUMNS = ("index", "token", "part", "layer", "point", "projection")
_MOST_NAMED = 90  # tokens that can be written below the axis
_PART_COLOURS = {
    "template": "#8A8A8A",
    "prompt": style.INK,
    "thought": "#A65E00",
    "response": "#7A3E9D",
}


def token_heatmap(
    projections: TokenProjections | pd.DataFrame,
    ax: Axes | None = None,
    *,
    own_scale: bool = True,
) -> Axes:
    """Every token's projection at every layer of one point: layers upwards, tokens from left to right.

    Tokens of the template are grey and slanted, those of a thought brown, those of the response purple, with a line
    before them.

    Args:
        projections: `token_projections`' result, or its frame with the rows of one point, position and method.
        own_scale: each layer's values around their median and over their own range (`layer_shares`); False draws
            the projections as they are.

    Raises:
        RunError: a missing column, no rows, or several directions at one layer.
    """
    from interp_ablate.activations.token_view import TokenProjections

    whole = isinstance(projections, TokenProjections)
    frame: Any = projections.one_per_layer().to_frame() if whole else projections  # type: ignore[union-attr]
    style.require_columns(frame, TOKEN_COLUMNS, "token projections")
    style.require_rows(frame, "token projections")
    if frame.duplicated(["index", "layer"]).any():
        raise RunError(
            "token_heatmap() draws one direction a layer: pass the rows of one point, position and method"
        )
    table = frame.pivot(index="layer", columns="index", values="projection")
    values, layers = table.to_numpy(float), list(table.index)
    limit, label = 1.0, "projection above its layer's median\n(1: the layer's 98th percentile)"
    if own_scale:
        values = layer_shares(values.T).T
    else:
        limit = float(np.quantile(np.abs(values), 0.98)) or 1.0
        label = "projection (unit of the activations)"
    ax = style.axes_or_new(ax, height=1.9 + 0.13 * len(layers))
    image = ax.imshow(
        values, cmap=style.GRADES, vmin=-limit, vmax=limit, aspect="auto", origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    tokens = frame.drop_duplicates("index").sort_values("index")
    ax.set_yticks(range(len(layers))[:: max(1, -(-len(layers) // 16))])
    ax.set_yticklabels([str(layers[int(tick)]) for tick in ax.get_yticks()])
    counts = tokens["part"].value_counts()
    parts = ", ".join(f"{counts[part]} {part}" for part in _PART_COLOURS if part in counts)
    style.finish_axes(
        ax,
        f"Projection of every token at {frame['point'].iloc[0]}, on each layer's direction",
        f"n = {len(tokens)} tokens ({parts}) x {len(layers)} layers",
        "token",
        "layer",
        grid="",
    )
    _name_tokens(ax, tokens)  # after the ticks have their colours
    style.add_colour_bar(image, ax, label, fraction=0.03, pad=0.015)
    return ax


def _name_tokens(ax: Axes, tokens: pd.DataFrame) -> None:
    """The tokens below the axis, coloured by their part; only their numbers where they are many."""
    parts = list(tokens["part"])
    if "response" in parts and parts[0] != "response":
        ax.axvline(parts.index("response") - 0.5, color=style.INK, linewidth=1.0)
    if len(parts) > _MOST_NAMED:
        return
    size = float(np.clip(420 / len(parts), 4.5, 8.5))
    ax.set_xticks(range(len(parts)))
    names = [
        style.drawable(str(text).replace("\n", "↵")).replace("$", r"\$") or "⋯"
        for text in tokens["token"]
    ]
    labels = ax.set_xticklabels(names, rotation=90, family="monospace")
    for name, part in zip(labels, parts):
        name.set(color=_PART_COLOURS.get(part, style.INK), fontsize=size)
        name.set_fontstyle("italic" if part == "template" else "normal")
