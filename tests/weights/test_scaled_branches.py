"""Additions into biases whose module reaches the stream by a factor, or beside another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import build, config_classes, tiny_config
from support.hand_hooked import passed, reloaded
from support.tiny import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from interp_ablate import Plan
from interp_ablate.edits.kinds import Add, Clamp
from interp_ablate.errors import ExportError
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.models.load import from_hf

ROW = list(range(5, 17))
C = torch.randn(64, generator=torch.Generator().manual_seed(5))


def biased(model_type: str, *fields: str) -> Any:
    """A tiny model with biases, all of them random."""
    config = tiny_config(config_classes()[model_type])
    for name in fields:
        assert hasattr(config, name)
        setattr(config, name, True)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    return hf


def by_hand(hf: Any, module: Any, added: Tensor) -> Tensor:
    """Logits where a vector is added to what a module returns."""

    def add(inner: Any, args: Any, output: Any) -> Any:
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = module.register_forward_hook(add)
    try:
        return passed(hf, ROW)
    finally:
        handle.remove()


def exports(hf: Any, plan: Plan, place: Path) -> Sequence[Any]:
    """The plan as weights: of the model in memory, and streamed."""
    hf.save_pretrained(place / "source")
    make_tokenizer().save_pretrained(place / "source")
    model = from_hf(hf, make_tokenizer(), backend="hf")
    export_checkpoint(model, plan, place / "one", prompts=[ROW])
    export_folder(place / "source", plan, place / "other")
    return [reloaded(place / name) for name in ("one", "other")]


@pytest.mark.parametrize("point", ("attn", "mlp"))
def test_an_addition_at_a_scaled_branch(point: str, tmp_path: Path) -> None:
    """Granite's blocks add 0.22 times what a module returns: its bias must get 1 / 0.22 of the vector."""
    hf = biased("granite", "attention_bias", "mlp_bias")
    layer = hf.model.layers[1]
    assert hf.config.residual_multiplier == 0.22
    module = layer.self_attn if point == "attn" else layer.mlp
    want = by_hand(hf, module, C / 0.22)
    assert float((want - passed(hf, ROW)).abs().max()) > 1e-2
    for export in exports(hf, Plan((Add(C.double(), f"blocks.1.hook_{point}_out"),)), tmp_path):
        torch.testing.assert_close(passed(export, ROW), want, rtol=1e-4, atol=1e-5)


def test_a_clamp_at_a_scaled_branch(tmp_path: Path) -> None:
    hf = biased("granite", "attention_bias", "mlp_bias")
    unit, attention = C / C.norm(), hf.model.layers[1].self_attn

    def clamp(inner: Any, args: Any, output: Any) -> Any:
        x = 0.22 * output[0]
        return ((x + (2.0 - x @ unit)[..., None] * unit) / 0.22, *output[1:])

    handle = attention.register_forward_hook(clamp)
    want = passed(hf, ROW)
    handle.remove()
    plan = Plan((Clamp(unit.double(), "blocks.1.hook_attn_out", value=2.0),))
    for export in exports(hf, plan, tmp_path):
        torch.testing.assert_close(passed(export, ROW), want, rtol=1e-4, atol=1e-5)


def test_an_addition_where_two_modules_write_comes_once(tmp_path: Path) -> None:
    """Falcon-H1's attention and Mamba branches add at one site, both with biases."""
    hf = biased("falcon_h1", "attention_bias", "mamba_proj_bias")
    want = by_hand(hf, hf.model.layers[1].self_attn, C / hf.config.attention_out_multiplier)
    for export in exports(hf, Plan((Add(C.double(), "blocks.1.hook_attn_out"),)), tmp_path):
        torch.testing.assert_close(passed(export, ROW), want, rtol=1e-4, atol=1e-5)


def test_an_addition_without_a_bias_is_refused_as_before(tmp_path: Path) -> None:
    model = from_hf(build("granite"), make_tokenizer(), backend="hf")
    with pytest.raises(ExportError, match="needs a bias"):
        export_checkpoint(model, Plan((Add(C.double(), "blocks.1.hook_attn_out"),)), tmp_path / "x")
