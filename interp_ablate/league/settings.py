"""The settings of a league, checked before any work.

Knows: settings and their checks. Does not know: what is done with them. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.models.loading import LoadingOptions
from interp_ablate.settings import MAX_KL, MAX_NEW_TOKENS, SPLIT_SIZES, setting

BEHAVIOURS = ("declining", "language", "sentiment", "persona:gloomy")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")


@dataclass(frozen=True)
class LeagueSettings(LoadingOptions):
    """What plays in a league, and by which rules.

    Raises:
        RunError: values that cannot be used.
    """

    model: str = setting("smollm2", "bundled alias, HF folder, .gguf file or hub name")
    behaviours: tuple[str, ...] = setting(
        BEHAVIOURS,
        "comma-separated: bundled contrast sets, files of one, persona:TRAIT, or FILE#LIST with a "
        "list of expressions",
    )
    methods: tuple[str, ...] = setting((), "comma-separated names (default: all that there are)")
    seeds: tuple[str, ...] = setting(
        ("0", "1", "2"), "comma-separated: each splits the prompts anew"
    )
    budget: str = setting(
        "5min", "time that a method has for one behaviour and seed: 30s, 5min, 1h"
    )
    n_train: int = setting(
        SPLIT_SIZES["n_train"], "prompts a side that a method is fitted on", least=2
    )
    n_validation: int = setting(
        SPLIT_SIZES["n_validation"], "prompts a side that it may choose by", least=2
    )
    n_test: int = setting(SPLIT_SIZES["n_test"], "prompts a side that it is judged on", least=2)
    max_kl: float = setting(MAX_KL, "removals are compared up to this first-token KL, in nats")
    max_kl_induction: float = setting(
        2.0, "the same for inductions, whose KL holds the behaviour itself"
    )
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "tokens of an answer, at most", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("behaviours", self.behaviours), ("seeds", self.seed_numbers)):
            if not values or len(set(values)) < len(values):
                given = ", ".join(getattr(self, name))
                raise RunError(f"--{name} names one or more, each once; got {given!r}")
        self.seconds  # noqa: B018  (a bad budget fails before any work)
        for name, limit in (("max-kl", self.max_kl), ("max-kl-induction", self.max_kl_induction)):
            if not 0 < limit < float("inf"):
                raise RunError(f"--{name} is a number of nats above 0; got {limit}")

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds as numbers.

        Raises:
            RunError: something that is no seed.
        """
        wrong = [text for text in self.seeds if not text.isdecimal() or int(text) >= 1 << 32]
        if wrong:
            raise RunError(
                f"--seeds are numbers from 0 to 2^32 - 1, such as 0,1,2; got {wrong[0]!r}"
            )
        return tuple(int(text) for text in self.seeds)

    @property
    def seconds(self) -> float:
        """The budget in seconds.

        Raises:
            RunError: no number with a unit, or no time at all.
        """
        found = _BUDGET.fullmatch(self.budget.strip())
        seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
        if not seconds > 0:
            raise RunError(f"--budget is a time such as 30s, 5min or 1h; got {self.budget!r}")
        return seconds

    @property
    def rules(self) -> dict[str, Any]:
        """What every record depends on beside its own behaviour, method and seed."""
        names = (
            "seconds", "n_train", "n_validation", "n_test", "max_kl", "max_kl_induction", "max_new_tokens",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
