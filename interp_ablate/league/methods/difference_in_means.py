"""Difference in means: ablated at every writer, added at its own layer.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.mean_difference import checked_means
from interp_ablate.league.fitted import FittedMethod, ablation, addition
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site

DirectionAt = Callable[[LeagueTask, Site], Direction]


def along_one_direction(direction_at: DirectionAt, task: LeagueTask) -> FittedMethod:
    """A method of one direction: it detects by projection, ablates at every writer and adds at its own layer."""

    def fit(site: Site) -> FittedMethod:
        direction = direction_at(task, site)
        about = {"layer": site.layer}
        return FittedMethod(
            direction, ablation(direction, task.model.writers), addition(direction), about
        )

    return best_of_sites(task, fit)


def difference_at(task: LeagueTask, site: Site) -> Direction:
    """The difference in means of the training prompts at a site, at the last token.

    Raises:
        DirectionError: the two sets have the same mean there.
    """
    return checked_means(*task.sides(site), site, "-1")


METHOD = LeagueMethod(
    "difference_in_means",
    partial(along_one_direction, difference_at),
    "weights",
    "Arditi et al. 2024, https://arxiv.org/abs/2406.11717",
)
