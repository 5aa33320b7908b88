"""Fitted edits read back: each file one edit, or a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import unit

from interp_ablate import Ablate, Add, Plan, Site
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import PlanError
from interp_ablate.runs.fits import load_fitted_edits

SITE = Site(0, "mlp_out")


def test_one_ablation_or_erasure_a_file(tmp_path: Path) -> None:
    Plan((Ablate(unit(), SITE),)).save(tmp_path / "a.json")
    Plan((Erase(unit(), unit() + unit(1), SITE),)).save(tmp_path / "b.json")
    assert [each.op for each in load_fitted_edits(tmp_path).values()] == ["ablate", "erase"]


@pytest.mark.parametrize(
    "plan", [Plan(), Plan((Add(unit(), SITE),)), Plan((Ablate(unit(), SITE),) * 2)]
)
def test_what_no_fit_writes_is_refused_in_words(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "x.json")
    with pytest.raises(PlanError, match=r"x\.json is no fitted edit"):
        load_fitted_edits(tmp_path)
