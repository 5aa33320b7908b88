"""What a search may take and what it searches: the settings, their defaults and help.

Knows: the settings and their checks. Does not know: how a search runs. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from interp_ablate.errors import RunError
from interp_ablate.settings import setting

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
        "wall time for the race, fits and trials together (a minute of trials at least); the test follows",
    )
    trials: int | None = setting(None, "of the whole study, at most")
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
