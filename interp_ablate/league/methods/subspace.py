"""A subspace of rank 3: the mean difference and two axes of what it leaves of the paired differences.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import PerPrompt
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

    def score(values: PerPrompt) -> Float[Tensor, " prompt"]:
        """How much nearer to the positive mean than to the negative one, within the subspace."""
        inside = as_float64(values) @ found.vectors.T
        near, far = ((inside - mean).square().sum(-1) for mean in means)
        return far - near

    return FittedMethod(
        Detector(site, "-1", score),
        ablation(found.vectors, task.model.writers),
        about={"layer": site.layer, "rank": RANK},
    )


METHOD = LeagueMethod(
    "subspace",
    _fit,
    "weights",
    "Zou et al. 2023, https://arxiv.org/abs/2310.01405, of more than one axis",
)
