"""Filter rules: what is read off an assistant's answer, and which readings match.

Knows: phrases, expression lists, scorers, projections on a direction and lengths as rules, and rules from
lines of text. Does not know: samples, files, or what becomes of an answer that matches (`filtering`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from interp_ablate.datasets.conversations import Turn
from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import PromptResponse, TextScorer
from interp_ablate.scoring.expressions import ExpressionScorer, expression_scorer
from interp_ablate.scoring.refusals import LANGUAGES, REASONS, Reason, RefusalDetector
from interp_ablate.scoring.scorer_kind import ScorerKind
from interp_ablate.scoring.text_folding import fold

if TYPE_CHECKING:
    from interp_ablate.directions.direction import Direction
    from interp_ablate.models.model import Model

NO_PROMPT, EMPTY = "no prompt before the answer", "empty answer"


class RuleValue(NamedTuple):
    """What a rule read off an answer.

    `value` is None where there is no verdict, and `why` then says why; `found` are phrases with their kind.
    """

    value: float | None
    why: str = ""
    found: tuple[tuple[str, str], ...] = ()


class Rule(Protocol):
    """Reads a number off answers, and says which numbers match.

    `identity` is what the numbers depend on, as JSON, `match` what matching depends on beside it. Numbers of
    a rule that is `stored` are kept in the journal. Rules are asked in the order of their `cost`.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def match(self) -> dict[str, Any]: ...

    @property
    def cost(self) -> int: ...

    @property
    def stored(self) -> bool: ...

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]: ...

    def hits(self, value: float) -> bool: ...


class _Phrases:
    """What rules share that find phrases: a number from 1 on is a match."""

    match: dict[str, Any] = {}  # noqa: RUF012  (never written)
    cost, stored = 1, False

    def hits(self, value: float) -> bool:
        return value >= 1


@dataclass(frozen=True)
class DeclineRule(_Phrases):
    """The assistant declines, moralizes, or says that it is a language model, in its own words."""

    declines: RefusalDetector = field(default_factory=RefusalDetector)
    name: str = "declines"

    @property
    def identity(self) -> dict[str, Any]:
        found = hashlib.sha256(json.dumps([asdict(c) for c in self.declines.patterns]).encode())
        return {
            "kind": "declines",
            "reasons": list(self.declines.reasons),
            "languages": list(self.declines.languages),
            "phrases": found.hexdigest()[:16],
        }

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        return [self._read(turn.answer) for turn in turns]

    def _read(self, text: str) -> RuleValue:
        if not text.strip():
            return RuleValue(None, EMPTY)
        found = tuple((f"{f.reason} ({f.language})", f.phrase) for f in self.declines.find(text))
        return RuleValue(float(len(found)), found=found)


@dataclass(frozen=True)
class ExpressionRule(_Phrases):
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
            return None
        return tuple(
            dict.fromkeys(fold(text).strip() for text, weight, _, _ in entries if weight > 0)
        )

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        return [self._read(turn.answer) for turn in turns]

    def _read(self, text: str) -> RuleValue:
        if not text.strip():
            return RuleValue(None, EMPTY)
        if self._words is not None:
            folded = fold(text)
            if not any(word in folded for word in self._words):
                return RuleValue(0.0)
        if self.scorer.outcome(text) != "expressed":
            return RuleValue(0.0)
        found = tuple(
            (f"{self.name} ({m.language})" if m.language else self.name, m.expression)
            for m in self.scorer.matches(text)
        )
        return RuleValue(1.0, found=found)


@dataclass(frozen=True)
class _Limits:
    """Numbers above one limit or below another match."""

    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.above, self.below) if limit is not None]
        if not given or any(limit != limit for limit in given):
            raise RunError(
                f"{self.name}: say which numbers match: above a limit (--above), or below one"
            )

    @property
    def name(self) -> str:
        return "limits"

    @property
    def match(self) -> dict[str, Any]:
        return {"above": self.above, "below": self.below}

    def hits(self, value: float) -> bool:
        over = self.above is not None and value > self.above
        return over or (self.below is not None and value < self.below)


@dataclass(frozen=True, kw_only=True)
class ScoreRule(_Limits):
    """A scorer's number, from 0 to 100, is above or below a limit.

    Args:
        stored: whether numbers are kept in the journal; False for a scorer that costs nothing.
    """

    scorer: TextScorer
    cost: int = 5
    stored: bool = True

    @property
    def name(self) -> str:
        return self.scorer.name

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "score", **self.scorer.identity}

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        return _asked(turns, self._ask)

    def _ask(self, exchanges: Sequence[PromptResponse]) -> list[RuleValue]:
        from interp_ablate.scoring.verdicts import ExplainingScorer

        if isinstance(self.scorer, ExplainingScorer):
            return [RuleValue(v.score, v.why) for v in self.scorer.explain(exchanges)]
        return [RuleValue(score) for score in self.scorer(exchanges)]


@dataclass(frozen=True, kw_only=True)
class ProjectionRule(_Limits):
    """The mean projection of an answer's tokens on a direction is above or below a limit.

    In the units of the activations at the direction's site (`screening.project_responses`).
    """

    model: Model
    direction: Direction
    cost: int = 4
    stored: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        width = len(self.direction.vector)
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
        return {
            "kind": "projection",
            "model": self.model.fingerprint,
            "template": self.model.template,
            "direction": self.direction.fingerprint,
        }

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        return _asked(turns, self._ask)

    def _ask(self, exchanges: Sequence[PromptResponse]) -> list[RuleValue]:
        from interp_ablate.activations.projections import project_responses

        return [
            RuleValue(value) for value in project_responses(self.model, exchanges, self.direction)
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


def _asked(
    turns: Sequence[Turn], ask: Callable[[Sequence[PromptResponse]], list[RuleValue]]
) -> list[RuleValue]:
    """Readings of turns; those that have no prompt cannot be asked about."""
    there = [bool((turn.prompt or "").strip()) for turn in turns]
    exchanges = [turn.exchange for turn, yes in zip(turns, there) if yes]
    found = iter(ask(exchanges) if exchanges else ())
    return [next(found) if yes else RuleValue(None, NO_PROMPT) for yes in there]


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
) -> ScoreRule:
    """A rule from a scorer's line of text (see `judges.scorer_of`).

    Raises:
        RunError: no such scorer, no limit.
    """
    from interp_ablate.scoring.registry import make_scorer, scorer_kind

    scorer = make_scorer(spec, rubric=rubric, cache=cache)
    kind = scorer_kind(spec.partition(":")[0])
    cost = kind.cost if kind else ScorerKind.cost
    return ScoreRule(above=above, below=below, scorer=scorer, cost=cost, stored=cost > 2)


def direction_at(place: str) -> Direction:
    """A persona folder's direction for reading text, or that of a directions file (`FILE#SITE` where it has several).

    Raises:
        InterpAblateError: nothing that can be read there, or several directions.
    """
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.sites import Site

    if Path(place).is_dir():
        from interp_ablate.persona.persona import load_persona

        return load_persona(place).readout_direction
    path, _, site = place.partition("#")
    found = Directions.load(path)
    if site:
        return found[Site.parse(site)]
    if len(found) != 1:
        known = ", ".join(sorted({str(item.site) for item in found})[:4])
        raise RunError(
            f"{path} holds {len(found)} directions: name one as {path}#SITE, such as {known}"
        )
    return next(iter(found))
