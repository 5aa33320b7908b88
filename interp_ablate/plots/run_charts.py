"""Charts of a run folder that say each value under the pointer: projections, separation, cosines, trials.

Knows: which table each chart is made of, and what is seen in it. Does not know: how a chart or a page is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_ablate.display import Html, shortened
from interp_ablate.plots.directions import control_ends, distinct_directions, held_out_rows
from interp_ablate.plots.style import distinct_rows, drawn_places, finished_trials, layer_name
from interp_ablate.plots.svg_charts import Mark, heat_svg, marks_svg
from interp_ablate.plots.trials import change_from_unedited, counted, prompts_of

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction

MOST_MARKS = 4000  # a page with more is slow to open
MOST_CELLS = 48  # of a side of the cosines


def held_out(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last point of a layer and of the first position: validation prompts where there are any.

    Each place of the stream is there once: the stream before layer 0 is layer -1 (`style.distinct_rows`).
    """
    rows = distinct_rows(held_out_rows(frame))
    points = list(dict.fromkeys(rows["point"]))
    rows = rows[rows["point"] == ("resid_post" if "resid_post" in points else points[-1])]
    if "position" in rows:
        rows = rows[rows["position"] == rows["position"].iloc[0]]
    return rows


def place_of(rows: pd.DataFrame) -> str:
    """The point, and the position where there were several, of rows of `held_out`."""
    position = f" [{rows['position'].iloc[0]}]" if "position" in rows else ""
    return f"{rows['point'].iloc[0]}{position}"


