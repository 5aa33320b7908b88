"""Filter rules: each gives an answer of the assistant a number, and says which numbers match.

Knows: phrases, expression lists, scorers, projections and lengths as rules. Does not know: samples, files, or
what becomes of an answer that matches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from interp_ablate.datasets.conversations import Turn
from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import (
    ExplainingScorer,
    ScorerKind,
    Server,
    TextScorer,
    verdicts_of,
)
from interp_ablate.scoring.expressions import ExpressionScorer, expression_scorer
from interp_ablate.scoring.prefilter import expression_superset, phrase_patterns
from interp_ablate.scoring.refusals import LANGUAGES, REASONS, Reason, RefusalDetector
from interp_ablate.scoring.text_folding import fold

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction
    from interp_ablate.models.model import Model

_RARE = 8  # characters of a phrase's beginning that is rare by itself
_THEN = 10  # characters that are looked for behind others
_LONGEST_THEN = 3000
NO_PROMPT, EMPTY = "no prompt before the answer", "empty answer"


class RuleValue(NamedTuple):
    """The number that a rule gives an answer."""

    value: float | None
    """None where there is no verdict."""
    why: str = ""
    """The reason why there is no verdict."""
    phrases: tuple[tuple[str, str], ...] = ()
    """The phrases in the answer, each as (kind, phrase)."""


class Rule(Protocol):
    """Gives answers numbers, and says which numbers match."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON."""
        ...

    @property
    def match(self) -> dict[str, Any]:
        """Everything that matching depends on besides, as JSON."""
        ...

    @property
    def cost(self) -> int:
        """Rules are asked in the order of their cost."""
        ...

    @property
    def stored(self) -> bool:
        """True if the numbers are kept in the journal."""
        ...

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]: ...

    def matches(self, value: float) -> bool: ...


class PhraseRule:
    """Common part of rules that look for phrases: a number from 1 on matches."""

    match: dict[str, Any] = {}  # noqa: RUF012  (never written)
    cost, stored = 1, False

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        answers = [turn.answer for turn in turns]
        return [self._read(a) if a.strip() else RuleValue(None, EMPTY) for a in answers]

    def _read(self, text: str) -> RuleValue:
        raise NotImplementedError

    def patterns(self) -> tuple[str, ...] | None:
        """Patterns (see `Prefilter`) of which one is found in every answer whose number is not 0.

        None where nothing can be said of such an answer.
        """
        return None

    def matches(self, value: float) -> bool:
        return value >= 1


@dataclass(frozen=True)
class DeclineRule(PhraseRule):
    """The assistant declines, moralizes, or says that it is a language model, in its own words."""

    detector: RefusalDetector = field(default_factory=RefusalDetector)
    name: str = "declines"

    @property
    def identity(self) -> dict[str, Any]:
        patterns = json.dumps([asdict(pattern) for pattern in self.detector.patterns])
        return {
            "kind": "declines",
            "reasons": list(self.detector.reasons),
            "languages": list(self.detector.languages),
            "phrases": hashlib.sha256(patterns.encode()).hexdigest()[:16],
        }

    def _read(self, text: str) -> RuleValue:
        phrases = tuple((f"{m.reason} ({m.language})", m.phrase) for m in self.detector.find(text))
        return RuleValue(float(len(phrases)), phrases=phrases)

    def patterns(self) -> tuple[str, ...] | None:
        rare: dict[bool, list[str]] = {True: [], False: []}  # by whether a start begins a word
        common: list[str] = []
        for pattern in self.detector.patterns:
            spaced = pattern.language != "zh"
            short = [start for start in pattern.starts if spaced and len(start) < _RARE]
            then = expression_superset(pattern.then, _THEN, least=0) if short else None
            if then is None or len(then) > _LONGEST_THEN:
                short, then = [], ""
            common += [begin + then for begin in phrase_patterns(short, at_word=True)]
            rare[spaced] += [start for start in pattern.starts if start not in short]
        in_words = phrase_patterns(rare[False])
        return (*phrase_patterns(rare[True], at_word=True), *in_words, *common)


