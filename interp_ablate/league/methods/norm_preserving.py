"""Norm-preserving ablation of the difference in means: what each writer puts out keeps its size.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    def fit_at(site: Site) -> FittedMethod:
        direction = difference_at(task, site)

        def removal(strength: float) -> Plan:
            edit = Ablate(direction, task.model.writers, strength=strength, norm_preserving=True)
            return Plan((edit,))

        return FittedMethod(direction, removal, about={"layer": site.layer})

    return best_of_sites(task, fit_at)


METHOD = LeagueMethod(
    "norm_preserving",
    _fit,
    "weights",
    "norm-preserving biprojected abliteration, Lai 2025, https://huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration",
)
