"""One direction: a unit vector with its norm, site and method, and how well it separates two sets.

Knows: the vector, where it came from, AUC and d'. Does not know: how it was estimated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_ablate.display import html_table, shortened
from interp_ablate.errors import DirectionError
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site
from interp_ablate.stats.intervals import auc

# A difference of means shorter than this fraction of the activations' own norm is rounding, not signal.
ZERO_TOLERANCE = 1e-6
PerPrompt = Float[Tensor, "prompt d_model"]
"""Activations of one site and position, a row a prompt."""


@dataclass(frozen=True)
class Separation:
    """Measures of how well projections on a direction tell the two sets apart."""

    auc: float
    """Probability that a positive prompt projects higher than a negative one; ties count half."""
    d_prime: float
    """Distance of the two means in units of the pooled standard deviation."""

    def __str__(self) -> str:
        return f"AUC {self.auc:.3f}, d′ {self.d_prime:.2f}"


def separation(
    projections: Float[Tensor, " prompt"], labels: Bool[Tensor, " prompt"]
) -> Separation:
    """AUC and d' of projections under the labels (True = positive).

    Raises:
        DirectionError: NaN or infinity, labels that are not one bool a projection, or only one set.
    """
    if labels.dtype != torch.bool or labels.shape != projections.shape or labels.ndim != 1:
        raise DirectionError(
            f"separation needs one bool a projection (True = positive); got {labels.dtype} of shape "
            f"{tuple(labels.shape)} for projections of shape {tuple(projections.shape)}"
        )
    if not torch.isfinite(projections).all():
        raise DirectionError(
            "projections hold NaN or infinity: check the model's dtype; float16 often overflows, "
            "bfloat16 or float32 do not"
        )
    positive, negative = projections[labels].double(), projections[~labels].double()
    if not len(positive) or not len(negative):
        raise DirectionError("separation needs prompts of both sets")
    gap = float(positive.mean() - negative.mean())
    degrees = max(len(positive) + len(negative) - 2, 1)
    squares = sum(float((group - group.mean()).square().sum()) for group in (positive, negative))
    spread = (squares / degrees) ** 0.5
    infinite = math.copysign(math.inf, gap) if gap else 0.0
    ranked = auc(projections.double().cpu().numpy(), labels.cpu().numpy())
    return Separation(ranked, gap / spread if spread > 0 else infinite)


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector of the residual stream with the site, position and method it came from.

    Raises:
        DirectionError: a vector of zeros, not finite, or with more than one axis.
    """

    vector: Float[Tensor, " d_model"]
    """Scaled to unit length, float64 on the CPU."""
    norm: float
    """Length of the estimator's own result; see `raw`."""
    site: Site
    position: str = "-1"
    """Token position that was read: an index from the end, or a name such as "response"."""
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
        object.__setattr__(self, "site", Site.parse(self.site))

    def __repr__(self) -> str:
        measured = f", {self.separation}" if self.separation else ""
        return f"Direction({self.name}, d_model {len(self.vector)}, norm {self.norm:.4g}{measured})"

    def _repr_html_(self) -> str:
        return html_table(("direction", "d_model", "norm", "AUC", "d′", "source"), [self._row()])

    def _row(self) -> tuple[object, ...]:
        auc, d_prime = (
            (self.separation.auc, self.separation.d_prime) if self.separation else ("", "")
        )
        return self.name, len(self.vector), float(self.norm), auc, d_prime, shortened(self.source)

    def __matmul__(self, x: Float[Tensor, "*rows d_model"] | np.ndarray) -> Any:
        """The projections of activations: their scalar products with the unit vector, in float64.

        `x` is a tensor (the result is on its device, on the CPU where that has no float64), an array, or another
        direction; its last axis is d_model. `x @ direction` is the same.

        Raises:
            DirectionError: another d_model.
        """
        if isinstance(x, Direction):
            return float(self @ x.vector)
        if isinstance(x, Tensor):
            wide = to_float64(x.detach())
        else:
            wide = torch.as_tensor(np.asarray(x, np.float64))
        if wide.ndim < 1 or wide.shape[-1] != len(self.vector):
            raise DirectionError(
                f"a projection needs activations [..., {len(self.vector)}]; got {tuple(wide.shape)}"
            )
        projections = wide @ self.vector.to(wide.device)
        return projections if isinstance(x, Tensor) else projections.numpy()

    __rmatmul__ = __matmul__
    __array_ufunc__ = None  # arrays leave `array @ direction` to the direction

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """`tensor @ direction`, which torch asks for here."""
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul) and not kwargs:
            x, direction = args
            return direction @ x if isinstance(direction, Direction) else x @ direction
        return NotImplemented

    def __neg__(self) -> Direction:
        """The opposite direction, the same bits but for the sign; what was positive is negative."""
        flipped = self.separation and Separation(1 - self.separation.auc, -self.separation.d_prime)
        opposite = replace(self, separation=flipped)
        object.__setattr__(opposite, "vector", -self.vector)
        return opposite

    def cosine(self, other: Direction | Float[Tensor, " d_model"]) -> float:
        """The cosine of the angle to another direction or vector.

        Raises:
            DirectionError: another d_model, or a vector of zeros.
        """
        vector = as_vector(other)
        length = float(vector.norm())
        if not length > 0:
            raise DirectionError("a vector of zeros has no direction to compare with")
        return float(self @ vector) / length

    @property
    def raw(self) -> Float[Tensor, " d_model"]:
        """The estimator's result before it was scaled to unit length.

        For the difference in means, adding it with coefficient 1 moves the negative mean onto the positive one.
        """
        return self.vector * self.norm

    @property
    def name(self) -> str:
        """Readable label: method, hook name and position."""
        return f"{self.method}@{self.site}[{self.position}]"

    def is_of(self, position: str | None, method: str | None) -> bool:
        """True if it was read at this position with this method; None stands for any."""
        return position in (None, self.position) and method in (None, self.method)

    @property
    def fingerprint(self) -> str:
        """sha256 of the vector, its norm and where it came from."""
        return fingerprint_of(
            [self.vector], [self.norm, str(self.site), self.position, self.method]
        )


