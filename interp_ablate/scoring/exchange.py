"""The protocol of scorers: exchanges of prompt and answer go in, verdicts come out, and a spec makes a scorer.

Knows: the scale of scores, reversed scorers, the options in a spec such as `lexicon:length?half=30`. Does not
know: models, where exchanges come from, any one scorer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl

from interp_ablate.errors import RunError
from interp_ablate.prompts.prompt import Prompt


@dataclass(frozen=True)
class PromptResponse:
    """A prompt (with its system prompt, if any) and the answer that was given to it."""

    prompt: Prompt
    answer: str


class TextScorer(Protocol):
    """Scores exchanges from 0 (the trait is absent) to 100 (it is strong); None where there is no verdict."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the score depends on, as JSON. It keys caches and goes into manifests."""
        ...

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]: ...


EMPTY = "empty answer"


@dataclass(frozen=True)
class Verdict:
    """A scorer's verdict on one exchange."""

    score: float | None
    """From 0 to 100, or None."""
    why: str = ""
    """The reason why there is no score, in a few words that can be counted."""
    detail: Mapping[str, Any] = field(default_factory=dict)


class ExplainingScorer(ABC):
    """A `TextScorer` that says why it has no verdict. An empty answer never has one."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]: ...

    @abstractmethod
    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """Verdicts on exchanges with answers that are not empty."""

    def explain(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """A verdict an exchange, in order.

        Raises:
            InterpAblateError: the scorer itself fails; one exchange without a verdict is no failure.
        """
        asked = [exchange for exchange in exchanges if exchange.answer.strip()]
        verdicts = iter(self.judged(asked)) if asked else iter(())
        return [next(verdicts) if e.answer.strip() else Verdict(None, EMPTY) for e in exchanges]

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        return [verdict.score for verdict in self.explain(exchanges)]


@dataclass(frozen=True)
class ReversedScorer(ExplainingScorer):
    """100 minus another's score; no verdict stays none."""

    scorer: TextScorer

    @property
    def name(self) -> str:
        return f"-{self.scorer.name}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"reversed": self.scorer.identity}

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        if isinstance(self.scorer, ExplainingScorer):
            verdicts = self.scorer.explain(exchanges)
        else:
            verdicts = [
                Verdict(score, "" if score is not None else "no verdict")
                for score in self.scorer(exchanges)
            ]
        return [
            Verdict(None if v.score is None else 100 - v.score, v.why, v.detail) for v in verdicts
        ]


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
