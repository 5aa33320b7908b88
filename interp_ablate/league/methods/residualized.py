"""SRA: the difference in means without what the directions of the other bundled contrasts explain of it.

Knows: the method, its source, which concepts it protects. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.directions.residualizing import residualized
from interp_ablate.errors import DirectionError
from interp_ablate.league.fitted import FittedMethod, ablation, addition
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.readers import bundled_names
from interp_ablate.sites import Site

PROMPTS = 32  # of each side of a protected contrast


def _fit(task: LeagueTask) -> FittedMethod:
    protected = _protected(task)
    if not protected:
        raise DirectionError("SRA protects other concepts, and every bundled contrast is this one")

    def fit_at(site: Site) -> FittedMethod:
        others = [directions[site] for directions in protected.values()]
        direction = residualized(difference_at(task, site), others)
        about = {"layer": site.layer, "protected": sorted(protected)}
        return FittedMethod(
            direction, ablation(direction, task.model.writers), addition(direction), about
        )

    return best_of_sites(task, fit_at)


def _protected(task: LeagueTask) -> dict[str, Directions]:
    """Directions of the bundled contrasts that share no prompt with the task, by name."""
    own = _texts(task.train) | _texts(task.validation)
    found = {}
    for name in bundled_names():
        contrast = ContrastSet.load(name)
        if name == task.behaviour or own & _texts(contrast):
            continue
        found[name] = estimate_directions(collect(task.model, contrast.first(PROMPTS), task.sites))
    return found


def _texts(contrast: ContrastSet) -> set[str]:
    """Every prompt of a contrast, as something that can be compared."""
    return {repr(prompt.parts) for prompt in (*contrast.positive, *contrast.negative)}


METHOD = LeagueMethod(
    "residualized", _fit, "weights", "SRA, Cristofano 2026, https://arxiv.org/abs/2601.08489"
)
