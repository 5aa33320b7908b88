"""PCA of paired differences, and rank-k subspaces.

Knows: principal axes of what the two sets differ by. Does not know: hooks or plans.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction, PerPrompt, fingerprint_of
from interp_ablate.directions.mean_difference import (
    TIE_TOLERANCE,
    as_float64,
    checked_means,
    signed_direction,
)
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site


@dataclass(frozen=True, eq=False)
class Subspace:
    """Several directions of one site, for `Ablate(subspace.vectors, ...)`.

    Raises:
        DirectionError: rows that are not finite, not orthonormal, or more than d_model.
    """

    vectors: Float[Tensor, "k d_model"]
    """Orthonormal rows, float64 on the CPU."""
    site: Site
    position: str = "-1"
    method: str = "subspace"
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        vectors = torch.as_tensor(self.vectors).detach().to("cpu", torch.float64)
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise DirectionError(
                f"a subspace has shape [k, d_model]; this one has shape {tuple(vectors.shape)}"
            )
        gram = vectors @ vectors.T
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-8):
            raise DirectionError(
                f"the rows of the subspace at {self.site} are not orthonormal and finite: make it "
                "with `subspace`, or take torch.linalg.qr of its transpose first"
            )
        object.__setattr__(self, "vectors", vectors)

    @property
    def rank(self) -> int:
        """Number of directions that it spans."""
        return len(self.vectors)

    @property
    def name(self) -> str:
        """Readable label: method, rank, hook name and position."""
        return f"{self.method}{self.rank}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the vectors and where they came from."""
        return fingerprint_of([self.vectors], [str(self.site), self.position, self.method])


def pca(
    positive: PerPrompt, negative: PerPrompt, site: Site, *, position: str = "-1", source: str = ""
) -> Direction:
    """First principal axis of the paired differences, uncentred, with positives on its higher side.

    The i-th negative activation is taken from the i-th positive one; of sets of different size the
    first min(n) of each are paired. The differences are not centred, which would take away the mean
    difference, the very thing that is looked for. `norm` is the gap of the two means (of all prompts)
    along the axis, so that adding with coefficient 1 moves one mean past the other as far as they are
    apart. Sets whose i-th prompts have nothing to do with each other give an axis of their noise too.
    Source: Zou et al. 2023, https://arxiv.org/abs/2310.01405.

    Raises:
        DirectionError: NaN, empty sets, shapes that do not fit, equal pairs, two axes of equal length, or
            an axis orthogonal to the difference in means, which has no sign.
    """
    means = checked_means(positive, negative, site, position)
    _, lengths, axes = torch.linalg.svd(
        _paired_differences(positive, negative, means), full_matrices=False
    )
    if len(lengths) > 1 and float(lengths[0] - lengths[1]) <= TIE_TOLERANCE * float(lengths[0]):
        raise DirectionError(
            f"the first two principal axes at {site}[{position}] are of the same length: neither is "
            "the first. Give more prompts, use difference_in_means, or `subspace` with rank 2"
        )
    return signed_direction(axes[0], means, "pca", source)


def checked_rank(rank: int) -> int:
    """The rank as a whole number.

    Raises:
        DirectionError: it is none from 1.
    """
    try:
        wanted = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        wanted = 0
    if wanted < 1:
        raise DirectionError(f"a rank is an integer from 1; got {rank!r}")
    return wanted


def subspace(
    positive: PerPrompt,
    negative: PerPrompt,
    site: Site,
    *,
    rank: int,
    position: str = "-1",
    source: str = "",
) -> Subspace:
    """The unit mean difference, and rank - 1 principal axes of what it leaves of the paired differences.

    Pairs are made as in `pca`. The axes are those of the differences without their component along the
    mean difference, longest first; of an axis the largest coordinate is positive.

    Raises:
        DirectionError: as `pca`; a rank that is no integer from 1, or more than the differences span.
    """
    wanted = checked_rank(rank)
    means = checked_means(positive, negative, site, position)
    rows = means.vector[None]
    if wanted > 1:
        differences = _paired_differences(positive, negative, means)
        rest = differences - (differences @ means.vector)[:, None] * means.vector
        _, lengths, axes = torch.linalg.svd(rest, full_matrices=False)
        axes = axes[lengths > ZERO_TOLERANCE * float(differences.norm())]
        if wanted > 1 + len(axes):
            raise DirectionError(
                f"the {len(differences)} paired differences at {site}[{position}] span {1 + len(axes)} "
                f"directions with the mean difference; rank {wanted} needs more prompts, or rank "
                f"{1 + len(axes)} at most"
            )
        axes = axes[: wanted - 1]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        rows = torch.cat([rows, axes * largest.sign()])
    basis, triangle = torch.linalg.qr(rows.T)  # orthogonal to the last bit, signs as they were
    vectors = (basis * triangle.diagonal().sign()).T.contiguous()
    return Subspace(vectors, site, position, source=source)


def _paired_differences(
    positive: PerPrompt, negative: PerPrompt, means: Direction
) -> Float[Tensor, "pair d_model"]:
    pairs = min(len(positive), len(negative))
    first = as_float64(positive[:pairs])
    differences = first - as_float64(negative[:pairs])
    if float(differences.norm()) <= ZERO_TOLERANCE * float(first.norm()):
        raise DirectionError(
            f"the first {pairs} positive and negative activations at {means.site}[{means.position}] "
            "are the same pair by pair: there is nothing to find axes of. Give sets of equal size "
            "whose i-th prompts differ, or use difference_in_means"
        )
    return differences
