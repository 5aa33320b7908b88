"""CAST: the difference in means, subtracted after one layer where the prompt meets a condition of an earlier layer.

Knows: the method and its source. Does not know: how it is judged.
"""

from __future__ import annotations

from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.league.fitted import Detector, FittedMethod
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.methods.difference_in_means import difference_at
from interp_ablate.league.task import LeagueTask, best_of_sites
from interp_ablate.search.condition_choice import best_condition
from interp_ablate.sites import Site

MOST = 1.0  # as far as the two sets' means lie apart: no KL of prompts that it leaves alone ends it


def _fit(task: LeagueTask) -> FittedMethod:
    return best_of_sites(task, lambda site: _fit_at(task, site))


def _fit_at(task: LeagueTask, site: Site) -> FittedMethod:
    behaviour = difference_at(task, site)
    places = [each for each in task.activations.sites if not site < each]
    found = [difference_in_means(*task.sides(each), each) for each in places]
    # read at the last token, as every method's vectors are
    choice = best_condition(
        task.model, task.validation, [each for each in found if each is not None], pooled="last"
    )
    condition = choice.condition

    def removal(strength: float) -> Plan:
        return Plan((Conditional(Add(behaviour, site, coefficient=-strength), condition),))

    about = {
        "layer": site.layer,
        "condition_layer": condition.site.layer,
        "threshold": condition.threshold,
        "above": condition.above,
        "f1": choice.f1,
    }
    return FittedMethod(_detector(condition), removal, about=about, greatest_strength=MOST)


def _detector(condition: Condition) -> Detector:
    """The condition's similarity of the last token, on the side on which it is met."""
    sign = 1.0 if condition.above else -1.0
    return Detector(condition.site, "-1", lambda x: sign * condition.similarities(x.double()))


METHOD = LeagueMethod("cast", _fit, "hooks", "Lee et al. 2024, https://arxiv.org/abs/2409.05907")
