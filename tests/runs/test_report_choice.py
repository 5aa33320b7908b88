"""The report's words of a search's choice: numbers of the objective that it was made by, in its unit."""

from __future__ import annotations

from typing import Any

from interp_ablate.runs.report_choice import choice_told


def told(column: str, **numbers: float) -> str:
    found: dict[str, Any] = {
        "column": column, "splits": 200, "plans": 9, "chosen_half": 0.8, "other_half": 0.78, "optimism": 0.02,
        "kl_chosen_half": 0.01, "kl_other_half": 0.02,
    }  # fmt: skip
    trial = {"expression_rate": 0.03, "kl": 0.5} | numbers
    return choice_told({}, {"trial": trial, "optimism": found})[-1]


def test_the_optimism_is_of_the_leading_objective() -> None:
    text = told("polite", polite=0.81)
    assert "polite 80% on the half" in text and "beside the polite 81% on" in text
    assert "3%" not in text and "2.0 percentage points" in text
    assert "had 80% on" in told("expression_rate") and "beside the 3% on" in told("expression_rate")


def test_a_kl_is_no_share() -> None:
    text = told("kl")
    assert "%" not in text and "percentage" not in text
    assert "kl 0.8 on the half" in text and "0.02 nats, beside the kl 0.5" in text
