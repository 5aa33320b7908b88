"""The sliders of the page as a plan: an operation, a direction, an amount for each band of layers.

Knows: bands, and the sites that an operation writes in one. Does not know: the page, or how a plan runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Add, Clamp, Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.models.model import Model, check_model
from interp_ablate.sites import EMBEDDING_POINTS, Site

OPERATIONS = ("ablate", "add", "clamp")
MOST_BANDS = 6


def bands_of(n_layers: int) -> list[range]:
    """The layers in at most MOST_BANDS bands of about equal width, without a gap."""
    count = min(MOST_BANDS, n_layers)
    ends = [round(i * n_layers / count) for i in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Controls:
    """What the sliders are set to.

    Raises:
        PlanError: an operation that there is not, amounts that are no numbers.
    """

    operation: str
    direction: int
    """Its number among the session's directions."""
    amounts: tuple[float | None, ...]
    """One for each band; None is a band that is left alone."""

    def __post_init__(self) -> None:
        numbers = [amount for amount in self.amounts if amount is not None]
        if self.operation not in OPERATIONS or not all(map(math.isfinite, numbers)):
            raise PlanError(
                f"controls are one of {', '.join(OPERATIONS)} with a finite number, or nothing, a band; got "
                f"{self.operation!r:.40} and {self.amounts!r:.200}"
            )

    @classmethod
    def from_dict(cls, data: Any) -> Controls:
        """Read what a page sends.

        Raises:
            PlanError: something else.
        """
        try:
            amounts = tuple(None if each is None else float(each) for each in data["amounts"])
            return cls(str(data["operation"]), int(data["direction"]), amounts)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"controls have an operation, a direction and amounts; got {data!r:.200}"
            ) from error

    def plan(self, model: Model, directions: Sequence[Direction]) -> Plan:
        """The plan of these controls.

        `ablate` works at what attention and MLPs write in the band, which weights can hold. `add` writes to the stream
        that leaves the band's layers, the amount times the raw direction over the whole band. `clamp` sets the
        projection there to the amount times the raw direction's length.

        Raises:
            PlanError: another number of bands than the model has, a direction that there is not.
        """
        check_model(model)
        bands = bands_of(model.n_layers)
        if len(self.amounts) != len(bands) or not 0 <= self.direction < len(directions):
            raise PlanError(
                f"the model has {len(bands)} bands and there are {len(directions)} directions; got "
                f"{len(self.amounts)} amounts and direction {self.direction}"
            )
        strengths: dict[Site, float] = {}
        writers = model.writers if self.operation == "ablate" else ()
        for band, amount in zip(bands, self.amounts):
            if amount is None or (amount == 0 and self.operation != "clamp"):
                continue
            if self.operation == "ablate":
                blocks = (site for site in writers if site.point not in EMBEDDING_POINTS)
                strengths |= {site: amount for site in blocks if site.layer in band}
            else:
                share = len(band) if self.operation == "add" else 1
                strengths |= {Site(layer, "resid_post"): amount / share for layer in band}
        return Plan((self._edit(directions[self.direction], strengths),) if strengths else ())

    def _edit(self, direction: Direction, strengths: Mapping[Site, float]) -> Edit:
        amounts = tuple(strengths.values())
        if self.operation == "ablate":
            return Ablate(direction, strengths, strength=amounts)
        if self.operation == "add":
            return Add(direction, strengths, coefficient=amounts)
        return Clamp(direction, strengths, value=tuple(direction.norm * each for each in amounts))
