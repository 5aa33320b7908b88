"""Systems without fcntl, and systems whose text is not UTF-8: every module imports, every text file names its encoding."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import interp_ablate

LIBRARY = Path(interp_ablate.__file__).parent

WITHOUT_FCNTL = """
import importlib, pkgutil, sys
sys.modules["fcntl"] = None
import interp_ablate
names = [m.name for m in pkgutil.walk_packages(interp_ablate.__path__, "interp_ablate.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
FRENCH_CARD = r"""
import json, sys
from pathlib import Path
from interp_ablate.export.model_card import add_to_card, write_documents
folder = Path(sys.argv[1])
manifest = {
    "kind": "checkpoint", "dtype": "float32", "edited": [], "unchanged": [], "added": [], "versions": {},
    "source": {"name": "mod\u00e8le", "kind": "object", "path": None, "base_model": None, "license": None},
    "plan": {"format": "interp_ablate.plan/2", "edits": []},
}
write_documents(folder, manifest, {"passed": None})
add_to_card(folder, "## \u00c9valuation \u00e0 froid")
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_fcntl() -> None:
    assert int(run(WITHOUT_FCNTL)) > 150


def test_a_french_model_card_is_written_where_text_is_ascii(tmp_path: Path) -> None:
    run(FRENCH_CARD, str(tmp_path), LC_ALL="C", PYTHONUTF8="0")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "modèle" in card and "Évaluation à froid" in card


def text_without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in whatever encoding the system has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        mode = (
            node.args[1].value
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            else "r"
        )
        opens = isinstance(node.func, ast.Name) and name == "open" and "b" not in str(mode)
        if name in ("read_text", "write_text", "fdopen") or opens:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY))
)
def test_text_files_name_their_encoding(path: Path) -> None:
    assert not list(text_without_encoding(path))
