"""A sample of `make families`: types of every mechanism from a folder to an export that a second checker confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import ROWS, carried
from support.family_models import build
from support.hand_hooked import check
from support.tiny import make_tokenizer

from interp_ablate import Plan
from interp_ablate.edits.kinds import Ablate
from interp_ablate.export.checkpoint import export_checkpoint
from interp_ablate.models.load import from_hf


@pytest.mark.parametrize(
    "model_type",
    [
        "falcon_h1",
        "qwen3_vl_moe",  # experts whose files have other axes, which transformers tells by their shapes
        "molmo2",  # an embedding of two tensors in files
        "gpt_oss",
        "granitemoeshared",
        "mamba",
        "opt",
        "aya_vision",
        "llama4",
        "zamba2",
        "bloom",
        "mbart",
        "axk1",
        "nanochat",
    ],
)
def test_a_type_is_exported_exactly(model_type: str, tmp_path: Path) -> None:
    """On 4297ea7 falcon_h1 kept 3.5% of the stream along the direction; the others did not load or not export."""
    result = carried(model_type, tmp_path)
    assert result.outcome == "exact", result.detail


@pytest.mark.parametrize("form", [{}, {"text": True}])
def test_a_type_with_two_classes_keeps_the_one_that_the_folder_names(
    form: dict[str, bool], tmp_path: Path
) -> None:
    """The class for text alone was loaded of a wrapped folder, and its export had no vision tower."""
    result = carried("qwen3_5", tmp_path, **form)
    assert result.outcome == "exact", result.detail


@pytest.mark.parametrize(
    "model_type", ["xlnet", "bert", "deepseek_v4", "blip", "muse_glimmer", "musicgen"]
)
def test_what_is_no_single_stream_is_refused_in_words_before_any_work(
    model_type: str, tmp_path: Path
) -> None:
    """XLNet's config says -1 positions, of which torch made a raw error. Muse Glimmer's embedding has a norm inside,
    which was taken for a factor, and found out at the certificate only. MusicGen was made of a class for its decoder,
    which does not take its config."""
    result = carried(model_type, tmp_path)
    assert result.outcome == "refused", (result.outcome, result.detail)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.2.mlp.down_proj.weight"),
        ("gemma2", "model.layers.2.mlp.down_proj.weight"),
        ("bloom", "transformer.word_embeddings.weight"),
        ("bloom", "transformer.word_embeddings_layernorm.bias"),
    ],
)
def test_the_second_checker_finds_one_tensor_that_was_not_edited(
    model_type: str, name: str, tmp_path: Path
) -> None:
    hf = build(model_type)
    before = {name: p.clone() for name, p in hf.named_parameters()}
    model = from_hf(build(model_type), make_tokenizer())
    r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    out = tmp_path / "out"
    export_checkpoint(model, Plan((Ablate(r, model.writers),)), out, prompts=ROWS)
    assert check(hf, out, r, ROWS)["logits"] < 1e-4
    weights = load_file(out / "model.safetensors")
    save_file(weights | {name: before[name]}, out / "model.safetensors", {"format": "pt"})
    found = check(hf, out, r, ROWS)
    assert found["left"] > 1e-3 and found["logits"] > 1e-3
