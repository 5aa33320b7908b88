"""Plots of personas: steering and reading by layer, and trait and coherence against the coefficient.

Knows: how the tables of a persona folder are drawn. Does not know: models, or how a number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd

from interp_ablate.errors import RunError
from interp_ablate.plots import style
from interp_ablate.storage.tables import read_json, read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = Literal["score", "coherence"]
_LAYER_COLUMNS = (
    "layer",
    "coefficient",
    "score",
    "score_low",
    "score_high",
    "coherence",
    "answers",
    "chosen",
)
_READOUT_COLUMNS = ("layer", "r", "r_low", "r_high", "answers", "questions", "chosen")
_CURVE_COLUMNS = (
    "condition", "coefficient", "score", "score_low", "score_high", "coherence", "coherence_low",
    "coherence_high", "questions",
)  # fmt: skip
_COLOURS = ("#56B4E9", style.POSITIVE, "#009E73", "#CC79A7", "#E69F00")
_VALUES: dict[Value, tuple[str, str, str]] = {
    "score": ("Trait in the answers", "trait score (0 to 100)", style.POSITIVE),
    "coherence": ("Coherence of the answers", "coherence (0 to 100)", style.NEGATIVE),
}


def steering_by_layer(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    trait: str = "trait",
    unsteered: float | None = None,
    min_coherence: float = 50.0,
) -> Axes:
    """Trait score of steered answers by layer, one line a coefficient; hollow: incoherent; star: chosen.

    Args:
        unsteered: score of the unedited model's answers to the same questions: the dashed line.
        min_coherence: coherence below which a layer could not be chosen.

    Raises:
        RunError: a missing column, or no row with a score.
    """
    ax = style.axes_or_new(ax, height=3.6)
    style.require_columns(frame, _LAYER_COLUMNS, "layers")
    rows = frame[frame["score"].notna()]
    style.require_rows(rows, "layers with a score")
    style.require_whole(rows, ("layer", "answers"), "layers")
    for place, (coefficient, some) in enumerate(rows.groupby("coefficient")):
        line = some.sort_values("layer")
        _layer_line(
            ax, line, _COLOURS[place % len(_COLOURS)], f"coefficient {coefficient:g}", min_coherence
        )
    _star(ax, rows, "score")
    if unsteered is not None:
        ax.axhline(
            unsteered, color=style.CONTROL, linewidth=0.9, linestyle=(0, (4, 3)), label="unsteered"
        )
    style.finish_axes(
        ax,
        f"Steering towards {trait!r} by layer",
        f"n = {rows['answers'].max():.0f} answers a point, to questions that made no vector; bands: 95% intervals; "
        f"hollow: coherence below {min_coherence:g}",
        "layer (resid_post)",
        "trait score of the answers\n(0 to 100)",
    )
    style.set_layer_axis(ax, rows["layer"])
    style.add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4)
    return ax


def _star(ax: Axes, rows: pd.DataFrame, value: str) -> None:
    """The row that was chosen."""
    for _, row in rows[rows["chosen"].astype(str) == "True"].iterrows():
        ax.plot(
            row["layer"], row[value], "*", color=style.INK, markersize=14, markeredgecolor="white",
            linewidth=0, label="chosen", zorder=5,
        )  # fmt: skip


def _layer_line(
    ax: Axes, line: pd.DataFrame, colour: str, label: str, min_coherence: float
) -> None:
    """One coefficient's scores with their band; hollow where the answers are incoherent."""
    ax.fill_between(
        line["layer"], line["score_low"], line["score_high"], color=colour, alpha=0.13, linewidth=0
    )
    ax.plot(line["layer"], line["score"], color=colour, linewidth=1.5, label=label)
    fluent = line["coherence"] >= min_coherence
    for mask, face in ((fluent, colour), (~fluent, "white")):
        ax.plot(
            line["layer"][mask], line["score"][mask], "o", markersize=5, markerfacecolor=face,
            markeredgecolor=colour, linewidth=0,
        )  # fmt: skip


def readout_by_layer(frame: pd.DataFrame, ax: Axes | None = None, *, trait: str = "trait") -> Axes:
    """Correlation of each layer's readout with the scores of answers to unseen questions; star: chosen.

    Raises:
        RunError: a missing column, or no row with a correlation.
    """
    ax = style.axes_or_new(ax, height=3.6)
    style.require_columns(frame, _READOUT_COLUMNS, "readout")
    rows = frame[frame["r"].notna()].sort_values("layer")
    style.require_rows(rows, "layers with a correlation")
    style.require_whole(rows, ("layer", "answers", "questions"), "readout")
    ax.fill_between(
        rows["layer"], rows["r_low"], rows["r_high"], color=style.POSITIVE, alpha=0.15, linewidth=0
    )
    ax.plot(rows["layer"], rows["r"], color=style.POSITIVE, linewidth=1.5, marker="o", markersize=5)
    _star(ax, rows, "r")
    ax.axhline(0, color=style.CONTROL, linewidth=0.9, linestyle=(0, (4, 3)))
    first = rows.iloc[0]
    style.finish_axes(
        ax,
        f"Reading {trait!r} off answers by layer",
        f"n = {first['answers']:.0f} answers, each read by what the other {first['questions'] - 1:.0f} questions "
        "made; band: 95% interval",
        "layer (resid_post)",
        "Pearson's r of projection\nand score",
    )
    style.set_layer_axis(ax, rows["layer"])
    style.add_legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4)
    return ax


