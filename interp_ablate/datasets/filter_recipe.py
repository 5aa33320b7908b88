"""The rules of a filter, their decision on one sample, and a page that shows some decisions.

Knows: how several rules make one decision, HTML of a few samples. Does not know: files.
"""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from interp_ablate.datasets.conversations import Sample, Turn, Turns
from interp_ablate.datasets.filter_rules import DeclineRule, Rule, RuleValue
from interp_ablate.errors import RunError
from interp_ablate.prompts.chat_format import ReadPart
from interp_ablate.settings import setting

Action = Literal["drop", "keep"]
Combine = Literal["any", "all"]
Scope = Literal["sample", "round"]
Outcome = Literal["kept", "dropped", "cut"]
T = TypeVar("T")
NO_ANSWER = "no answer of the assistant"


# ---- a recipe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterRecipe:
    """Says which samples match, and what becomes of them.

    Raises:
        RunError: no rule, a choice that there is not.
    """

    rules: tuple[Rule, ...] = field(default_factory=lambda: (DeclineRule(),))
    """Read off every answer that is looked at."""
    combine: Combine = setting("any", "of several rules", choices=get_args(Combine))
    turns: Turns = setting(
        "any",
        "which answers of a conversation are looked at; a sample matches where one of them does",
        choices=get_args(Turns),
    )
    read: ReadPart = setting(
        "answer", "part of an answer that rules read", choices=get_args(ReadPart)
    )
    action: Action = "drop"
    """Matching samples are dropped, or only they are kept."""
    scope: Scope = setting(
        "sample",
        "what is dropped: the sample, or only the question and the answer that matches (later rounds stay, "
        "though they may refer to it)",
        choices=get_args(Scope),
    )
    # A judge that is down must not empty a data set in silence. Samples without a verdict are counted, and named
    # in why.jsonl.
    no_verdict: Action | None = setting(
        None,
        "samples of which it is not known whether they match (default: as if they did not)",
        choices=get_args(Action),
    )

    def __post_init__(self) -> None:
        if not self.rules:
            raise RunError("a filter needs at least one rule")
        for name, kind in (
            ("combine", Combine),
            ("turns", Turns),
            ("read", ReadPart),
            ("action", Action),
            ("scope", Scope),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise RunError(f"{name} is {' or '.join(get_args(kind))}; got {value!r}")
        if self.no_verdict not in (None, *get_args(Action)):
            raise RunError(
                f"no_verdict is {' or '.join(get_args(Action))}; got {self.no_verdict!r}"
            )
        if self.scope == "round" and self.action == "keep":
            raise RunError(
                "single rounds can be dropped, not kept: what was asked before is part of them"
            )

    def without_verdict(self) -> Action:
        """The action on a sample without a verdict."""
        return self.no_verdict or ("keep" if self.action == "drop" else "drop")

    def as_dict(self) -> dict[str, Any]:
        """Everything a decision depends on, as JSON."""
        rules = [{"name": r.name, **r.identity, **r.match} for r in self.rules]
        choices = {n: getattr(self, n) for n in ("combine", "turns", "read", "action", "scope")}
        return {"rules": rules, **choices, "no_verdict": self.without_verdict()}


class RuleHit(NamedTuple):
    """One rule's value of one answer, as it counted for a decision."""

    turn: int
    """The answer's message, from 0; -1 where there is none."""
    rule: str
    value: RuleValue

    @property
    def as_dict(self) -> dict[str, Any]:
        """The same for a file, without what is empty."""
        value, why, phrases = self.value
        fields = {"turn": self.turn, "rule": self.rule, "value": value}
        return fields | ({"why": why} if why else {}) | ({"found": phrases} if phrases else {})


class Decision(NamedTuple):
    """The outcome for one sample, and why."""

    outcome: Outcome
    matched: bool | None
    """None where no verdict says so."""
    hits: tuple[RuleHit, ...]
    """The rules' values that made the decision."""
    sample: Sample | None
    """The sample as it is kept."""


Ask = Callable[[Rule, Sequence[tuple[Sample, Turn]]], list[RuleValue]]


def read_now(rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
    """A rule's values, made without a journal."""
    return rule.read([turn for _, turn in asked])


def decide(samples: Sequence[Sample], recipe: FilterRecipe, ask: Ask = read_now) -> list[Decision]:
    """Decide what becomes of each sample.

    Cheap rules are asked first, and no rule is asked about an answer that is decided without it.
    """
    turns = [
        (i, turn)
        for i, sample in enumerate(samples)
        for turn in sample.turns(recipe.turns, read=recipe.read)
    ]
    hits: list[list[tuple[bool | None, RuleHit]]] = [[] for _ in turns]
    deciding = recipe.combine == "any"  # a rule that says so settles the answer
    settled = [False] * len(turns)
    done: set[int] = set()  # samples that one answer has settled
    for rule in sorted(recipe.rules, key=lambda rule: rule.cost):
        open_ = [k for k, (i, _) in enumerate(turns) if not settled[k] and i not in done]
        if not open_:
            break
        values = ask(rule, [(samples[turns[k][0]], turns[k][1]) for k in open_])
        for k, value in zip(open_, values, strict=True):
            matches = None if value.value is None else rule.matches(value.value)
            hits[k].append((matches, RuleHit(turns[k][1].index, rule.name, value)))
            settled[k] = matches is deciding
        if recipe.scope == "sample" and deciding:
            done |= {turns[k][0] for k in open_ if settled[k]}
    each: list[list[tuple[bool | None, tuple[RuleHit, ...]]]] = [[] for _ in samples]
    for (i, _), of_turn in zip(turns, hits):
        if of_turn:
            each[i].append(_together(of_turn, recipe.combine))
    return [_decided(sample, answers, recipe) for sample, answers in zip(samples, each)]


def quiet_decision(recipe: FilterRecipe) -> Decision:
    """The decision on a sample in which no answer matches, without the sample."""
    return _decided(None, [(False, ())], recipe)


def _together(
    hits: list[tuple[bool | None, RuleHit]], combine: Combine
) -> tuple[bool | None, tuple[RuleHit, ...]]:
    """Combine the rules on one answer: True, False or None (no verdict), and the hits that say so."""
    verdicts = [matches for matches, _ in hits]
    if combine == "any":
        matched = True if True in verdicts else (None if None in verdicts else False)
    else:
        matched = False if False in verdicts else (None if None in verdicts else True)
    return matched, tuple(
        hit for matches, hit in hits if matches is matched and matched is not False
    )


def _decided(
    sample: Sample | None,
    turns: list[tuple[bool | None, tuple[RuleHit, ...]]],
    recipe: FilterRecipe,
) -> Decision:
    verdicts = [matches for matches, _ in turns]
    matched = True if True in verdicts else (None if None in verdicts or not turns else False)
    hits = tuple(hit for matches, of_turn in turns if matches is matched for hit in of_turn)
    if not turns:
        hits = (RuleHit(-1, "turns", RuleValue(None, NO_ANSWER)),)
    goes = (
        recipe.without_verdict() == "drop"
        if matched is None
        else matched == (recipe.action == "drop")
    )
    if not goes:
        return Decision("kept", matched, hits, sample)
    if recipe.scope == "round" and turns and sample is not None:
        gone = (None, True) if recipe.without_verdict() == "drop" else (True,)
        left = sample.without(
            {hit.turn for matches, of_turn in turns if matches in gone for hit in of_turn}
        )
        if left is not None:
            return Decision("cut", matched, hits, left)
    return Decision("dropped", matched, hits, None)


_SHOWN = 1500  # characters of a message on the page of samples


class SampledDecisions:
    """A uniform random sample of a stream (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random, self.seen = size, random.Random(seed), 0
        self.items: list[tuple[Sample, Decision]] = []

    def add(self, items: Iterable[T], sample: Callable[[T], Sample], decision: Decision) -> None:
        """Count some more with one decision, and keep the sample of each that is drawn."""
        for item in items:
            self.seen += 1
            place = len(self.items)
            if place >= self.size:
                place = self.random.randrange(self.seen)
            if place < self.size:
                self.items[place : place + 1] = [(sample(item), decision)]


def reason_kinds(decision: Decision) -> Iterator[tuple[str, str]]:
    """The kinds of reasons of a decision, each with the phrase in the answer, or ""."""
    for hit in decision.hits:
        value, why, phrases = hit.value
        if value is None:
            yield f"no verdict: {why or hit.rule}", ""
        else:
            yield from phrases or ((hit.rule, ""),)


# ---- for human eyes --------------------------------------------------------------------------------

_STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "article{border:1px solid #ccc;border-radius:6px;padding:.6rem 1rem;margin:1rem 0}"
    ".role{color:#666;font-size:.8rem;margin:.6rem 0 0}.text{white-space:pre-wrap;margin:0}"
    ".why{color:#a33;font-size:.9rem;margin:.2rem 0}.hit{border-left:3px solid #a33;padding-left:.6rem}"
)


def samples_page(title: str, parts: dict[str, SampledDecisions]) -> str:
    """An HTML page of some samples of each outcome; everything that comes from the data is escaped."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for name, drawn in parts.items():
        if drawn.seen:
            body.append(f"<h2>{name}: {len(drawn.items)} of {drawn.seen}</h2>")
        for sample, decision in sorted(drawn.items, key=lambda item: item[0].number):
            body.append(_article(sample, decision))
    return (
        '<!doctype html>\n<html><head><meta charset="utf-8"><title>'
        f"{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _article(sample: Sample, decision: Decision) -> str:
    reasons = [_reason(hit) for hit in decision.hits]
    turns = {hit.turn for hit in decision.hits}
    parts = [f"<article><p class='role'>number {sample.number}</p>"]
    parts += [f"<p class='why'>{html.escape(reason)}</p>" for reason in reasons]
    for index, message in enumerate(sample.messages):
        text = message.content
        if len(text) > _SHOWN:
            text = f"{text[:_SHOWN]} ... ({len(text) - _SHOWN} more characters)"
        marked = " hit" if index in turns else ""
        parts.append(
            f"<p class='role'>{message.role}</p><p class='text{marked}'>{html.escape(text)}</p>"
        )
    return "".join(parts) + "</article>"


def _reason(hit: RuleHit) -> str:
    value, why, phrases = hit.value
    reason = why or ("no verdict" if value is None else f"{value:g}")
    if phrases:
        reason = "; ".join(f"{kind}: {phrase}" for kind, phrase in phrases)
    place = f"message {hit.turn + 1}, " if hit.turn >= 0 else ""
    return f"{place}{hit.rule}: {reason}"
