"""The explorer's page and the parts of it that are made without the model.

Knows: what the page shows of a run folder. Does not know: HTTP, or how an answer is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import most_separating
from interp_ablate.display import Html, html_table, shortened
from interp_ablate.errors import RunError
from interp_ablate.explorer.controls import OPERATIONS, bands_of
from interp_ablate.explorer.session import LONGEST_ANSWER, USUAL_ANSWER, ExplorerSession
from interp_ablate.plots.run_charts import (
    cosines_chart,
    held_out,
    place_of,
    projections_chart,
    separation_chart,
    trials_chart,
)
from interp_ablate.plots.run_tables import read_choice, read_controls, read_projections
from interp_ablate.plots.svg_charts import Mark, marks_svg
from interp_ablate.plots.trials import is_comparable
from interp_ablate.runs.kept_plans import plan_names
from interp_ablate.runs.report_claims import number
from interp_ablate.search.trial_table import read_trials
from interp_ablate.storage.bundled_data import bundled

if TYPE_CHECKING:
    import pandas as pd

_TRIAL_COLUMNS = ("trial", "stage", "edit", "layer", "point", "target_log_odds", "kl", "expression_rate", "prompts", "status")  # fmt: skip
_BINS = 16


def page_of(session: ExplorerSession) -> str:
    """The page, rendered once: nothing on it needs the model."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        bundled("templates", "explorer.html.j2").read_text(encoding="utf-8")
    )
    trials = _trials(session)
    frame = _projections(session)
    return template.render(
        model=session.model.source.name,
        folder=str(session.folder),
        bands=[
            f"{b[0]}–{b[-1]}" if len(b) > 1 else f"{b[0]}" for b in bands_of(session.model.n_layers)
        ],
        operations=OPERATIONS,
        usual_answer=USUAL_ANSWER,
        longest_answer=LONGEST_ANSWER,
        directions=_names(session.directions),
        first=session.directions.index(most_separating(session.directions)),
        plans=plan_names(session.folder),
        projections=None if frame is None else projections_chart(held_out(frame)),
        separation=separation_chart(session.directions, _controls(session)),
        cosines=cosines_chart(session.directions),
        trials_chart=None if trials is None else _trials_chart(session, trials),
        trials=None if trials is None else _trials_table(trials),
    )


def layer_view(session: ExplorerSession, request: Any) -> dict[str, Any]:
    """One layer's projections: their distribution, and its prompts in order.

    Raises:
        RunError: no projections, or no such layer.
    """
    frame = _projections(session)
    if frame is None:
        raise RunError("projections are a run's, and no run folder with some was given")
    rows = held_out(frame)
    rows = rows[rows["layer"].astype(str) == str(request.get("layer"))]
    if rows.empty:
        raise RunError(f"there are no projections at layer {request.get('layer')!r:.40}")
    rows = rows.sort_values("projection", ascending=False)
    cells = [
        (row.label, float(row.projection), shortened(row.prompt, 200)) for row in rows.itertuples()
    ]
    split = str(rows["split"].iloc[0])
    table = html_table(
        ("set", "projection", "prompt"),
        cells,
        caption=f"{len(cells)} {split} prompts at {place_of(rows)}, the highest first",
    )
    return {"html": _histogram(rows) + table}


def _histogram(rows: pd.DataFrame) -> Html:
    """How many prompts of each set project how far."""
    low, high = float(rows["projection"].min()), float(rows["projection"].max())
    width = (high - low) / _BINS or 1.0
    marks = []
    for label in ("positive", "negative"):
        group = rows[rows["label"] == label]
        counts = [0] * _BINS
        for value in group["projection"]:
            counts[min(int((value - low) / width), _BINS - 1)] += 1
        marks += [
            Mark(
                low + (i + 0.5) * width,
                count,
                f"{count} {label} prompts from {low + i * width:.3g} to {low + (i + 1) * width:.3g}",
                label,
            )
            for i, count in enumerate(counts)
        ]
    means = rows.groupby("label")["projection"].mean()
    alt = "Counts of prompts by projection. Means: " + ", ".join(
        f"{label} {mean:.3g}" for label, mean in means.items()
    )
    n = " + ".join(f"{count} {label}" for label, count in rows["label"].value_counts().items())
    return marks_svg(
        marks, alt=alt + ".", xlabel="projection (units of the stream)", ylabel="prompts", lines=True,
        caption=f"n = {n} prompts.",
    )  # fmt: skip


def _projections(session: ExplorerSession) -> pd.DataFrame | None:
    return read_projections(session.run.out) if session.run is not None else None


def _trials(session: ExplorerSession) -> pd.DataFrame | None:
    run = session.run
    if run is None or not (run.out / "trials.csv").exists():
        return None
    return read_trials(run.out / "trials.csv")


def _controls(session: ExplorerSession) -> pd.DataFrame | None:
    return read_controls(session.run.out) if session.run is not None else None


def _trials_chart(session: ExplorerSession, trials: pd.DataFrame) -> Html | None:
    if session.run is None or not is_comparable(trials):
        return None
    choice = read_choice(session.run.out)
    return trials_chart(trials, choice.trial.get("trial"), n=choice.n, max_kl=choice.max_kl)


def _trials_table(trials: pd.DataFrame) -> dict[str, Any]:
    columns = [name for name in _TRIAL_COLUMNS if name in trials]
    rows = [[number(value) for value in row] for row in trials[columns].itertuples(index=False)]
    return {"heads": [name.replace("_", " ") for name in columns], "rows": rows}


def _names(directions: Sequence[Direction]) -> list[str]:
    """A name for each direction; the method is a part of it where there are several."""
    several = len({each.method for each in directions}) > 1
    return [
        f"{each.site.layer}.{each.site.point} [{each.position}]"
        + f" {each.method.replace('_', ' ')}" * several
        + ("" if each.separation is None else f", d′ {each.separation.d_prime:.2f}")
        for each in directions
    ]
