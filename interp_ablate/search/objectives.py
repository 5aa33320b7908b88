"""Objectives of a search: what its trials are scored by, each with a direction and perhaps a limit.

Knows: the grammar of `--objective` and of `--stop-at`. Does not know: how anything is measured, or Optuna.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from interp_ablate.errors import RunError
from interp_ablate.settings import suggestion

Side = Literal["positive", "negative"]

BUILT_IN: dict[str, str] = {
    "expressions": "expression_rate",
    "false_hits": "false_hits",
    "kl": "kl",
    "repetition": "positive_repetition",
}
"""The measures that need no scorer of their own, and their columns in the table of trials."""
SAID = {
    "expressions": "share of positive prompts whose answer\nshows the behaviour",
    "false_hits": "share of negative prompts whose answer\nshows the behaviour by the edit alone",
    "kl": "KL to the unedited model, first token, negative prompts (nats)",
    "repetition": "share of repeated 3-grams,\nanswers to positive prompts",
}
"""What an axis says of each."""
DEFAULT_OBJECTIVES = ("expressions", "kl", "repetition")
FORM = "[NAME=][min:|max:][negative:]MEASURE[<=N|>=N]"
_FORM = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=(?!=))?(?:(?P<goal>min|max):)?(?P<negative>negative:)?(?P<measure>.+?)"
    r"(?:\s*(?P<sign><=|>=)\s*(?P<limit>[^<>=]*))?"
)
_CONDITION = re.compile(r"\s*(?P<name>[^<>=\s]+)\s*(?P<sign><=|>=)\s*(?P<limit>[^<>=]*)")


@dataclass(frozen=True)
class Objective:
    """One number that a search makes small, or large."""

    name: str
    """What `--stop-at`, the table of trials and the figures call it."""
    measure: str
    """One of `BUILT_IN`, or the spec of a scorer (`scoring.make_scorer`)."""
    maximize: bool = False
    side: Side = "positive"
    """The prompts whose answers a scorer scores."""
    limit: float | None = None
    """What a chosen plan may have at most; at least, of one that is made large."""

    @property
    def column(self) -> str:
        """Its column in the table of trials."""
        return BUILT_IN.get(self.measure, self.name)

    @property
    def prompts(self) -> Side:
        """The prompts that it is a mean over."""
        return "negative" if self.measure in ("kl", "false_hits") else self.side

    @property
    def is_built_in(self) -> bool:
        """Whether it needs no scorer of its own."""
        return self.measure in BUILT_IN

    @property
    def said(self) -> str:
        """The measure in words, for an axis."""
        if self.is_built_in:
            return SAID[self.measure]
        return f"{self.name}: mean score over 100,\nanswers to {self.side} prompts"

    @property
    def text(self) -> str:
        """The objective as its grammar writes it."""
        goal = "max:" if self.maximize else ""
        side = "negative:" if self.side == "negative" else ""
        sign = ">=" if self.maximize else "<="
        limit = "" if self.limit is None else f"{sign}{self.limit:g}"
        return f"{self.name}={goal}{side}{self.measure}{limit}"

    def excess(self, value: float) -> float:
        """How far a value is beyond the limit; 0 or less within it, and without one."""
        if self.limit is None:
            return 0.0
        return self.limit - value if self.maximize else value - self.limit


def parse_objective(text: str) -> Objective:
    """An objective as a flag gives it: `kl<=0.02`, `max:lexicon:formality`, `polite=max:classifier:FOLDER#polite`.

    The form is `[NAME=][min:|max:][negative:]MEASURE[<=N|>=N]`. A measure is one of `BUILT_IN` or the spec of a
    scorer, whose mean score over 100 counts. Without a name it has that of its measure, or of a scorer's kind.

    Raises:
        RunError: not of that form, an unknown measure, a direction or a limit that it cannot have.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise RunError(f"cannot read --objective {text!r}: write {FORM}, such as kl<=0.02")
    measure, maximize = match["measure"].strip(), match["goal"] == "max"
    if ":" not in measure and measure not in BUILT_IN:
        raise RunError(
            f"--objective {text!r}: no measure {measure!r}{suggestion(measure, BUILT_IN)}; there are "
            f"{', '.join(BUILT_IN)}, and scorers such as lexicon:formality, judge:MODEL@BASE_URL and FILE.py:FUNCTION"
        )
    side: Side = "negative" if match["negative"] else "positive"
    if measure in BUILT_IN:
        if maximize and measure != "expressions":
            raise RunError(f"--objective {text!r}: {measure} is damage, which is only made small")
        if match["negative"]:
            raise RunError(
                f"--objective {text!r}: negative: goes before a scorer; the behaviour on negative prompts is false_hits"
            )
    return Objective(
        match["name"] or _name_of(measure), measure, maximize, side,
        None if match["sign"] is None else _limit(text, match["sign"], match["limit"], maximize),
    )  # fmt: skip


