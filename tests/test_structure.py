"""The house rules that a machine can check: layers, who may import or print what, docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "interp_ablate"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}

# A module imports from its own layer or from earlier ones; "export" stands for everything in it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "lines", "listeners", "executors", "study", "kv_cache"),
    ("sites", "batches", "remembered"),
    ("architectures", "prompts", "prompt_files", "rendering", "lint", "chat_files"),
    ("exchanges", "expressions", "declines", "chat_data", "traits"),
    ("directions", "estimators", "vectors", "gguf_vectors"),
    ("edits",),
    ("hooks",),
    ("sources", "lens", "convert"),
    ("model",),
    ("activations", "weights", "scores", "judges", "endpoints", "correlation"),
    ("fit", "candidates", "journal", "selection"),
    ("sweep", "search"),
    (
        "persona",
        "pooling",
        "reading",
        "rollouts",
        "monitoring",
        "screening",
        "filter_rules",
        "filtering",
        "layer_edits",
    ),
    ("plots", "plots_persona", "plots_monitor", "plots_training", "plots_evaluate", "report"),
    ("export",),
    ("baking", "training", "preventing", "healing", "evaluation", "harness"),
    ("pipeline", "experiment", "searching", "budget"),
    (
        "cli",
        "cli_progress",
        "cli_artefacts",
        "cli_scores",
        "cli_persona",
        "cli_monitor",
        "cli_filter",
        "cli_training",
        "cli_evaluate",
    ),
)


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if module in layer or module.split(".")[0] in layer:
            return number
    raise AssertionError(
        f"interp_ablate/{module.replace('.', '/')}.py has no layer: add it to LAYERS in "
        f"{Path(__file__).name}, and to the file tree in README.md"
    )


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module a file imports, wherever the statement stands, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it in full"
            for alias in node.names:  # `from package import x`: x may be a module itself
                yield f"{node.module}.{alias.name}", node.lineno


def inside(module: str) -> dict[str, int]:
    """The modules of this package that one imports, and the line of the first statement."""
    found: dict[str, int] = {}
    for name, line in imported(TREES[module]):
        parts = name.split(".")
        if parts[0] == "interp_ablate":
            candidates = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            target = next((c for c in candidates if c in FILES), None)
            if target is not None:
                found.setdefault(target, line)
    return found


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name, _ in imported(TREES[module])}


MODULES = [name for name in FILES if name.split(".")[-1] != "__init__"]


# --------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way_only(module: str) -> None:
    own = layer_of(module)
    for target, line in inside(module).items():
        assert layer_of(target) <= own, (
            f"{FILES[module].relative_to(ROOT)}, line {line}: {module} imports {target}, of a later "
            "layer: what they share belongs in the earlier one"
        )


def test_imports_have_no_cycle() -> None:
    edges = {m: inside(m) for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in edges.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_package_files_import_nothing_of_the_package() -> None:
    for module in set(FILES) - set(MODULES):
        assert not inside(module), f"{module}: public names are loaded when first used"


def test_only_lens_knows_transformer_lens() -> None:
    assert [m for m in FILES if "transformer_lens" in outside(m)] == ["lens"]


LIGHT = "prompts prompt_files lint rendering sites chat_files chat_data declines expressions exchanges traits"


@pytest.mark.parametrize("module", LIGHT.split())
def test_what_needs_no_model_is_light(module: str) -> None:
    heavy = "torch transformers pandas datasets sklearn numpy scipy pyarrow matplotlib"
    loaded = loads(f"interp_ablate.{module}", heavy.split())
    assert not loaded, f"import interp_ablate.{module} imports {', '.join(loaded)}"


@pytest.mark.parametrize("module", ["", ".cli"])
def test_package_and_command_line_start_without_torch(module: str) -> None:
    if module == ".cli" and "cli" not in FILES:
        pytest.skip("there is no cli.py yet")
    loaded = loads(f"interp_ablate{module}", ["torch", "transformers", "transformer_lens"])
    assert not loaded, f"import interp_ablate{module} imports {', '.join(loaded)}"


def loads(module: str, heavy: list[str]) -> list[str]:
    """Which heavy packages importing a module loads, in a process of its own."""
    code = f"import sys, {module}\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_public_names_do_not_depend_on_what_was_imported_before() -> None:
    code = (
        "import importlib, interp_ablate\n"
        f"for name in {MODULES}: importlib.import_module('interp_ablate.' + name)\n"
        "bad = [n for n in interp_ablate.__all__ if n in interp_ablate.__dict__\n"
        "       and type(interp_ablate.__dict__[n]).__name__ == 'module']\n"
        "sys = importlib.import_module('sys'); sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("module", [name for name in FILES if name not in LAYERS[-1]])
def test_only_the_command_line_prints(module: str) -> None:
    assert "rich" not in outside(module)
    for node in ast.walk(TREES[module]):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), (
            f"{module}, line {node.lineno}: print; the library logs"  # type: ignore[attr-defined]
        )
        written = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
        assert not (written and ast.unparse(node).startswith("sys.")), (
            f"{module}: {ast.unparse(node)}"
        )


@pytest.mark.parametrize("module", FILES)
def test_no_error_is_swallowed_whole(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}, line {node.lineno}: a bare except"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            names = {ast.unparse(argument) for argument in node.args}
            assert not names & {"Exception", "BaseException"}, f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", FILES)
def test_a_file_says_what_it_knows(module: str) -> None:
    text = ast.get_docstring(TREES[module])
    assert text, f"{module} has no docstring"
    if module in MODULES:
        folded = " ".join(text.split()).lower()
        assert "knows" in folded and "not know" in folded, (
            f"{module}: its docstring says what the file knows and what it deliberately does not"
        )


def listed(text: str) -> set[str]:
    """The .py files of a tree drawn by indentation that have a description, as paths."""
    found: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in text.splitlines():
        entry = re.fullmatch(r"( *)([\w.-]+/|[\w.-]+\.py)(?:  +(\S.*))?", line.rstrip())
        if entry is None:
            continue
        indent, name, description = len(entry[1]), entry[2], entry[3]
        folders = [folder for folder in folders if folder[0] < indent]
        if name.endswith("/"):
            folders.append((indent, name))
        elif description:
            found.add("".join(folder for _, folder in folders) + name)
    return found


def test_the_readme_lists_every_file() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    tree = {path for path in listed(readme.read_text()) if path.startswith("interp_ablate/")}
    there = {path.relative_to(ROOT).as_posix() for path in FILES.values()}
    assert not there - tree, f"the file tree in README.md lacks {sorted(there - tree)}"
    assert not tree - there, f"the file tree in README.md has {sorted(tree - there)}: no such file"
