"""What a search may take and what it searches: the settings, their defaults and help.

Knows: the settings and their checks. Does not know: how a search runs. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from interp_ablate.errors import RunError
from interp_ablate.search.objectives import (
    BUILT_IN,
    DEFAULT_OBJECTIVES,
    FORM,
    Objective,
    parse_conditions,
    parse_objectives,
)
from interp_ablate.settings import DEFAULT_RULE, RULE_NAMES, setting

CONTROLS = ("random", "shuffled")
SAMPLERS = ("tpe", "random", "nsga2")


@dataclass(frozen=True)
class SearchSettings:
    """What a search may take, and what it searches.

    Raises:
        RunError: values out of range.
    """

    minutes: float = setting(
        10.0,
        "wall time of the whole search: race, fits and trials together, over all calls (a minute of trials at least; "
        "no fit whose first round could not end within 80% of it); "
        "the test follows",
    )
    trials: int | None = setting(None, "of the whole search, at most")
    objective: tuple[str, ...] = setting(
        (),
        f"what the search minimizes, again for each: {FORM}. A measure is one of {', '.join(BUILT_IN)}, or a scorer as "
        "for --scorer, whose mean score over 100 counts; max: makes it large, negative: scores answers to negative "
        "prompts, a limit binds the chosen plan "
        f"(default {' '.join(DEFAULT_OBJECTIVES)})",
        repeat=True,
        metavar="OBJECTIVE",
    )
    objective_rubric: tuple[str, ...] = setting(
        (),
        "of a judge among the objectives: [NAME=]TEXT or [NAME=]@FILE, again for each",
        repeat=True,
        metavar="RUBRIC",
    )
    stop_at: str | None = setting(
        None,
        "end when one trial meets all of these, such as expressions<=0.03,kl<=0.01",
        metavar="NAME<=N,...",
    )
    rule: str = setting(
        DEFAULT_RULE,
        "which plan within the limits is chosen: the strongest, the cheapest in KL whose rate is within the best one's "
        "upper bound, or the knee of the two",
        choices=RULE_NAMES,
    )
    control: str | None = setting(
        None, "the same search from directions that are none of the concept's", choices=CONTROLS
    )
    fits: bool = setting(True, "no edit fitted by gradient, and no search around one")
    sampler: str = setting("tpe", "Optuna's, which draws plans", choices=SAMPLERS)

    def __post_init__(self) -> None:
        if not self.minutes > 0 or (self.trials is not None and self.trials < 1):
            raise RunError(
                f"a search takes minutes above 0 and at least one trial; got {self.minutes} and {self.trials}"
            )
        if self.control not in (None, *CONTROLS):
            raise RunError(f"unknown control {self.control!r}: accepted are {', '.join(CONTROLS)}")
        if self.rule not in RULE_NAMES:
            raise RunError(f"unknown rule {self.rule!r}: accepted are {', '.join(RULE_NAMES)}")
        self.conditions  # noqa: B018  (bad ones are refused here, and bad objectives with them)
        self._check_rubrics()

    def _check_rubrics(self) -> None:
        """Every rubric is some judge's, and no judge has two."""
        rubrics, names = self.rubrics, {each.name for each in self.objectives}
        judges = {each.name for each in self.objectives if each.measure.startswith("judge:")}
        unread = set(rubrics) - names - {""}
        if unread:
            raise RunError(
                f"--objective-rubric {min(unread)}=...: the search has no objective of that name; it has "
                f"{', '.join(each.name for each in self.objectives)}. A text that begins so, and is no name, goes "
                "after a =, or in a file (@FILE)"
            )
        if len(rubrics) < len(self.objective_rubric):
            raise RunError(
                "two of --objective-rubric are for one judge, or have no name: give NAME=TEXT, each name once"
            )
        idle = set(rubrics) - judges - ({""} if judges - set(rubrics) else set())
        if idle:
            of = f"{min(idle)}=..." if min(idle) else "without a name"
            raise RunError(
                f"--objective-rubric {of}: no judge among the objectives would read it"
                f" (judges: {', '.join(sorted(judges)) or 'none'})"
            )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the search minimizes and maximizes."""
        return parse_objectives(self.objective)

    @property
    def conditions(self) -> tuple[Objective, ...]:
        """What a trial has to meet to end the search; none of `stop_at`."""
        return parse_conditions(self.stop_at, self.objectives) if self.stop_at else ()

    @property
    def rubrics(self) -> dict[str, str]:
        """Rubrics of judges by the objective's name; that of "" is any other judge's."""
        named = (re.match(r"(?:(\w*)=)?(.*)", text, re.DOTALL) for text in self.objective_rubric)
        return {match[1] or "": match[2] for match in named if match}
