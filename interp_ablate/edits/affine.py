"""Affine maps of the residual stream, and the checks of their vectors.

Knows: x -> A x + b as low-rank factors. Does not know: sites, models or weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.subspaces import Subspace
from interp_ablate.errors import PlanError

# Below this cosine of write and read an erasure scales rounding (and everything else) up a millionfold.
SMALLEST_COSINE = 1e-6
# What norms multiply the stream by: channel by channel, or through a matrix where one centres it (`norm_gain`).
NormGain = Float[Tensor, "*d_model d_model"]


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> x + left (right^T x) + shift, with left and right of shape [d_model, k]; float64."""

    left: Float[Tensor, "d_model k"]
    right: Float[Tensor, "d_model k"]
    shift: Float[Tensor, " d_model"]

    @classmethod
    def identity(cls, d_model: int) -> Affine:
        """The map that changes nothing (k = 0)."""
        empty = torch.zeros(d_model, 0, dtype=torch.float64)
        return cls(empty, empty, torch.zeros(d_model, dtype=torch.float64))

    def then(self, after: Affine) -> Affine:
        """The map that applies this one first and `after` to its result."""
        # right columns of `after` read x through this map: (I + left right^T)^T after.right
        through = after.right + self.right @ (self.left.T @ after.right)
        return Affine(
            torch.cat([self.left, after.left], 1),
            torch.cat([self.right, through], 1),
            after(self.shift),
        )

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map without its shift."""
        return x + (x @ self.right) @ self.left.T

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(x) + self.shift

    @property
    def is_linear(self) -> bool:
        """True where nothing is added whatever the input."""
        return not bool(self.shift.any())

    def to(self, like: Tensor) -> Affine:
        """The same map in the dtype and on the device of `like`, for use inside a forward pass."""
        return Affine(*(part.to(like) for part in (self.left, self.right, self.shift)))


def as_vectors(
    direction: Direction | Subspace | Tensor | Sequence[Direction | Tensor],
) -> Float[Tensor, "k d_model"]:
    """The vectors of an edit as float64 rows on the CPU; of a list, those of its members one below the other.

    Raises:
        PlanError: no tensor, another shape, NaN, infinity, or a zero row; members of different sizes.
    """
    if isinstance(direction, (list, tuple)) and any(
        isinstance(each, (Direction, Subspace, Tensor)) for each in direction
    ):
        rows = [as_vectors(each) for each in direction]
        if len({row.shape[1] for row in rows}) > 1:
            raise PlanError(
                f"directions of one edit have one d_model; got {[row.shape[1] for row in rows]}"
            )
        return torch.cat(rows)
    vectors = direction.vector if isinstance(direction, Direction) else direction
    vectors = vectors.vectors if isinstance(vectors, Subspace) else vectors
    try:
        tensor = torch.as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            "an edit needs a Direction, or a tensor [d_model] ([k, d_model] for a subspace); got "
            f"{direction!r} ({type(direction).__name__})"
        ) from error
    tensor = tensor.detach().to("cpu", torch.float64)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise PlanError(
            f"a direction has shape [d_model], a subspace [k, d_model]; got {tuple(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise PlanError(
            "the direction holds NaN or infinity: estimate it again in float32 or better"
        )
    if not tensor.any(dim=1).all():
        raise PlanError("the direction is zero: nothing can be edited along it")
    return tensor


def orthonormal_rows(vectors: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of the rows' span, in their order.

    Raises:
        PlanError: rows that are not linearly independent.
    """
    units = vectors / vectors.norm(dim=1, keepdim=True)
    if len(units) == 1:
        return units
    if float(torch.linalg.svdvals(units)[-1]) < 1e-6 or len(units) > units.shape[1]:
        raise PlanError(
            f"the {len(units)} directions of the subspace are not linearly independent: drop some"
        )
    basis, triangle = torch.linalg.qr(units.T)
    return (basis * triangle.diagonal().sign()).T.contiguous()


