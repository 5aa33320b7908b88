"""Biprojection: the direction of one layer, orthogonal to each layer's negative mean, taken from what each writes.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.biprojection import biprojected_directions
from interp_ablate.edits.layer_plans import ablate_by_layer
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    direction = difference_at(task, site)
    by_layer = biprojected_directions(direction, task.activations)

    def removal(strength: float) -> Plan:
        return ablate_by_layer(task.model, by_layer, strength=strength, norm_preserving=True)

    return FittedMethod(direction, removal, about={"layer": site.layer})


METHOD = LeagueMethod(
    "biprojected",
    _fit,
    "weights",
    "Lai 2025, https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration",
)
