"""The wheel: built as a user's pip builds it, installed into an empty environment, and run from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, **environment: str) -> str:
    """The output of a command that does not see this checkout, with its errors where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "100", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder of this checkout gets into it or is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").splitlines()
    for name in tracked:
        if name.split("/")[0] in ("interp_ablate", "pyproject.toml", "README.md", "LICENSE"):
            if not (ROOT / name).is_file():
                continue
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    here = sysconfig.get_path("purelib")
    target = run(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).strip()
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", wheel)
    # a plain path, not a site folder: an editable install beside it is not followed
    (Path(target) / "pinned.pth").write_text(here + "\n")
    return programs


def test_the_wheel_holds_types_and_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "interp_ablate"
    expected = [package / "py.typed", *package.rglob("*.pyi"), *package.rglob("*.py")]
    expected += [path for path in (package / "data").rglob("*") if path.is_file()]
    missing = [
        str(path.relative_to(ROOT))
        for path in expected
        if "__pycache__" not in path.parts and str(path.relative_to(ROOT)) not in names
    ]
    assert not missing, f"package-data in pyproject.toml leaves out {missing}"
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))]


def test_the_metadata_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    for line in ("Author: interp_ablate contributors", "License-Expression: Apache-2.0"):
        assert line in text, line
    assert text.count("Project-URL: ") >= 4 and text.count("Classifier: ") >= 5
    assert "Description-Content-Type: text/markdown" in text
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in text, extra


def test_the_installed_command_runs(installed: Path) -> None:
    where = run(installed / "python", "-c", "import interp_ablate; print(interp_ablate.__file__)")
    assert str(installed.parent) in where, "the checkout was imported, not the wheel"
    command = installed / "interp-ablate"
    version = ["interp-ablate", PROJECT["version"]]
    assert run(command, "--version").split() == version
    assert run(installed / "python", "-m", "interp_ablate", "--version").split() == version
    assert "certified checkpoint" in " ".join(run(command, "--help").split())
    assert "declining: 128 positive, 128 negative prompts" in run(command, "lint", "declining")
    assert "model.layers.{layer}.self_attn.o_proj.weight" in run(command, "models")


def test_the_makefile_installs_the_documentation_extra() -> None:
    """`make docs` names the packages itself: the extra would bring torch with the library."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"install .*-c constraints.txt (mkdocs.*)", makefile)
    listed = {word.strip("'") for word in line.split()}
    assert listed == {
        re.split(r"[<>=]", each)[0] for each in PROJECT["optional-dependencies"]["docs"]
    }


def test_the_versions_agree() -> None:
    from interp_ablate import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert __version__ == PROJECT["version"]
    assert f"\nversion: {__version__}\n" in citation
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_all_is_all() -> None:
    """The extra `all` names every extra that the library itself can use."""
    extras = PROJECT["optional-dependencies"]
    (line,) = extras["all"]
    named = set(re.findall(r"\[(.*)\]", line)[0].split(","))
    assert named == set(extras) - {"all", "demo", "test", "notebooks", "docs"}
