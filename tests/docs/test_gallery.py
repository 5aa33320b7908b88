"""docs/gallery.md shows every plot that the package has, and each picture that it shows is there."""

from __future__ import annotations

import re
from pathlib import Path

from interp_ablate import plots

DOCS = Path(__file__).parents[2] / "docs"
NO_PLOTS = {"new_figure", "save_figure", "RUN_FIGURES"}


def test_the_gallery_has_every_plot() -> None:
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert not set(plots.__all__) - NO_PLOTS - set(re.findall(r"\w+", text))
    shown = re.findall(r"\(figures/([\w.]+)\)", text)
    assert shown and not [name for name in shown if not (DOCS / "figures" / name).is_file()]
