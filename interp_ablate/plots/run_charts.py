"""Charts of a run folder that say each value under the pointer: projections, separation, cosines, trials.

Knows: which table each chart is made of, and what is seen in it. Does not know: how a chart or a page is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_ablate.display import Html, shortened
from interp_ablate.plots.directions import held_out_rows
from interp_ablate.plots.style import finished_trials
from interp_ablate.plots.svg_charts import Mark, heat_svg, marks_svg

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction

MOST_MARKS = 4000  # a page with more is slow to open
MOST_CELLS = 48  # of a side of the cosines


def held_out(
    frame: pd.DataFrame, point: str | None = None, position: str | None = None
) -> pd.DataFrame:
    """The rows of one point and position of projections.csv: validation prompts where there are any.

    `point`, `position`: default: the last point of a layer, and the first position.
    """
    rows = held_out_rows(frame)
    points = list(dict.fromkeys(rows["point"]))
    chosen = point or ("resid_post" if "resid_post" in points else points[-1])
    rows = rows[rows["point"] == chosen]
    if "position" in rows:
        rows = rows[rows["position"] == (position or rows["position"].iloc[0])]
    return rows


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
                    f"layer {layer}: {raw:.3g} ({value:+.2f} SD) · {shortened(prompt, 90)}",
                    "positive" if is_positive else "negative",
                    str(layer),
                )
            )
    best = max(gaps, key=lambda layer: gaps[layer]) if gaps else 0
    alt = (
        f"Projections of {rows['prompt'].nunique()} prompts at {len(gaps)} layers. The two sets are furthest "
        f"apart at layer {best}, by {gaps.get(best, 0):.1f} standard deviations."
    )
    shown = marks[:: max(1, -(-len(marks) // MOST_MARKS))]
    return marks_svg(shown, alt=alt, xlabel="layer", ylabel="projection (pooled SDs)")


def centre_and_spread(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """The middle between two sets' means, and the pooled standard deviation within them (1 where that is 0)."""
    groups = [group for group in (values[positive], values[~positive]) if len(group)]
    middle = float(np.mean([group.mean() for group in groups]))
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return middle, float(np.sqrt(squares / max(len(values) - len(groups), 1))) or 1.0


def separation_chart(directions: Sequence[Direction]) -> Html:
    """d' of held-out prompts by layer, a line a point; what is infinite is left out."""
    measured = [each for each in directions if each.separation is not None]
    marks = [
        Mark(
            each.site.layer,
            each.separation.d_prime,
            f"{each.site}[{each.position}]: d′ {each.separation.d_prime:.3g}, AUC {each.separation.auc:.3f}",
            f"{each.site.point} [{each.position}]",
            str(each.site.layer),
        )
        for each in measured
        if each.separation is not None
    ]
    finite = [mark for mark in marks if np.isfinite(mark.y)]
    best = max(finite, key=lambda mark: mark.y, default=None)
    alt = f"Separation of {len(marks)} directions by layer." + (
        f" Highest: {best.text}." if best else ""
    )
    return marks_svg(marks, alt=alt, xlabel="layer", ylabel="d′", lines=True)


def cosines_chart(directions: Sequence[Direction]) -> Html:
    """Cosines of every pair of directions, in forward order; of many, evenly spaced ones."""
    from interp_ablate.directions.direction import cosine_similarities

    items = sorted(directions, key=lambda each: (each.position, each.site.order))
    items = items[:: max(1, -(-len(items) // MOST_CELLS))]
    if not items:
        return Html('<p class="soft">No directions.</p>')
    cosines = cosine_similarities(items).tolist()
    names = [f"{each.site.layer}.{each.site.point.removeprefix('resid_')}" for each in items]
    near = [cosines[i][i + 1] for i in range(len(items) - 1)]
    alt = f"Cosines of {len(items)} directions in forward order." + (
        f" Neighbours: {np.mean(near):.2f} on average; the first and the last: {cosines[0][-1]:.2f}."
        if near
        else ""
    )
    return heat_svg(cosines, names, alt=alt)


def _on_prompts(row: Any) -> str:
    count = getattr(row, "prompts", None)
    return "" if count in (None, "") or count != count else f" on {count} prompts"


def trials_chart(trials: pd.DataFrame, chosen: Any = None) -> Html:
    """Behaviour against damage, a mark a trial that has both, with the front on which no trial beats another."""
    rows = trials[finished_trials(trials, ("target_log_odds", "kl"))]
    marks = [
        Mark(
            row.kl,
            row.target_log_odds,
            f"trial {row.trial}, {row.stage}{_on_prompts(row)}, {row.layer:g}.{row.point}: KL {row.kl:.3g} nats, "
            f"log-odds {row.target_log_odds:.3g}",
            str(row.stage),
            str(row.trial),
            str(row.trial) == str(chosen),
        )
        for row in rows.itertuples()
    ]
    front: list[tuple[float, float]] = []
    # scores of few prompts are not held against those of all
    partial = (
        set(rows["trial"][rows["prompts"].notna() & (rows["prompts"] != "")].astype(str))
        if "prompts" in rows
        else set()
    )
    whole = [mark for mark in marks if mark.key not in partial] or marks
    for mark in sorted(whole, key=lambda each: (each.x, each.y)):
        if not front or mark.y < front[-1][1]:
            front.append((mark.x, mark.y))
    at = next((mark for mark in marks if mark.chosen), None)
    alt = (
        f"{len(marks)} trials by KL and behaviour; {len(front)} are on the front of those scored on all prompts."
        + (f" Chosen: {at.text}." if at else "")
    )
    return marks_svg(
        marks, alt=alt, xlabel="KL, first token (nats)", ylabel="behaviour (log-odds)", front=front
    )
