"""Plot of a screened data set: a histogram of its samples by projection, with the threshold.

Knows: how the histogram is drawn. Does not know: how samples were scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots.style import (
    CONTROL,
    INK,
    NEGATIVE,
    POSITIVE,
    add_legend,
    finish_axes,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def screening_histogram(
    values: Sequence[float] | np.ndarray,
    ax: Axes,
    *,
    threshold: float,
    by: str = "projection",
    trait: str = "",
    labels: Sequence[bool] | np.ndarray | None = None,
    reference: Sequence[float] | np.ndarray | None = None,
) -> Axes:
    """Samples by projection (or difference), with the threshold; those above it are flagged.

    Samples without a value are left out and counted.

    Args:
        labels: where they are known, they colour the bars instead.
        reference: values of a clean set, drawn as a line scaled to the same area.

    Raises:
        RunError: no sample has a value.
    """
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    if not finite.any():
        raise RunError("there are no samples with a value to draw")
    array = array[finite]
    count = int(np.clip(np.sqrt(len(array)) * 2, 12, 80))
    bins = np.histogram_bin_edges(np.append(array, threshold), bins=count).tolist()
    if labels is None:
        orange, names = array > threshold, ("kept", "flagged")
    else:
        orange, names = np.asarray(labels, bool)[finite], ("not planted", "planted")
    for part, colour, name in zip((array[~orange], array[orange]), (NEGATIVE, POSITIVE), names):
        ax.hist(
            part, bins=bins, color=colour, alpha=0.65, label=f"{name} ({len(part)})",
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    if reference is not None:
        _outline(ax, np.asarray(reference, float), bins, len(array))
    ax.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="threshold")
    lost, above = int((~finite).sum()), int((array > threshold).sum())
    finish_axes(
        ax,
        f"Training samples by {by if by != 'adjusted' else 'adjusted projection'}"
        + (f": {trait!r}" if trait else ""),
        f"{len(array)} samples, {above} of them above the threshold {threshold:.3g}"
        + (f"; {lost} without a value left out" if lost else ""),
        _MEASURES.get(by, by),
        "samples",
    )
    add_legend(ax, loc="best")
    return ax


_MEASURES = {
    "difference": "projection of the answer minus that of the model's own answer",
    "adjusted": "projection of the answer minus the part that the model's own answer explains",
    "projection": "projection of the answer (mean over its tokens)",
}


def _outline(ax: Axes, values: np.ndarray, bins: list[float], n: int) -> None:
    """A reference as a line, scaled to the area of n samples; what lies beyond the bins is not drawn."""
    clean = values[np.isfinite(values)]
    weights = np.full(len(clean), n / max(1, len(clean)))
    ax.hist(
        clean, bins=bins, weights=weights, histtype="step", color=CONTROL, linewidth=1.4,
        label=f"reference ({len(clean)}, scaled)",
    )  # fmt: skip


def save_screening(
    table: pd.DataFrame,
    path: str | Path,
    *,
    by: str,
    threshold: float,
    trait: str = "",
    labels: Sequence[bool] | None = None,
    reference: pd.DataFrame | None = None,
) -> Path:
    """The histogram of the column `by` as PNG; `labels` belong to the rows of `table` in their order.

    Raises:
        RunError: see `screening_histogram`; a place that cannot be written.
    """
    figure = new_figure(height=3.4)
    screening_histogram(
        table[by].to_numpy(float),
        figure.add_subplot(),
        threshold=threshold,
        by=by,
        trait=trait,
        labels=labels,
        reference=None if reference is None else reference[by].to_numpy(float),
    )
    return save_figure(figure, path)
