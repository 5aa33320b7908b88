"""Angular steering: the stream after one layer is turned away from the feature's direction, and keeps its norm.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.directions.rotation_planes import steering_plane
from interp_ablate.edits.plan import Plan
from interp_ablate.edits.rotation import Rotate
from interp_ablate.league.fitted import Family, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site

AWAY, ALONG = 180.0, 0.0  # degrees from the feature's direction


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    feature = difference_at(task, site)
    found = [difference_in_means(*task.sides(each), each) for each in task.activations.sites]
    plane = steering_plane(feature, [each for each in found if each is not None])

    def family(angle: float, *, adaptive: bool) -> Family:
        edit = Rotate(*plane, site, angle=angle, adaptive=adaptive, label=feature.name)
        return lambda strength: Plan((edit.times(strength),))

    return FittedMethod(
        feature,
        family(AWAY, adaptive=True),
        family(ALONG, adaptive=False),
        greatest_strength=1.0,  # more turns past the angle, and round again
        about={"layer": site.layer},
    )


METHOD = LeagueMethod(
    "angular_steering", _fit, "hooks", "Vu and Nguyen 2025, https://arxiv.org/abs/2510.26243"
)
