"""Certificates in bfloat16 and float16: an export passes, one tensor that is not as planned does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import N_LAYERS, folder_of, rows_of, unit
from transformers import LlamaForCausalLM

from interp_ablate import Ablate, Plan, certify, everywhere, export_checkpoint, load_model
from interp_ablate.errors import ExportError

PLAN = Plan((Ablate(unit(), everywhere(N_LAYERS)),))
ROWS = rows_of(9, 14)
DTYPES = ("bfloat16", "float16")


@pytest.fixture(params=DTYPES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source", dtype=request.param)


def model_of(source: Path) -> Any:
    import json

    return load_model(source, dtype=json.loads((source / "config.json").read_text())["dtype"])


def with_tensor(folder: Path, name: str, value: torch.Tensor) -> Path:
    """The export with one tensor replaced."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: value}, file, metadata={"format": "pt"})
    return folder


def tensor(folder: Path, name: str) -> torch.Tensor:
    return next(t[name] for t in map(load_file, folder.glob("*.safetensors")) if name in t)


@pytest.mark.parametrize("plan", (None, PLAN), ids=("no plan", "plan"))
def test_an_export_is_certified_in_its_own_precision(
    source: Path, plan: Plan | None, tmp_path: Path
) -> None:
    model = model_of(source)
    certificate = export_checkpoint(model, plan, tmp_path / "out", prompts=ROWS)
    dtype = str(model.dtype).removeprefix("torch.")
    assert certificate["passed"] and certificate["share_of_edit_missed"] < 0.1
    assert certificate["compared"] == dict.fromkeys(("stored", "hooked", "reloaded"), dtype)
    step = torch.finfo(model.dtype).eps * max(certificate["max_abs_logit"], 4)
    assert certificate["limits"]["max_abs_logit_difference"] == pytest.approx(12 * step)
    if plan is None:  # the folder as it is loaded by anyone computes the same to the bit
        assert certificate["max_abs_logit_difference"] == 0


def test_buffers_stay_as_the_checkpoint_computes_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.to(dtype)` would round the rotary frequencies: of SmolLM2, that moves logits by 1.1."""
    dtypes = []
    real = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes.append(self.model.rotary_emb.inv_freq.dtype)
        return real(self, *args, **kwargs)

    model = model_of(source)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    export_checkpoint(model, PLAN, tmp_path / "out", prompts=ROWS)
    assert dtypes and set(dtypes) == {torch.float32}


@pytest.mark.parametrize("fault", ("left", "half", "swapped"))
@pytest.mark.parametrize("branch", ("self_attn.o_proj", "mlp.down_proj"))
def test_one_tensor_of_one_layer(source: Path, fault: str, branch: str, tmp_path: Path) -> None:
    model, out = model_of(source), tmp_path / "out"
    export_checkpoint(model, PLAN, out, prompts=ROWS)
    name = f"model.layers.1.{branch}.weight"
    before, after = tensor(source, name), tensor(out, name)
    value = {
        "left": before,
        "half": ((before.float() + after.float()) / 2).to(after.dtype),
        "swapped": tensor(out, name.replace("layers.1", "layers.2")),
    }[fault]
    certificate = certify(model, PLAN, with_tensor(out, name, value), prompts=ROWS)
    assert not certificate["passed"]
    if fault != "swapped":
        share = {"left": 1.0, "half": 0.5}[fault]
        assert certificate["share_of_edit_missed"] == pytest.approx(share, abs=0.1)


def test_an_unedited_folder_does_not_pass_for_a_weak_plan(source: Path, tmp_path: Path) -> None:
    model = model_of(source)
    weak = Plan((Ablate(unit(), everywhere(N_LAYERS), strength=0.01),))
    export_checkpoint(model, None, tmp_path / "unedited", prompts=ROWS)
    assert not certify(model, weak, tmp_path / "unedited", prompts=ROWS)["passed"]


def test_what_rounding_hides_is_said(tmp_path: Path) -> None:
    model = model_of(folder_of(tmp_path / "source", dtype="bfloat16"))
    weak = Plan((Ablate(unit(), everywhere(N_LAYERS), strength=0.002),))
    with pytest.raises(
        ExportError, match=r"nothing can be said .* drowns in the rounding of bfloat16"
    ):
        export_checkpoint(model, weak, tmp_path / "out", prompts=ROWS)
    assert not (tmp_path / "out").exists()
    wide = load_model(tmp_path / "source", dtype="float32")
    with pytest.raises(ExportError, match=r"share_of_edit_missed"):  # stored in bfloat16 it is lost
        export_checkpoint(wide, weak, tmp_path / "out", prompts=ROWS)
