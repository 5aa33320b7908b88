"""SOM directions: the batch rule's fixed point, one neuron as the difference in means, planted clusters, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_ablate import Ablate, Plan
from interp_ablate.directions.mean_difference import difference_in_means
from interp_ablate.directions.self_organizing_map import som_directions
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D, SITE = 20, Site(2, "resid_post")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(seed: int = 0, each: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Positive activations in three clusters of different size, negative ones, and the clusters' centres."""
    centres = 12 * draw(seed + 7, 3, D) / D**0.5 + 3
    parts = [draw(seed + i, each * (3 - i), D) * 0.3 + centres[i] for i in range(3)]
    return torch.cat(parts), draw(seed + 50, 40, D) * 0.3, centres


def test_one_neuron_is_the_difference_in_means() -> None:
    """What the paper proves of its maps, here to rounding."""
    positive, negative, _ = clusters()
    means = difference_in_means(positive, negative, SITE)
    assert means is not None
    [only] = som_directions(positive, negative, SITE, grid=(1, 1)).directions
    torch.testing.assert_close(only.raw, means.raw, atol=1e-12, rtol=1e-12)
    # and so is each neuron of a map whose neighbourhood is far larger than its grid
    wide = som_directions(positive, negative, SITE, grid=(2, 3), radius=1e6)
    assert all(item.cosine(means) > 1 - 1e-9 for item in wide.directions)


@pytest.mark.parametrize("grid", [(1, 3), (2, 2), (3, 3)])
@pytest.mark.parametrize("radius", [0.2, 0.6])
def test_every_neuron_is_the_mean_that_its_neighbourhood_weighs(
    grid: tuple[int, int], radius: float
) -> None:
    """The rule written out in numpy: nearest neurons, then weighted means, of the map that came to rest."""
    positive, negative, _ = clusters(3)
    found = som_directions(positive, negative, SITE, grid=grid, radius=radius, seed=1)
    x, neurons = positive.numpy(), found.neurons.numpy()
    nearest = ((x[:, None] - neurons[None]) ** 2).sum(-1).argmin(1)
    assert nearest.tolist() == found.winners.tolist()
    for i, neuron in enumerate(neurons):
        away = np.linalg.norm(found.grid.numpy()[i] - found.grid.numpy()[nearest], axis=1)
        weights = np.exp(-(away**2) / (2 * radius**2))
        np.testing.assert_allclose(neuron, np.average(x, axis=0, weights=weights), atol=1e-10)


def test_the_grid_is_hexagonal() -> None:
    found = som_directions(*clusters()[:2], SITE, grid=(3, 3))
    middle = torch.cdist(found.grid, found.grid)[4]
    assert sum(math.isclose(float(each), 1, abs_tol=1e-12) for each in middle) == 6


def test_planted_clusters_are_found_most_prompts_first() -> None:
    positive, negative, centres = clusters()
    best = min(
        (
            som_directions(positive, negative, SITE, grid=(1, 3), radius=0.1, seed=s)
            for s in range(6)
        ),
        key=lambda f: float((positive - f.neurons[f.winners]).square().sum()),
    )
    wins = torch.bincount(best.winners, minlength=3).sort(descending=True).values.tolist()
    assert wins == [90, 60, 30]
    assert [item.method for item in best.directions] == ["som_1", "som_2", "som_3"]
    for item, centre in zip(best.directions, centres):
        assert item.cosine(centre - negative.mean(0)) > 0.999
    single = difference_in_means(positive, negative, SITE)
    assert single is not None
    left = Plan((Ablate(best.vectors, SITE),)).maps_at(SITE)[0][1](positive - negative.mean(0))
    assert (left @ best.vectors.T).abs().max() < 1e-10  # all of them at once, exactly
    alone = Plan((Ablate(single, SITE),)).maps_at(SITE)[0][1](positive - negative.mean(0))
    assert alone.norm() > 4 * left.norm()  # one direction leaves most of three clusters


def test_a_seed_decides_all_and_offsets_nothing() -> None:
    positive, negative, _ = clusters(2)
    first, again = (som_directions(positive, negative, SITE, seed=4) for _ in range(2))
    assert torch.equal(first.neurons, again.neurons)
    assert [d.fingerprint for d in first.directions] == [d.fingerprint for d in again.directions]
    shuffled = positive[torch.randperm(len(positive), generator=torch.Generator().manual_seed(1))]
    other = som_directions(shuffled, negative, SITE, seed=4)
    torch.testing.assert_close(other.neurons, first.neurons)  # the order of prompts says nothing
    moved = som_directions(positive + 1e5, negative + 1e5, SITE, seed=4)
    for a, b in zip(first.directions, moved.directions, strict=True):
        torch.testing.assert_close(a.raw, b.raw, atol=1e-6, rtol=0)


def test_neurons_without_a_prompt_give_no_direction() -> None:
    positive = torch.cat([draw(0, 1, D), draw(1, 1, D)]).repeat(5, 1) + 1e-9 * draw(2, 10, D)
    found = som_directions(positive, draw(3, 9, D) + 5, SITE, grid=(3, 3), radius=0.6)
    wins = torch.bincount(found.winners, minlength=9)
    assert len(found.directions) == int((wins > 0).sum()) < 9


def test_what_makes_no_map_is_refused() -> None:
    positive, negative, _ = clusters()
    for grid in ((0, 2), (2,), 4, (2.0, 2), (True, 2)):
        with pytest.raises(DirectionError, match="a grid is two whole numbers"):
            som_directions(positive, negative, SITE, grid=grid)  # type: ignore[arg-type]
    for radius in (0, -1, math.nan, math.inf):
        with pytest.raises(DirectionError, match="a radius is a finite number above 0"):
            som_directions(positive, negative, SITE, radius=radius)
    with pytest.raises(DirectionError, match="a seed is a whole number"):
        som_directions(positive, negative, SITE, seed=-1)
    with pytest.raises(DirectionError, match=r"1 different positive.*map of 4 neurons"):
        som_directions(positive[:1].repeat(9, 1), negative, SITE)
    with pytest.raises(DirectionError, match="difference in means is zero"):
        som_directions(positive, positive, SITE)
