"""What a method makes of training prompts: a detector, and families of plans by a strength.

Knows: the parts of a fitted method, the usual families. Does not know: any method, or how one is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, PerPrompt
from interp_ablate.directions.mean_difference import as_float64
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan
from interp_ablate.sites import Site, SiteLike

if TYPE_CHECKING:
    from collections.abc import Iterable

Family: TypeAlias = Callable[[float], Plan]
"""From a strength >= 0 to a plan; 0 changes nothing, and the KL grows with the strength."""


@dataclass(frozen=True, eq=False)
class Detector:
    """A score of activations at one place: the higher, the likelier the concept is there."""

    site: Site
    position: str
    """Token position that is read, as in `Direction`."""
    score: Callable[[PerPrompt], Float[Tensor, " prompt"]]

    @classmethod
    def of(cls, detection: Direction | Detector) -> Detector:
        """A direction's projections as a detector; a detector as it is."""
        if isinstance(detection, Detector):
            return detection
        return cls(detection.site, detection.position, lambda values: values @ detection)

    @classmethod
    def nearer(
        cls,
        site: Site,
        components: Float[Tensor, "k d_model"],
        near: Float[Tensor, " k"],
        far: Float[Tensor, " k"],
    ) -> Detector:
        """How much nearer an activation lies to one mean than to another, within a subspace; of its last token."""

        def score(values: PerPrompt) -> Float[Tensor, " prompt"]:
            inside = as_float64(values) @ components.T
            away = [(inside - mean).square().sum(-1) for mean in (near, far)]
            return away[1] - away[0]

        return cls(site, "-1", score)


@dataclass(frozen=True, eq=False)
class FittedMethod:
    """What a method made of the training prompts."""

    detection: Direction | Detector
    """What tells held-out prompts of the two sets apart."""
    removal: Family
    """Plans that remove the behaviour, by strength."""
    induction: Family | None = None
    """Plans that bring the behaviour out, by strength; None where the method has none of its own."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was chosen on the way, as JSON: a layer, a threshold."""
    greatest_strength: float = math.inf
    """Beyond it a strength of either family means nothing more: a rotation at 1 has reached its angle."""


def ablation(
    vectors: Direction | Float[Tensor, "*k d_model"], sites: SiteLike | Iterable[SiteLike]
) -> Family:
    """Directional ablations by strength: 1 removes all of the direction, more reflects."""
    sites = [sites] if isinstance(sites, (str, Site)) else list(sites)
    return lambda strength: Plan((Ablate(vectors, sites, strength=strength),))


def addition(direction: Direction) -> Family:
    """Additions of the raw vector at the direction's own site, by coefficient."""
    return lambda coefficient: Plan((Add(direction, direction.site, coefficient=coefficient),))
