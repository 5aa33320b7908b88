"""Flags: each is declared once, read by its command, and named right in messages; a typo is told what was meant."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import interp_ablate
from interp_ablate.cli.main import COMMANDS, main, parser_for
from interp_ablate.cli.settings import flags_from, read_toml, settings_from
from interp_ablate.errors import RunError
from interp_ablate.models.loading import LoadingOptions
from interp_ablate.runs.configuration import Configuration
from interp_ablate.settings import setting

PACKAGE = Path(interp_ablate.__file__).parent
NAMES = [name for name, (file, _) in COMMANDS.items() if file]
COMMON = {"help", "quiet"}
LOADING = {field.name for field in fields(LoadingOptions)}  # read as a whole, by the loader
READ_IN_ORDER = {"tests", "action"}  # of `filter`: its rules with limits, which are no fields


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    parser: Any = parser_for(name.split())
    for word in name.split():
        (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = group.choices[word]
    return parser


def flags_of(name: str) -> dict[str, set[str]]:
    """The names of a command's arguments, and how each is written."""
    return {action.dest: set(action.option_strings) for action in parser_of(name)._actions}


def attributes(path: Path) -> set[str]:
    """Every attribute that a file reads by name."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def files_of(stem: str) -> set[Path]:
    """A command's file, and the files of its folder that it imports, however far."""
    files, waiting = set(), [PACKAGE / "cli" / f"{stem}.py"]
    while waiting:
        files.add(path := waiting.pop())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "interp_ablate.cli"
            ):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                stems = {str(name).removeprefix("interp_ablate.cli").lstrip(".") for name in names}
                found = {PACKAGE / "cli" / f"{each}.py" for each in stems}
                waiting += [each for each in found if each.is_file() and each not in files]
    return files


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_read(name: str) -> None:
    flags: dict[str, type] = parser_of(name).get_default("flags")
    assert set(flags_of(name)) == set(flags) | COMMON | (
        READ_IN_ORDER if name == "filter" else set()
    )
    files = files_of(COMMANDS[name][0])
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    read = {attribute for path in files for attribute in attributes(path)}
    everywhere = {attribute for path in PACKAGE.rglob("*.py") for attribute in attributes(path)}
    for flag, cls in flags.items():
        made = rf"(settings_from|given_flags)\(\s*args,\s+{cls.__name__}\b"
        assert re.search(made, text), f"{name}: no {cls.__name__} is made of the flags it declares"
        # a command reads its own settings itself, those of the library are read there
        own = cls.__module__.startswith("interp_ablate.cli.") and flag not in LOADING
        whole = f"asdict({cls.__name__.removesuffix('Settings').lower()})" in text
        assert whole or flag in (read if own else everywhere), f"{name}: nothing reads --{flag}"


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_each_default_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "usage" in text
    assert not re.search(
        r"\(default [^)]*\)[^-]*\(default", text.split("--help", 1)[1].split(" --")[0]
    )
    for action in parser_of(name)._actions:
        assert (action.help or "").count("(default") <= 1, action.dest


def test_messages_name_only_flags_that_exist() -> None:
    known = {option for name in NAMES for options in flags_of(name).values() for option in options}
    known |= {
        "--version",
        "--above",
        "--below",
        "--no-deps",
        "--control-vector-scaled",
    }  # of this program; of pip; of llama.cpp
    wrong = [
        f"{path.relative_to(PACKAGE)}: {flag}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", node.value)
        if flag not in known
    ]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "--out", "x"], "did you mean run?"),
        (["persona", "steeer"], "did you mean persona steer?"),
        (["lint", "declining", "--jsom"], "did you mean --json?"),
        (["run", "--out", "x", "--max-new-tokns=3"], "did you mean --max-new-tokens?"),
        (["no-such-thing-at-all"], "unknown command"),
    ],
)
def test_a_typo_is_told_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_toml_keys_have_dashes_or_underscores(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\nmax-new-tokens = 7\nn_train = 9\npositions = ["-1", "-2"]\n')
    settings = read_toml(str(path), Configuration)
    assert settings == {
        "model": "m", "max_new_tokens": 7, "n_train": 9, "positions": ["-1", "-2"]
    }  # fmt: skip
    path.write_text("max_new_token = 7\n")
    with pytest.raises(RunError, match="did you mean max_new_tokens"):
        read_toml(str(path), Configuration)


@dataclass(frozen=True)
class _Base:
    seed: int = setting(3, "of chance")


@dataclass(frozen=True)
class _Example(_Base):
    name: str = setting(help="of it", positional=True)
    size: float | None = setting(None, "how much: 5% of it")
    own: bool = setting(True, "not its own")
    layers: tuple[int, int] | None = setting(None, "A-B")
    scales: tuple[float, ...] = setting((1.0, 2.0), "comma-separated")
    labels: tuple[str, ...] = setting((), "may be given again", flag="label", repeat=True)
    hidden: int = 5


def test_settings_are_flags_and_flags_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    flags_from(parser, _Example, _Base)
    assert settings_from(parser.parse_args(["x"]), _Example) == _Example(name="x")
    args = parser.parse_args(
        [
            "x",
            "--seed",
            "4",
            "--size",
            "2",
            "--no-own",
            "--layers",
            "8-20",
            "--scales=-1,0.5",
            "--label",
            "a",
            "--label",
            "b",
        ]
    )
    assert settings_from(args, _Example) == _Example(
        name="x", seed=4, size=2.0, own=False, layers=(8, 20), scales=(-1.0, 0.5), labels=("a", "b")
    )
    assert settings_from(args, _Base) == _Base(seed=4)
    assert settings_from(parser.parse_args(["x"]), _Example, under={"seed": 7}).seed == 7
    assert settings_from(args, _Example, under={"seed": 7}).seed == 4
    with pytest.raises(RunError, match="--scales takes numbers between commas"):
        settings_from(parser.parse_args(["x", "--scales", "1,b"]), _Example)
    with pytest.raises(RunError, match="--layers takes A-B"):
        settings_from(parser.parse_args(["x", "--layers", "all"]), _Example)
    text = " ".join(parser.format_help().split())
    assert "of chance (default 3)" in text and "comma-separated (default 1,2)" in text
    assert "5% of it" in text and "--hidden" not in text


def test_another_package_adds_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        print(f"hello {args.who}")
        return 0

    module = SimpleNamespace(add=lambda parser: parser.add_argument("who"), run=run)
    entry = SimpleNamespace(package="outside", load=lambda: module)
    for file in ("cli.main", "storage.entry_points"):
        name = f"interp_ablate.{file}.entry_points_of"
        monkeypatch.setattr(name, lambda group: {"greet": entry})
    assert main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "greet" in capsys.readouterr().out


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "interp_ablate", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["interp-ablate", interp_ablate.__version__]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_a_file_with_add_and_run(name: str) -> None:
    module = importlib.import_module(f"interp_ablate.cli.{COMMANDS[name][0]}")
    assert callable(module.add) and callable(module.run)


def test_a_large_default_is_short() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "interp_ablate.cli.main", "budget", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "4e14" in text
    assert "400000000000000" not in text


def test_a_description_that_is_a_question_ends_in_one_mark() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "interp_ablate.cli.main", "persona", "screen", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "carry the trait?" in text
    assert "?." not in text
