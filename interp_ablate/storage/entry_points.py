"""Entry points: what other installed packages register under a group of this package.

A package adds, for instance, a scorer with three lines of its `pyproject.toml`:

    [project.entry-points."interp_ablate.scorers"]
    politeness = "my_package.politeness:PolitenessScorer"

Knows: how installed packages are asked what they register. Does not know: what a group's entries are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from interp_ablate.errors import InterpAblateError

Entry = TypeVar("Entry")


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


def entry_names(built_in: Mapping[str, Any], group: str) -> list[str]:
    """Every name of a table, and those that installed packages register besides."""
    return list(dict.fromkeys([*built_in, *entry_points_of(group)]))


def entry_named(
    name: str,
    built_in: Mapping[str, Entry],
    group: str,
    *,
    what: str,
    error: type[InterpAblateError],
    kind: type[Any] = object,
    advice: str = "",
) -> Entry:
    """The entry of this name in a table of this package, else the one that another package registers.

    Args:
        what: the thing that is named, for the messages.
        kind: the class of which another package's object must be an instance.
        advice: stands behind the accepted names where there is no such name.

    Raises:
        InterpAblateError: the package that registers it fails to load. As `error`: no such name, or an
            object of another class.
    """
    if name in built_in:
        return built_in[name]
    registered = entry_points_of(group).get(name)
    if registered is None:
        names = ", ".join(entry_names(built_in, group))
        raise error(f"unknown {what} {name!r}: accepted are {names}{advice}")
    entry = registered.load()
    if not isinstance(entry, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise error(
            f"the package {registered.package} registers {name!r} under {group} as "
            f"{registered.target}, a {type(entry).__name__}: {article} {kind.__name__} is needed"
        )
    return entry
