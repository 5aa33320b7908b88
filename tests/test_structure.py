"""The house rules that a machine can check: layers, who may import or print what, docstrings."""

from __future__ import annotations

import ast
import importlib
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

# The layers, from the ground up: a wing imports from its own folder and from the rows before it. A new file
# needs no entry here; a new wing does.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("sites", "settings", "precision", "display"),
    ("stats", "jobs", "storage"),
    ("prompts",),
    ("scoring", "directions"),
    ("edits",),
    ("models",),
    ("weights", "evaluation", "activations"),
    ("export", "search", "circuits"),
    ("persona",),
    ("datasets",),
    ("training",),
    ("budget", "plots"),
    ("runs",),
    ("explorer", "league"),
    ("cli",),
    ("__main__",),
)


def wing_of(module: str) -> str:
    return module.split(".")[0]


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if wing_of(module) in layer:
            return number
    raise AssertionError(
        f"interp_ablate/{wing_of(module)} has no layer: add it to LAYERS in {Path(__file__).name} and to the "
        "diagram in docs/architecture.md"
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
    for target, line in inside(module).items():
        allowed = wing_of(target) == wing_of(module) or layer_of(target) < layer_of(module)
        assert allowed, (
            f"{FILES[module].relative_to(ROOT)}, line {line}: {module} imports {target}, which is beside it or "
            "above it: what they share belongs below both"
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


DOORS = sorted(set(FILES) - set(MODULES))


def test_every_wing_has_a_door() -> None:
    folders = {path.parent for path in FILES.values()}
    without = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not without, f"no __init__.py in {without}"
    for wing in {wing_of(module) for module in MODULES if "." in module}:
        text = ast.get_docstring(TREES[f"{wing}.__init__"]) or ""
        assert "May import:" in text and "To add" in text, (
            f"interp_ablate/{wing}/__init__.py says what the wing is for, what it may import and how one adds to it"
        )


@pytest.mark.parametrize("door", DOORS)
def test_doors_load_nothing_and_files_do_not_use_them(door: str) -> None:
    assert not inside(door), f"{door}: public names are loaded when first used"
    users = [module for module in MODULES if door in inside(module)]
    assert not users, f"{users} import the door {door}: inside the library files import files"


@pytest.mark.parametrize("door", [d for d in DOORS if FILES[d].with_suffix(".pyi").is_file()])
def test_public_names_are_there(door: str) -> None:
    """The typed stub is the list of public names: each can be imported, and none is hidden by a file."""
    package = f"interp_ablate.{door}".removesuffix(".__init__")
    stub = ast.parse(FILES[door].with_suffix(".pyi").read_text())
    names = [a.asname for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names]
    folder = FILES[door].parent
    hidden = [n for n in names if (folder / f"{n}.py").exists() or (folder / f"{n}").is_dir()]
    assert not hidden, (
        f"{package}: {hidden} are files too, and would be found in place of the names"
    )
    assert len(set(names)) == len(names)
    loaded = importlib.import_module(package)
    missing = [name for name in names if not hasattr(loaded, str(name))]
    assert not missing, f"{package} has no {missing}"


def test_only_backends_know_transformer_lens() -> None:
    knowing = [m for m in FILES if "transformer_lens" in outside(m)]
    assert knowing and all(m.startswith("models.backends.") for m in knowing), knowing


LIGHT = (
    "sites settings runs.configuration models.loading prompts.contrast_set prompts.readers prompts.linting prompts.chat_template scoring.exchange "
    "scoring.expressions scoring.refusals storage.row_files datasets.chat_reader persona.traits"
)


@pytest.mark.parametrize("module", LIGHT.split())
def test_what_needs_no_model_is_light(module: str) -> None:
    heavy = "torch transformers pandas datasets sklearn numpy scipy pyarrow matplotlib"
    loaded = loads(f"interp_ablate.{module}", heavy.split())
    assert not loaded, f"import interp_ablate.{module} imports {', '.join(loaded)}"


@pytest.mark.parametrize(
    "module",
    ["", *(f".{d}".removesuffix(".__init__") for d in DOORS if d != "__init__"), ".cli.main"],
)
def test_package_doors_and_command_line_start_without_torch(module: str) -> None:
    loaded = loads(
        f"interp_ablate{module}", ["torch", "transformers", "transformer_lens", "pandas"]
    )
    assert not loaded, f"import interp_ablate{module} imports {', '.join(loaded)}"


def test_help_of_every_command_is_shown_without_torch() -> None:
    code = (
        "import sys\nfrom interp_ablate.cli.main import COMMANDS, parser_for\n"
        "for name in COMMANDS: parser_for(name.split())\n"
        "print(*[m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"a command's flags import {done.stdout}"


def loads(module: str, heavy: list[str]) -> list[str]:
    """Which heavy packages importing a module loads, in a process of its own."""
    code = f"import sys, {module}\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_public_names_do_not_depend_on_what_was_imported_before() -> None:
    modules = [m for m in MODULES if m != "__main__"]
    code = (
        "import importlib\n"
        f"for name in {modules}: importlib.import_module('interp_ablate.' + name)\n"
        f"doors = [importlib.import_module(('interp_ablate.' + d).removesuffix('.__init__')) for d in {DOORS}]\n"
        "bad = [f'{d.__name__}.{n}' for d in doors for n in getattr(d, '__all__', ())\n"
        "       if type(getattr(d, n)).__name__ == 'module']\n"
        "sys = importlib.import_module('sys'); sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


SIZES = {"lines": 500, "function": 60, "parameters": 8, "members": 25}
LONG_FILES = 8  # over 400 lines


def test_nothing_is_too_large_to_see() -> None:
    faults, long = [], []
    for module, tree in TREES.items():
        lines = FILES[module].read_text().count("\n")
        long += [module] if lines > 400 else []
        faults += [f"{module}: {lines} lines"] if lines > SIZES["lines"] else []
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                place = f"{module}.{node.name}"
                size = (node.end_lineno or 0) - node.lineno + 1
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([each for each in every if each.arg not in ("self", "cls")])
                faults += [f"{place}: {size} lines"] if size > SIZES["function"] else []
                faults += [f"{place}: {count} parameters"] if count > SIZES["parameters"] else []
            if isinstance(node, ast.ClassDef):
                count = len(list(members(node)))
                faults += (
                    [f"{module}.{node.name}: {count} public members"]
                    if count > SIZES["members"]
                    else []
                )
    assert not faults, "\n".join(faults)
    assert len(long) <= LONG_FILES, f"{len(long)} files over 400 lines: {long}"


def members(node: ast.ClassDef) -> Iterator[str]:
    for part in node.body:
        name = getattr(part, "name", None) or getattr(getattr(part, "target", None), "id", "_")
        if not name.startswith("_"):
            yield name


# --------------------------------------------------------------------------------- manners


@pytest.mark.parametrize(
    "module", [name for name in FILES if wing_of(name) != "cli" and name != "jobs.bars"]
)
def test_only_the_command_line_prints(module: str) -> None:
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


def test_the_architecture_page_shows_every_wing() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [
        wing for layer in LAYERS for wing in layer if wing not in ("__main__",) and wing not in page
    ]
    assert not missing, f"docs/architecture.md does not name {missing}"
