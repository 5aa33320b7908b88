"""SOM directions: several directions of one concept, from a self-organizing map over the positive activations.

Knows: the map and its directions at one site. Does not know: models, hooks or plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.directions.direction import ZERO_TOLERANCE, Direction, PerPrompt
from interp_ablate.directions.mean_difference import as_float64, checked_means
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

GRID, RADIUS = (2, 2), 0.33
MOST_STEPS = 200  # a map that has not come to rest by then is taken as it is


@dataclass(frozen=True, eq=False)
class SelfOrganizingMap:
    """A fitted map: neurons on a hexagonal grid, and the direction of each that wins a prompt."""

    neurons: Float[Tensor, "neuron d_model"]
    """Places in the stream, float64."""
    grid: Float[Tensor, "neuron 2"]
    """Places on the grid, where neighbours are 1 apart."""
    winners: Int[Tensor, " prompt"]
    """For each positive prompt the number of its nearest neuron."""
    directions: tuple[Direction, ...]
    """Neuron minus negative mean, the neuron of the most prompts first; methods som_1, som_2 and so on."""

    @property
    def vectors(self) -> Float[Tensor, "direction d_model"]:
        """The unit vectors of the directions, as `Ablate` takes a subspace (it makes them orthonormal)."""
        return torch.stack([item.vector for item in self.directions])


def som_directions(
    positive: PerPrompt,
    negative: PerPrompt,
    site: Site,
    *,
    grid: tuple[int, int] = GRID,
    radius: float = RADIUS,
    seed: int = 0,
    position: str = "-1",
    source: str = "",
) -> SelfOrganizingMap:
    """Several directions of one concept: the neurons of a map over the positive activations, minus the negative mean.

    A neuron is the mean of the positive activations, each weighted by exp(-(distance on the grid to its nearest
    neuron)^2 / (2 radius^2)). This is Kohonen's batch rule, repeated until no prompt changes its neuron; the paper
    steps through prompts one at a time at random instead. A map of one neuron is the difference in means to rounding.
    Neurons start at positive prompts drawn by `seed`; the same seed gives the same bits. Neurons that win no
    prompt, and those that lie on the negative mean, give no direction. Ablate all of them as one subspace,
    `Ablate(found.vectors, sites)`, which leaves nothing along any.
    Source: Piras et al. 2025, https://arxiv.org/abs/2511.08379; the batch map: Kohonen 1995.

    Args:
        grid: rows and columns of neurons; the paper goes up to 4 x 4.
        radius: of the neighbourhood in steps of the grid. A small one makes clusters, a large one a single mean.

    Raises:
        DirectionError: as `difference_in_means`, and a difference of zero; a grid, radius or seed out of range; fewer
            different positive activations than neurons.
    """
    rows, columns = _checked(grid, radius, seed)
    checked_means(positive, negative, site, position)
    x, centre = as_float64(positive), as_float64(negative).mean(0)
    places = _hexagonal(rows, columns)
    neurons = _first_neurons(x, len(places), seed, site)
    closeness = torch.exp(-torch.cdist(places, places).square() / (2 * float(radius) ** 2))
    winners = torch.full((len(x),), -1)
    for _ in range(MOST_STEPS):
        nearest = _distances(x, neurons).argmin(1)
        if torch.equal(nearest, winners):
            break
        winners = nearest
        weights = closeness[:, winners]  # [neuron, prompt]
        total = weights.sum(1, keepdim=True)
        # a neuron so far from all that win that its weights are rounding stays where it is
        neurons = torch.where(total > 0, weights @ x / total.clamp(min=1e-300), neurons)
    wins = torch.bincount(winners, minlength=len(neurons))
    scale = max(float(centre.norm()), float(x.norm(dim=1).max()))
    order = sorted(range(len(neurons)), key=lambda i: (-int(wins[i]), i))
    found = [
        (neurons[i] - centre)
        for i in order
        if wins[i] and float((neurons[i] - centre).norm()) > ZERO_TOLERANCE * scale
    ]
    directions = tuple(
        Direction(each, float(each.norm()), site, position, f"som_{i}", source=source)
        for i, each in enumerate(found, 1)
    )
    return SelfOrganizingMap(neurons, places, winners, directions)


def _checked(grid: tuple[int, int], radius: float, seed: int) -> tuple[int, int]:
    whole = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise DirectionError(f"a grid is two whole numbers from 1, such as (2, 2); got {grid!r}")
    if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 < radius < math.inf:
        raise DirectionError(f"a radius is a finite number above 0; got {radius!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise DirectionError(f"a seed is a whole number from 0 to 2**63 - 1; got {seed!r}")
    return grid[0], grid[1]


def _hexagonal(rows: int, columns: int) -> Float[Tensor, "neuron 2"]:
    """Places of a hexagonal grid: every second row is half a step to the right, and all neighbours are 1 apart."""
    places = [
        (c + 0.5 * (r % 2), r * math.sqrt(3) / 2) for r in range(rows) for c in range(columns)
    ]
    return torch.tensor(places, dtype=torch.float64)


def _distances(
    x: Float[Tensor, "prompt d_model"], neurons: Float[Tensor, "neuron d_model"]
) -> Float[Tensor, "prompt neuron"]:
    """Squared distances but for each prompt's own norm, about the prompts' mean: offsets cost no digits."""
    middle = x.mean(0)
    moved = neurons - middle
    return moved.square().sum(1) - 2 * (x - middle) @ moved.T


def _first_neurons(x: PerPrompt, count: int, seed: int, site: Site) -> PerPrompt:
    """Different positive activations, drawn by the seed."""
    different = torch.unique(x, dim=0)
    if len(different) < count:
        raise DirectionError(
            f"{len(different)} different positive activations at {site} cannot make a map of {count} neurons: "
            "give more prompts, or a smaller grid"
        )
    generator = torch.Generator().manual_seed(seed)
    return different[torch.randperm(len(different), generator=generator)[:count]]
