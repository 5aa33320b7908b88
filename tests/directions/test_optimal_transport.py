"""Gaussian optimal transport: its moments, its smallness, what it leaves alone, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from interp_ablate.directions.optimal_transport import gaussian_transport
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D, SITE = 12, Site(2, "mlp_out")


def sets(seed: int, positives: int = 60, negatives: int = 45) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = draw(positives, D) @ draw(D, D) + 3 * draw(D)
    return first, draw(negatives, D) @ draw(D, D) * 0.5 + draw(D)


@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("seed", range(3))
def test_mean_and_covariance_in_the_subspace_are_the_targets(seed: int, rank: int) -> None:
    positive, negative = sets(seed)
    found = gaussian_transport(positive, negative, SITE, rank=rank)
    edit = AffineEdit.of(found, SITE)
    moved = edit.map_at(SITE)(positive)
    basis = found.components.numpy()
    # numpy's moments, in the subspace
    for what in (lambda x: x.mean(0), lambda x: np.cov(x.T)):
        np.testing.assert_allclose(
            what(moved.numpy() @ basis.T), what(negative.numpy() @ basis.T), rtol=1e-9, atol=1e-9
        )
        assert not np.allclose(what(positive.numpy() @ basis.T), what(negative.numpy() @ basis.T))
    # nothing across the subspace is touched
    outside = np.eye(D) - basis.T @ basis
    np.testing.assert_allclose(moved.numpy() @ outside, positive.numpy() @ outside, atol=1e-10)
    assert_close(found(positive), moved)
    assert_close(found(positive.float()), moved.float())


def test_the_components_are_those_of_both_sets_together() -> None:
    positive, negative = sets(1)
    found = gaussian_transport(positive, negative, SITE, rank=4)
    both = torch.cat([positive, negative]).numpy()
    values, vectors = np.linalg.eigh(np.cov(both.T))
    apart = found.components.numpy() @ vectors[:, -4:]
    np.testing.assert_allclose(np.linalg.svd(apart)[1], 1, atol=1e-9)
    assert found.explained == pytest.approx(values[-4:].sum() / values.sum())


def test_no_other_map_of_the_same_moments_moves_less() -> None:
    """The matrix is symmetric and positive (Brenier); any rotation before or behind it moves activations more."""
    positive, negative = sets(2)
    found = gaussian_transport(positive, negative, SITE, rank=5)
    matrix = found.matrix
    assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    z = positive @ found.components.T - found.source_mean
    target = (negative @ found.components.T).T.cov()
    root = torch.linalg.cholesky(target)
    least = (z @ matrix - z).square().sum()
    whiten = torch.linalg.inv(torch.linalg.cholesky(z.T.cov()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
        other = root @ turn @ whiten
        assert_close((z @ other.T).T.cov(), target, rtol=1e-8, atol=1e-8)  # the same moments
        assert (z @ other.T - z).square().sum() > least


def test_equal_covariances_leave_a_translation() -> None:
    positive, _ = sets(3)
    found = gaussian_transport(positive, positive - 2.5, SITE, rank=3)
    assert_close(found.matrix, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_labels_say_where_it_is_from() -> None:
    positive, negative = sets(4)
    found = gaussian_transport(positive, negative, SITE, rank=2, position="-2", source="here")
    assert found.name == f"gaussian_transport2@{SITE}[-2]" and found.source == "here"
    assert AffineEdit.of(found, SITE).label == found.name
    again = gaussian_transport(positive, negative, SITE, rank=2, position="-2")
    assert found.fingerprint == again.fingerprint
    assert found.fingerprint != gaussian_transport(positive, negative, SITE, rank=3).fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "a rank is an integer from 1"),
        ({"rank": True}, "a rank is an integer from 1"),
        ({"rank": 1.5}, "a rank is an integer from 1"),
        ({"rank": 6, "positives": 6}, r"covariance of rank 5 at most: rank 6 needs 7 or more"),
        ({"rank": 4, "flat": True}, r"vary in 2 of the 4 principal components only"),
        ({"rank": 2, "spoiled": True}, "NaN"),
    ],
)
def test_what_has_no_map_is_refused(change: dict[str, Any], said: str) -> None:
    positive, negative = sets(5)
    positive = positive[: change.get("positives", 60)]
    if change.get("flat"):
        positive = positive.clone()
        positive[:, 2:] = 1.0
        negative = negative.clone()
        negative[:, 4:] = 1.0
    if change.get("spoiled"):
        positive = positive.clone()
        positive[0, 0] = float("nan")
    with pytest.raises(DirectionError, match=said):
        gaussian_transport(positive, negative, SITE, rank=change["rank"])
