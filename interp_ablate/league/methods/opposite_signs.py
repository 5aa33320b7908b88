"""Difference in means, ablated only at layers where the two sets' means project on it with opposite signs.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.opposite_signs import mean_projections
from interp_ablate.edits.plan import ablate_layers
from interp_ablate.errors import DirectionError
from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    direction = difference_at(task, site)
    table = mean_projections(direction, task.activations)
    layers = sorted(set(table["layer"][table["opposite"]].tolist()))
    if not layers:
        raise DirectionError(
            f"both sets' means lie on one side of zero along the direction of {site} at every layer"
        )
    return FittedMethod(
        direction,
        lambda strength: ablate_layers(task.model, direction, layers, strength=strength),
        about={"layer": site.layer, "layers": layers},
    )


METHOD = LeagueMethod(
    "opposite_signs",
    _fit,
    "weights",
    "layers of selective steering, Dang and Ngo 2026, https://arxiv.org/abs/2601.19375, with ablation",
)
