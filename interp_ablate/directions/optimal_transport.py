"""Gaussian optimal transport between two sets of activations, in the space of their first principal components.

Knows: the map and its fit. Does not know: hooks or plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import PerPrompt, fingerprint_of
from interp_ablate.directions.mean_difference import as_float64, check_spread, checked_means
from interp_ablate.directions.subspaces import checked_rank
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

# An eigenvalue of a covariance below this share of the largest is rounding: the map would divide by it.
SMALLEST_EIGENVALUE = 1e-10


@dataclass(frozen=True, eq=False)
class Transport:
    """x -> x + components^T ((matrix - 1) z + shift of z), where z = components x: an affine map of rank k.

    In the subspace it is z -> target_mean + matrix (z - source_mean); what is orthogonal to the subspace stays.
    `AffineEdit.of(transport, sites)` makes it an edit.
    """

    components: Float[Tensor, "k d_model"]
    """The principal components as orthonormal rows, the largest first."""
    matrix: Float[Tensor, "k k"]
    """The symmetric, positive matrix that turns the one covariance into the other."""
    source_mean: Float[Tensor, " k"]
    """The mean of the set that is moved, in the subspace."""
    target_mean: Float[Tensor, " k"]
    """The mean of the set that it is moved onto, in the subspace."""
    site: Site
    position: str = "-1"
    explained: float = 1.0
    """The share of both sets' variance (about their common mean) that lies in the subspace."""
    method: str = "gaussian_transport"
    source: str = field(default="", kw_only=True)

    @property
    def rank(self) -> int:
        """The number of components."""
        return len(self.components)

    @property
    def read(self) -> Float[Tensor, "k d_model"]:
        """What the map reads: the components."""
        return self.components

    @property
    def write(self) -> Float[Tensor, "k d_model"]:
        """What the map writes, a row for each row that is read."""
        return (self.matrix - torch.eye(self.rank, dtype=self.matrix.dtype)) @ self.components

    @property
    def shift(self) -> Float[Tensor, " d_model"]:
        """What the map adds to every activation."""
        return (self.target_mean - self.matrix @ self.source_mean) @ self.components

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A new tensor, computed in float64 and returned in the dtype of `x`."""
        wide = x.detach().to("cpu", torch.float64)
        moved = wide + (wide @ self.read.T) @ self.write + self.shift
        return moved.to(x)

    @property
    def name(self) -> str:
        """Readable label: method, rank, hook name and position."""
        return f"{self.method}{self.rank}@{self.site}[{self.position}]"

    @property
    def fingerprint(self) -> str:
        """sha256 of the map and where it came from."""
        parts = [self.components, self.matrix, self.source_mean, self.target_mean]
        return fingerprint_of(parts, [str(self.site), self.position, self.method])


def gaussian_transport(
    positive: PerPrompt,
    negative: PerPrompt,
    site: Site,
    *,
    rank: int,
    position: str = "-1",
    source: str = "",
) -> Transport:
    """The optimal transport of the positive set's Gaussian onto the negative's, in `rank` principal components.

    The components are those of both sets together, about their common mean. Of all maps that give the positives
    the mean and the covariance of the negatives there, this one moves activations least: the matrix is
    S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2, with the covariances S of the positives and T of the negatives. Nothing is
    regularized, so both moments are met exactly; a subspace in which S is singular is refused. Swap the two sets
    to induce the concept instead of removing it. Fitted at a writer's site (`mlp_out`), the edit there is exact in
    weights and a bias.
    Source: Nanfack, Belilovsky, Dohmatob 2026, https://arxiv.org/abs/2603.04355 (one or two layers at 40 to 60% of
    the depth); the closed form: Peyré and Cuturi 2019, https://arxiv.org/abs/1803.00567, remark 2.31.

    Raises:
        DirectionError: NaN, empty sets, shapes that do not fit; a rank that is no integer from 1, or more than the
            positives' covariance has.
    """
    wanted = checked_rank(rank)
    means = checked_means(positive, negative, site, position)
    check_spread("gaussian_transport", positive, negative, means)
    start, end = as_float64(positive), as_float64(negative)
    most = min(len(start) - 1, start.shape[1])
    if wanted > most:
        raise DirectionError(
            f"{len(start)} positive activations at {site}[{position}] have a covariance of rank {most} at most: "
            f"rank {wanted} needs {wanted + 1} or more of them, or rank={most} at most"
        )
    both = torch.cat([start, end])
    centred = both - both.mean(0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    components = axes[:wanted]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    (first, before), (last, after) = (_moments(x @ components.T) for x in (start, end))
    matrix = _transport_matrix(before, after, f"{site}[{position}]", wanted)
    explained = float(lengths[:wanted].square().sum() / lengths.square().sum())
    return Transport(components, matrix, first, last, site, position, explained, source=source)


def _moments(rows: Float[Tensor, "prompt k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """The mean and the covariance (the unbiased one) of rows; of one row the covariance is zero."""
    mean = rows.mean(0)
    away = rows - mean
    return mean, away.T @ away / max(len(rows) - 1, 1)


def _root(matrix: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The symmetric square root; what rounding made negative counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _transport_matrix(
    before: Float[Tensor, "k k"], after: Float[Tensor, "k k"], place: str, rank: int
) -> Float[Tensor, "k k"]:
    values, vectors = torch.linalg.eigh(before)
    sound = int((values > SMALLEST_EIGENVALUE * values[-1].clamp(min=0)).sum())
    if sound < rank or not float(values[-1]) > 0:
        raise DirectionError(
            f"the positive activations at {place} vary in {sound} of the {rank} principal components only: no map "
            f"gives them the negatives' covariance there. Give more prompts, or a smaller rank (try {max(sound, 1)})"
        )
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    matrix = inverse @ _root(root @ after @ root) @ inverse
    return (matrix + matrix.T) / 2
