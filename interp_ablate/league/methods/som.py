"""SOM directions: all neurons of a self-organizing map over the positive activations, ablated as one subspace.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import PerPrompt
from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.directions.self_organizing_map import GRID, som_directions
from interp_ablate.league.fitted import Detector, FittedMethod, ablation
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    positive, negative = task.sides(site)
    found = som_directions(positive, negative, site, seed=task.seed)
    centre = as_float64(negative).mean(0)

    def score(values: PerPrompt) -> Float[Tensor, " prompt"]:
        """How much nearer to a neuron than to the negative mean."""
        wide = as_float64(values)
        away = (wide[:, None] - found.neurons).square().sum(-1).amin(1)
        return (wide - centre).square().sum(-1) - away

    return FittedMethod(
        Detector(site, "-1", score),
        ablation(found.vectors, task.model.writers),
        about={"layer": site.layer, "grid": list(GRID), "directions": len(found.directions)},
    )


METHOD = LeagueMethod(
    "som", _fit, "weights", "Piras et al. 2025, https://arxiv.org/abs/2511.08379, as a batch map"
)
