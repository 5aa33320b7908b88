"""Versions and hashes that recreate an artefact.

Knows: package versions. Does not know: what was made.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from interp_ablate.storage.atomic_files import hash_file

# An export's own files, beside its card.
MANIFEST = "interp_ablate.json"
WEIGHTS = (".safetensors", ".gguf")
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


def machine() -> dict[str, Any]:
    """What beside versions decides the last bits of a computation: system, processor, threads."""
    import torch

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def weight_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights in a folder, by its name there; each is read once.

    Raises:
        OSError: a file that cannot be read.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in WEIGHTS and path.is_file():
            digest = hashlib.sha256()
            hash_file(digest, path)
            digests[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return digests
