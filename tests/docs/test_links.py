"""Links lead somewhere: within the pages, from the README to the pages, and from the metadata.

What lies behind the project's own addresses is looked up in this folder, without a network. MkDocs checks the
pages' links once more when the site is built (`make docs`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SITE = "https://interp-ablate.github.io/interp-ablate/"
REPOSITORY = re.compile(
    r"https://(?:github\.com/interp-ablate/interp-ablate/(?:blob|tree)|"
    r"raw\.githubusercontent\.com/interp-ablate/interp-ablate)/main/([^#]*)"
)


def prose(path: Path) -> str:
    return re.sub(r"```.*?```", " ", path.read_text(encoding="utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def fault(page: Path, link: str) -> str | None:
    """Why a link leads nowhere; None where it leads somewhere, or to someone else's place."""
    target, _, anchor = link.partition("#")
    if in_repository := REPOSITORY.match(link):
        return None if (ROOT / in_repository[1]).exists() else "no such file in the repository"
    if link.startswith(SITE):
        name = target.removeprefix(SITE).strip("/") or "index"
        path = DOCS / f"{name}.md"
        if name == "api":  # made while the site is built
            return None
    elif re.match(r"\w+:", link):
        return None
    else:
        path = page if not target else (page.parent / target).resolve()
        if target.startswith("api/"):
            return None
    if not path.exists():
        return f"there is no {path.name}"
    if anchor and anchor not in anchors(path):
        return f"{path.name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    faults = [f"{link}: {why}" for link in LINK.findall(prose(page)) if (why := fault(page, link))]
    assert not faults, "\n".join(faults)


def test_a_broken_link_is_seen() -> None:
    readme = ROOT / "README.md"
    for link in (
        "docs/nowhere.md",
        "docs/glossary.md#nothing",
        f"{SITE}nowhere/",
        f"{SITE}method/#nothing",
        "https://github.com/interp-ablate/interp-ablate/blob/main/NOTHING.md",
    ):
        assert fault(readme, link), link
    assert fault(readme, f"{SITE}method/#search") is None


def test_the_readme_has_no_relative_link() -> None:
    """A package index shows the README by itself."""
    relative = [link for link in LINK.findall(prose(ROOT / "README.md")) if "://" not in link]
    assert not relative, f"give these with https://: {relative}"


def test_every_figure_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    unused = [path.name for path in (DOCS / "figures").glob("*.png") if path.name not in text]
    assert not unused, f"no page shows {unused}"


def test_files_named_in_the_architecture_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").split("## Every file")[0]
    text = re.sub(r"### From another package.*?(?=^## )", "", text, flags=re.S | re.M)
    named = [name for name in re.findall(r"`([\w/]+(?:\.pyi?|/))`", text) if name != "docs/"]
    missing = [
        name
        for name in named
        if not any((top / name).exists() for top in (ROOT, ROOT / "interp_ablate"))
    ]
    assert len(named) > 20 and not missing, f"docs/architecture.md names {missing}"
