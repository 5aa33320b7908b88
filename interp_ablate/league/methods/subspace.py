"""A subspace of rank 3: the mean difference and two axes of what it leaves of the paired differences.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.directions.subspaces import subspace
from interp_ablate.league.fitted import Detector, FittedMethod, ablation
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site

RANK = 3


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    positive, negative = task.sides(site)
    found = subspace(positive, negative, site, rank=RANK)
    means = [as_float64(side).mean(0) @ found.vectors.T for side in (positive, negative)]
    return FittedMethod(
        Detector.nearer(site, found.vectors, *means),
        ablation(found.vectors, task.model.writers),
        about={"layer": site.layer, "rank": RANK},
    )


METHOD = LeagueMethod(
    "subspace",
    _fit,
    "weights",
    "Zou et al. 2023, https://arxiv.org/abs/2310.01405, of more than one axis",
)
