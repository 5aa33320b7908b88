"""The code in the documentation runs: docs/coming_from.md on a tiny model, the README's on the real one."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tiny import make

import interp_ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse

ROOT = Path(__file__).parents[2]


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_every_snippet_of_coming_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(eos_token_id=None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interp_ablate, "load_model", lambda name: model)
    namespace: dict[str, Any] = {}
    blocks = snippets("docs/coming_from.md")
    assert len(blocks) == 7
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/coming_from.md, snippet {number + 1}", "exec"), namespace)
    assert namespace["certificate"]["passed"] and (tmp_path / "edited" / "config.json").is_file()
    assert len(namespace["answers"]) == 8 and len(namespace["again"]) == len(namespace["vectors"])
    assert Plan.load(tmp_path / "plan.json") == namespace["everywhere"]
    scores = namespace["Shouting"]()([PromptResponse(Prompt("a"), t) for t in ("AB c", "", "ok")])
    assert scores == [pytest.approx(200 / 3), None, 0.0]


def test_the_tables_of_coming_from_name_what_there_is() -> None:
    """Every name of ours in the right-hand column of a table exists."""
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    modules = [
        "edits", "sites", "scoring", "scoring.registry", "scoring.expressions", "directions",
        "export", "export.hub", "edits.plan",
    ]  # fmt: skip
    places = [interp_ablate, *(import_module(f"interp_ablate.{name}") for name in modules)]
    ours = {
        name
        for line in text.splitlines()
        if line.startswith("| ") and line.count("|") >= 3
        for name in re.findall(r"\b([a-zA-Z_]{4,})\(", line.rsplit(" | ", 1)[1])
    } - {
        "applied", "applied_each", "generate", "encode", "split", "load", "report", "score_texts",
        "__call__", "range",
    }  # fmt: skip
    assert len(ours) > 15
    for name in ours:
        assert any(name in dir(place) for place in places), name


def test_the_gallery_draws_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "plots")
    import_module("test_plots").make_run(tmp_path / "runs" / "declining")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    of_a_run = [block for block in blocks if "run" in block and "runs/" not in block]
    assert len(of_a_run) >= 6 and "plt.subplots()" in blocks[0]
    for block in of_a_run:
        namespace: dict[str, Any] = {}
        exec(compile(blocks[0], "docs/gallery.md, the shared lines", "exec"), namespace)
        exec(compile(block, "docs/gallery.md", "exec"), namespace)
        ax = namespace["ax"]
        assert ax.has_data() or ax.images, block
        namespace["plt"].close("all")


@pytest.mark.slow
def test_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = snippets("README.md")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- snippet:start -->")[1].split("```")[3].strip().splitlines()
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    assert [line.strip() for line in printed] == [line.strip() for line in shown]
    assert "I'm sorry" in printed[0] and "sorry" not in printed[1]


def test_the_error_messages_on_the_page_are_the_codes() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").split("## Common ones")[1]
    source = " ".join(
        " ".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")).split())
        for path in (ROOT / "interp_ablate").rglob("*.py")
    )
    phrases = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(phrases) >= 8
    for phrase in phrases:
        for part in phrase.split(" ... "):
            assert part in source, f"no error says {phrase!r}"


@pytest.mark.parametrize("page", ["run_folder", "persona", "recovery", "filter"])
def test_files_that_a_page_names_are_files_that_are_written(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    names = set(
        re.findall(r"`(?:figures/)?([a-z_]+\.(?:jsonl?|csv|html|png|safetensors|yaml))`", rows)
    )
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "interp_ablate").rglob("*.py"))
    missing = [name for name in names if name not in source]
    assert names and not missing, f"docs/{page}.md names {missing}"
