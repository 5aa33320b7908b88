"""The commands that make and check artefacts: what they print, and 0, 1 or 2 as they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import N_LAYERS, tiny, unit

from interp_ablate import Ablate, Add, Plan, Site, everywhere
from interp_ablate.cli.main import main
from interp_ablate.cli.options import rubric_of
from interp_ablate.errors import RunError
from interp_ablate.models.architectures import ARCHITECTURES

EDITED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A source folder, an ablation and an addition."""
    hf, tokenizer = tiny(tied=True)
    hf.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    Plan((Ablate(unit(), everywhere(N_LAYERS)),)).save(tmp_path / "plan.json")
    Plan((Add(unit(), Site(1, "resid_post")),)).save(tmp_path / "add.json")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> Any:
    """The command's one JSON line, or its error message."""
    assert main(["--quiet", *map(str, arguments)]) == status
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if status == 2 else json.loads(said.out.splitlines()[-1])


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(f"{model_type}  (" in text for model_type in ARCHITECTURES)
    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model_type"] for row in rows] == list(ARCHITECTURES)
    gemma = next(row for row in rows if row["model_type"] == "gemma2")
    assert "1 + weight" in gemma["norm_after"]


def test_models_of_one_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(place / "a")]) == 0
    text = capsys.readouterr().out
    assert f"layers 0-{N_LAYERS - 1}" in text and "self_attn.o_proj.weight [linear]" in text
    assert text.rstrip().endswith("exact       yes")
    found = run(capsys, "models", place / "a", "--json")
    assert not found["problems"] and len(found["blocks"]) == N_LAYERS


def test_streamed_then_verified_by_anyone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, plan = place / "a", place / "b", place / "plan.json"
    said = run(capsys, "export", "--source", a, "--plan", plan, "--out", b)
    assert said["edited"] == 1 + 2 * N_LAYERS and said["added"] == 1 and said["tied"] == "untie"
    found = run(capsys, "verify", a, b, "--plan", plan)
    assert found["passed"] and found["tensors"]["passed"] and not found["failed"]
    assert found["max_abs_logit_difference"] < 1e-4
    assert run(capsys, "verify", a, b, "--plan", plan, "--tensors-only")["passed"]
    assert run(capsys, "verify", b)["passed"]  # the manifest names source and plan
    assert json.loads((b / "certificate.json").read_text())["passed"] is None
    assert run(capsys, "verify", a, b, "--plan", plan, "--write")["passed"]
    assert json.loads((b / "certificate.json").read_text())["passed"] is True
    assert "**passed**" in (b / "README.md").read_text()
    tensors = load_file(b / "model.safetensors")
    tensors[EDITED][0, 0] += 0.3
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    found = run(capsys, "verify", a, b, "--plan", plan, status=1)
    assert not found["passed"] and EDITED in found["tensors"]["problems"][0]
    assert "max_abs_logit_difference" in found["failed"]
    assert not run(capsys, "verify", b, "--tensors-only", status=1)["passed"]


@pytest.mark.parametrize("tied", ("untie", "skip-embedding", "accept"))
def test_tied(place: Path, tied: str, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, plan = place / "a", place / "b", place / "plan.json"
    said = run(capsys, "export", "--model", a, "--plan", plan, "--out", b, "--tied", tied)
    assert said["passed"] and ("cost_of_accept" in said) == (tied == "accept")
    found = run(capsys, "verify", a, b, "--plan", plan)
    assert found["passed"] and found["tensors"]["tied"] == tied


def test_lora_gguf_and_control_vector(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, plan, add = place / "a", place / "plan.json", place / "add.json"
    said = run(
        capsys, "export", "--model", a, "--plan", plan, "--format", "lora", "--out", place / "l"
    )
    assert said["passed"] and (place / "l" / "adapter_model.safetensors").is_file()
    said = run(
        capsys,
        "export",
        "--source",
        a,
        "--plan",
        add,
        "--format",
        "control-vector",
        "--out",
        place / "v.gguf",
    )
    assert (place / "v.gguf").is_file() and said["format"] == "control-vector"
    error = run(
        capsys, "export", "--source", a, "--plan", plan, "--format", "control-vector",
        "--out", place / "no.gguf", status=2,
    )  # fmt: skip
    assert "nearest" in error and not (place / "no.gguf").exists()


def test_import(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(3 * unit(), place / "direction.pt")
    out = place / "v.safetensors"
    said = run(
        capsys, "import", place / "direction.pt", "--site", "blocks.1.hook_resid_pre", "--out", out
    )
    assert said == {"site": "blocks.1.hook_resid_pre", "norm": pytest.approx(3)}
    assert "exists" in run(capsys, "import", place / "direction.pt", "--out", out, status=2)
    error = run(capsys, "import", place / "direction.pt", "--out", out, "--force", status=2)
    assert "site" in error and out.is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["export"], "run folder"),
        (["export", "--plan", "plan.json", "--out", "b"], "--model"),
        (
            ["export", "--plan", "plan.json", "--model", "a", "--source", "a", "--out", "b"],
            "one of them",
        ),
        (["export", "--plan", "nowhere.json", "--source", "a", "--out", "b"], "nowhere.json"),
        (["export", "--plan", "plan.json", "--source", "nowhere", "--out", "b"], "nowhere"),
        (["export", "--plan", "plan.json", "--source", "a", "--out", "plan.json"], "exists"),
        (
            ["export", "--plan", "plan.json", "--source", "a", "--out", "plan.json", "--force"],
            "no export",
        ),
        (["export", "--plan", "plan.json", "--source", "a", "--out", "a/b"], "inside the source"),
        (["export", "--plan", "plan.json", "--source", "a", "--out", "a", "--force"], "source"),
        (
            [
                "export",
                "--plan",
                "plan.json",
                "--source",
                "a",
                "--out",
                "plan.json",
                "--force",
                "--format",
                "gguf",
            ],
            "not what this command writes",
        ),
        (
            ["import", "direction.pt", "--out", "plan.json", "--force"],
            "not what this command writes",
        ),
        (["verify", "a"], "interp_ablate.json"),
        (["verify", "a", "nowhere", "--plan", "plan.json"], "nowhere"),
        (["verify", "a", "a", "a"], "A B"),
        (["verify", "a", "a"], "--plan"),
        (["import", "nowhere.pt", "--out", "v.safetensors"], "nowhere.pt"),
        (["push", "a", "me/mine"], "README.md"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_message(
    place: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert said in run(capsys, *arguments, status=2)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_rubric_is_a_text_or_a_file(place: Path) -> None:
    assert rubric_of(None) is None
    assert rubric_of("0 is cheerful, 100 is gloomy") == "0 is cheerful, 100 is gloomy"
    for name in ("rubric.txt", "my rubric.txt"):
        (place / name).write_text("How gloomy?")
        assert rubric_of(str(place / name)) == rubric_of(f"@{place / name}") == "How gloomy?"
    assert rubric_of("How " * 2000) == "How " * 2000
    for wrong in ("gloomy", "@no such file", str(place)):
        with pytest.raises(RunError, match=r"cannot read the rubric .*Give a file"):
            rubric_of(wrong)


@pytest.mark.parametrize("manifest", ("{", "[]", "{}", '{"source": {"name": "x", "path": "b"}}'))
def test_a_manifest_that_lies(
    place: Path, manifest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    run(capsys, "export", "--source", "a", "--plan", "plan.json", "--out", "b")
    (place / "b" / "interp_ablate.json").write_text(manifest)
    assert "give A B" in run(capsys, "verify", "b", status=2)
