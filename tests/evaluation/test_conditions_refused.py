"""What has no prompt refuses plans with a condition of it; what turns has no strength to calibrate."""

from __future__ import annotations

import pytest
import torch
from tiny import shared, unit

from interp_ablate import Ablate, Plan, Site
from interp_ablate.edits.conditional import Condition, Conditional, refuse_conditions
from interp_ablate.edits.joint import jointly
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import DirectionError, InterpAblateError, PlanError
from interp_ablate.evaluation.calibration import strength_at_kl_quantile
from interp_ablate.evaluation.perplexity import Corpus, corpus_losses
from interp_ablate.export.certification import removed_vectors

SITE = Site(1, "resid_post")
CONDITION = Condition(unit(0), Site(0, "resid_post"), threshold=0.0)


def test_perplexity_has_no_prompt_to_hold_a_condition_against() -> None:
    """It was decided by the first token alone."""
    plan = Plan(Conditional(Ablate(unit(1), SITE), CONDITION))
    with pytest.raises(PlanError, match="read in windows"):
        corpus_losses(
            shared(), Corpus("c", ("some text of several words",)), plan=plan, context=8, stride=4
        )
    # one that is applied already was read at every window's first token
    with pytest.raises(PlanError, match="read in windows"), shared().applied(plan):
        corpus_losses(shared(), Corpus("c", ("some text of several words",)), context=8, stride=4)
    refuse_conditions(Plan(Ablate(unit(1), SITE)), "x")
    refuse_conditions(None, "x")


@pytest.mark.parametrize("conditional", [False, True])
def test_a_rotation_has_no_strength_to_calibrate(conditional: bool) -> None:
    edit = Rotate(unit(0), unit(1), SITE, angle=180)
    plan = Plan(Conditional(edit, CONDITION) if conditional else edit)
    with pytest.raises(PlanError, match="turns by an angle"):
        strength_at_kl_quantile(shared(), plan, ["one", "two"], kl=0.1)


def test_a_plan_that_does_not_fit_is_not_too_strong() -> None:
    wrong = Plan(Ablate(torch.eye(7)[0], SITE))
    with pytest.raises((PlanError, DirectionError, InterpAblateError), match="d_model"):
        strength_at_kl_quantile(shared(), wrong, ["one", "two"], kl=0.1)


def test_only_what_a_joint_plan_removes_is_called_removed() -> None:
    """A direction that it reads and leaves was in the list: a sound export would have failed."""
    model = shared()
    mixed = (unit(0) + 0.5 * unit(1)) / 1.25**0.5
    plan = jointly(
        Plan((Ablate(unit(0), model.writers), Ablate(mixed, model.writers, strength=0.0)))
    )
    removed = removed_vectors(plan, model)
    for row in removed:
        moved = plan.edits[0].map_at(model.writers[0])(
            torch.randn(5, len(row), dtype=torch.float64)
        )
        assert float((moved @ row.double()).abs().max()) < 1e-9
