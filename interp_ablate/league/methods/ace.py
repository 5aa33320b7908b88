"""ACE, affine concept editing: along the difference in means, the stream gets what the negatives have, everywhere.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.edits.affine_concept import affine_concept_edit
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    direction = difference_at(task, site)
    negative, writers = task.sides(site)[1], task.model.writers

    def family(alpha: float, strength: float) -> Plan:
        return Plan(
            (affine_concept_edit(direction, negative, writers, alpha=alpha, strength=strength),)
        )

    return FittedMethod(
        direction,
        lambda strength: family(0.0, strength),
        lambda strength: family(1.0, strength),
        about={"layer": site.layer},
    )


METHOD = LeagueMethod(
    "ace", _fit, "weights", "Marshall, Scherlis, Belrose 2024, https://arxiv.org/abs/2411.09003"
)
