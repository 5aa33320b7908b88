"""Audits: a folder against its source and a plan, tensor by tensor; anything else is found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import N_LAYERS, folder_of, make, shared, unit
from torch import Tensor

from interp_ablate import Ablate, Add, Clamp, Plan, Site, audit, everywhere, export_checkpoint
from interp_ablate.edits.kinds import Edit
from interp_ablate.errors import ExportError
from interp_ablate.export.auditing import AuditSource
from interp_ablate.export.checkpoint import export_folder

PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
UNTOUCHED, EDITED = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = folder_of(tmp_path / "a")
    export_folder(source, PLAN, tmp_path / "b")
    return source, tmp_path / "b"


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor | None]) -> None:
    """One tensor of a folder changed, or dropped where `how` gives None."""
    index = folder / "model.safetensors.index.json"
    file = folder / json.loads(index.read_text())["weight_map"][name]
    tensors = load_file(file)
    changed = how(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    else:
        data = json.loads(index.read_text())
        del data["weight_map"][name]
        index.write_text(json.dumps(data))
    save_file(tensors, file, metadata={"format": "pt"})


@cache
def bit() -> Tensor:
    """The smallest change of one float32 value."""
    return torch.tensor(torch.finfo(torch.float32).eps)


# --------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2", "gemma2", "mixtral"))
def test_an_export_is_what_it_says(tmp_path: Path, kind: str, dtype: str) -> None:
    source, plan = (
        folder_of(tmp_path / "a", kind, dtype=dtype),
        Plan((Ablate(unit(), shared(kind).writers),)),
    )
    manifest = export_folder(source, plan, tmp_path / "b")
    found = audit(AuditSource.of_folder(source), plan, tmp_path / "b")
    assert found.passed and not found.problems
    assert found.edited == found.edited_bit_equal == len(manifest["edited"]) > 0
    assert found.added == 1 and found.tied == "untie"
    assert found.same == len(manifest["unchanged"]) > 0


@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2"))
@pytest.mark.parametrize("what", ("ablation", "addition", "both", "clamp"))
def test_what_is_called_changed_is_changed_and_nothing_else(
    tmp_path: Path, kind: str, what: str
) -> None:
    """An addition goes to a bias: the weight beside it keeps its bytes, and is not called changed."""
    site = Site(1, "mlp_out")
    edits: dict[str, tuple[Edit, ...]] = {
        "ablation": (Ablate(unit(), site),),
        "addition": (Add(unit(), site),),
        "both": (Ablate(unit(), site), Add(unit(1), site)),
        "clamp": (Clamp(unit(), site, value=2.0),),
    }
    source = folder_of(tmp_path / "a", kind)
    manifest = export_folder(source, Plan(edits[what]), tmp_path / "b")
    before, after = ({**tensors_of(tmp_path / name)} for name in "ab")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == set(manifest["edited"]) and set(manifest["added"]) == set(after) - set(before)
    assert set(manifest["unchanged"]) == set(before) - differ
    found = audit(AuditSource.of_folder(source), Plan(edits[what]), tmp_path / "b")
    assert found.passed and (found.edited, found.same) == (len(differ), len(before) - len(differ))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_a_model_in_memory_as_the_origin(tmp_path: Path) -> None:
    export_checkpoint(shared(tied=True), PLAN, tmp_path / "b", prompts=[[5, 6, 7, 8]])
    assert audit(AuditSource.of_model(make(tied=True)), PLAN, tmp_path / "b").passed
    assert not audit(AuditSource.of_model(make(tied=True, seed=1)), PLAN, tmp_path / "b").passed


@pytest.mark.parametrize("tied", ("untie", "skip-embedding", "accept"))
@pytest.mark.parametrize("manifest", (True, False), ids=("manifest", "no manifest"))
def test_the_choice_for_tied_embeddings_is_read_off(
    tmp_path: Path, tied: str, manifest: bool
) -> None:
    source, out = folder_of(tmp_path / "a"), tmp_path / "b"
    export_folder(source, PLAN, out, tied=tied)  # type: ignore[arg-type]
    if not manifest:
        (out / "interp_ablate.json").unlink()
    found = audit(AuditSource.of_folder(source), PLAN, out)
    assert found.passed and found.tied == tied
    for other in {"untie", "skip-embedding", "accept"} - {tied}:
        assert not audit(AuditSource.of_folder(source), PLAN, out, tied=other).passed  # type: ignore[arg-type]


def test_additions_are_checked_with_their_new_biases(tmp_path: Path) -> None:
    source, plan = folder_of(tmp_path / "a"), Plan((Add(unit(), Site(1, "resid_post")),))
    export_folder(source, plan, tmp_path / "b")
    found = audit(AuditSource.of_folder(source), plan, tmp_path / "b")
    assert found.passed and found.added == 3 * N_LAYERS
    change(tmp_path / "b", "model.layers.2.mlp.up_proj.bias", lambda x: x + 0.1)
    assert (
        "model.layers.2.mlp.up_proj.bias"
        in audit(AuditSource.of_folder(source), plan, tmp_path / "b").problems[0]
    )


def test_rounding_of_another_machine_is_allowed(pair: tuple[Path, Path]) -> None:
    source, out = pair
    change(out, EDITED, lambda x: torch.nextafter(x, torch.full_like(x, torch.inf)))
    found = audit(AuditSource.of_folder(source), PLAN, out)
    assert found.passed and found.edited_bit_equal == found.edited - 1


# --------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("name", "how", "problem"),
    (
        (
            UNTOUCHED,
            lambda x: x + bit() * (torch.arange(x.numel()) == 3).view_as(x),
            "does not touch",
        ),
        (UNTOUCHED, lambda x: x.half(), "does not touch"),
        (
            EDITED,
            lambda x: x + 1e-3 * (torch.arange(x.numel()) == 3).view_as(x),
            "1 of 1536 values",
        ),
        (EDITED, lambda x: x * torch.nan, "1536 of 1536 values differ"),
        (
            EDITED,
            lambda x: x.bfloat16(),
            r"torch.bfloat16 \(32, 48\); the plan makes it torch.float32",
        ),
        ("lm_head.weight", lambda x: x * 1.01, "lm_head.weight is not what the plan"),
        (UNTOUCHED, lambda x: None, "up_proj.weight is missing"),
    ),
    ids=("a bit", "dtype", "edited value", "NaN", "edited dtype", "head", "missing"),
)
def test_a_tensor_that_is_something_else(
    pair: tuple[Path, Path], name: str, how: Callable, problem: str
) -> None:
    source, out = pair
    change(out, name, how)
    found = audit(AuditSource.of_folder(source), PLAN, out)
    assert not found.passed and len(found.problems) == 1
    assert re.search(problem, found.problems[0]) and name in found.problems[0]


def test_a_tensor_too_many(pair: tuple[Path, Path]) -> None:
    source, out = pair
    index = out / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["extra"] = "extra.safetensors"
    index.write_text(json.dumps(data))
    save_file({"extra": torch.ones(3)}, out / "extra.safetensors")
    assert audit(AuditSource.of_folder(source), PLAN, out).problems == [
        "extra is not a tensor of the source, nor of the plan"
    ]


def test_another_plan_is_found(pair: tuple[Path, Path]) -> None:
    source, out = pair
    other = Plan((Ablate(unit(1), everywhere(N_LAYERS)),))
    assert len(audit(AuditSource.of_folder(source), other, out).problems) == 1 + 2 * N_LAYERS
    weaker = Plan((Ablate(unit(), everywhere(N_LAYERS), strength=0.999),))
    assert not audit(AuditSource.of_folder(source), weaker, out).passed


@pytest.mark.parametrize(
    "file", ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
)
def test_what_lies_beside_the_weights_counts(pair: tuple[Path, Path], file: str) -> None:
    source, out = pair
    data = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**data, "added": 1}))
    assert audit(AuditSource.of_folder(source), PLAN, out).problems == [
        f"{file} differs from the source's"
    ]
    (out / file).unlink()
    assert f"{file} is only in" in audit(AuditSource.of_folder(source), PLAN, out).problems[0]


def test_a_config_that_says_something_else(pair: tuple[Path, Path]) -> None:
    source, out = pair
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    (problem,) = audit(AuditSource.of_folder(source), PLAN, out).problems
    assert "rms_norm_eps is 0.001; the plan makes it 1e-06" in problem


def test_a_config_that_still_says_tied(pair: tuple[Path, Path]) -> None:
    source, out = pair
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert any(
        "tie_word_embeddings" in p for p in audit(AuditSource.of_folder(source), PLAN, out).problems
    )


def test_a_plan_without_a_form_and_files_that_cannot_be_read(pair: tuple[Path, Path]) -> None:
    source, out = pair
    with pytest.raises(ExportError, match="some places only"):
        audit(AuditSource.of_folder(source), Plan((Ablate(unit(), Site(1, "resid_mid")),)), out)
    (out / "interp_ablate.json").write_text("[")
    with pytest.raises(ExportError, match="is not whole JSON"):
        audit(AuditSource.of_folder(source), PLAN, out)
    shutil.rmtree(out)
    with pytest.raises(ExportError):
        audit(AuditSource.of_folder(source), PLAN, out)


@pytest.mark.parametrize(
    "file",
    ("modeling_own.py", "own.json", "additional_chat_templates/x.jinja"),
)
def test_files_that_loaders_would_act_on(pair: tuple[Path, Path], file: str) -> None:
    source, out = pair
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("{}")
    (problem,) = audit(AuditSource.of_folder(source), PLAN, out).problems
    assert problem.startswith(f"{file} is only in {out}")
    (out / file).unlink()
    (out / "picture.png").write_bytes(b"not read by anything")
    assert audit(AuditSource.of_folder(source), PLAN, out).passed


@pytest.mark.parametrize("in_source", (False, True), ids=("only here", "as in the source"))
@pytest.mark.parametrize(
    "file",
    (
        "pytorch_model.bin", "flax_model.msgpack", "rust_model.ot", "tf_model.h5", "onnx/model.onnx",
        "model-q4.gguf", "last.ckpt", "arrays.npz", "consolidated.00.pth", "original/params.json.pt",
        "consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json",
        "pytorch_model.bin.index.json", "weights.of-tomorrow", "noextension", "LICENSE.bin",
    ),
)  # fmt: skip
def test_weights_that_nobody_checked(pair: tuple[Path, Path], file: str, in_source: bool) -> None:
    """Equal bytes in the source do not help: they are the unedited model."""
    source, out = pair
    for folder in (source, out)[not in_source :]:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"{}")
    (problem,) = audit(AuditSource.of_folder(source), PLAN, out).problems
    assert problem.startswith(f"{file} may hold or name weights that nothing here checked")


def test_another_class_of_model(pair: tuple[Path, Path]) -> None:
    source, out = pair
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    (problem,) = audit(AuditSource.of_folder(source), PLAN, out).problems
    assert "architectures is ['LlamaModel']; the plan makes it ['LlamaForCausalLM']" in problem


@pytest.mark.parametrize(
    "field",
    (
        {"repetition_penalty": 9.0},
        {"dtype": "float16"},
        {"torch_dtype": "float16"},
        {"rope_theta": 5.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
)
def test_fields_of_the_config_that_its_class_drops(pair: tuple[Path, Path], field: dict) -> None:
    source, out = pair
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **field}))
    problems = audit(AuditSource.of_folder(source), PLAN, out).problems
    assert any(next(iter(field)) in problem for problem in problems)
