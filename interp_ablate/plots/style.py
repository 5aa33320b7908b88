"""The look that all figures share: colours, axes, legends, captions, files.

It keeps away from pyplot (no window, no global state, no open figures; any backend may be in use) unless a plot is
drawn without axes.

Knows: how a figure looks, and that it is written whole. Does not know: the data.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from interp_ablate.display import shortened
from interp_ablate.errors import RunError
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.tables import MAX_LAYERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)


# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
POSITIVE, NEGATIVE, CONTROL, INK, FAINT = "#D55E00", "#0072B2", "#7A7A7A", "#222222", "#D9D9D9"
# From the one label's colour through grey to the other's.
GRADES = LinearSegmentedColormap.from_list("grades", (NEGATIVE, "#E4E4E4", POSITIVE))
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
Place = tuple[int, str, str]  # layer, point, position
FORMATS = ("png", "svg", "pdf")
_unfinished: WeakSet[Any] = WeakSet()
MAX_DPI = 1200  # more is no sharper in print, and a page of it takes gigabytes


def drawable(text: str) -> str:
    """The text with a box for every character that the monospaced font lacks."""
    charmap = get_font(findfont("monospace")).get_charmap()
    return "".join(
        c if c.isprintable() and ord(c) in charmap else "\u25a1" for c in text.replace("\t", " ")
    )


def axes_or_new(ax: Axes | None, *, height: float, width: float = _WIDTH) -> Axes:
    """The axes, or those of a new figure, which pyplot has once they are finished (`finish_axes`); sizes in inches.

    So a notebook shows it, and no figure stays open of a plot that refuses its data.
    """
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), layout="constrained")
    _unfinished.add(figure)
    return figure.subplots()


def add_colour_bar(image: Any, ax: Axes, label: str, **options: Any) -> Any:
    """The scale of an image's colours."""
    bar = ax.get_figure().colorbar(image, ax=ax, **options)  # type: ignore[union-attr]
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def finished_trials(trials: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """True for each finished trial in which every one of these scores is a finite number."""
    numbers = trials[list(columns)].apply(pd.to_numeric, errors="coerce")
    return (trials["status"] == "ok") & np.isfinite(numbers).all(axis=1)


def point_order(point: str) -> int:
    """Place of a point in a forward pass.

    Raises:
        RunError: an unknown point.
    """
    order = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    if point not in order:
        raise RunError(f"unknown point {point!r}: accepted are {', '.join(order)}")
    return order.index(point)


def position_key(position: str) -> tuple[int, str]:
    """Sorting key: the last position first, then backwards; named positions after the numbered ones."""
    text = str(position)
    return (-int(text), "") if re.fullmatch(r"-?\d+", text) else (10**9, text)


def require_columns(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise a RunError that names the columns that a table lacks, or says that it is no table."""
    if not isinstance(frame, pd.DataFrame):
        raise RunError(
            f"the {what} are a table (pandas.DataFrame); got {shortened(repr(frame))} ({type(frame).__name__})"
        )
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise RunError(
            f"the {what} lack the column{'s' if missing[1:] else ''} {', '.join(missing)}: "
            f"expected {', '.join(columns)}; came {', '.join(map(str, frame.columns)) or 'none'}"
        )


def require_rows(frame: pd.DataFrame, what: str) -> None:
    """Raise a RunError for a table without rows."""
    if not len(frame):
        raise RunError(f"there are no {what} to draw")


def require_whole(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise a RunError for a value of these columns, as far as they are there, that is no layer and no count."""
    for column in [name for name in columns if name in frame]:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        most = MAX_LAYERS if column in ("layer", "index") else 10**6
        bad = frame[column][~numbers.between(-1, most) | (numbers % 1 != 0)]
        if len(bad):
            raise RunError(
                f"the {what} have {shortened(repr(bad.iloc[0]))} under {column}, where a whole number belongs"
            )


def same_place(place: Place) -> Place:
    """resid_pre of a layer as what it is too: resid_post of the layer before, which is -1 before layer 0."""
    layer, point, position = place
    return (layer - 1, "resid_post", position) if point == "resid_pre" else place


def drawn_places(places: Iterable[Place]) -> dict[Place, Place | None]:
    """Where each place of a figure is drawn, so that none of the stream is drawn twice.

    resid_pre becomes resid_post of the layer before (`same_place`), or None where that is there too. Without any
    resid_post every place stays what it is.
    """
    there = set(places)
    if not any(point == "resid_post" for _, point, _ in there):
        return {place: place for place in there}
    moved = {place: same_place(place) for place in there}
    return {a: None if b != a and b in there else b for a, b in moved.items()}


def distinct_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """A table by layer and point (and position), each place of the stream once: see `drawn_places`."""
    require_whole(frame, ("layer",), "rows of layers")
    positions = frame["position"].astype(str) if "position" in frame else [""] * len(frame)
    keys = list(zip(frame["layer"].astype(int), frame["point"].astype(str), positions))
    drawn = drawn_places(keys)
    places = [place for key in keys if (place := drawn[key]) is not None]
    kept = frame[[drawn[key] is not None for key in keys]]
    return kept.assign(layer=[layer for layer, *_ in places], point=[p for _, p, _ in places])


def layer_name(layer: int) -> str:
    """A layer's number; "pre 0" for the stream before layer 0, which `same_place` calls -1."""
    return "pre 0" if layer == -1 else str(layer)


def set_layer_axis(ax: Axes, layers: Iterable[int]) -> None:
    """Whole layer numbers, at most sixteen of them, with room at the ends."""
    numbers = sorted({int(layer) for layer in layers})
    ticks = numbers[:: max(1, -(-len(numbers) // 16))]
    ax.set_xticks(ticks, [layer_name(tick) for tick in ticks])
    ax.set_xlim(numbers[0] - 0.7, numbers[-1] + 0.7)


def set_row_axis(ax: Axes, names: Sequence[str]) -> None:
    """One named row a value, from the top."""
    ax.set_yticks(range(len(names)))
    ax.set_yticklabels(names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def whisker(
    ax: Axes, row: float, value: float, interval: Sequence[float] | None, colour: str, *,
    text: str = "", hollow: bool = False,
) -> None:  # fmt: skip
    """A dot with its interval (low, high) in a row, and the number to the right of both."""
    ends = [end for end in interval or () if np.isfinite(end)]
    if len(ends) == 2:
        ax.plot(ends, [row, row], color=colour, linewidth=2.2, alpha=0.55)
    face: dict[str, Any] = {"markerfacecolor": "white"} if hollow else {"markeredgecolor": "white"}
    ax.plot(value, row, "o", color=colour, markersize=8, **face)
    if text:
        ax.annotate(
            text, (max(value, *ends) if ends else value, row), (8, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def colour_patch(colour: str, name: str) -> Any:
    """A legend's entry for an area."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.7, label=name)


def add_legend(ax: Axes, handles: list[Any] | None = None, **options: Any) -> None:
    """A legend of the labelled artists, or of these handles."""
    shown = handles if handles is not None else ax.get_legend_handles_labels()[0]
    ax.legend(handles=shown, fontsize=8.5, framealpha=0.85, edgecolor="none", **options)


def finish_axes(
    ax: Axes,
    title: str,
    caption: str,
    xlabel: str,
    ylabel: str,
    *,
    grid: Literal["both", "x", ""] = "both",
) -> None:
    """Title on top, a caption (with n) below it in grey, labelled axes, no frame on two sides."""
    lines = textwrap.wrap(caption, _line_length(ax))
    pad = 8 + 11 * len(lines)
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=pad)
    ax.annotate(
        "\n".join(lines), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color="#555555", annotation_clip=False, linespacing=1.15,
    )  # fmt: skip
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(which="both", labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(visible=True, axis=grid, color="#E8E8E8", linewidth=0.7)
        ax.set_axisbelow(True)
    if (figure := ax.get_figure()) in _unfinished:
        from matplotlib import pyplot

        _unfinished.remove(figure)
        pyplot.figure(FigureClass=lambda **_: figure)  # type: ignore[arg-type]


def _line_length(ax: Axes) -> int:
    """Characters of a caption that fit the width of axes: the layout would otherwise squeeze the plot."""
    spec, figure = ax.get_subplotspec(), ax.get_figure()
    columns = spec.get_gridspec().ncols if spec is not None else 1
    return max(24, int(13.0 * (figure.get_figwidth() / columns - 0.7)))  # type: ignore[union-attr]


def new_figure(*, height: float, width: float = _WIDTH) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def check_format(form: str, dpi: int | None) -> None:
    """Refuse what `save_figure` cannot write.

    Raises:
        RunError: a format that is not one of FORMATS, or a dpi that is none of 1 to MAX_DPI.
    """
    if form not in FORMATS or (dpi is not None and not 1 <= dpi <= MAX_DPI):
        raise RunError(
            f"no figure of the format {form!r} with dpi {dpi}: formats are {', '.join(FORMATS)}, a dpi is "
            f"from 1 to {MAX_DPI}"
        )


def save_figure(figure: Figure, path: str | Path, *, dpi: int | None = None) -> Path:
    """Write a figure as its name's end says (png, svg, pdf), whole or not at all.

    `dpi`: pixels an inch, of pictures in a PNG; default: the figure's own.

    Raises:
        RunError: another end, another dpi than `check_format` takes, a place that cannot be written.
    """
    path = Path(path)
    form = path.suffix.removeprefix(".").lower()
    check_format(form, dpi)
    # without the hour, so that the same figure is the same file
    unstamped = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        with (
            atomic_path(path) as temporary,
            matplotlib.rc_context({"svg.hashsalt": "interp_ablate"}),
        ):
            figure.savefig(
                temporary, format=form, dpi=dpi or "figure", metadata=unstamped.get(form)
            )
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Free space or choose another folder"
        ) from error
    logger.info("wrote %s", path)
    return path
