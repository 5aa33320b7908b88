"""Gemma 3 270M: post-norm blocks, a tied and scaled embedding, on real weights (`make gemma`)."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp_ablate import (
    Ablate,
    ContrastSet,
    Direction,
    Plan,
    Site,
    collect,
    estimate_directions,
    everywhere,
    export_checkpoint,
    load_model,
)
from interp_ablate.errors import ExportError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.certification import PROBES
from interp_ablate.models.model import Model
from interp_ablate.sites import sites_of
from interp_ablate.weights.plan_to_weights import TensorEdit, edited_tensor

FOLDER = Path(__file__).parents[2] / ".models" / "gemma-3-270m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file() and "CI" not in os.environ,
        reason="no .models/gemma-3-270m: make gemma",
    ),
]


@cache
def model() -> Model:
    return load_model(FOLDER, template="none")


@cache
def direction() -> Direction:
    """Difference in means of two sentiments, from the middle of the model."""
    contrast = ContrastSet.load("sentiment").split(n_train=32, n_validation=8, n_test=8)
    acts = collect(model(), contrast.train, [Site(9, "resid_post")])
    return estimate_directions(acts)[Site(9, "resid_post")]


def left_along(plan: Plan | None) -> float:
    """The largest share of the stream along the direction at any residual site and position."""
    unit, largest = direction().vector, 0.0
    rows = model().encode_all(PROBES[:4])
    sites = sites_of(model().residual_points, range(model().n_layers))

    def share(x: Tensor, batch: object) -> Tensor:
        return ((x.double() @ unit).abs() / x.double().norm(dim=-1))[0].max()

    with model().applied(plan or Plan()):
        for row in rows:
            for _, _, got in model().stream(
                [row], capture=dict.fromkeys(sites, share), batch_size=1
            ):
                largest = max(largest, *map(float, got.values()))
    return largest


def logits(plan: Plan | None) -> Tensor:
    with model().applied(plan or Plan()):
        return torch.cat([model().logits([p], keep=4)[0] for p in PROBES[:4]])


def test_projections_before_the_norm_leave_nothing_and_are_exact(tmp_path: Path) -> None:
    assert {site.point for site in model().writers} == {"embed", "attn_proj", "mlp_proj"}
    plan = Plan((Ablate(direction(), model().writers),))
    assert left_along(None) > 0.05
    assert left_along(plan) < 1e-5
    certificate = export_checkpoint(model(), plan, tmp_path / "out", prompts=PROBES[:4])
    assert certificate["passed"] and certificate["largest_projection_left"] < 1e-5
    assert certificate["max_abs_logit_effect_of_plan"] > 0.1
    found = audit(AuditSource.of_folder(FOLDER), plan, tmp_path / "out")
    assert found.passed and found.edited == 37 and found.added == 1 and found.tied == "untie"


def test_a_naive_edit_leaves_the_direction_in_the_stream() -> None:
    """W_O and W_out orthogonalized against r itself, as for a pre-norm model: the gain brings r back."""
    held = model()
    ((_, affine),) = Plan((Ablate(direction(), Site(0, "attn_out")),)).maps_at(Site(0, "attn_out"))
    parameters = {
        name.replace("._original_component", ""): value
        for name, value in held.tl.original_model.named_parameters()
    }
    before = {}
    names = [n for n in parameters if n.endswith(("o_proj.weight", "down_proj.weight"))]
    try:
        for name in names:
            before[name] = parameters[name].clone()
            parameters[name].copy_(edited_tensor(before[name], TensorEdit("linear", affine)))
        left = left_along(Plan((Ablate(direction(), Site(0, "embed")),)))
    finally:
        for name, value in before.items():
            parameters[name].copy_(value)
    assert len(names) == 36
    assert left > 100 * left_along(Plan((Ablate(direction(), held.writers),)))
    assert left > 1e-3


def test_after_the_norm_is_another_function_without_a_weight_form(tmp_path: Path) -> None:
    after = Plan((Ablate(direction(), everywhere(model().n_layers)),))
    before = Plan((Ablate(direction(), model().writers),))
    assert left_along(after) < 1e-5
    apart = float((logits(after) - logits(before)).abs().max())
    effect = float((logits(before) - logits(None)).abs().max())
    assert apart > 1e-3 and effect > 1e-3
    with pytest.raises(ExportError, match="attn_proj and mlp_proj"):
        export_checkpoint(model(), after, tmp_path / "out")


@pytest.mark.parametrize("tied", ("accept", "skip-embedding"))
def test_tied_choices_are_certified(tied: str, tmp_path: Path) -> None:
    plan = Plan((Ablate(direction(), model().writers),))
    certificate = export_checkpoint(model(), plan, tmp_path / "out", prompts=PROBES[:4], tied=tied)  # type: ignore[arg-type]
    assert certificate["passed"]
    if tied == "accept":
        assert certificate["cost_of_accept"]["max_abs_logit_difference"] > 1e-3
    else:
        assert certificate["largest_projection_left"] > 1e-3  # the embedding's share stays
