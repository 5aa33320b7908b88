"""Kinds of scorers: how a spec such as `lexicon:length?half=30` becomes a scorer.

Knows: the options in a spec. Does not know: any one scorer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl

from interp_ablate.errors import RunError
from interp_ablate.scoring.verdicts import ExplainingScorer


@dataclass(frozen=True)
class ScorerKind:
    """One kind of scorer. Its name is the key in `registry.SCORERS`, or that of an entry point."""

    make: Callable[[str, dict[str, Any]], ExplainingScorer]
    """Makes the scorer from the text behind the colon and the options that were given."""
    form: str
    """The spec as error messages show it, such as `lexicon:MEASURE`."""
    options: tuple[str, ...] = ()
    """The options that `make` reads, besides those of `make_scorer` (rubric, cache, endpoint)."""
    query: Literal["options", "url", "none"] = "options"
    """A `?` in the spec starts options; or the query of a URL, which may hold options; or is part of a name."""
    cost: int = 5
    """Filters ask cheap rules first. Scores of a kind that costs more than 2 are kept on disk."""

    def split(self, text: str) -> tuple[str, dict[str, Any]]:
        """The name in the text behind the colon, and the options in its query.

        Raises:
            RunError: an option that this kind does not have.
        """
        name, mark, query = text.partition("?")
        if self.query == "none":
            return text, {}
        if self.query == "url":
            parts = [part.partition("=") for part in query.split("&")]
            options = {key: value for key, _, value in parts if key in self.options}
            rest = "&".join("".join(part) for part in parts if part[0] not in options)
            return (f"{name}{mark}{rest}" if rest else name), options
        try:
            options = dict(parse_qsl(query, strict_parsing=bool(mark)))
        except ValueError:
            options = {query: ""}
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            accepted = ", ".join(f"{option}=..." for option in self.options) or "none"
            raise RunError(
                f"{self.form.partition(':')[0]}:{text}: no option {', '.join(unknown)}; there are "
                f"{accepted}, joined by &"
            )
        return name, options


def as_flag(value: Any) -> bool:
    """An option that is true or false.

    Raises:
        RunError: any other value.
    """
    flags = {"true": True, "1": True, "false": False, "0": False}
    if str(value).casefold() not in flags:
        raise RunError(f"expected true or false; got {value!r}")
    return flags[str(value).casefold()]


def as_number(name: str, value: Any) -> float:
    """An option that is a number.

    Raises:
        RunError: any other value.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RunError(f"{name} is a number; got {value!r}") from error
