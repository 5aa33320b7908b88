"""Logistic regression: a probe's weights, ablated and added as a direction.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.discriminants import logistic
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    return logistic(*task.sides(site), site)


METHOD = LeagueMethod(
    "logistic",
    partial(along_one_direction, _direction),
    "weights",
    "Alain and Bengio 2016, https://arxiv.org/abs/1610.01644",
)
