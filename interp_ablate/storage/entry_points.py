"""Entry points: what other installed packages register under a group of this package.

A package adds, for instance, a scorer with three lines of its `pyproject.toml`:

    [project.entry-points."interp_ablate.scorers"]
    politeness = "my_package.politeness:PolitenessScorer"

Knows: how installed packages are asked what they register. Does not know: what a group's entries are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from interp_ablate.errors import InterpAblateError


@dataclass(frozen=True)
class RegisteredEntry:
    """One name that an installed package registers; nothing of that package is imported before `load`."""

    name: str
    group: str
    target: str
    """The object, as `module:attribute`."""
    package: str
    """The distribution that registers it."""
    _entry: metadata.EntryPoint

    def load(self) -> Any:
        """Import the object.

        Raises:
            InterpAblateError: the import fails, with the package's name and the reason.
        """
        try:
            return self._entry.load()
        except Exception as error:  # an import of another package may raise anything
            raise InterpAblateError(
                f"the package {self.package} registers {self.name!r} under {self.group} as "
                f"{self.target}, which fails to load: {type(error).__name__}: {error}. "
                f"Update {self.package}, or uninstall it"
            ) from error


def entry_points_of(group: str) -> dict[str, RegisteredEntry]:
    """The entries that installed packages register under a group, by name.

    Raises:
        InterpAblateError: two packages register the same name.
    """
    entries: dict[str, RegisteredEntry] = {}
    for entry in metadata.entry_points(group=group):
        package = entry.dist.name if entry.dist else "an unnamed package"
        other = entries.get(entry.name)
        if other is not None and (other.package, other.target) != (package, entry.value):
            raise InterpAblateError(
                f"{other.package} and {package} both register {entry.name!r} under {group}: "
                "uninstall one of them"
            )
        entries[entry.name] = RegisteredEntry(entry.name, group, entry.value, package, entry)
    return entries