def _name_of(measure: str) -> str:
    """The kind of a scorer, or the function's name of a scorer of one's own."""
    first, _, rest = measure.partition(":")
    name = rest if first.endswith(".py") else first
    return re.sub(r"\W", "_", name.removeprefix("-"))


def _limit(text: str, sign: str, number: str, maximize: bool) -> float:
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise RunError(f"{text!r}: the limit {number!r} is not a number")
    if (sign == ">=") != maximize:
        least = "max:, whose limit is >=" if maximize else "no max:, and its limit is <="
        raise RunError(f"{text!r}: the objective has {least}")
    return limit


def parse_objectives(texts: Sequence[str], *, columns: Sequence[str] = ()) -> tuple[Objective, ...]:
    """The objectives of a search; without any text, those of `DEFAULT_OBJECTIVES`.

    Args:
        columns: names that the table of trials has for something else.

    Raises:
        RunError: two of one name, one measure twice, a name that is taken; see `parse_objective`.
    """
    objectives = tuple(parse_objective(text) for text in texts or DEFAULT_OBJECTIVES)
    seen: dict[str, Objective] = {}
    for each in objectives:
        if not each.is_built_in and each.name in {*columns, *BUILT_IN, *BUILT_IN.values()} - {
            "expressions"
        }:
            raise RunError(
                f"the objective {each.text!r} cannot be named {each.name!r}, which the table of trials has for "
                "something else: give NAME=SPEC"
            )
        for other in (seen.get(each.name), *(o for o in seen.values() if o.column == each.column)):
            if other is not None:
                raise RunError(
                    f"two objectives are named {each.name!r}, or are the same ({other.text}, {each.text}): give each "
                    "once, and two of a kind names of their own, NAME=SPEC"
                )
        seen[each.name] = each
    return objectives


def leading(objectives: Sequence[Objective]) -> Objective:
    """The objective that a search is for: the first one that is no damage, or else the first."""
    damage = ("kl", "repetition", "false_hits")
    return next((each for each in objectives if each.measure not in damage), objectives[0])


def parse_conditions(text: str, objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """What `--stop-at` asks of one trial, such as `expressions<=0.03,kl<=0.01`: objectives with these limits.

    Raises:
        RunError: not of that form, an objective that the search does not have, a sign against its direction.
    """
    by_name = {each.name: each for each in objectives}
    conditions = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise RunError(
                f"cannot read --stop-at {text!r}: write NAME<=N (or NAME>=N of one that is made large), several with "
                f"commas. The search's objectives are {', '.join(by_name)}"
            )
        name = match["name"]
        if name not in by_name:
            raise RunError(
                f"--stop-at {text!r}: the search has no objective {name!r}{suggestion(name, by_name)}; it has "
                f"{', '.join(by_name)}"
            )
        objective = by_name[name]
        limit = _limit(part.strip(), match["sign"], match["limit"], objective.maximize)
        conditions.append(replace(objective, limit=limit))
    return tuple(conditions)


def meets(conditions: Sequence[Objective], scores: Mapping[str, float]) -> bool:
    """Whether a trial's scores are within every limit; a score that is not there is not."""
    return all(
        each.column in scores and each.excess(scores[each.column]) <= 0 for each in conditions
    )
