"""Versions and hashes that recreate an artefact.

Knows: package versions. Does not know: what was made.
"""

from __future__ import annotations

import platform
from importlib import metadata

# An export's own files, beside its card.
MANIFEST = "interp_ablate.json"
PACKAGES = ("interp-ablate", "torch", "transformers", "transformer-lens", "safetensors", "numpy")


def versions(*more: str) -> dict[str, str]:
    """Versions of what computed a result, `more` packages too; one that is not installed is left out."""
    installed = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
