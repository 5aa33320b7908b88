"""Concept cones: several directions fitted by gradient, each of which, and each mixture of which, carries a behaviour.

Knows: the loss of an ablated direction, and its optimisation over an orthonormal basis and the mixtures in its cone.
Does not know: which direction is worth starting from, or validation prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from interp_ablate.directions.direction import Direction, as_direction
from interp_ablate.edits.affine import orthonormal_rows
from interp_ablate.errors import DirectionError, NotFiniteError, PlanError
from interp_ablate.jobs.bars import with_bar
from interp_ablate.models.batches import telling_of_memory
from interp_ablate.models.model import Model, check_model
from interp_ablate.search.gradient_fit import UNLIKELY, FitData, answer_logprobs, kept_kls

CONE_KL_WEIGHT = 10.0
"""Nats of log-probability that a nat of KL outweighs: less than in a fit of strengths, as all are 1 here."""
MIXTURES = 4  # random directions inside the cone that a step tries beside the basis
RATE = 0.05  # of Adam at the start, in unit vectors; it falls along a cosine


@dataclass(frozen=True, eq=False)
class ConceptCone:
    """All mixtures with no negative share of a few orthonormal directions."""

    vectors: Float[Tensor, "k d_model"]
    """The basis, orthonormal rows, float64 on the CPU."""
    start: Direction
    """The direction of the fit's start; the cone has its site, position and norm."""
    losses: tuple[float, ...]
    """Mean loss over basis and mixtures before each step, of that step's rows; the basis is that after the last."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The basis as directions, methods cone_1, cone_2 and so on.

        Ablation does not care for a sign, and only the first began with one: positives may project lower on others.
        """
        return tuple(self._as_direction(v, f"cone_{i}") for i, v in enumerate(self.vectors, 1))

    def sample(self, count: int, *, seed: int = 0) -> list[Direction]:
        """Unit directions drawn uniformly over angles inside the cone, the same ones for a seed."""
        shares = _mixtures(count, len(self.vectors), torch.Generator().manual_seed(seed)).double()
        return [self._as_direction(each @ self.vectors, "cone_mixture") for each in shares]

    def _as_direction(self, vector: Tensor, method: str) -> Direction:
        like = self.start
        return Direction(vector, like.norm, like.site, like.position, method, source=like.source)

    def __repr__(self) -> str:
        return f"ConceptCone({len(self.vectors)} directions from {self.start.name}, loss {self.losses[-1]:.4g} at the last step)"


def fit_cone(
    model: Model,
    direction: Direction,
    data: FitData,
    *,
    rank: int = 2,
    steps: int = 12,
    kl_weight: float = CONE_KL_WEIGHT,
    orthogonal_to: Sequence[Direction] = (),
    seed: int = 0,
) -> ConceptCone:
    """Orthonormal directions of which every mixture without negative shares removes the behaviour when ablated.

    Each step ablates every basis vector, and four random directions inside the cone, one at a time at every writer
    with strength 1. Its loss is the log-probability of the expressing answers (above a floor) plus `kl_weight` times
    the KL of what follows other prompts. Adam moves the basis; it is made orthonormal again after each step. The first
    vector starts at `direction`, the others at random at right angles to it. Deterministic by seed.
    Source: refusal cone optimization (Wollschlaeger et al. 2025, https://arxiv.org/abs/2502.17420). Unlike there,
    what the unedited model answers is made unlikely instead of an edited answer likely, and the loss has no term for
    additions: try `Add` of `cone.directions` on negative prompts. Ablate the whole cone with
    `Ablate(cone.vectors, model.writers)`, which is exact in weights.

    Args:
        data: `fit_data` of training prompts.
        rank: directions of the cone.
        orthogonal_to: directions to which every basis vector stays orthogonal.

    Raises:
        PlanError: numbers out of range.
        DirectionError: another d_model, directions that leave the first vector nothing.
    """
    check_model(model)
    _check(model, direction, rank, steps, kl_weight)
    generator = torch.Generator().manual_seed(seed)
    outside = _outside(orthogonal_to, model.d_model)
    basis = _first_basis(direction, rank, outside, generator)
    vectors = basis.float().to(model.device).requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=RATE, betas=(0.9, 0.98))
    losses: list[float] = []
    with telling_of_memory("while a cone was fitted"):
        for step in with_bar(range(steps), "cone"):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (0.15 + 0.85 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.zero_grad()
            shares = torch.cat(
                [torch.eye(rank), _mixtures(MIXTURES if rank > 1 else 0, rank, generator)]
            )
            some, total = data.some(step), 0.0
            for share in shares.to(vectors):
                total += _backward(
                    model, vectors, share, some, kl_weight / len(shares), len(shares)
                )
            losses.append(total)
            _check_finite(total, step)
            optimizer.step()
            with torch.no_grad():
                vectors.copy_(_orthonormal(vectors.double().cpu(), outside))
    # the last: losses of two steps are of different rows, so the lowest is not the best
    last = vectors.detach().double().cpu()
    return ConceptCone(_orthonormal(last, outside), direction, tuple(losses))


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the loss of a cone is not finite at step {step}: use --dtype float32, or fewer directions"
        )


