"""Every command and flag that the documentation names is one that the command line has."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from interp_ablate.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Flags of pip and of others, and those of an older version in the changelog.
OTHERS = {"--no-deps", "--index-url", "--strict", "--new-tokens", "--keep"}


@cache
def help_of(*command: str) -> str:
    """The help of a command; nothing where there is no such command."""
    text = io.StringIO()
    quiet = contextlib.redirect_stderr(io.StringIO())
    with contextlib.redirect_stdout(text), quiet, pytest.raises(SystemExit):
        main([*command, "--help"])
    return text.getvalue()


def flags_of(command: tuple[str, ...]) -> set[str]:
    return set(FLAG.findall(help_of(*command)))


def commands() -> list[tuple[str, ...]]:
    def parts(*command: str) -> list[str]:
        return re.findall(r"^ {4}([a-z]+)(?:  | *$)", help_of(*command), flags=re.M)

    return [(name,) for name in parts()] + [("persona", name) for name in parts("persona")]


def calls(text: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Each call of the command line in a text: the command and its flags."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in re.findall(r"interp-ablate ([^`\n#|]+)", joined):
        words = re.match(r"((?:[a-z]+ ?){1,2})", line)
        if words is None:
            continue
        first, *rest = words[1].split()
        command = (first, rest[0]) if first == "persona" and rest else (first,)
        yield command, set(FLAG.findall(line)) - OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = set(commands())
    for command, flags in calls(text):
        assert command in known, f"there is no command {' '.join(command)}"
        missing = flags - flags_of(command)
        assert not missing, f"{' '.join(command)} has no {sorted(missing)}"
    every = {flag for command in known for flag in flags_of(command)} | flags_of(())
    unknown = set(FLAG.findall(text)) - every - OTHERS
    assert not unknown, f"no command has {sorted(unknown)}"


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name, *rest in commands() if not rest and f"`{name}`" not in text]
    assert not missing, f"the README's table of commands lacks {missing}"
