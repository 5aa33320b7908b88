"""Norms between the embeddings and the stream: BLOOM's, mBART's, ModernBERT's and nanochat's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import ROWS
from support.family_models import D_MODEL, build
from support.tiny import make_tokenizer
from torch import Tensor, nn

from interp_ablate import Plan
from interp_ablate.activations.collection import collect
from interp_ablate.circuits.attribution import attribute
from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import before_norm, norm_gain
from interp_ablate.edits.kinds import Ablate, Add, Edit, Erase
from interp_ablate.errors import ExportError, PlanError
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.models.backends.hf import measured_anatomy
from interp_ablate.models.load import from_hf, load_model
from interp_ablate.models.model import Model
from interp_ablate.sites import Site

EMBED, BIAS, ENTERING = Site(0, "embed"), Site(0, "embed_bias"), Site(0, "resid_pre")


def direction(seed: int = 0) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def model_of(model_type: str) -> Model:
    return from_hf(build(model_type), make_tokenizer())


@pytest.mark.parametrize(
    ("model_type", "norm", "centred", "weighted", "biased"),
    [
        ("bloom", "transformer.word_embeddings_layernorm", True, True, True),
        ("mbart", "model.decoder.layernorm_embedding", True, True, True),
        ("modernbert-decoder", "model.embeddings.norm", True, True, False),
        ("nanochat", "model.norm", False, False, False),
    ],
)
def test_the_norm_is_measured(
    model_type: str, norm: str, centred: bool, weighted: bool, biased: bool
) -> None:
    """All four were refused: 7% to 20% of what enters the first block was no sum of embeddings."""
    measured = measured_anatomy(build(model_type))
    assert not measured.problems
    (found,) = measured.embed_norms
    assert found.path == norm and found.offset == 0.0
    assert (found.centred, found.weighted, found.biased) == (centred, weighted, biased)
    assert ("embed_bias" in measured.embeddings) is biased
    assert (measured.pos_embed is not None) is (model_type == "mbart")


def test_a_bias_of_a_norm_that_runs_again_later_is_refused() -> None:
    """It would be edited at both places."""
    hf = build("bloom")
    hf.transformer.ln_f = hf.transformer.word_embeddings_layernorm
    assert "run again later" in measured_anatomy(hf).embed_problem


@pytest.mark.parametrize("centred", [False, True])
def test_a_direction_before_a_norm(centred: bool) -> None:
    """What has nothing along it before the norm has nothing along the direction after it."""
    gain, r, x = 1 + 0.5 * direction(1), direction().double(), torch.randn(20, D_MODEL).double()
    norm = nn.LayerNorm(D_MODEL, bias=False) if centred else nn.RMSNorm(D_MODEL)
    norm = norm.double()
    norm.weight.data = gain.double()
    combined = norm_gain([(gain, centred)])
    assert combined is not None and norm_gain([]) is None
    v = before_norm(r, combined)
    v = v / v.norm()
    left = (norm(x - (x @ v)[:, None] * v) @ r).detach()
    assert float(left.abs().max()) < 1e-12 < float((norm(x) @ r).detach().abs().min())


def test_gains_of_norms_one_after_another() -> None:
    """Orthogonal directions before both, the last norm's gain first."""
    last, first, r = direction(1).double(), direction(2).double(), direction(3).double()
    combined = norm_gain([(last, True), (first, True)])
    assert combined is not None
    want = r * last
    want = (want - want.mean()) * first
    torch.testing.assert_close(before_norm(r, combined), want - want.mean())


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("model_type", ["bloom", "mbart", "nanochat"])
def test_the_plan_as_hooks_is_the_plan_as_weights(
    model_type: str, strength: float, tmp_path: Path
) -> None:
    model = model_of(model_type)
    assert (BIAS in model.writers) is (model_type != "nanochat")
    plan = Plan((Ablate(direction(), model.writers, strength=strength),))
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["passed"], certificate
    with model.applied(plan):
        streams = collect(model, ROWS, sites=[ENTERING], positions=(-1,)).values
    left = (streams @ (direction() / direction().norm())).abs().max()
    assert (float(left) < 1e-6) is (strength == 1.0)


def test_norm_preserving_rows_before_the_norm(tmp_path: Path) -> None:
    model = model_of("bloom")
    edit = Ablate(direction(), model.writers, norm_preserving=True)
    certificate = export_checkpoint(model, Plan((edit,)), tmp_path / "out", prompts=ROWS)
    assert certificate["passed"], certificate


def test_an_addition_to_what_enters_is_held_by_the_norms_bias(tmp_path: Path) -> None:
    model = model_of("bloom")
    plan = Plan((Add(direction(), ENTERING, coefficient=2.0),))
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 0.01


@pytest.mark.parametrize(
    "edit", [Add(direction(), EMBED), Erase(direction(), direction(), EMBED, value=1.0)]
)
def test_nothing_is_added_before_the_norm(edit: Edit) -> None:
    model = model_of("bloom")
    with (
        pytest.raises(PlanError, match=r"before a norm.*blocks\.0\.hook_resid_pre"),
        model.applied(edit),
    ):
        pass


def test_a_direction_that_is_equal_in_all_channels_never_passes_the_norm() -> None:
    hf = build("bloom")
    hf.transformer.word_embeddings_layernorm.weight.data.fill_(1.0)
    model = from_hf(hf, make_tokenizer())
    with (
        pytest.raises(PlanError, match="same in all of them"),
        model.applied(Ablate(torch.ones(D_MODEL), EMBED)),
    ):
        pass


def test_the_stream_itself_has_no_weight_form(tmp_path: Path) -> None:
    model = model_of("bloom")
    points: Any = [Site(i, p) for i in range(model.n_layers) for p in model.residual_points]
    with pytest.raises(ExportError, match="norm after its embeddings"):
        export_checkpoint(
            model, Plan((Ablate(direction(), points),)), tmp_path / "out", prompts=ROWS
        )


def test_a_folder_is_streamed_with_its_norm(tmp_path: Path) -> None:
    build("bloom").save_pretrained(tmp_path / "in")
    make_tokenizer().save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    plan = Plan((Ablate(direction(), model.writers),))
    export_checkpoint(model, plan, tmp_path / "loaded", prompts=ROWS)
    export_folder(tmp_path / "in", plan, tmp_path / "streamed")
    states = [load_model(tmp_path / name).hf_state_dict() for name in ("loaded", "streamed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_words_and_positions_behind_a_norm_are_one_term() -> None:
    found = attribute(
        model_of("mbart"), ROWS[:1], Direction(direction(), 1.0, Site(2, "resid_pre"))
    )
    assert [term.name for term in found.terms if "embed" in term.name] == ["embed"]
    assert float(found.error) < 1e-5
