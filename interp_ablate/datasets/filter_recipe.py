"""Which rules a filter applies, and what they decide for one sample.

Knows: rules' hits and their combination. Does not know: files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from interp_ablate.datasets.conversations import Sample, Turn, Turns
from interp_ablate.datasets.filter_rules import DeclineRule, Rule, RuleValue
from interp_ablate.errors import RunError

Action = Literal["drop", "keep"]
Combine = Literal["any", "all"]
Scope = Literal["sample", "round"]
Outcome = Literal["kept", "dropped", "cut"]
NO_ANSWER = "no answer of the assistant"


# ---- a recipe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterRecipe:
    """Which samples match, and what becomes of them.

    Args:
        rules: read off every answer that is looked at.
        combine: an answer matches where any rule does, or where all do.
        turns: which answers of a conversation are looked at; a sample matches where one of them does.
        action: matching samples are dropped, or only they are kept.
        scope: with "round", only the round of a matching answer goes (see `Sample.without`); later rounds
            stay, though they may refer to it.
        no_verdict: what becomes of a sample of which it is not known whether it matches: an empty answer,
            none at all, a judge without a verdict. By default it counts as not matching (it is kept
            where matching ones are dropped): a judge that is down must not empty a data set in silence.
            They are counted, and named in why.jsonl.

    Raises:
        RunError: no rule, a choice that there is not.
    """

    rules: tuple[Rule, ...] = field(default_factory=lambda: (DeclineRule(),))
    combine: Combine = "any"
    turns: Turns = "any"
    action: Action = "drop"
    scope: Scope = "sample"
    no_verdict: Action | None = None

    def __post_init__(self) -> None:
        if not self.rules:
            raise RunError("a filter needs at least one rule")
        for name, kind in (
            ("combine", Combine),
            ("turns", Turns),
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

    def unknown(self) -> Action:
        """What becomes of a sample without a verdict."""
        return self.no_verdict or ("keep" if self.action == "drop" else "drop")

    def as_dict(self) -> dict[str, Any]:
        """Everything a decision depends on, as JSON."""
        rules = [{"name": r.name, **r.identity, **r.match} for r in self.rules]
        choices = {n: getattr(self, n) for n in ("combine", "turns", "action", "scope")}
        return {"rules": rules, **choices, "no_verdict": self.unknown()}


class RuleHit(NamedTuple):
    """One rule's reading of one answer, as it counted for a decision."""

    turn: int
    rule: str
    reading: RuleValue


class Decision(NamedTuple):
    """What became of a sample. `matched` is None where that is not known."""

    outcome: Outcome
    matched: bool | None
    because: tuple[RuleHit, ...]
    sample: Sample | None  # as it is kept


Ask = Callable[[Rule, Sequence[tuple[Sample, Turn]]], list[RuleValue]]


def read_now(rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
    """A rule's readings, made without a journal."""
    return rule.read([turn for _, turn in asked])


def decide(samples: Sequence[Sample], recipe: FilterRecipe, ask: Ask = read_now) -> list[Decision]:
    """What becomes of each sample.

    Cheap rules are asked first, and no rule is asked about an answer that is decided without it.
    """
    turns = [(i, turn) for i, sample in enumerate(samples) for turn in sample.turns(recipe.turns)]
    found: list[list[tuple[bool | None, RuleHit]]] = [[] for _ in turns]
    deciding = recipe.combine == "any"  # a rule that says so settles the answer
    settled = [False] * len(turns)
    done: set[int] = set()  # samples that one answer has settled
    for rule in sorted(recipe.rules, key=lambda rule: rule.cost):
        open_ = [k for k, (i, _) in enumerate(turns) if not settled[k] and i not in done]
        if not open_:
            break
        readings = ask(rule, [(samples[turns[k][0]], turns[k][1]) for k in open_])
        for k, reading in zip(open_, readings, strict=True):
            hit = None if reading.value is None else rule.hits(reading.value)
            found[k].append((hit, RuleHit(turns[k][1].index, rule.name, reading)))
            settled[k] = hit is deciding
        if recipe.scope == "sample" and deciding:
            done |= {turns[k][0] for k in open_ if settled[k]}
    each: list[list[tuple[bool | None, tuple[RuleHit, ...]]]] = [[] for _ in samples]
    for (i, _), readings_of in zip(turns, found):
        if readings_of:
            each[i].append(_together(readings_of, recipe.combine))
    return [_decided(sample, given, recipe) for sample, given in zip(samples, each)]


def _together(
    found: list[tuple[bool | None, RuleHit]], combine: Combine
) -> tuple[bool | None, tuple[RuleHit, ...]]:
    """Whether an answer matches, and the readings that say so."""
    hits = [hit for hit, _ in found]
    if combine == "any":
        matched = True if True in hits else (None if None in hits else False)
    else:
        matched = False if False in hits else (None if None in hits else True)
    return matched, tuple(
        because for hit, because in found if hit is matched and matched is not False
    )


def _decided(
    sample: Sample, turns: list[tuple[bool | None, tuple[RuleHit, ...]]], recipe: FilterRecipe
) -> Decision:
    hits = [hit for hit, _ in turns]
    matched = True if True in hits else (None if None in hits or not turns else False)
    because = tuple(b for hit, given in turns if hit is matched for b in given)
    if not turns:
        because = (RuleHit(-1, "turns", RuleValue(None, NO_ANSWER)),)
    goes = recipe.unknown() == "drop" if matched is None else matched == (recipe.action == "drop")
    if not goes:
        return Decision("kept", matched, because, sample)
    if recipe.scope == "round" and turns:
        gone = (None, True) if recipe.unknown() == "drop" else (True,)
        left = sample.without({b.turn for hit, given in turns if hit in gone for b in given})
        if left is not None:
            return Decision("cut", matched, because, left)
    return Decision("dropped", matched, because, None)