def projections_chart(rows: pd.DataFrame) -> Html:
    """Every prompt's projection by layer, in pooled standard deviations of its layer.

    Args:
        rows: of one point and position (`held_out`); each layer's values are centred between the sets' means.
    """
    marks, gaps = [], {}
    for layer, group in rows.sort_values("label", ascending=False).groupby("layer"):
        values = group["projection"].to_numpy(float)
        positive = (group["label"] == "positive").to_numpy()
        middle, spread = centre_and_spread(values, positive)
        scaled = (values - middle) / spread
        gaps[int(layer)] = float(scaled[positive].mean() - scaled[~positive].mean())  # type: ignore[call-overload]
        for value, raw, is_positive, prompt in zip(scaled, values, positive, group["prompt"]):
            marks.append(
                Mark(
                    float(layer) + (0.17 if is_positive else -0.17),  # type: ignore[arg-type]
                    float(value),
                    f"layer {layer_name(int(layer))}: {raw:.3g} ({value:+.2f} SD) · {shortened(prompt, 90)}",
                    "positive" if is_positive else "negative",
                    str(layer),
                )
            )
    best = max(gaps, key=lambda layer: gaps[layer]) if gaps else 0
    first = rows[rows["layer"] == rows["layer"].min()]["label"].value_counts()
    n = f"n = {' + '.join(f'{count} {label}' for label, count in first.items())} prompts a layer"
    alt = (
        f"Projections of {n} at {len(gaps)} layers. The two sets are furthest "
        f"apart at layer {layer_name(best)}, by {gaps.get(best, 0):.1f} standard deviations."
    )
    shown = marks[:: max(1, -(-len(marks) // MOST_MARKS))]
    return marks_svg(
        shown,
        alt=alt,
        xlabel="layer",
        ylabel="projection (pooled SDs)",
        caption=f"{n}, at {place_of(rows)}.",
    )


def centre_and_spread(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """The middle between two sets' means, and the pooled standard deviation within them (1 where that is 0)."""
    groups = [group for group in (values[positive], values[~positive]) if len(group)]
    middle = float(np.mean([group.mean() for group in groups]))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return middle, float(np.sqrt(squares / max(len(values) - len(groups), 1))) or 1.0


def separation_chart(directions: Sequence[Direction], controls: pd.DataFrame | None = None) -> Html:
    """d' of held-out prompts by layer, a line a point; what is infinite is left out.

    Args:
        controls: the separations by directions of shuffled labels: a band behind the lines.
    """
    places = drawn_places(
        (d.site.layer, d.site.point, d.position) for d in directions if d.separation is not None
    )
    marks = []
    for each in directions:
        place = places.get((each.site.layer, each.site.point, each.position))
        if place is None or each.separation is None:
            continue
        text = f"{each.site}[{each.position}]: d′ {each.separation.d_prime:.3g}, AUC {each.separation.auc:.3f}"
        layer, point, position = place
        marks.append(
            Mark(layer, each.separation.d_prime, text, f"{point} [{position}]", str(layer))
        )
    finite = [mark for mark in marks if np.isfinite(mark.y)]
    best = max(finite, key=lambda mark: mark.y, default=None)
    alt = f"Separation of n = {len(marks)} directions by layer." + (
        f" Highest: {best.text}." if best else ""
    )
    caption, band = f"n = {len(marks)} directions.", []
    if controls is not None and len(controls):
        ends = control_ends(controls, "d_prime", {int(mark.x) for mark in marks})
        band = list(ends.itertuples(name=None))
        caption += f" Grey: {controls['control'].nunique()} directions of shuffled labels, lowest to highest."
        alt += f" Directions of shuffled labels reach from {ends['min'].min():.2g} to {ends['max'].max():.2g}."
    return marks_svg(
        marks, alt=alt, xlabel="layer", ylabel="d′", lines=True, band=band, caption=caption
    )


def cosines_chart(directions: Sequence[Direction]) -> Html:
    """Cosines of every pair of directions, in forward order; of many, evenly spaced ones."""
    from interp_ablate.directions.direction import cosine_similarities

    items = distinct_directions(directions)
    items.sort(key=lambda each: (each.position, each.site.order))
    items = items[:: max(1, -(-len(items) // MOST_CELLS))]
    if not items:
        return Html('<p class="soft">No directions.</p>')
    cosines = cosine_similarities(items).tolist()
    several = len({each.position for each in items}) > 1
    names = [
        f"{each.site.layer}.{each.site.point.removeprefix('resid_')}"
        + f"[{each.position}]" * several
        for each in items
    ]
    near = [cosines[i][i + 1] for i in range(len(items) - 1)]
    alt = f"Cosines of {len(items)} directions in forward order." + (
        f" Neighbours: {np.mean(near):.2f} on average; the first and the last: {cosines[0][-1]:.2f}."
        if near
        else ""
    )
    return heat_svg(cosines, names, alt=alt, caption=f"{len(items)} directions.")


def trials_chart(
    trials: pd.DataFrame, chosen: Any = None, *, n: int | None = None, max_kl: float | None = None
) -> Html:
    """Change of behaviour against damage, a mark a trial that has both, beside the unedited model.

    Each change is from the unedited model on the same prompts. Trials of fewer prompts than the most are hollow, and
    the front, on which no trial beats another within the limit, is of the others.

    Args:
        n: validation prompts a side, where a trial was scored on all.
    """
    rows = trials[finished_trials(trials, ("target_log_odds", "kl"))]
    counts = prompts_of(rows)
    whole = counts >= min(counts.max(), n or np.inf)
    marks = [Mark(0.0, 0.0, "the unedited model: KL 0, no change", "unedited")]
    for row, change, count, full in zip(
        rows.itertuples(), change_from_unedited(rows, "target_log_odds"), counts, whole
    ):
        on = counted(count, n)
        text = (
            f"trial {row.trial}, {row.stage} on {on} prompts, {row.layer:g}.{row.point}: KL {row.kl:.3g} nats, "
            f"log-odds {row.target_log_odds:.3g}, {change:+.3g} from unedited"
        )
        is_chosen = str(row.trial) == str(chosen)
        series = f"{row.stage}, n = {on}"
        marks.append(Mark(row.kl, change, text, series, str(row.trial), is_chosen, not full))
    front: list[tuple[float, float]] = []
    for mark in sorted(marks[1:], key=lambda each: (each.x, each.y)):
        inside = max_kl is None or mark.x <= max_kl
        if inside and not mark.hollow and (not front or mark.y < front[-1][1]):
            front.append((mark.x, mark.y))
    at = next((mark for mark in marks if mark.chosen), None)
    limit = "" if max_kl is None else f" within the limit of {max_kl:g} nats"
    alt = (
        f"n = {len(marks) - 1} trials by KL and change of the behaviour; {len(front)} are on the front of those scored "
        f"on the most prompts{limit}." + (f" Chosen: {at.text}." if at else "")
    )
    return marks_svg(
        marks,
        alt=alt,
        xlabel="KL, first token (nats)",
        ylabel="change of log-odds",
        front=front,
        caption=f"n: prompts a side; hollow: fewer than the most. Line: the front{limit}.",
    )