@dataclass(frozen=True)
class ExpressionRule(PhraseRule):
    """An answer holds a list's expressions, wherever in it (the scorer's scope) and whoever says them."""

    scorer: ExpressionScorer
    name: str = "expressions"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "expressions", **self.scorer.identity}

    @cached_property
    def _words(self) -> tuple[str, ...] | None:
        """Folded phrases of which a matching text holds one; None where patterns can match any text."""
        entries = self.scorer.identity["expressions"]
        if any(regex for _, _, _, regex in entries):
            return None  # `patterns` may know more
        return tuple(
            dict.fromkeys(fold(text).strip() for text, weight, _, _ in entries if weight > 0)
        )

    def _read(self, text: str) -> RuleValue:
        if self.scorer.own_speech and self._words is not None:
            folded = fold(text)  # before the words of others are left out, which takes longer
            if not any(word in folded for word in self._words):
                return RuleValue(0.0)
        found = self.scorer.counted(text)
        if not self.scorer.reached(math.fsum(each.weight for each in found)):
            return RuleValue(0.0)
        phrases = tuple(
            (f"{self.name} ({each.language})" if each.language else self.name, each.text)
            for each in found
        )
        return RuleValue(1.0, phrases=phrases)

    def patterns(self) -> tuple[str, ...] | None:
        entries = [each for each in self.scorer.identity["expressions"] if each[1] > 0]
        own_words = (
            self.scorer.own_speech
        )  # what is left of a text may match where the text did not
        regexes = [expression_superset(text) for text, _, _, regex in entries if regex]
        if None in regexes or (regexes and own_words):
            return None
        phrases = (fold(text).strip() for text, _, _, regex in entries if not regex)
        return (*phrase_patterns(phrases), *(each for each in regexes if each is not None))


@dataclass(frozen=True)
class _Limits:
    """Numbers above one limit or below another match."""

    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.above, self.below) if limit is not None]
        if not limits or any(limit != limit for limit in limits):
            raise RunError(
                f"{self.name}: say which numbers match: above a limit (--above), or below one"
            )

    @property
    def name(self) -> str:
        return "limits"

    @property
    def match(self) -> dict[str, Any]:
        return {"above": self.above, "below": self.below}

    def matches(self, value: float) -> bool:
        over = self.above is not None and value > self.above
        return over or (self.below is not None and value < self.below)


@dataclass(frozen=True, kw_only=True)
class ScoreRule(_Limits):
    """A scorer's number, from 0 to 100, is above or below a limit."""

    scorer: TextScorer
    cost: int = 5
    stored: bool = True
    """False for a scorer that costs nothing: its numbers are not kept in the journal."""

    @property
    def name(self) -> str:
        return self.scorer.name

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "score", **self.scorer.identity}

    @property
    def server(self) -> Server | None:
        """The server that gives the numbers, if one does."""
        return self.scorer.server if isinstance(self.scorer, ExplainingScorer) else None

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        values = dict(self.read_each(turns))
        return [values[number] for number in range(len(turns))]

    def read_each(self, turns: Sequence[Turn]) -> Iterator[tuple[int, RuleValue]]:
        """The values as they are ready, each with the number of its turn; a turn without a prompt has none."""
        asked = [number for number, turn in enumerate(turns) if turn.is_asked]
        rest = [number for number, turn in enumerate(turns) if not turn.is_asked]
        yield from ((number, RuleValue(None, NO_PROMPT)) for number in rest)
        for place, v in verdicts_of(self.scorer, [turns[number].exchange for number in asked]):
            yield asked[place], RuleValue(v.score, v.why)


