"""The protocol of scorers: exchanges of prompt and answer go in, verdicts come out, and a spec makes a scorer.

Knows: the scale of scores, reversed scorers, the options in a spec such as `lexicon:length?half=30`. Does not
know: models, where exchanges come from, any one scorer.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable
from urllib.parse import parse_qsl

from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import with_bar
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.thoughts import split_thought


@dataclass(frozen=True)
class PromptResponse:
    """A prompt (with its system prompt, if any) and the answer that was given to it."""

    prompt: Prompt
    answer: str


@runtime_checkable
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
UNANSWERED = "no answer from the server"  # may be had another time: such verdicts are kept nowhere
AT_A_TIME = 16  # exchanges that are scored together, where a scorer has no other way


@dataclass(frozen=True)
class Verdict:
    """A scorer's verdict on one exchange."""

    score: float | None
    """From 0 to 100, or None."""
    why: str = ""
    """The reason why there is no score, in a few words that can be counted."""
    detail: Mapping[str, Any] = field(default_factory=dict)


class Server(Protocol):
    """A server that answers many questions at a time."""

    def stop(self) -> None:
        """End what other threads ask of it, with an error there."""
        ...


class ExplainingScorer(ABC):
    """A `TextScorer` that says why it has no verdict. An empty answer never has one."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]: ...

    @property
    def spent(self) -> str:
        """What the scores cost so far, for a person; "" where that is nothing."""
        return ""

    @property
    def server(self) -> Server | None:
        """The server that gives the verdicts, for which one waits: several threads may ask at a time."""
        return None

    @abstractmethod
    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """Verdicts on exchanges with answers that are not empty."""

    def judged_each(self, exchanges: Sequence[PromptResponse]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts of `judged` as they are ready, each with the number of its exchange."""
        for start in range(0, len(exchanges), AT_A_TIME):
            part = exchanges[start : start + AT_A_TIME]
            yield from enumerate(_checked(self, part, self.judged(part)), start)

    def explain_each(self, exchanges: Sequence[PromptResponse]) -> Iterator[tuple[int, Verdict]]:
        """A verdict an exchange as soon as it is there, with the exchange's number.

        A thought in front of an answer is not judged.

        Raises:
            InterpAblateError: the scorer itself fails; one exchange without a verdict is no failure.
        """
        numbers, asked = [], []
        for number, exchange in enumerate(exchanges):
            answer = split_thought(exchange.answer)[1]
            if answer.strip():
                numbers.append(number)
                asked.append(replace(exchange, answer=answer))
            else:
                yield number, Verdict(None, EMPTY)
        for place, verdict in with_bar(self.judged_each(asked), "scores", total=len(asked)):
            yield numbers[place], verdict

    def explain(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """The verdicts of `explain_each`, in the order of the exchanges."""
        verdicts = dict(self.explain_each(exchanges))
        return [verdicts[number] for number in range(len(exchanges))]

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

    @property
    def spent(self) -> str:
        return self.scorer.spent if isinstance(self.scorer, ExplainingScorer) else ""

    @property
    def server(self) -> Server | None:
        return self.scorer.server if isinstance(self.scorer, ExplainingScorer) else None

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        verdicts = dict(self.judged_each(exchanges))
        return [verdicts[number] for number in range(len(exchanges))]

    def judged_each(self, exchanges: Sequence[PromptResponse]) -> Iterator[tuple[int, Verdict]]:
        for number, v in verdicts_of(self.scorer, exchanges):
            score = None if v.score is None else 100 - v.score
            yield number, Verdict(score, v.why or ("no verdict" if score is None else ""), v.detail)


def verdicts_of(
    scorer: TextScorer, exchanges: Sequence[PromptResponse]
) -> Iterator[tuple[int, Verdict]]:
    """The verdicts of any scorer as they are ready, each with the number of its exchange."""
    if isinstance(scorer, ExplainingScorer):
        yield from scorer.explain_each(exchanges)
        return
    for start in range(0, len(exchanges), AT_A_TIME):
        part = exchanges[start : start + AT_A_TIME]
        for number, score in enumerate(_checked(scorer, part, scorer(part)), start):
            yield number, Verdict(score)


T = TypeVar("T")


def _checked(scorer: TextScorer, exchanges: Sequence[PromptResponse], values: list[T]) -> list[T]:
    if len(values) != len(exchanges):
        raise RunError(
            f"the scorer {scorer.name!r} gave {len(values)} scores for {len(exchanges)} answers: a scorer "
            "gives one number from 0 to 100, or None, an answer"
        )
    return values


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


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function must be given by place.

    Raises:
        TypeError, ValueError: something without a signature.
    """
    return [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]


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
