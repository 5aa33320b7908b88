"""Every import of the package in documentation, notebooks and code strings is one that works."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "notebooks", "interp_ablate", "tests", "benchmarks")
IMPORT = re.compile(r"from (interp_ablate(?:\.\w+)*) import (\([^()]*\)|\w[\w, ]*)")


def texts() -> Iterator[tuple[Path, str]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.*"))]
    for path in [ROOT / "README.md", *paths]:
        if path.suffix in (".md", ".py"):
            yield path, path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            yield path, "\n".join("".join(cell["source"]) for cell in cells)


def works(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("folder", ["README.md", *FOLDERS])
def test_imports_in_texts_work(folder: str) -> None:
    broken = []
    for path, text in texts():
        if path.relative_to(ROOT).parts[0] != folder or path.name == "test_typing.py":
            continue
        for found in IMPORT.finditer(text):
            names = re.sub(r"[()]|#[^\n]*", "", found[2]).replace("\\n", " ").split(",")
            for name in (part.split(" as ")[0].strip() for part in names):
                if re.fullmatch(r"\w+", name) and not works(found[1], name):
                    broken.append(f"{path.relative_to(ROOT)}: from {found[1]} import {name}")
    assert not broken, "\n".join(broken)