def as_direction(given: Any) -> Direction:
    """The direction that was given.

    Raises:
        DirectionError: it is something else.
    """
    if isinstance(given, Direction):
        return given
    raise DirectionError(
        f"a Direction is needed, such as one of estimate_directions(...) or Direction(vector, norm, site); got "
        f"{shortened(repr(given))} ({type(given).__name__})"
    )


def as_directions(given: Any) -> list[Direction]:
    """Directions as a list, which may be empty; one alone is a list of one.

    Raises:
        DirectionError: something else than directions was given.
    """
    several = isinstance(given, Iterable) and not isinstance(given, (str, Direction, Tensor))
    return [as_direction(each) for each in (given if several else [given])]


def as_vector(given: Any) -> Float[Tensor, " d_model"]:
    """The unit vector of a direction, or a vector as it was given; float64 on the CPU.

    Raises:
        DirectionError: something else, or more than one axis.
    """
    vector = given.vector if isinstance(given, Direction) else given
    vector = torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector
    if not isinstance(vector, Tensor) or vector.ndim != 1:
        raise DirectionError(
            f"a Direction or a tensor [d_model] is needed; got {shortened(repr(given))} ({type(given).__name__})"
        )
    return vector.detach().to("cpu", torch.float64)


def fingerprint_of(tensors: Sequence[Tensor], about: Sequence[object]) -> str:
    """sha256 of the tensors' bytes and of plain data about them."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A uniformly random direction of the same norm at the same site: a control."""
    like = as_direction(like)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(like.vector), generator=generator, dtype=torch.float64)
    return Direction(vector, like.norm, like.site, like.position, "random", source=f"seed {seed}")


def random_directions(like: Direction, count: int, *, seed: int = 0) -> list[Direction]:
    """Random directions as controls (`random_direction`), the same ones for one seed."""
    return [random_direction(like, seed=1000 * seed + i) for i in range(count)]


def cosine_similarities(directions: Sequence[Direction]) -> Float[Tensor, "site site"]:
    """Cosine of every pair of directions.

    Raises:
        DirectionError: no directions, or of different d_model.
    """
    items = as_directions(directions)
    if len({len(item.vector) for item in items}) != 1:
        raise DirectionError(
            f"cosines are of directions of one d_model; got {[len(item.vector) for item in items][:8] or 'none'}"
        )
    vectors = torch.stack([item.vector for item in items])
    return vectors @ vectors.T


def orthogonalized(direction: Direction, against: Float[Tensor, " d_model"]) -> Direction:
    """The direction without its component along another vector (the negative set's mean activation).

    What both sets share is left alone by such an edit, so that it costs less on other prompts; a zero
    `against` takes nothing away. Two Gram-Schmidt passes, for rounding. Source: "projected
    abliteration" (Lai 2025, on Hugging Face).

    Raises:
        DirectionError: another d_model; nothing is left but rounding: the direction is parallel to `against`.
    """
    wide, rest = as_vector(against), as_direction(direction).raw
    if wide.shape != rest.shape:
        raise DirectionError(
            f"the direction has d_model {len(rest)}, what it is orthogonalized against {len(wide)}: both are of one "
            "stream"
        )
    length = float(wide.norm())
    unit = wide / length if length > 0 else wide
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
