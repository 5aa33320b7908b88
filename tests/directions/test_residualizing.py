"""SRA: the ridge's own equation, its two limits, places, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.residualizing import residualized, residualized_directions
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

D, SITE = 24, Site(3, "resid_post")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction(seed: int = 0, layer: int = 3, position: str = "-1") -> Direction:
    return Direction(draw(seed, D), 7.0, Site(layer, "resid_post"), position, source="s")


@pytest.mark.parametrize("ridge", (0.0, 0.01, 3.0))
def test_the_rest_is_the_ridge_residual(ridge: float) -> None:
    """Its normal equation in numpy, of unit vectors whatever lengths are given."""
    item, atoms = direction(), draw(1, 4, D) * torch.tensor([[1.0], [50], [1e-3], [2]])
    clean = residualized(item, list(atoms), ridge=ridge)
    a = (atoms / atoms.norm(dim=1, keepdim=True)).numpy().T
    w = np.linalg.solve(a.T @ a + ridge * np.eye(4), a.T @ item.raw.numpy())
    np.testing.assert_allclose(clean.raw.numpy(), item.raw.numpy() - a @ w, atol=1e-12)
    # at the ridge's minimum the part that is left along the atoms is the ridge times their weights
    np.testing.assert_allclose(a.T @ clean.raw.numpy(), ridge * w, atol=1e-12)
    assert clean.method == "difference_in_means_residualized" and clean.separation is None
    assert (clean.site, clean.position, clean.source) == (item.site, item.position, "s")


def test_one_concept_keeps_the_share_that_its_ridge_says() -> None:
    item, atom = direction(), direction(1)
    for ridge in (0.0, 0.25, 4.0):
        clean = residualized(item, [atom], ridge=ridge)
        left = float(clean.raw @ atom.vector) / float(item.raw @ atom.vector)
        assert left == pytest.approx(ridge / (1 + ridge), abs=1e-12)
    # what is at right angles to all that is protected stays as it was
    beside = item.raw - (item.raw @ atom.vector) * atom.vector
    torch.testing.assert_close(residualized(item, atom.vector, ridge=0).raw, beside)


def test_a_planted_confound_is_taken_out_and_the_concept_stays() -> None:
    """The direction is concept + confound; protected prompts differ in the confound alone."""
    concept, confound = torch.linalg.qr(draw(5, D, 2))[0].T
    clean = residualized(Direction(concept + 2 * confound, 3.0, SITE), [4 * confound], ridge=0)
    assert clean.cosine(concept) == pytest.approx(1, abs=1e-12)


def test_atoms_that_depend_on_each_other_are_no_trouble() -> None:
    item, atom = direction(), draw(1, D)
    twice = residualized(item, [atom, -3 * atom, atom + 1e-9 * draw(2, D)], ridge=0.01)
    once = residualized(item, [atom], ridge=0.01 / 3)  # three of one kind weigh three times
    torch.testing.assert_close(twice.raw, once.raw, atol=1e-7, rtol=0)
    exact = residualized(item, [atom, -3 * atom], ridge=0)
    torch.testing.assert_close(exact.raw, residualized(item, [atom], ridge=0).raw)


def test_each_place_is_cleaned_by_its_own_protected_directions() -> None:
    items = Directions((direction(0, 1), direction(1, 2), direction(2, 2, "-2"), direction(3, 5)))
    maths = Directions((direction(10, 1), direction(11, 2), direction(12, 2, "-2")))
    style = Directions((direction(20, 2),))
    found = residualized_directions(items, {"maths": maths, "style": style}, ridge=0)
    assert [(d.site.layer, d.position) for d in found] == [(1, "-1"), (2, "-1"), (2, "-2")]
    for item, by in zip(
        found, ([maths.items[0]], [maths.items[1], style.items[0]], [maths.items[2]])
    ):
        assert max(abs(item.cosine(each)) for each in by) < 1e-12
    [(place, why)] = found.left_out.items()
    assert place.startswith("blocks.5.hook_resid_post[-1]") and "no protected concept" in why


def test_what_cannot_be_done_is_refused() -> None:
    item = direction()
    for ridge in (-1, float("nan"), float("inf"), True, "a"):
        with pytest.raises(DirectionError, match="a ridge is a finite number from 0"):
            residualized(item, [draw(1, D)], ridge=ridge)  # type: ignore[arg-type]
    with pytest.raises(DirectionError, match="by name"):
        residualized(item, {"a": item})  # type: ignore[arg-type]
    with pytest.raises(DirectionError, match="at least one protected"):
        residualized(item, [])
    with pytest.raises(DirectionError, match=r"\(24,\), a protected one \(23,\)"):
        residualized(item, [draw(1, D - 1)])
    with pytest.raises(DirectionError, match="zero or not finite"):
        residualized(item, [torch.zeros(D)])
    with pytest.raises(DirectionError, match=r"nothing is left.*span it"):
        residualized(item, [item.vector, draw(1, D)], ridge=0)
    with pytest.raises(DirectionError, match="no direction is left"):
        residualized_directions(Directions((item,)), {"x": Directions((direction(1, 9),))})
    with pytest.raises(DirectionError, match="at least one"):
        residualized_directions(Directions((item,)), {})
