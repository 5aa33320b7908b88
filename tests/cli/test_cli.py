"""The command line: help without torch, one clear message and exit status 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from interp_ablate.cli.main import main

COMMANDS = (
    "run",
    "collect",
    "directions",
    "sweep",
    "plot",
    "select",
    "lint",
    "export",
    "verify",
    "generate",
    "import",
    "models",
    "push",
)


def test_help_lists_the_commands_without_torch() -> None:
    code = (
        "import sys;  from interp_ablate.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


DECLINING = ["--contrast", "declining"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", *DECLINING], "no model"),
        (["run", "--model", "smollm2"], "--contrast"),
        (["run", "--model", "nowhere/at/all", *DECLINING], "nowhere/at/all"),
        (["run", "--model", "smollm2", "--contrast", "declinng"], "declining"),
        (["run", "--model", "smollm2", *DECLINING, "--sites", "resid"], "resid_pre"),
        (["run", "--model", "smollm2", *DECLINING, "--dtype", "int8"], "float32"),
        (["run", "--model", "smollm2", *DECLINING, "--device", "tpu9"], "tpu9"),
        (["run", "--model", "smollm2", *DECLINING, "--n-train", "9000"], "9000"),
        (["run", "--config", "missing.toml"], "missing.toml"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["--quiet", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (out / "selected.json").exists() and not (out / "directions.json").exists()


def test_same_prompt_in_both_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yes, no = tmp_path / "yes.txt", tmp_path / "no.txt"
    yes.write_text("order a pizza\ncall me\n")
    no.write_text("Order  a PIZZA\nname a tree\n")
    out = tmp_path / "out"
    files = ["--positive", str(yes), "--negative", str(no)]
    assert main(["run", "--model", "smollm2", *files, "--out", str(out)]) == 2
    assert "both sets" in capsys.readouterr().err and not out.exists()
    no.write_text("")
    assert main(["lint", *files]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert main(["collect", "--model", "smollm2", *DECLINING, "--out", str(out)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.toml"
    config.write_text('model = "smollm2"\ncontrast = "declining"\npositoins = ["-1"]\n')
    assert main(["run", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "positoins" in capsys.readouterr().err


def test_select_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "data" / "arditi" / "gemma-2b-it"
    path = str(folder / "direction_evaluations.json")
    assert main(["select", "--rule", "arditi", "--n-layers", "18", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    choice = json.loads(lines[0])
    assert (choice["position"], choice["layer"], choice["kept"]) == (-2, 10, 13)
    assert main(["select", "--rule", "arditi", path]) == 2
    assert main(["select", "--rule", "pareto", path]) == 0
    assert main(["select", "no-such-file.json", "--n-layers", "4"]) == 2


def test_lint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "declining"]) == 0
    assert "bag of words" in capsys.readouterr().out
    assert main(["lint", "declining", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "declining"
