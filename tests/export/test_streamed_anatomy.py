"""Streamed exports of models that no table declares: measured on a stand-in, told in the checkpoint's own names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_models import build
from support.hand_hooked import left_along
from support.tiny import make_tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interp_ablate import Plan
from interp_ablate.edits.kinds import Ablate
from interp_ablate.errors import ExportError
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.models.hf_classes import without_data
from interp_ablate.models.load import from_hf, load_model
from interp_ablate.models.stand_in import measured_without_data
from interp_ablate.sites import Site

ROWS = [[*range(5, 17)], [3, 4, 5]]
TYPES = (
    "llama", "gemma3", "gpt_oss", "falcon_h1", "qwen2_moe", "granitemoe", "opt", "mamba", "olmoe", "mistral3",
    "deepseek_v3", "qwen3_next", "ernie4_5_vl_moe", "evolla",
)  # fmt: skip


def folder_of(model_type: str, place: Path) -> Path:
    build(model_type).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def direction(d_model: int) -> torch.Tensor:
    return torch.randn(d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", TYPES)
def test_streamed_and_from_memory_are_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    source = folder_of(model_type, tmp_path / "a")
    model = load_model(source, backend="hf")
    plan = Plan((Ablate(direction(model.d_model), model.writers),))
    export_folder(source, plan, tmp_path / "streamed")
    certificate = export_checkpoint(model, plan, tmp_path / "certified", prompts=ROWS)
    assert certificate["passed"] and certificate["max_abs_logit_effect_of_plan"] > 1e-3
    memory = from_hf(build(model_type), make_tokenizer(), backend="hf")
    export_checkpoint(memory, plan, tmp_path / "memory", prompts=ROWS)
    before, streamed, certified, written = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("a", "streamed", "certified", "memory")
    )
    for other in (streamed, certified, written):
        assert set(before) <= set(other) <= {*before, *streamed}
        assert all(torch.equal(streamed[name], tensor) for name, tensor in other.items())
    assert any(not torch.equal(before[name], streamed[name]) for name in before)
    assert left_along(tmp_path / "streamed", plan.edits[0].vectors[0], ROWS) < 1e-5
    assert audit(AuditSource.of_folder(source), plan, tmp_path / "streamed").passed


@pytest.mark.parametrize("rows", (400, 214))  # as published, and as transformers saves it
def test_an_embedding_of_two_tensors_is_edited_in_both(rows: int, tmp_path: Path) -> None:
    """Molmo 2's new tokens have a tensor of their own: such folders could not be streamed."""
    source = folder_of("molmo2", tmp_path / "a")
    before = load_file(source / "model.safetensors")
    old, new = (f"model.transformer.wte.{name}" for name in ("embedding", "new_embedding"))
    whole = torch.cat([before[old], before[new]])
    before |= {old: whole[:rows].clone(), new: whole[rows:].clone()}
    save_file(before, source / "model.safetensors", {"format": "pt"})
    model = load_model(source)
    plan = Plan((Ablate(direction(model.d_model), model.writers),))
    export_folder(source, plan, tmp_path / "b")
    assert export_checkpoint(model, plan, tmp_path / "c", prompts=ROWS)["passed"]
    streamed, certified = (load_file(tmp_path / n / "model.safetensors") for n in "bc")
    assert streamed.keys() == certified.keys() == before.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in certified.items())
    unit = direction(model.d_model) / direction(model.d_model).norm()
    for name in (old, new):
        assert streamed[name].shape == before[name].shape
        assert (streamed[name] @ unit).abs().max() < 1e-5 < (before[name] @ unit).abs().max()
    assert left_along(tmp_path / "b", plan.edits[0].vectors[0], ROWS) < 1e-5
    assert audit(AuditSource.of_folder(source), plan, tmp_path / "b").passed
    with torch.no_grad():  # a row of the second tensor
        model.tl.hf.get_input_embeddings().weight[-1] += 1
    with pytest.raises(ExportError, match=r"embedding in memory is not what"):
        export_checkpoint(model, plan, tmp_path / "d", prompts=ROWS)


def test_every_expert_of_a_published_folder_is_edited_under_its_own_name(tmp_path: Path) -> None:
    source = folder_of("qwen2_moe", tmp_path / "a")
    d_model = 64
    plan = Plan((Ablate(direction(d_model), [Site(2, "mlp_out")]),))
    export_folder(source, plan, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    edited = {name for name in before if not torch.equal(before[name], after[name])}
    mlp = "model.layers.2.mlp"
    assert edited == {f"{mlp}.shared_expert.down_proj.weight"} | {
        f"{mlp}.experts.{i}.down_proj.weight" for i in range(4)
    }


def test_names_as_in_memory_and_as_published_are_streamed(tmp_path: Path) -> None:
    """Gemma 3 was published with its decoder at `language_model.model.`; version 5 has it at `model.language_model.`"""
    source = folder_of("gemma3", tmp_path / "a")
    plan = Plan((Ablate(direction(64), load_model(source).writers),))
    export_folder(source, plan, tmp_path / "b")
    names = load_file(source / "model.safetensors")
    other = {
        name.replace("language_model.model.", "model.language_model."): tensor
        for name, tensor in names.items()
    }
    assert other.keys() != names.keys()
    save_file(other, source / "model.safetensors", metadata={"format": "pt"})
    export_folder(source, plan, tmp_path / "c")
    now, older = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert {*other} <= {*older}
    for name, tensor in now.items():
        assert torch.equal(
            older[name.replace("language_model.model.", "model.language_model.")], tensor
        )
    assert left_along(tmp_path / "c", plan.edits[0].vectors[0], ROWS) < 1e-5


@pytest.mark.parametrize(
    "model_type",
    ("deepseek_v3", "gpt_oss", "gemma3", "falcon_h1", "qwen3_next", "granite", "cohere"),
)
def test_a_stand_in_writes_with_the_parameters_that_the_model_has(model_type: str) -> None:
    """Of the config's own size (671B for DeepSeek V3), held to the tiny model whose every value was measured."""
    config = CONFIG_MAPPING[model_type]()
    hf = without_data(config)
    assert sum(p.numel() for p in hf.parameters()) > 1e9
    entry, tiny = (
        measured_without_data(config, hf),
        from_hf(build(model_type), None, backend="hf").architecture,
    )
    names = dict(hf.named_parameters())
    layouts = {
        name: layout
        for group in entry.branches.values()
        for b in group
        for name, layout in b.writers.items()
    }
    assert len(entry.branches) >= len(hf.get_submodule(path_of(entry)))
    axes = {"linear": 0, "conv1d": 1, "bias": 0, "experts": 1, "experts_conv1d": 2}
    d_model = hf.get_input_embeddings().weight.shape[1]
    for name, layout in layouts.items():
        assert names[name].shape[axes[layout]] == d_model
    kinds = {
        (re.sub(r"\d+", "#", name), layout)
        for group in tiny.branches.values()
        for branch in group
        for name, layout in branch.writers.items()
    }
    assert {(re.sub(r"\d+", "#", name), layout) for name, layout in layouts.items()} <= kinds
    assert (entry.embed, entry.unembed, entry.gain_offset) == (
        tiny.embed,
        tiny.unembed,
        tiny.gain_offset,
    )


def path_of(entry: Any) -> str:
    """The name of the list of blocks."""
    branch = next(iter(entry.branches.values()))[0]
    return re.split(r"\.\d+\.", branch.path)[0]
