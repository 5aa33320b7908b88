"""Strengths calibrated to a KL: the quantile is reached, non-monotone families are seen, refusals and the flag."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import folder_of, make, rows_of, unit

from interp_ablate import Ablate, Add, Clamp, Plan, Site
from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.evaluation.calibration import (
    KLStrength,
    harmless_prompts,
    read_strength,
    strength_at_kl_quantile,
)
from interp_ablate.models.model import Model

PROMPTS = rows_of(*range(5, 18))
PLAN = Plan((Add(unit(3), Site(1, "resid_post")), Ablate(unit(1), Site(2, "mlp_out"))))


@pytest.fixture(scope="module")
def model() -> Model:
    return make()


def kls(model: Model, plan: Plan) -> np.ndarray:
    """Of each prompt, from logits, in float64."""
    before = model.logits(PROMPTS)[:, -1].double().log_softmax(-1)
    with model.applied(plan):
        after = model.logits(PROMPTS)[:, -1].double().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).numpy()


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("wanted", [1e-4, 0.02])
def test_the_quantile_of_the_measured_kl_is_the_one_asked_for(
    model: Model, quantile: float, wanted: float
) -> None:
    found = strength_at_kl_quantile(model, PLAN, PROMPTS, kl=wanted, quantile=quantile)
    assert found.plan == PLAN.times(found.strength)
    here = float(np.quantile(kls(model, found.plan), quantile))
    assert 0.97 * wanted < here < 1.005 * wanted
    assert found.kl == pytest.approx(here, rel=1e-2) and found.kl <= wanted
    assert found.grows and (found.strength, found.kl) in found.measured
    assert str(found).startswith("strength ") and f"quantile {quantile:g}" in str(found)


def test_a_family_that_is_not_monotone_is_told_of_and_its_weakest_crossing_taken(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """A coefficient that falls again, then grows: three strengths have the KL."""

    def family(strength: float) -> Plan:
        height = strength if strength < 1 else max(2 - strength, 0.01) if strength < 3 else strength
        return Plan((Add(unit(3), Site(1, "resid_post"), coefficient=2 * height),))

    at = {s: float(np.median(kls(model, family(s)))) for s in (0.8, 2.0, 4.0)}
    assert at[2.0] < at[0.8] < at[4.0]
    found = strength_at_kl_quantile(model, family, PROMPTS, kl=at[0.8], quantile=0.5)
    assert found.strength == pytest.approx(0.8, rel=0.02)
    assert found.grows  # of what was measured: doubling passed the value at 1 already
    higher = float(np.median(kls(model, family(3.5))))
    found = strength_at_kl_quantile(model, family, PROMPTS, kl=higher, quantile=0.5)
    assert found.strength == pytest.approx(3.5, rel=0.02)
    assert not found.grows and "does not grow with the strength everywhere" in caplog.text


def test_a_kl_that_jumps_is_left_below(model: Model) -> None:
    def family(strength: float) -> Plan:
        return Plan(
            (Add(unit(3), Site(1, "resid_post"), coefficient=0.1 if strength < 0.7 else 9.0),)
        )

    found = strength_at_kl_quantile(model, family, PROMPTS, kl=0.05, quantile=0.5)
    assert found.strength == pytest.approx(0.7, rel=1e-3) and found.kl < 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kl": 0.0}, "a KL is above 0"),
        ({"kl": math.nan}, "a KL is above 0"),
        ({"quantile": 1.5}, "a quantile from 0 to 1"),
        ({"tolerance": 0.0}, "a tolerance between"),
        ({"kl": 1e5}, "does not reach"),
        ({"plans": Plan((Clamp(unit(), Site(1, "resid_post"), value=1.0),))}, "has no strength"),
        ({"plans": lambda s: Plan((Add(50 * unit(), Site(1, "resid_post")),))}, "already, above"),
        ({"prompts": []}, "no tokens to run"),
    ],
)
def test_bad_input(model: Model, change: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {"plans": PLAN, "prompts": PROMPTS, "kl": 0.01} | change
    plans, prompts = options.pop("plans"), options.pop("prompts")
    kind = PlanError if said == "has no strength" else InterpAblateError
    with pytest.raises(kind, match=said):
        strength_at_kl_quantile(model, plans, prompts, **options)


def test_strengths_are_read() -> None:
    assert read_strength("0.5") == 0.5 and read_strength("-2") == -2.0
    assert read_strength("kl:0.05") == KLStrength(0.05, 0.9)
    assert read_strength(" kl:1e-3@0.5") == KLStrength(0.001, 0.5)
    for text in ("", "x", "nan", "inf", "kl:", "kl:-1", "kl:0", "kl:0.1@2", "kl:0.1@x", "KL:0.1"):
        with pytest.raises(InterpAblateError, match=r"kl:0\.05@0\.5"):
            read_strength(text)


def test_harmless_prompts_are_of_the_validation_part() -> None:
    from interp_ablate.prompts.contrast_set import ContrastSet

    parts = ContrastSet.load("declining").split(seed=3)
    assert harmless_prompts("declining", seed=3) == parts.validation.negative


def test_the_flag_of_generate(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "model")
    PLAN.save(tmp_path / "plan.json")
    prompts = tmp_path / "harmless.txt"
    prompts.write_text("\n".join(f"number {i} of the list" for i in range(6)), encoding="utf-8")
    base = ["generate", "hello", "--model", str(folder), "--plan", str(tmp_path / "plan.json"),
            "--max-new-tokens", "4"]  # fmt: skip
    assert main([*base, "--strength", "kl:0.01@0.5", "--kl-prompts", str(prompts)]) == 0
    said = capsys.readouterr()
    assert "at quantile 0.5 (asked for 0.01)" in said.err
    strength = said.err.split("strength ")[1].split(":")[0]
    assert main([*base, "--strength", strength]) == 0
    assert capsys.readouterr().out == said.out
    for wrong, why in (
        (["--strength", "x"], "kl:0.05"),
        (["--strength", "kl:0.1", "--kl-prompts", "no"], "no"),
    ):
        assert main([*base, *wrong]) == 2
        assert why in capsys.readouterr().err
    no_plan = ["generate", "hello", "--model", str(folder), "--strength", "2"]
    assert main(no_plan) == 2 and "give --plan" in capsys.readouterr().err
