"""The documentation is in plain English: short sentences, and a README that is a door."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST, MEAN, README_WORDS = 35, 18, 1200

# What is no prose: fenced code, comments, tables, headings, quotations, indented code.
NO_PROSE = re.compile(r"```.*?```|<!--.*?-->|^\s*[|#>].*?$|^    .*?$", flags=re.S | re.M)


def sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z`*])|\n\s*\n", NO_PROSE.sub(" ", text))
    return [" ".join(part.split()) for part in parts if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    prose = sentences(page.read_text(encoding="utf-8"))
    long = [part for part in prose if len(part.split()) > LONGEST]
    assert not long, f"over {LONGEST} words: {long}"
    mean = fmean(len(part.split()) for part in prose)
    assert mean <= MEAN, f"the mean sentence has {mean:.1f} words, at most {MEAN} are allowed"


def test_the_readme_is_a_door() -> None:
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= README_WORDS, f"{len(words)} words, at most {README_WORDS} are allowed"


def test_a_long_sentence_is_seen() -> None:
    text = (
        "Short one. "
        + "Word " * 40
        + ".\n\n    code "
        + "x " * 50
        + "\n\n| a | "
        + "b " * 50
        + "|\n"
    )
    assert [len(part.split()) > LONGEST for part in sentences(text)] == [False, True]