def ablation_loss(
    model: Model, along: Float[Tensor, " d_model"], data: FitData
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Of a direction ablated at every writer: how likely the expressing answers are, and the KL on other prompts.

    Gradients flow to `along`, which is scaled to unit length. Two forward passes, each over all rows at once.
    """
    unit = along / along.norm()
    sites = model.writers
    ones = torch.ones(len(sites), device=unit.device)
    with model.plans.fitting_erasure(unit, unit, sites, ones):
        likely = softplus(answer_logprobs(model, data) - UNLIKELY).mean()
        return likely, kept_kls(model, data).mean()


def _backward(
    model: Model, vectors: Tensor, share: Tensor, data: FitData, kl_weight: float, count: int
) -> float:
    """Gradients of one mixture's part of the loss, added to those of the basis; and the part."""
    likely, kl = ablation_loss(model, share @ vectors, data)
    loss = likely / count + kl_weight * kl.to(likely.device)
    loss.backward()
    return float(loss.detach())


def _mixtures(count: int, rank: int, generator: torch.Generator) -> Float[Tensor, "count rank"]:
    """Shares of unit length without a negative one, uniform over angles."""
    shares = torch.randn(count, rank, generator=generator).abs()
    return shares / shares.norm(dim=1, keepdim=True)


def _outside(directions: Sequence[Direction], d_model: int) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of what the cone stays orthogonal to."""
    if any(len(each.vector) != d_model for each in directions):
        raise DirectionError(f"orthogonal_to holds a direction of another d_model than {d_model}")
    if not directions:
        return torch.zeros(0, d_model, dtype=torch.float64)
    return orthonormal_rows(torch.stack([each.vector for each in directions]))


def _first_basis(
    direction: Direction, rank: int, outside: Tensor, generator: torch.Generator
) -> Float[Tensor, "rank d_model"]:
    first = direction.vector - (direction.vector @ outside.T) @ outside
    if float(first.norm()) < 1e-6:
        raise DirectionError(
            "the direction lies in the span of orthogonal_to: nothing of it is left to start at"
        )
    others = torch.randn(rank - 1, len(first), generator=generator, dtype=torch.float64)
    return _orthonormal(torch.cat([first[None], others]), outside)


def _orthonormal(vectors: Tensor, outside: Tensor) -> Float[Tensor, "rank d_model"]:
    """Gram-Schmidt in the vectors' order, at right angles to `outside`."""
    rows = orthonormal_rows(torch.cat([outside, vectors]))
    return rows[len(outside) :].contiguous()


def _check(model: Model, direction: Direction, rank: int, steps: int, kl_weight: float) -> None:
    if len(as_direction(direction).vector) != model.d_model:
        raise DirectionError(
            f"the direction has d_model {len(direction.vector)}, the model {model.d_model}"
        )
    limits = {"rank": (rank, 1), "steps": (steps, 1)}
    for name, (value, least) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{name} is a whole number from {least}; got {value!r}")
    if not 0 <= kl_weight < math.inf:
        raise PlanError(f"kl_weight is a finite number from 0; got {kl_weight!r}")
    if rank >= model.d_model:
        raise PlanError(f"a cone of {rank} directions in {model.d_model} dimensions: give fewer")
