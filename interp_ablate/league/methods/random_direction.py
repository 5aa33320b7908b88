"""A control: a random direction of the same length, its layer chosen as carefully as a method's.

Knows: the control. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction, random_direction
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction, difference_at
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    return random_direction(difference_at(task, site), seed=1000 * task.seed + site.layer)


METHOD = LeagueMethod(
    "random_direction",
    partial(along_one_direction, _direction),
    "weights",
    "control: what removing or adding anything does",
    is_control=True,
)
