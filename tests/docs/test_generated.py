"""The parts of the pages that are made from the code are what the code makes, and every wing has its pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402


@pytest.mark.parametrize("page", generated.PARTS)
def test_pages_show_what_the_code_is(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert generated.with_parts(page) == text, f"docs/{page} is out of date: run `make pages`"


def test_every_wing_has_its_storey_and_its_reference_page() -> None:
    wings = {path.parent.name for path in generated.PACKAGE.glob("*/__init__.py")}
    assert set(generated.wings()) == wings, "STOREYS in docs/generated.py"
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [wing for wing in wings if f"api/{wing}.md" not in config]
    assert not missing, f"mkdocs.yml has no reference page of {missing}"


def test_a_page_without_the_comments_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generated.PARTS, "glossary.md", {"files": generated.files})
    with pytest.raises(ValueError, match=r"docs/glossary.md lacks the comments"):
        generated.with_parts("glossary.md")


def test_the_page_of_the_league_is_made_of_its_file() -> None:
    from interp_ablate.league.page import page
    from interp_ablate.league.saved_results import read_results

    made = page(read_results(ROOT / "docs" / "league.json"), figure="figures/league.png")
    assert (ROOT / "docs" / "league.md").read_text(encoding="utf-8") == made, (
        "run `interp-ablate league --from docs/league.json --page docs/league.md`"
    )


def test_the_readme_says_how_many_types_are_exact() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = page.split("<!-- generated: exact -->")[1].split("<!--")[0].splitlines()
    exact = {row.split("|")[1].strip() for row in rows if row.startswith("| ")} - {"model type"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{len(exact)} model types](" in readme, f"{len(exact)} types are exact"
