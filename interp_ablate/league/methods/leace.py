"""LEACE: least-squares concept erasure, at every writer of the stream.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import PerPrompt
from interp_ablate.directions.leace_eraser import leace
from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.edits.kinds import Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.sites import Site


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    positive, negative = task.sides(site)
    eraser = leace(positive, negative, site)
    higher = float((as_float64(positive).mean(0) - as_float64(negative).mean(0)) @ eraser.read)
    sign = 1.0 if higher > 0 else -1.0

    def score(values: PerPrompt) -> Float[Tensor, " prompt"]:
        return sign * (as_float64(values) @ eraser.read)

    writers = task.model.writers
    # what the writers add sums up: the first of them brings the centre, and the others nothing
    values = [float(eraser.read @ eraser.centre), *[0.0] * (len(writers) - 1)]

    def removal(strength: float) -> Plan:
        return Plan((Erase(eraser.write, eraser.read, writers, strength=strength, value=values),))

    return FittedMethod(Detector(site, "-1", score), removal, about={"layer": site.layer})


METHOD = LeagueMethod(
    "leace", _fit, "weights", "Belrose et al. 2023, https://arxiv.org/abs/2306.03819"
)
