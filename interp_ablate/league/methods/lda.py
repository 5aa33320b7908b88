"""LDA: Fisher's discriminant, ablated and added as a direction.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.discriminants import lda
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    return lda(*task.sides(site), site)


METHOD = LeagueMethod(
    "lda",
    partial(along_one_direction, _direction),
    "weights",
    "Fisher 1936, https://doi.org/10.1111/j.1469-1809.1936.tb02137.x",
)
