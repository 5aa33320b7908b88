"""One direction: a unit vector with its norm, site, method and separation.

Knows: the vector and its origin. Does not know: how it was estimated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.class_separation import Separation
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

# A difference of means shorter than this fraction of the activations' own norm is rounding, not signal.
ZERO_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector of the residual stream with the site, position and method it came from.

    `raw` (unit vector times `norm`) is the estimator's own result: the difference in means, whose
    addition with coefficient 1 moves the negative mean onto the positive one.
    """

    vector: Float[Tensor, " d_model"]
    norm: float
    site: Site
    position: str = "-1"
    method: str = "difference_in_means"
    separation: Separation | None = None
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector)
        if vector.ndim != 1:
            raise DirectionError(
                f"a direction has one axis (d_model); this one has shape {tuple(vector.shape)}"
            )
        vector = vector.detach().to("cpu", torch.float64)
        length = float(vector.norm())
        if not (length > 0 and torch.isfinite(vector).all()):
            raise DirectionError(
                f"the direction at {self.site} is {'zero' if length == 0 else 'not finite'}: "
                "nothing can be ablated or added along it"
            )
        object.__setattr__(self, "vector", vector / length)

    @property
    def raw(self) -> Float[Tensor, " d_model"]:
        """The estimator's result before it was scaled to unit length."""
        return self.vector * self.norm

    @property
    def name(self) -> str:
        """Readable label: method, hook name and position."""
        return f"{self.method}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the vector, its norm and where it came from."""
        digest = hashlib.sha256(self.vector.numpy().tobytes())
        digest.update(json.dumps([self.norm, str(self.site), self.position, self.method]).encode())
        return digest.hexdigest()


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A uniformly random direction of the same norm at the same site: a control."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator, dtype=torch.float64)
    return Direction(vector, like.norm, like.site, like.position, "random", source=f"seed {seed}")


def cosine_similarities(
    directions: Sequence[Direction],
) -> Float[Tensor, "site site"]:
    """Cosine of every pair of directions."""
    vectors = torch.stack([item.vector for item in directions])
    return vectors @ vectors.T


def orthogonalized(direction: Direction, against: Float[Tensor, " d_model"]) -> Direction:
    """The direction without its component along another vector (the negative set's mean activation).

    What both sets share is left alone by such an edit, so that it costs less on other prompts; a zero
    `against` takes nothing away. Two Gram-Schmidt passes, for rounding. Source: "projected
    abliteration" (Lai 2025, on Hugging Face).

    Raises:
        DirectionError: nothing is left but rounding: the direction is parallel to `against`.
    """
    wide = against.double()
    length = float(wide.norm())
    unit = wide / length if length > 0 else wide
    rest = direction.raw
    for _ in range(2):
        rest = rest - (rest @ unit) * unit
    if float(rest.norm()) <= ZERO_TOLERANCE * direction.norm:
        raise DirectionError(
            f"nothing is left of the direction at {direction.site}[{direction.position}]: it is "
            "parallel to what it is orthogonalized against (the negative set's mean activation); use "
            f"the plain {direction.method}"
        )
    return Direction(
        rest,
        float(rest.norm()),
        direction.site,
        direction.position,
        f"{direction.method}_orthogonalized",
        source=direction.source,
    )
