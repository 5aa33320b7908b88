"""What an editor and a type checker see of the public names: types and completions, not `Any`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SNIPPET = """
from interp_ablate import ContrastSet, collect, load_model
from interp_ablate.persona import load_trait

contrast = ContrastSet.load("declining")
model = load_model("smollm2")
reveal_type(load_model)
reveal_type(model)
reveal_type(collect(model, contrast))
reveal_type(load_trait("gloomy"))
"""


def test_a_type_checker_knows_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "snippet.py"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == 4, done.stdout + done.stderr
    assert not [
        line for line in revealed if "Any" in line.split("Revealed type is")[1].split("->")[-1]
    ]
    for line, name in zip(revealed, ("Model", "Model", "Activations", "Trait")):
        assert name in line, line


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("from interp_ablate import lo", {"load_model"}),
        ("from interp_ablate.export import export_", {"export_checkpoint", "export_lora"}),
        (
            "from interp_ablate import load_model\nmodel = load_model('smollm2')\nmodel.",
            {"applied", "generate", "logits", "writers"},
        ),
        ("import interp_ablate\ninterp_ablate.Contrast", {"ContrastSet"}),
    ],
)
def test_an_editor_completes(code: str, wanted: set[str]) -> None:
    jedi = pytest.importorskip("jedi")
    script = jedi.Script(code, project=jedi.Project(ROOT))
    names = {completion.name for completion in script.complete()}
    assert wanted <= names, f"of {sorted(wanted)} only {sorted(wanted & names)} are completed"
