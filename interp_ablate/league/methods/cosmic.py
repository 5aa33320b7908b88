"""COSMIC: the difference in means whose ablation and addition best turn one set's activations into the other's.

Knows: the method, its source, how many prompts judge. Does not know: how it is judged itself.
"""

from __future__ import annotations

from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.league.fitted import FittedMethod, ablation, addition
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask
from interp_ablate.search.concept_inversion import cosmic

PROMPTS = 12  # of each side of validation, which every layer's direction runs through


def _fit(task: LeagueTask) -> FittedMethod:
    directions = estimate_directions(task.activations)
    some = task.validation.first(PROMPTS)
    at_last = [item for item in directions if item.position == "-1"]
    # the league compares at equal KL: what a full ablation costs does not decide here
    found = cosmic(task.model, at_last, some, max_kl=None)
    direction = found.direction
    about = {"layer": direction.site.layer, "judged_at": list(found.layers)}
    return FittedMethod(
        direction, ablation(direction, task.model.writers), addition(direction), about
    )


METHOD = LeagueMethod(
    "cosmic", _fit, "weights", "Siu et al. 2025, https://arxiv.org/abs/2506.00085"
)