def steering_curve(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    *,
    value: Value = "score",
    chosen: float | None = None,
) -> Axes:
    """Trait score (or coherence) against the coefficient, with random directions of the same norm in grey.

    Args:
        chosen: the persona's own coefficient: a dotted line.

    Raises:
        RunError: a missing column, an unknown value, or no row of the persona with one.
    """
    ax = style.axes_or_new(ax, height=3.6)
    if value not in get_args(Value):
        raise RunError(f"unknown value {value!r}: accepted are {', '.join(get_args(Value))}")
    style.require_columns(frame, _CURVE_COLUMNS, "curve")
    rows = frame[frame[value].notna()]
    style.require_rows(rows[rows["condition"] == "persona"], f"{value}s of the persona's direction")
    style.require_whole(rows, ("questions",), "curve")
    title, ylabel, colour = _VALUES[value]
    zero = rows[(rows["condition"] == "persona") & (rows["coefficient"] == 0)]
    drawn = False
    for condition, some in rows.groupby("condition"):
        control = condition != "persona"
        # at coefficient 0 every direction is the unedited model
        line = (pd.concat([some, zero]) if control else some).sort_values("coefficient")
        ax.fill_between(
            line["coefficient"], line[f"{value}_low"], line[f"{value}_high"],
            color=style.CONTROL if control else colour, alpha=0.08 if control else 0.17, linewidth=0,
        )  # fmt: skip
        ax.plot(
            line["coefficient"], line[value], color=style.CONTROL if control else colour,
            linewidth=1.2 if control else 1.8, marker="s" if control else "o",
            markersize=3.5 if control else 5, linestyle="--" if control else "-",
            label=None if control and drawn else
            "random direction, same norm" if control else "persona's direction",
        )  # fmt: skip
        drawn = drawn or control
    if chosen is not None:
        ax.axvline(
            chosen, color=style.INK, linewidth=0.9, linestyle=":", label=f"chosen: {chosen:g}"
        )
    ax.set_ylim(-3, 103)
    count = int(rows["questions"].max())
    style.finish_axes(
        ax,
        title,
        f"n = {count} questions; bands: 95% intervals",
        "coefficient (added at generated tokens)",
        ylabel,
    )
    return ax


def save_figures(folder: str | Path, *, form: str = "png", dpi: int | None = None) -> list[Path]:
    """Draw what the persona folder has data for: layers, readout and curve, in figures/.

    Args:
        form: png, svg or pdf.
        dpi: pixels an inch, of a PNG.

    Raises:
        RunError: no persona there, a corrupt table, or a place that cannot be written.
    """
    folder = Path(folder)
    persona = read_json(folder / "persona.json")
    if persona is None:
        raise RunError(
            f"{folder} holds no persona.json: make one with `interp-ablate persona extract`"
        )
    trait, written = str(persona.get("trait", "trait")), []
    for name, columns, draw in (
        ("layers", _LAYER_COLUMNS, _draw_layers),
        ("readout", _READOUT_COLUMNS, None),
        ("curve", _CURVE_COLUMNS, _draw_curve),
    ):
        has_readout = (persona.get("readout") or {}).get("layers")
        if lexists(folder / f"{name}.csv") and (name != "readout" or has_readout):
            numbers = [column for column in columns if column not in ("condition", "chosen")]
            frame = read_table(folder / f"{name}.csv", columns, numbers=numbers)
            figure = style.new_figure(height=3.9)
            if draw is None:
                readout_by_layer(frame, figure.add_subplot(), trait=trait)
            else:
                draw(frame, figure, persona, trait)
            path = folder / "figures" / f"{name}.{form}"
            written.append(style.save_figure(figure, path, dpi=dpi))
    return written


def _draw_layers(
    frame: pd.DataFrame, figure: Figure, persona: Mapping[str, Any], trait: str
) -> None:
    settings = (persona.get("made_of") or {}).get("settings") or {}
    unsteered = (persona.get("unsteered") or {}).get("score")
    min_coherence = float(settings.get("min_coherence", 50.0))
    steering_by_layer(
        frame, figure.add_subplot(), trait=trait, unsteered=unsteered, min_coherence=min_coherence
    )


def _draw_curve(
    frame: pd.DataFrame, figure: Figure, persona: Mapping[str, Any], trait: str
) -> None:
    axes = [figure.add_subplot(1, 2, place + 1) for place in range(2)]
    values: tuple[Value, ...] = get_args(Value)
    for ax, value in zip(axes, values):
        steering_curve(frame, ax, value=value, chosen=persona.get("coefficient"))
    axes[0].set_title(f"{trait.capitalize()}: {axes[0].get_title(loc='left').lower()}",
                      loc="left", fontsize=10.5, fontweight="bold", color=style.INK, pad=19)  # fmt: skip
    handles = axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
