"""Plots of what writes a direction: the largest terms as bars, heads and MLPs by layer.

Knows: how they are drawn. Does not know: how anything was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTRIBUTION_COLUMNS = ("term", "kind", "layer", "module", "index")


def _value_column(frame: pd.DataFrame) -> str:
    """The column that is drawn: the difference of both sets' means, the mean, or one token's value.

    Raises:
        RunError: none of them is there.
    """
    for name in ("difference", "mean", "value"):
        if name in frame:
            return name
    raise RunError(
        "the attribution lacks the column difference, mean or value: give to_frame() or of_token()"
    )


def _n(frame: pd.DataFrame) -> str:
    return f"n = {int(frame['n'].max())} prompts" if "n" in frame else "n = 1 token"


def attribution_bars(frame: pd.DataFrame, ax: Axes | None = None, *, top: int = 20) -> Axes:
    """The terms that write most along a direction, the largest first, with 95% intervals where there are some.

    Raises:
        RunError: a missing column, or no rows.
    """
    ax = style.axes_or_new(ax, height=6.2)
    style.require_columns(frame, ATTRIBUTION_COLUMNS, "attribution")
    style.require_rows(frame, "terms")
    style.require_whole(frame, ("n",), "attribution")
    name = _value_column(frame)
    order = frame[name].abs().sort_values(ascending=False, kind="stable").index
    rows = frame.loc[order].head(top)
    colours = [style.POSITIVE if value > 0 else style.NEGATIVE for value in rows[name]]
    ax.barh(range(len(rows)), rows[name], color=colours, alpha=0.8)
    if {"low", "high"} <= {*rows}:
        ends = rows[["low", "high"]].astype(float).to_numpy()
        for row, (low, high) in enumerate(ends):
            if np.isfinite([low, high]).all():
                ax.plot([low, high], [row, row], color=style.INK, linewidth=1.2)
    style.set_row_axis(ax, [str(term) for term in rows["term"]])
    ax.axvline(0, color=style.INK, linewidth=0.8)
    rest = float(frame[name].sum() - rows[name].sum())
    style.finish_axes(
        ax,
        f"What writes the direction: the {len(rows)} largest of {len(frame)} terms",
        f"{_n(frame)}; sum of all terms {frame[name].sum():.3g}, of those not shown {rest:.3g}",
        f"{'difference of the means' if name == 'difference' else name} along the direction (units of the stream)",
        "",
        grid="x",
    )
    return ax


def attribution_map(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Layers by heads, with a column for each layer's whole MLP: what each wrote along a direction.

    Experts of a layer are added up; biases and what is not split stand with their module.

    Raises:
        RunError: a missing column, or no layers.
    """
    ax = style.axes_or_new(ax, height=6.2)
    style.require_columns(frame, ATTRIBUTION_COLUMNS, "attribution")
    name = _value_column(frame)
    rows = frame[frame["layer"].notna()]
    style.require_rows(rows, "terms of layers")
    heads = rows[rows["kind"] == "head"]
    style.require_whole(rows, ("n", "layer"), "attribution")
    style.require_whole(heads, ("index",), "attribution")
    n_layers, n_heads = (
        int(rows["layer"].max()) + 1,
        int(heads["index"].max()) + 1 if len(heads) else 0,
    )
    columns = [f"H{h}" for h in range(n_heads)] + ["attn, not split", "MLP"]
    values = np.full((n_layers, len(columns)), np.nan)
    for layer, kind, module, index, value in zip(
        rows["layer"], rows["kind"], rows["module"], rows["index"], rows[name]
    ):
        place = int(index) if kind == "head" else len(columns) - (1 if module == "mlp" else 2)
        before = values[int(layer), place]
        values[int(layer), place] = value if np.isnan(before) else before + value
    if np.isnan(values[:, -2]).all():
        values, columns = np.delete(values, -2, axis=1), [*columns[:-2], columns[-1]]
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = ax.imshow(
        values,
        cmap="PuOr_r",
        vmin=-limit,
        vmax=limit,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    step = max(1, -(-len(columns) // 24))
    shown = [i for i in range(len(columns)) if i % step == 0 or i >= n_heads]
    ax.set_xticks(shown, [columns[i] for i in shown], rotation=90)
    ax.set_yticks(range(0, n_layers, max(1, -(-n_layers // 16))))
    style.finish_axes(
        ax,
        "What writes the direction, by layer and head",
        _n(rows) + ("; blank: no such head" if np.isnan(values).any() else f"; {n_layers} layers"),
        "head; the whole MLP last",
        "layer",
        grid="",
    )
    style.add_colour_bar(
        image, ax, "along the direction (units of the stream)", fraction=0.046, pad=0.03
    )
    return ax
