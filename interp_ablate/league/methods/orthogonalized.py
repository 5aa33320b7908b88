"""Difference in means, without its component along the mean of the negative prompts.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction, orthogonalized
from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction, difference_at
from interp_ablate.league.task import LeagueTask
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    negative = task.sides(site)[1]
    return orthogonalized(difference_at(task, site), as_float64(negative).mean(0))


METHOD = LeagueMethod(
    "orthogonalized",
    partial(along_one_direction, _direction),
    "weights",
    "projected abliteration, Lai 2025, https://huggingface.co/blog/grimjim/projected-abliteration",
)
