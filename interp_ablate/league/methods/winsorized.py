"""Difference in means of winsorized activations: a few massive dimensions are clipped first.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.adjustments import winsorized
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.mean_difference import checked_means
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    positive, negative = map(winsorized, task.sides(site))
    return checked_means(positive, negative, site, "-1")


METHOD = LeagueMethod(
    "winsorized",
    partial(along_one_direction, _direction),
    "weights",
    "winsorizing, Hastings et al. 1947, https://doi.org/10.1214/aoms/1177730388; practice of abliteration tools",
)