def projection_map(vectors: Float[Tensor, "k d_model"], amount: float) -> Affine:
    """x -> x - amount * (projection on the orthonormal rows)."""
    basis = vectors.T
    return Affine(-amount * basis, basis, torch.zeros(len(basis), dtype=torch.float64))


def norm_gain(norms: Iterable[tuple[Float[Tensor, " d_model"], bool]]) -> NormGain | None:
    """The gain of norms that stand one after another, the last one first; None for no norm.

    Args:
        norms: of each its gain, and whether it takes the mean over the channels off first.

    Returns [d_model], float64; where a norm takes the mean off, the matrix [d_model, d_model] of gain times centring.
    """
    total: Tensor | None = None
    for gain, centred in norms:
        own = gain.detach().to("cpu", torch.float64)
        total = own if total is None else total * own
        if centred:
            total = torch.diag(total) if total.ndim == 1 else total
            total = total - total.mean(-1, keepdim=True)
    return total


def before_norm(
    vectors: Float[Tensor, "*k d_model"], gain: NormGain
) -> Float[Tensor, "*k d_model"]:
    """What along vectors before a norm leaves it along `vectors`: the normed output is gain * x / rms(x).

    So along r it is x . (gain * r) / rms(x). Of a norm that takes the mean off, the same holds with a matrix.
    """
    return vectors * gain.to(vectors) if gain.ndim == 1 else vectors @ gain.to(vectors)


def through_gain(vectors: Float[Tensor, "k d_model"], gain: NormGain) -> Float[Tensor, "k d_model"]:
    """Orthonormal directions before a norm whose removal leaves nothing along `vectors` after it.

    Raises:
        PlanError: nothing before the norm leaves it along one of them.
    """
    rows = before_norm(vectors, gain.detach().to("cpu", torch.float64))
    if float(rows.norm(dim=-1).min()) <= 1e-12 * float(vectors.norm()):
        raise PlanError(
            "a norm here takes the mean over the channels off, and the direction is the same in all of them: "
            "nothing is written along it, so nothing can be removed. Leave this site out"
        )
    return orthonormal_rows(rows)


def rescale_rows(
    rows: Float[Tensor, "*row d_model"], affine: Affine, *, eps: float
) -> tuple[Float[Tensor, "*row d_model"], Float[Tensor, " *row"]]:
    """Rows through the map (without its shift), each given its norm back, and the factor that did it.

    A row of which nothing but rounding is left (`eps`: of the dtype it is stored in) is not scaled up.
    """
    mapped = affine.to(rows).linear(rows)
    before, after = rows.norm(dim=-1), mapped.norm(dim=-1)
    factor = before / after.clamp(min=torch.finfo(rows.dtype).tiny)
    factor = torch.where(after <= eps * before, torch.ones_like(before), factor)
    return mapped * factor[..., None], factor


def one_row(vectors: Float[Tensor, "k d_model"], op: str) -> Float[Tensor, "1 d_model"]:
    """The vectors themselves, if there is one; `op` is for the message."""
    if len(vectors) != 1:
        raise PlanError(f"{op} takes one vector [d_model]; got {len(vectors)} rows")
    return vectors


def oblique_rows(
    write: Direction | Tensor, read: Direction | Tensor
) -> tuple[Float[Tensor, "2 d_model"], float]:
    """Write as a unit row, read as a row scaled to read . write = 1; and that scale.

    Raises:
        PlanError: different sizes, or orthogonal vectors.
    """
    along, across = (one_row(as_vectors(vector), "erase")[0] for vector in (write, read))
    if along.shape != across.shape:
        raise PlanError(
            f"write has d_model {len(along)}, read {len(across)}: both are vectors of one stream"
        )
    unit = along / along.norm()
    length = across.norm()
    cosine = float(across / length @ unit)
    if abs(cosine) < SMALLEST_COSINE:
        raise PlanError(
            f"write and read are orthogonal (their cosine is {cosine:.2g}): moving along write does not "
            "change read . x, so nothing can be erased. LEACE's write is the covariance times its read"
        )
    scale = 1 / float(length * cosine)
    return torch.stack([unit, across * scale]), scale
