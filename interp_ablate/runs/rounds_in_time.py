"""How many rounds of a fit a search of some minutes has time for.

Knows: the minutes that have gone, what was decided before. Does not know: the gradient, or trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from interp_ablate.runs.fits import FIT_ROUNDS
from interp_ablate.runs.run_folder import Run

# Of a search's minutes: a fit's first round is to end within the one, its later rounds begin within the other.
FIRST_WITHIN, LATER_WITHIN = 0.8, 0.6


@dataclass(frozen=True, eq=False)
class RoundsInTime:
    """The rounds that the fits of a search get, kept in its folder: a call that goes on makes the same fits.

    Args:
        begin: when the search's call began.
        first: seconds that the first round may take.
        decided: from the name of a fit to its rounds; None where the time decides.
    """

    run: Run
    minutes: float
    begin: float
    first: float
    decided: Callable[[str], int | None]

    def more(self, name: str, done: int) -> bool:
        """Whether the next round is to be, or comes early enough."""
        rounds = self.decided(name)
        if rounds is not None:
            return done < rounds
        gone = time.monotonic() - self.begin
        if done:
            return gone <= LATER_WITHIN * 60 * self.minutes
        return gone + self.first <= FIRST_WITHIN * 60 * self.minutes

    def keep(self, name: str, done: int) -> None:
        """Keep the number, and note what there was no time for."""
        self.run.state["search"].setdefault("fit_rounds", {})[name] = done
        self.run.save()
        if done < len(FIT_ROUNDS) and self.decided(name) is None:
            what = f"has {done} of {len(FIT_ROUNDS)} rounds" if done else "was not made"
            self.run.note(
                f"the fit {name} {what}: its first round is to end within {FIRST_WITHIN:.0%} of {self.minutes:g} minutes, "
                f"and later ones begin within {LATER_WITHIN:.0%}. In another folder, more --minutes give it all of them"
            )
