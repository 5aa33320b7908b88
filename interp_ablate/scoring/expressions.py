"""Expressions: phrases and regular expressions by which text shows a behaviour, in many languages.

Knows: weights, negation, the first sentence, which expression matched where, and how matches become a verdict.
Does not know: models, prompts, or the scales of other scorers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from interp_ablate.errors import InterpAblateError
from interp_ablate.scoring.exchange import (
    ExplainingScorer,
    PromptResponse,
    ScorerKind,
    Verdict,
    as_flag,
    as_number,
)
from interp_ablate.scoring.expression_lists import (
    DEFAULT_EXPRESSIONS,
    EXPRESSIONS_OF_CONTRAST,
    Expression,
    Scope,
    bundled_expressions,
    chosen_languages,
    expression_names,
    expression_pattern,
    read_expressions,
)
from interp_ablate.scoring.text_folding import (
    first_sentence,
    fold,
    fold_with_places,
    strip_quoted_speech,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


Outcome = Literal["expressed", "not expressed", "empty"]


# ---- negation ------------------------------------------------------------------------------------

# Words that deny what follows within the clause. Japanese denies behind the verb: nothing is looked for.
_NEGATORS: dict[str, str] = {
    "en": r"\b(?:not|never|cannot|without|hardly|scarcely|rarely|neither|nor)\b|n't\b",
    "es": r"\b(?:no|nunca|jamás|sin|tampoco|ni|apenas)\b",
    "de": r"\b(?:nicht|nie|niemals|kein|keine|keinen|keinem|keiner|keines|ohne|kaum|weder)\b",
    "fr": r"\b(?:pas|jamais|sans|aucun|aucune|guère|nullement)\b",
    "it": r"\b(?:non|mai|senza|né|nessun|nessuna|neanche)\b",
    "pt": r"\b(?:não|nunca|jamais|sem|nem|nenhum|nenhuma)\b",
    "zh": "不是|并非|並非|不|没|沒|从未|從未|绝非|絕非",
    "ru": r"\b(?:не|нет|никогда|без|ни|вовсе не)\b",
    "nl": r"\b(?:niet|nooit|geen|zonder|nauwelijks|noch)\b",
}
_CLAUSE_END = re.compile(r"[.,;:!?\u2026()\"\u3001\u3002\u2014]| - ")
_WITHIN = 2  # words between a negator and what it denies (characters, where there are no spaces)


@cache
def _negator(language: str) -> re.Pattern[str] | None:
    """A pattern that finds a negator near the end of a clause; None for a language that has none."""
    words = _NEGATORS.get(language or "en")
    if words is None:
        return None
    between = rf".{{0,{_WITHIN}}}" if language == "zh" else rf"(?:\s+\S+){{0,{_WITHIN}}}\s*"
    return re.compile(rf"(?:{words}){between}$")


# ---- the scorer ----------------------------------------------------------------------------------


class HasTexts(Protocol):
    """Outputs of a model, as far as expressions need them."""

    @property
    def texts(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Match:
    """One place of a text where an expression occurs."""

    expression: str
    start: int
    """First character in the folded text."""
    end: int
    """Character behind the last one, in the folded text."""
    place: tuple[int, int] = (0, 0)
    """The same two, in the original text."""
    weight: float = 1.0
    language: str = ""
    negated: bool = False
    counts: bool = True
    """False where it is negated, and where the same expression was counted before."""


@dataclass(frozen=True)
class ExpressionScorer:
    """Scores text 1.0 where it holds any of some expressions, else 0.0.

    Args:
        expressions: a bundled list's name, or phrases and `Expression`s; case, apostrophes and spaces are
            folded, and a phrase matches at word boundaries (anywhere, in scripts without spaces).
        patterns: regular expressions, searched in the folded text.
        languages: languages of a bundled list, or of own expressions that name theirs; () is the list's
            default (all own ones), ("all",) every one.
        scope: the part that is searched: the whole text, or its first sentence.
        negation: an expression that a negator of its language precedes, at most two words off in the same
            clause, does not count ("it is not that I can't"). Off by default.
        own_speech: code, quotations, dialogue, scripts and letters in the text do not count (see
            `strip_quoted_speech`). Off by default.
        threshold: text expresses the behaviour from this sum of weights on.

    Raises:
        InterpAblateError: an unknown list, language or scope, no expression at all, one that is not text, a
            weight that cannot be, a malformed regular expression.
    """

    expressions: str | tuple[str | Expression, ...] = DEFAULT_EXPRESSIONS
    patterns: tuple[str, ...] = ()
    name: str = "expression_rate"
    languages: tuple[str, ...] = field(default=(), kw_only=True)
    scope: Scope = field(default="whole", kw_only=True)
    negation: bool = field(default=False, kw_only=True)
    threshold: float = field(default=1.0, kw_only=True)
    own_speech: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise InterpAblateError(f"scope is {' or '.join(get_args(Scope))}; got {self.scope!r}")
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise InterpAblateError(
                f"threshold is a sum of weights above 0; got {self.threshold!r}"
            )
        self._compiled  # noqa: B018  (malformed input fails here, not in the middle of a sweep)

    @property
    def label(self) -> str:
        """The list's name, or "own"."""
        return self.expressions if isinstance(self.expressions, str) else "own"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything a score depends on, as JSON."""
        return {
            "expressions": [[e.text, e.weight, e.language, e.regex] for e, _ in self._compiled],
            "scope": self.scope,
            "negation": self.negation,
            "threshold": self.threshold,
            **({"own_speech": True} if self.own_speech else {}),
        }

    @cached_property
    def _compiled(self) -> list[tuple[Expression, re.Pattern[str]]]:
        if isinstance(self.expressions, str):
            chosen = bundled_expressions(self.expressions, self.languages)
        else:
            chosen = self._own()
        _check_texts("patterns", self.patterns, str)
        chosen += tuple(Expression(pattern, regex=True) for pattern in self.patterns)
        compiled = [
            (each, expression_pattern(each)) for each in chosen if each.regex or each.text.strip()
        ]
        if not compiled:
            raise InterpAblateError("an ExpressionScorer needs at least one expression or pattern")
        if not any(each.weight > 0 for each, _ in compiled):
            raise InterpAblateError("no expression has a weight above 0: nothing would ever count")
        return compiled

    def _own(self) -> tuple[Expression, ...]:
        """The caller's own expressions, in the languages that are wanted."""
        own = self.expressions
        _check_texts("expressions", own, (str, Expression))
        every = tuple(each if isinstance(each, Expression) else Expression(each) for each in own)  # type: ignore[arg-type]
        available = sorted({each.language for each in every} - {""})
        wanted = chosen_languages(self.languages, available, "the list")
        return tuple(e for e in every if not wanted or e.language in wanted or not e.language)

    # ---- one text

    def counted(self, text: str) -> list[Expression]:
        """The expressions that occur and are not negated, each once, in the order of the list."""
        folded = fold(self._scoped(text))
        return [
            each
            for each, pattern in self._candidates(folded)
            if any(not negated for _, _, negated in self._places(folded, each, pattern))
        ]

    def strength(self, text: str) -> float:
        """The sum of the weights of the expressions that occur and are not negated, each once."""
        return math.fsum(each.weight for each in self.counted(text))

    def outcome(self, text: str) -> Outcome:
        """The behaviour is expressed or not; a text of nothing but spaces is "empty"."""
        if not text.strip():
            return "empty"
        return "expressed" if self.reached(self.strength(text)) else "not expressed"

    def matches(self, text: str) -> list[Match]:
        """Every expression that occurs and is not negated, with the first place that counts."""
        return [match for match in self.all_matches(text) if match.counts]

    def all_matches(self, text: str) -> list[Match]:
        """Every place of every expression, in the order of the list; negated and repeated ones too."""
        scoped = self._scoped(text)
        folded = fold(scoped)
        matches: list[Match] = []
        places: list[tuple[int, int]] | None = None
        for each, pattern in self._candidates(folded):
            counted = False
            for start, end, negated in self._places(folded, each, pattern):
                if places is None:
                    places = fold_with_places(scoped)[1]
                counts = not negated and not counted
                counted = counted or counts
                where = _original(places, start, end)
                matches.append(
                    Match(each.text, start, end, where, each.weight, each.language, negated, counts)
                )
        return matches

    # ---- many texts

    def score_texts(self, texts: Sequence[str]) -> Float[Tensor, " prompt"]:
        """1.0 or 0.0 a text; an empty one is 0.0 (`counts` tells it apart)."""
        import torch

        return torch.tensor([float(self.reached(self.strength(text))) for text in texts])

    def __call__(self, outputs: HasTexts, baseline: HasTexts) -> Float[Tensor, " prompt"]:
        return self.score_texts(outputs.texts)

    def counts(self, texts: Sequence[str]) -> dict[Outcome, int]:
        """Counts of the texts that express the behaviour, do not, and are empty."""
        counts = Counter(self.outcome(text) for text in texts)
        return {outcome: counts[outcome] for outcome in get_args(Outcome)}

    def report(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The places of all matches, a row a place: `pandas.DataFrame(rows)` is the table.

        `text` is the number of the text; `start` and `end` are characters of the original, where `found`
        stands, `folded_start` and `folded_end` of the folded text.
        """
        return [
            {
                "text": number,
                "expression": match.expression,
                "language": match.language,
                "weight": match.weight,
                "found": text[slice(*match.place)],
                "start": match.place[0],
                "end": match.place[1],
                "folded_start": match.start,
                "folded_end": match.end,
                "negated": match.negated,
                "counts": match.counts,
            }
            for number, text in enumerate(texts)
            for match in self.all_matches(text)
        ]

    # ---- inside

    def _scoped(self, text: str) -> str:
        text = strip_quoted_speech(text) if self.own_speech else text
        return first_sentence(text) if self.scope == "first_sentence" else text

    def reached(self, strength: float) -> bool:
        """Whether a strength expresses the behaviour."""
        return strength >= self.threshold - 1e-9  # sums of tenths fall short of their total

    @cached_property
    def _literals(self) -> list[str]:
        """The substring that a text must hold for each expression to match; "" for regular expressions."""
        return ["" if each.regex else fold(each.text).strip() for each, _ in self._compiled]

    def _candidates(self, folded: str) -> Iterator[tuple[Expression, re.Pattern[str]]]:
        """The expressions that a text may hold: looking for a substring is ten times as fast."""
        for literal, compiled in zip(self._literals, self._compiled):
            if literal in folded:
                yield compiled

    def _places(
        self, folded: str, each: Expression, pattern: re.Pattern[str]
    ) -> Iterator[tuple[int, int, bool]]:
        """(start, end, negated) in the folded text, up to the first empty match."""
        negator = _negator(each.language) if self.negation else None
        for hit in pattern.finditer(folded):
            negated = False
            if negator is not None:
                before = folded[max(0, hit.start() - 80) : hit.start()]
                negated = bool(negator.search(_CLAUSE_END.split(before)[-1]))
            yield hit.start(), hit.end(), negated
            if hit.start() == hit.end():
                return


def expression_scorer(
    name_or_file: str | None = None,
    *,
    contrast: str = "",
    languages: Sequence[str] = (),
    **options: Any,
) -> ExpressionScorer:
    """The scorer that an option such as `--expressions NAME_OR_FILE` stands for.

    Args:
        name_or_file: a bundled list's name, else a file (see `read_expressions`). None: the list that
            belongs to the contrast set, or `DEFAULT_EXPRESSIONS`.
        contrast: name of the contrast set that the texts are about.
        languages: as for `ExpressionScorer`; ("all",) takes every language of the list.
        options: further fields of `ExpressionScorer`.

    Raises:
        InterpAblateError: a name that is neither, a file that cannot be read, a language that is missing.
    """
    name = name_or_file or EXPRESSIONS_OF_CONTRAST.get(contrast, DEFAULT_EXPRESSIONS)
    expressions = name if name in expression_names() else read_expressions(name)
    return ExpressionScorer(expressions, languages=tuple(languages), **options)


def _check_texts(what: str, texts: Any, kinds: type | tuple[type, ...]) -> None:
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Sequence):
        raise InterpAblateError(f"{what} are given as a tuple of texts; got {texts!r}")
    for each in texts:
        if not isinstance(each, kinds):
            raise InterpAblateError(
                f"{what} are texts; one is {each!r} ({type(each).__name__}): quote it"
            )


def _original(places: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The place in the original text of the characters from start to end of the folded text."""
    if start == end:
        at = places[start][0] if start < len(places) else (places[-1][1] if places else 0)
        return at, at
    return places[start][0], places[end - 1][1]


@dataclass(frozen=True)
class ExpressionTextScorer(ExplainingScorer):
    """100 where the weights of the matches reach the threshold, in proportion below it, 0 for none.

    `detail` says what matched where (`ExpressionScorer.report`).
    """

    expressions: ExpressionScorer
    label: str = ""

    @property
    def name(self) -> str:
        return f"expressions:{self.label or self.expressions.label}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "expressions", **self.expressions.identity}

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        return [self._verdict(exchange.answer) for exchange in exchanges]

    def _verdict(self, answer: str) -> Verdict:
        share = self.expressions.strength(answer) / self.expressions.threshold
        matches = self.expressions.report([answer])
        return Verdict(100 * min(1.0, max(0.0, share)), detail={"matches": matches})


def _make(name: str, options: dict[str, Any]) -> ExpressionTextScorer:
    languages = options.get("languages", ())
    scorer = expression_scorer(
        name,
        languages=languages.split(",") if isinstance(languages, str) else languages,
        scope=options.get("scope", "whole"),
        negation=as_flag(options.get("negation", False)),
        own_speech=as_flag(options.get("own_speech", False)),
        threshold=as_number("threshold", options.get("threshold", 1.0)),
    )
    return ExpressionTextScorer(scorer, Path(name).stem)


KIND = ScorerKind(
    _make,
    "expressions:NAME_OR_FILE",
    options=("languages", "scope", "negation", "own_speech", "threshold"),
    cost=1,
)
