"""PCA: the first principal axis of the paired differences, uncentred.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.subspaces import pca
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    return pca(*task.sides(site), site)


METHOD = LeagueMethod(
    "pca",
    partial(along_one_direction, _direction),
    "weights",
    "Zou et al. 2023, https://arxiv.org/abs/2310.01405",
)
