"""Files that come with the package: contrast sets, traits, expression lists, texts, templates.

Knows: the package's data folder. Does not know: what a file holds.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled(*parts: str) -> Path:
    """Path of a file or folder below the package's `data/`; `bundled("traits", "gloomy.json")`."""
    return Path(str(resources.files("interp_ablate"))).joinpath("data", *parts)
