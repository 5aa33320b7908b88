"""The plane of angular steering: orthonormal, and the best axis beside the feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.rotation_planes import steering_plane
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D = 10


def directions(n: int) -> list[Direction]:
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 1] += 2.0
    return [Direction(row, 1.0, Site(i, "resid_post")) for i, row in enumerate(rows)]


def test_the_plane_is_the_feature_and_the_main_axis_of_all() -> None:
    found = directions(6)
    first, second = steering_plane(found[2], found)
    assert torch.allclose(first, found[2].vector.double())
    assert abs(float(first @ second)) < 1e-12 and float(second.norm()) == pytest.approx(1)
    units = np.stack([each.vector.double().numpy() for each in found])
    _, vectors = np.linalg.eigh(units.T @ units)
    axis = vectors[:, -1]
    beside = axis - (axis @ first.numpy()) * first.numpy()
    assert abs(beside @ second.numpy()) / np.linalg.norm(beside) == pytest.approx(1)
    assert units.mean(0) @ second.numpy() >= 0


def test_no_plane() -> None:
    (one,) = directions(1)
    with pytest.raises(DirectionError, match="along the feature"):
        steering_plane(one, [one, one])
    with pytest.raises(DirectionError, match="needs candidates"):
        steering_plane(one, [])
