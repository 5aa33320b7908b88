"""Where no finalist is within the limits, the nearest are kept as plans that `export` takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from interp_ablate import Ablate, Direction, Plan, Site
from interp_ablate.runs import nearest_plans
from interp_ablate.runs.nearest_plans import keep_nearest, nearest_text
from interp_ablate.search.rules import RuleInput


def rows(*values: tuple[float, float]) -> pd.DataFrame:
    records = [
        {"trial": i, "edit": "ablate", "expression_rate": rate, "kl": kl, "kl_high": kl * 1.5}
        for i, (rate, kl) in enumerate(values)
    ]
    return pd.DataFrame(records)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    site = Site(0, "resid_post")
    plan = Plan(Ablate(Direction(torch.tensor([1.0, 0.0]), 1.0, site), site))
    monkeypatch.setattr(nearest_plans, "plan_of", lambda params, space: plan)
    return SimpleNamespace(out=tmp_path, edit_space=lambda control: None)


def test_the_front_is_kept_the_cheapest_first(run: Any) -> None:
    by = RuleInput(n=10, unedited=0.8)
    # 1 is beaten by 0, 4 does nothing, 5 costs less than all and does little
    frame = rows((0.4, 0.12), (0.5, 0.2), (0.1, 0.3), (0.0, 0.9), (0.8, 0.01), (0.7, 0.05))
    nearest = keep_nearest(run, frame, by, None)
    assert [each["plan"] for each in nearest] == ["trial-5", "trial-0", "trial-2"]
    assert nearest[1] == {
        "plan": "trial-0", "effect": "expression_rate", "value": 0.4, "kl": 0.12, "kl_high": pytest.approx(0.18),
    }  # fmt: skip
    assert {path.stem for path in (run.out / "plans").iterdir()} == {
        "trial-5",
        "trial-0",
        "trial-2",
    }
    assert keep_nearest(run, frame, by, None) == nearest  # again, as a killed stage does
    said = nearest_text(run.out, nearest)
    assert "trial-5" in said and "upper bound 0.18" in said


def test_what_does_nothing_is_not_kept(run: Any) -> None:
    nearest = keep_nearest(
        run, rows((0.8, 0.2), (float("nan"), 0.3)), RuleInput(unedited=0.8), None
    )
    assert nearest == [] and not (run.out / "plans").exists()
    assert "does more than the unedited model" in nearest_text(run.out, nearest)


def test_an_effect_that_is_wanted_large(run: Any) -> None:
    by = RuleInput(maximize=True, unedited=0.2)
    nearest = keep_nearest(run, rows((0.1, 0.1), (0.6, 0.4)), by, None)
    assert [each["plan"] for each in nearest] == ["trial-1"]


def test_a_name_is_of_the_plan_whose_numbers_are_told(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier call's file of that name is replaced; a plan that edits nothing is passed over."""
    keep_nearest(run, rows((0.1, 0.3)), RuleInput(unedited=0.8), None)
    site = Site(1, "resid_post")
    other = Plan(Ablate(Direction(torch.tensor([0.0, 1.0]), 1.0, site), site))
    plans = {0: other, 1: Plan()}
    monkeypatch.setattr(nearest_plans, "params_of", lambda row: row["trial"])
    monkeypatch.setattr(nearest_plans, "plan_of", lambda params, space: plans[params])
    nearest = keep_nearest(run, rows((0.1, 0.3), (0.2, 0.1)), RuleInput(unedited=0.8), None)
    assert [each["plan"] for each in nearest] == ["trial-0"]
    assert Plan.load(run.out / "plans" / "trial-0.json") == other
    assert not (run.out / "plans" / "trial-1.json").exists()


def test_an_effect_named_as_the_table_s_own_column(run: Any) -> None:
    frame = rows((0.1, 0.1), (0.6, 0.4), (0.5, 0.5)).rename(columns={"expression_rate": "_left"})
    nearest = keep_nearest(run, frame, RuleInput("_left", maximize=True, unedited=0.2), None)
    assert [(each["plan"], each["value"]) for each in nearest] == [("trial-1", 0.6)]
