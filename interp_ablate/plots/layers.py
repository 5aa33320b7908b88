"""The effect of each layer's direction, one line for each place that is edited.

Knows: how a layer sweep is drawn. Does not know: any model, or how an effect was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.search.by_layer import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = {
    "site": ("#0072B2", "o", "at its own site"),
    "writers": ("#D55E00", "s", "at all writers"),
    "from": ("#009E73", "^", "from it on"),
}
_UNITS = {"target_log_odds": "log-odds of the behaviour's first tokens", "kl_first_token": "nats"}
_DID = {"ablate": "ablated from", "add": "added to", "patch": "patched in"}


def layer_effects(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    score: str | None = None,
    edit: str | None = None,
) -> Axes:
    """The mean change of one score by layer under one edit, with its 95% interval and the band of shuffled labels.

    Args:
        frame: `layer_sweep`'s result.
        score, edit: which rows; default: the first of each.

    Raises:
        RunError: a missing column, or no row of that score and edit.
    """
    style.require_columns(frame, COLUMNS, "layer sweep")
    style.require_rows(frame, "rows of a layer sweep")
    score = frame["score"].iloc[0] if score is None else score
    edit = frame["edit"].iloc[0] if edit is None else edit
    rows = frame[(frame["score"] == score) & (frame["edit"] == edit)]
    if rows.empty:
        there = sorted({f"{s} under {e}" for s, e in zip(frame["score"], frame["edit"])})
        raise RunError(f"no rows of {score} under {edit}: there are {', '.join(there)}")
    style.require_whole(rows, ("layer", "n", "n_shuffled"), "layer sweep")
    if unknown := {*map(str, rows["where"])} - {*_LOOKS} | {str(edit)} - {*_DID}:
        raise RunError(
            f"the layer sweep names {', '.join(sorted(unknown))}: known are {', '.join((*_LOOKS, *_DID))}"
        )
    ax = style.axes_or_new(ax, height=3.6)
    ax.axhline(0, color=style.CONTROL, linewidth=0.9, linestyle=(0, (4, 3)))
    for place, line in rows.groupby("where", sort=False):
        colour, marker, name = _LOOKS[str(place)]
        line = line.sort_values("layer")
        layers = line["layer"].to_numpy(float)
        ax.plot(layers, line["change"], color=colour, marker=marker, markersize=4, label=name)
        ax.fill_between(
            layers, line["change_low"], line["change_high"], color=colour, alpha=0.2, linewidth=0
        )
        ax.vlines(
            layers, line["shuffled_low"], line["shuffled_high"], color=colour, alpha=0.55, linewidth=3,
            linestyle=(0, (1, 0.6)),
        )  # fmt: skip
        for end in ("shuffled_low", "shuffled_high"):  # a bar of one direction has no height
            ax.plot(layers, line[end], "_", color=colour, markersize=9, markeredgewidth=2)
    count, controls = int(rows["n"].min()), int(rows["n_shuffled"].max())
    of = "a direction" if controls == 1 else f"{controls} directions"
    bars = f"; dotted bars: {of} of shuffled labels" if controls else ""
    style.finish_axes(
        ax,
        f"{score}: each layer's direction, {_DID[edit]} {rows['on'].iloc[0]} prompts",
        f"n = {count} prompts; bands: 95% intervals of the paired change{bars}",
        f"layer (direction at {rows['point'].iloc[0]})",
        f"change of {score}\n({_UNITS.get(score, 'the score itself')})",
    )
    style.set_layer_axis(ax, rows["layer"])
    style.add_legend(ax, loc="best")
    return ax
