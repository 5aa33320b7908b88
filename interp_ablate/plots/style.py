"""What all figures share: colours, axes, legends, captions, files.

Knows: the look. Does not know: the data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from interp_ablate.errors import RunError
from interp_ablate.sites import POINTS, Point
from interp_ablate.storage.atomic_files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)


# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
POSITIVE, NEGATIVE, CONTROL, INK, FAINT = "#D55E00", "#0072B2", "#7A7A7A", "#222222", "#D9D9D9"
POINT_STYLE: dict[str, tuple[str, str]] = {
    "embed": ("#000000", "X"),
    "resid_pre": ("#0072B2", "o"),
    "attn_out": ("#CC79A7", "v"),
    "resid_mid": ("#E69F00", "s"),
    "mlp_out": ("#7A7A7A", "D"),
    "resid_post": ("#009E73", "^"),
}
LINE_STYLES = ("-", "--", ":", "-.")
_DPI, _WIDTH = 150, 7.8


# Drawing helpers -----------------------------------------------------------------------------

SIDES = ("negative", "positive")


def standardised_projections(rows: pd.DataFrame) -> list[np.ndarray]:
    """Negative and positive values, centred between the means, over the spread within labels."""
    groups = [rows["projection"][rows["label"] == name].to_numpy(float) for name in SIDES]
    filled = [group for group in groups if len(group)]
    if not filled:
        raise RunError(
            f"unknown labels {sorted(map(str, rows['label'].unique()))[:4]} in the projections: "
            f"accepted are {' and '.join(SIDES)}"
        )
    centre = float(np.mean([group.mean() for group in filled]))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in filled)
    spread = np.sqrt(squares / max(sum(map(len, filled)) - len(filled), 1))
    # Constant within each label: one unit apart is all that can be said.
    scale = spread or max(abs(group.mean() - centre) for group in filled) or 1.0
    return [(group - centre) / scale for group in groups]


def add_colour_bar(image: Any, ax: Axes, **options: Any) -> Any:
    return ax.get_figure().colorbar(image, ax=ax, **options)  # type: ignore[union-attr]


def finished_trials(trials: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Finished trials in which every given score is a finite number."""
    numbers = trials[list(columns)].apply(pd.to_numeric, errors="coerce")
    return (trials["status"] == "ok") & np.isfinite(numbers).all(axis=1)


def point_order(point: str) -> int:
    order: tuple[Point, ...] = (
        "embed",
        "resid_pre",
        "attn_out",
        "resid_mid",
        "mlp_out",
        "resid_post",
    )
    if point not in order:
        raise RunError(f"unknown point {point!r}: accepted are {', '.join(POINTS)}")
    return order.index(point)  # type: ignore[arg-type]


def position_key(position: str) -> tuple[int, str]:
    """The last position first, then backwards; named positions after the numbered ones."""
    text = str(position)
    return (-int(text), "") if re.fullmatch(r"-?\d+", text) else (10**9, text)


def require_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise RunError(
            f"the {what} lack the column{'s' if missing[1:] else ''} {', '.join(missing)}: "
            f"expected {', '.join(columns)}; came {', '.join(map(str, frame.columns)) or 'none'}"
        )


def require_rows(frame: pd.DataFrame, what: str) -> None:
    if not len(frame):
        raise RunError(f"there are no {what} to draw")


def set_layer_axis(ax: Axes, layers: Iterable[int]) -> None:
    """Whole layer numbers, at most sixteen of them, with room at the ends."""
    found = sorted({int(layer) for layer in layers})
    ax.set_xticks(found[:: max(1, -(-len(found) // 16))])
    ax.set_xlim(found[0] - 0.7, found[-1] + 0.7)


def colour_patch(colour: str, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.7, label=name)


def add_legend(ax: Axes, handles: list[Any] | None = None, **options: Any) -> None:
    shown = handles if handles is not None else ax.get_legend_handles_labels()[0]
    ax.legend(handles=shown, fontsize=8.5, framealpha=0.85, edgecolor="none", **options)


def finish_axes(
    ax: Axes, title: str, caption: str, xlabel: str, ylabel: str, *, grid: bool = True
) -> None:
    """The look that all figures share: what is seen on top, n below it in grey, labelled axes."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=19)
    ax.annotate(
        caption, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color="#555555", annotation_clip=False,
    )  # fmt: skip
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(which="both", labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(visible=True, color="#E8E8E8", linewidth=0.7)
        ax.set_axisbelow(True)


def new_figure(*, height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Free space or choose another folder"
        ) from error
    logger.info("wrote %s", path)
    return path
