"""A control: the difference in means of shuffled labels, its layer chosen as carefully as a method's.

Knows: the control. Does not know: how it is judged.
"""

from __future__ import annotations

from functools import partial

from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import along_one_direction, difference_at
from interp_ablate.league.task import LeagueTask
from interp_ablate.search.derived_edits import shuffled_labels_direction
from interp_ablate.sites import Site


def _direction(task: LeagueTask, site: Site) -> Direction:
    like = difference_at(task, site)
    values = task.activations.at(site, "-1")
    found = shuffled_labels_direction(values, task.labels, like, orthogonal=False, seed=task.seed)
    if found is None:
        raise DirectionError(f"shuffled labels have no difference in means at {site}")
    return found


METHOD = LeagueMethod(
    "shuffled_labels",
    partial(along_one_direction, _direction),
    "weights",
    "control: what the spread of the activations alone gives",
    is_control=True,
)
