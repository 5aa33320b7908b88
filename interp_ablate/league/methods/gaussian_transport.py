"""Gaussian optimal transport in principal components, on the stream after one layer.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.optimal_transport import gaussian_transport
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import Detector, Family, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site

MOST_COMPONENTS = 16
PROMPTS_A_COMPONENT = 4  # a covariance of as many components as prompts would be their noise


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    positive, negative = task.sides(site)
    fewest = min(len(positive), len(negative))
    rank = max(1, min(MOST_COMPONENTS, fewest // PROMPTS_A_COMPONENT))
    away = gaussian_transport(positive, negative, site, rank=rank)
    back = gaussian_transport(negative, positive, site, rank=rank)

    def family(transport: AffineEdit) -> Family:
        return lambda strength: Plan((transport.times(strength),))

    return FittedMethod(
        Detector.nearer(site, away.components, away.source_mean, away.target_mean),
        family(AffineEdit.of(away, site)),
        family(AffineEdit.of(back, site)),
        about={"layer": site.layer, "rank": rank, "explained": away.explained},
    )


METHOD = LeagueMethod(
    "gaussian_transport",
    _fit,
    "hooks",
    "Nanfack, Belilovsky, Dohmatob 2026, https://arxiv.org/abs/2603.04355",
)
