"""What is refused before any work is done: values that no setting has, and places that cannot be written."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import time_limit
from support.family_models import build
from tiny import N_LAYERS, folder_of, make, make_tokenizer, unit

from interp_ablate import Add, Direction, Directions, Plan, Site, collect
from interp_ablate.cli.main import main
from interp_ablate.cli.options import rubric_of
from interp_ablate.cli.settings import read_toml
from interp_ablate.errors import ExportError, ModelError, RunError
from interp_ablate.evaluation.perplexity import read_corpus
from interp_ablate.export.auditing import _same_file
from interp_ablate.export.model_card import source_front_matter
from interp_ablate.models.load import from_hf
from interp_ablate.runs.configuration import Configuration
from interp_ablate.storage.atomic_files import check_folder

HUGE = str(10**23)


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path) -> None:
    """The command ends with 2 and one message, without having loaded the model "nowhere"."""
    with time_limit(20):
        assert main(["--quiet", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "nowhere" not in error


@pytest.fixture
def directions(tmp_path: Path) -> Path:
    file = tmp_path / "directions.safetensors"
    Directions((Direction(unit(), 1.0, Site(0, "resid_post")),)).save(file)
    return file


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("--plan", ["chat", "--model", "nowhere", "--plan", ""]),
        ("--plan", ["generate", "hi", "--model", "nowhere", "--plan", ""]),
        ("--contrast", ["run", "--contrast", "", "--model", "nowhere", "--out", "o"]),
        ("--sites", ["run", "--sites", "", "--model", "nowhere", "--out", "o"]),
        ("--template", ["generate", "hi", "--model", "nowhere", "--template", ""]),
        ("--expressions", ["filter", "rows.jsonl", "--out", "o", "--expressions", ""]),
        ("trait", ["persona", "traits", ""]),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set(
    flag: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, f"{flag} is empty", *arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--seed is a number from 0", ["chat", "--model", "nowhere", "--seed", HUGE]),
        ("--seed is a number from 0", ["run", "--model", "nowhere", "--out", "o", "--seed", "-1"]),
        ("--seed is a number from 0", ["filter", "rows.jsonl", "--out", "o", "--seed", HUGE]),
        ("--temperature is at least 0", ["chat", "--model", "nowhere", "--temperature", "nan"]),
        ("--max-new-tokens is at least 1", ["chat", "--model", "nowhere", "--max-new-tokens", "0"]),
        ("--max-new-tokens is at least 1",
         ["generate", "hi", "--model", "nowhere", "--max-new-tokens", "-1"]),
    ],
)  # fmt: skip
def test_numbers_that_no_setting_has(
    message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, message, *arguments)


@pytest.mark.parametrize(
    "line",
    [
        'seed = "x"', "seed = 1.5", "seed = true", "seed = -1", f"seed = {HUGE}", 'max_kl = "a"',
        "n_train = true", "model = 3", "layers = 5", 'contrast = ""', "seed = 1979-05-27",
        "seed = " + "[" * 5000 + "]" * 5000, 'trust_remote_code = "yes"',
    ],
)  # fmt: skip
def test_values_of_another_type_in_toml(line: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(line)
    with pytest.raises(RunError):
        Configuration.from_dict(read_toml(str(tmp_path / "run.toml"), Configuration))


def test_places_that_cannot_be_written(
    tmp_path: Path, directions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    inside, said = tmp_path / "file" / "x", "cannot write into"
    model = ["--model", "nowhere"]
    refused(capsys, said, "tokens", directions, "hi", *model, "--out", inside)
    refused(
        capsys, said, "explore", *model, "--directions", directions, "--port", 0, "--out", inside
    )
    refused(capsys, said, "run", *model, "--contrast", "declining", "--out", inside)
    Plan(Add(unit(), Site(0, "resid_post"))).save(tmp_path / "plan.json")
    plan = ["--plan", tmp_path / "plan.json"]
    refused(capsys, said, "evaluate", "nowhere", *plan, "--out", inside)
    refused(capsys, said, "export", *model, *plan, "--format", "lora", "--out", inside)
    (tmp_path / "none").mkdir()
    check_folder(tmp_path / "none" / "a" / "b")
    assert not list((tmp_path / "none").iterdir())


def test_pictures_that_no_memory_holds(
    directions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        capsys, "from 1 to 1200", "tokens", directions, "hi", "--model", "nowhere", "--dpi", HUGE
    )


def test_the_explorers_address(directions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    more = ["explore", "--model", "nowhere", "--directions", directions, "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(capsys, "cannot listen on", *more, taken.getsockname()[1])
    refused(capsys, "cannot listen on", *more, 99999)
    refused(capsys, "cannot listen on", *more, 0, "--host", "::zz")
    refused(capsys, "--out is for --model", "explore", directions.parent, "--port", 0, "--out", "o")


def test_files_that_never_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda path: rubric_of(f"@{path}"), lambda path: read_corpus(path)):
        with time_limit(20), pytest.raises(RunError, match="pipe"):
            read(tmp_path / "pipe")
    with open(tmp_path / "README.md", "wb") as file:
        file.truncate(1 << 40)
    assert source_front_matter(tmp_path) == {}
    with pytest.raises(ExportError, match="at most"):
        _same_file(tmp_path / "README.md", tmp_path / "README.md")


def test_a_line_that_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"\xff\nhi\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    folder = folder_of(tmp_path / "model")
    assert main(["--quiet", "chat", "--model", str(folder), "--max-new-tokens", "3"]) == 0
    assert "not valid Unicode" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_say_nothing(temperature: float) -> None:
    model = make()
    broken: Any = model.tl.blocks[N_LAYERS - 1].mlp
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite without any plan"):
        model.generate(["hi"], max_new_tokens=2, temperature=temperature)
    with model.applied(Plan(Add(unit(), Site(0, "resid_post")))):  # a plan's are scored as they are
        model.generate(["hi"], max_new_tokens=2, temperature=temperature)


def test_a_bridge_that_cannot_run_a_checkpoint_is_refused_when_it_is_built() -> None:
    """TransformerLens 3.9 runs Qwen3-Next with a cache alone."""
    try:
        model = from_hf(build("qwen3_next"), make_tokenizer(), backend="bridge")
    except ModelError as error:
        assert "backend='hf'" in str(error)
    else:
        collect(model, ["hi"])