@dataclass(frozen=True, kw_only=True)
class ProjectionRule(_Limits):
    """The mean projection of an answer's tokens on a direction is above or below a limit.

    In the units of the activations at the direction's site (see `project_responses`).
    """

    model: Model
    direction: Direction
    cost: int = 4
    stored: bool = True

    def __post_init__(self) -> None:
        from interp_ablate.directions.direction import as_direction
        from interp_ablate.models.model import check_model

        check_model(self.model)
        width = len(as_direction(self.direction).vector)
        super().__post_init__()
        if width != self.model.d_model:
            raise RunError(
                f"the direction at {self.direction.site} has {width} components, the model's residual "
                f"stream {self.model.d_model}: it is of another model"
            )

    @property
    def name(self) -> str:
        return f"projection:{self.direction.site}"

    @property
    def identity(self) -> dict[str, Any]:
        from interp_ablate.models.rendering import rendering

        return {
            "kind": "projection",
            "model": self.model.fingerprint,
            "rendering": rendering(self.model),
            "direction": self.direction.fingerprint,
        }

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        """The values of turns; a turn without a prompt has none."""
        from interp_ablate.activations.pooling import project_responses

        exchanges = [turn.exchange for turn in turns if turn.is_asked]
        values = iter(project_responses(self.model, exchanges, self.direction))
        return [
            RuleValue(next(values)) if turn.is_asked else RuleValue(None, NO_PROMPT)
            for turn in turns
        ]


@dataclass(frozen=True)
class LengthRule(_Limits):
    """An answer has more or fewer characters than a limit."""

    name: str = "characters"  # type: ignore[misc]
    cost: int = 0
    stored: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "characters"}

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        return [RuleValue(float(len(turn.answer))) for turn in turns]


# ---- rules from flags ------------------------------------------------------------------------------


def expression_rule(name: str, languages: Sequence[str] = ()) -> Rule:
    """The rule that a name or file stands for: one of REASONS, a bundled list, or a list of one's own.

    Args:
        languages: those of the list to look for; by default all of them.

    Raises:
        InterpAblateError: no such list or language, an unreadable file.
    """
    if name in REASONS:
        return decline_rule((name,), languages)  # type: ignore[arg-type]
    return ExpressionRule(expression_scorer(name, languages=languages or ("all",)), Path(name).stem)


def decline_rule(reasons: Iterable[Reason] = REASONS, languages: Sequence[str] = ()) -> DeclineRule:
    """`DeclineRule` for some reasons and languages (by default all)."""
    chosen = tuple(reasons)
    name = "declines" if chosen == REASONS else "+".join(chosen)
    return DeclineRule(RefusalDetector(chosen, tuple(languages) or LANGUAGES), name)


def score_rule(
    spec: str,
    *,
    above: float | None = None,
    below: float | None = None,
    rubric: str | None = None,
    cache: str | Path | None = None,
    endpoint: Mapping[str, Any] | None = None,
) -> ScoreRule:
    """The rule of a scorer that a line of text names (see `make_scorer`).

    Raises:
        RunError: no such scorer, no limit.
    """
    from interp_ablate.scoring.registry import make_scorer, scorer_kind

    scorer = make_scorer(spec, rubric=rubric, cache=cache, endpoint=endpoint)
    kind = scorer_kind(spec.partition(":")[0])
    cost = kind.cost if kind else ScorerKind.cost
    return ScoreRule(above=above, below=below, scorer=scorer, cost=cost, stored=cost > 2)


def direction_at(place: str) -> Direction:
    """The direction of a persona folder that reads text, or of a directions file (`FILE#SITE` for one of several).

    Raises:
        InterpAblateError: nothing that can be read there, or several directions.
    """
    from interp_ablate.directions.direction_set import Directions

    if Path(place).is_dir():
        from interp_ablate.persona.persona import load_persona

        return load_persona(place).readout_direction
    path, _, site = place.partition("#")
    directions = Directions.load(path)
    if site:
        return directions[site]
    if len(directions) != 1:
        sites = ", ".join(sorted({str(item.site) for item in directions})[:4])
        raise RunError(
            f"{path} holds {len(directions)} directions: name one as {path}#SITE, such as {sites}"
        )
    return next(iter(directions))
