"""How many rounds of a fit a search of some minutes has time for.

Knows: the minutes that have gone, what was decided before. Does not know: the gradient, or trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from interp_ablate.runs.fits import FIT_ROUNDS
from interp_ablate.runs.run_folder import Run

FITS_WITHIN = 0.6  # of a search's minutes; no fit and no round of one begins later


@dataclass(frozen=True, eq=False)
class RoundsInTime:
    """The rounds that the fits of a search get, kept in its folder: a call that goes on makes the same fits.

    Args:
        begin: when the search's call began.
        decided: from the name of a fit to its rounds; None where the time decides.
    """

    run: Run
    minutes: float
    begin: float
    decided: Callable[[str], int | None]

    def more(self, name: str, done: int) -> bool:
        """Whether the next round is to be, or begins early enough."""
        rounds = self.decided(name)
        if rounds is not None:
            return done < rounds
        return time.monotonic() - self.begin <= FITS_WITHIN * 60 * self.minutes

    def keep(self, name: str, done: int) -> None:
        """Keep the number, and note what there was no time for."""
        self.run.state["search"].setdefault("fit_rounds", {})[name] = done
        self.run.save()
        if done < len(FIT_ROUNDS) and self.decided(name) is None:
            what = f"has {done} of {len(FIT_ROUNDS)} rounds" if done else "was not made"
            self.run.note(
                f"the fit {name} {what}: a round begins within the first {FITS_WITHIN:.0%} of {self.minutes:g} minutes "
                "or not at all. In another folder, more --minutes give it all of them"
            )
