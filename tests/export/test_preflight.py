"""Preflight: what the export at the end would refuse is refused first, before a model is loaded where files show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import folder_of, make, shared

from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError
from interp_ablate.export import preflight
from interp_ablate.export.preflight import check_model_exports, check_place, check_source_exports
from interp_ablate.models import load
from interp_ablate.models.sources import resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "source")


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    for name in ("yes", "no"):
        lines = [f"{name} number {i * 7 + 3} now" for i in range(24)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sizes = ("--n-train", "8", "--n-validation", "6", "--n-test", "6", "--max-new-tokens", "4")
    sizes = (*sizes, "--expressions", "declining")  # without any, a run exports nothing
    return ["--positive", f"{tmp_path}/yes.txt", "--negative", f"{tmp_path}/no.txt", *sizes]


def drop(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    file = folder / data["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps(data))


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def to_int8(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: t.to(torch.int8) if "down_proj" in n else t for n, t in tensors.items()}
        save_file(changed, file, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (
        lambda folder: drop(folder, "model.layers.1.mlp.down_proj.weight"),
        "model.layers.1.mlp.down_proj.weight",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
    "quantized tensors": (to_int8, "int8"),
    "a quantization config": (
        lambda folder: configure(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantiz",
    ),
}


@pytest.mark.parametrize("command", ("run", "search"))
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_folder_end_a_run_before_a_model_is_loaded(
    folder: Path,
    prompts: list[str],
    fault: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_fault, said = FAULTS[fault]
    make_fault(folder)
    monkeypatch.setattr(load, "load_hf", None)  # would be called
    out = folder.parent / "out"
    status = main(["--quiet", command, "--model", str(folder), *prompts, "--out", str(out)])
    error = capsys.readouterr().err
    assert status == 2 and said in error and "Traceback" not in error
    assert not out.exists()


def test_an_export_is_refused_before_its_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_checkpoint import PLAN

    PLAN.save(folder.parent / "plan.json")
    drop(folder, "model.layers.1.mlp.down_proj.weight")
    monkeypatch.setattr(load, "load_hf", None)
    out = ["--plan", f"{folder.parent}/plan.json", "--out", f"{folder.parent}/out"]
    assert main(["--quiet", "export", "--model", str(folder), *out]) == 2
    assert "down_proj" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ("llama_gqa", "gemma2", "gpt2", "mixtral", "gpt_neox"))
def test_what_can_be_exported_passes(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path / "source", kind)
    check_source_exports(resolve(folder), tmp_path / "out")
    check_model_exports(shared(kind), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_writers_that_are_not_known_are_refused_once_the_model_is_there(tmp_path: Path) -> None:
    with pytest.raises(InterpAblateError, match="falcon"):
        check_model_exports(make("falcon"), tmp_path / "out")
    with pytest.raises(InterpAblateError, match="Hugging Face config"):
        model = make()
        model.hf_config = None
        check_model_exports(model, tmp_path / "out")


def test_places(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(folder)
    check_place(tmp_path / "deep" / "out", 100, source=source)
    with pytest.raises(InterpAblateError, match="holds the source"):
        check_place(folder, 100, source=source, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InterpAblateError, match="cannot write"):
        check_place(tmp_path / "file" / "out", 100, source=source)
    with pytest.raises(InterpAblateError, match="cannot write"):
        check_place("/proc/out", 100, source=source)
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(InterpAblateError, match="GB are free"):
        check_place(tmp_path / "out", usage.free * 2, source=source)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(InterpAblateError, match="GB are free"):
        check_source_exports(source, tmp_path / "out")
    with pytest.raises(InterpAblateError, match="GB are free"):
        check_model_exports(shared(), tmp_path / "out")
