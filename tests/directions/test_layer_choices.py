"""Layers by opposite signs, and directions that are made orthogonal at each layer: plain sums as the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_ablate.activations.activations import Activations
from interp_ablate.directions.biprojection import biprojected_directions
from interp_ablate.directions.direction import Direction, orthogonalized
from interp_ablate.directions.mean_difference import estimate_directions
from interp_ablate.directions.opposite_signs import mean_projections, with_opposite_signs
from interp_ablate.edits.layer_plans import ablate_by_layer
from interp_ablate.errors import DirectionError, PlanError
from interp_ablate.sites import Site, sites_of

D, N = 16, 12
SITES = tuple(Site(layer, "resid_post") for layer in range(4))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONCEPT = draw(99, D) / draw(99, D).norm()


def planted(offsets: tuple[float, ...] = (5.0, 0.0, 0.2, -5.0)) -> Activations:
    """Two sets 2 apart along CONCEPT at every layer, and where their middle lies along it."""
    labels = torch.arange(2 * N) < N
    values = draw(0, 2 * N, 1, 4, D) * 0.01
    for i, offset in enumerate(offsets):
        values[:, 0, i] += (offset + labels.double() * 2 - 1)[:, None] * CONCEPT
    return Activations(values, SITES, ("-1",), labels)


def test_layers_are_kept_where_the_means_lie_on_opposite_sides() -> None:
    activations = planted()
    directions = estimate_directions(activations)
    kept = with_opposite_signs(directions, activations)
    assert [item.site.layer for item in kept] == [1, 2]
    assert set(kept.left_out) == {
        "blocks.0.hook_resid_post[-1] difference_in_means",
        "blocks.3.hook_resid_post[-1] difference_in_means",
    }
    table = mean_projections(directions, activations)
    values, labels = activations.values.numpy(), activations.labels.numpy()  # type: ignore[union-attr]
    for i, (item, row) in enumerate(zip(directions, table.itertuples())):
        along = values[:, 0, i] @ item.vector.numpy()
        np.testing.assert_allclose(
            [row.positive, row.negative], [along[labels].mean(), along[~labels].mean()]
        )
        assert row.opposite == (along[labels].mean() * along[~labels].mean() < 0)


def test_one_direction_is_projected_on_at_every_layer() -> None:
    table = mean_projections(Direction(-CONCEPT, 1.0, SITES[2]), planted())
    assert table["layer"].tolist() == [0, 1, 2, 3]
    assert table["opposite"].tolist() == [False, True, True, False]
    np.testing.assert_allclose(table["positive"], [-6, -1, -1.2, 4], atol=0.02)


def test_no_layer_at_all_is_an_error() -> None:
    activations = planted((5.0,) * 4)
    with pytest.raises(DirectionError, match=r"none of 4 directions.*opposite sides of zero"):
        with_opposite_signs(estimate_directions(activations), activations)
    one_set = Activations(activations.values[:N], SITES, ("-1",), torch.ones(N, dtype=torch.bool))
    with pytest.raises(DirectionError, match="both sets"):
        mean_projections(Direction(CONCEPT, 1.0, SITES[0]), one_set)


def test_each_site_loses_its_own_negative_mean() -> None:
    activations = planted()
    activations.values[:, 0] += 3 * draw(5, 4, D)  # every layer has a mean of its own
    measured = estimate_directions(activations)[SITES[1]]
    found = biprojected_directions(measured, activations)
    assert [item.site for item in found] == list(SITES)
    labels = activations.labels
    assert labels is not None
    for i, item in enumerate(found):
        mean = activations.values[~labels, 0, i].mean(0)
        assert abs(item.cosine(mean)) < 1e-14
        # one Gram-Schmidt step in numpy, from the direction that was measured elsewhere
        unit = mean.numpy() / np.linalg.norm(mean.numpy())
        raw = measured.raw.numpy()
        np.testing.assert_allclose(item.raw.numpy(), raw - (raw @ unit) * unit, atol=1e-12)
        assert item.method == "biprojected" and "blocks.1.hook_resid_post" in item.source
    own = orthogonalized(measured, activations.at(SITES[1])[~labels].mean(0))
    torch.testing.assert_close(found.items[1].vector, own.vector, atol=1e-15, rtol=0)
    some = biprojected_directions(measured, activations, ["blocks.3.hook_resid_post"])
    assert [item.site.layer for item in some] == [3]


def test_a_place_where_nothing_is_left_is_left_out() -> None:
    activations = planted()
    activations.values[:, 0, 3] = -4 * CONCEPT
    found = biprojected_directions(Direction(CONCEPT, 2.0, SITES[1]), activations)
    assert 3 not in {item.site.layer for item in found}
    assert "parallel" in found.left_out["blocks.3.hook_resid_post[-1]"]


def test_biprojection_refuses_what_was_not_collected() -> None:
    activations = planted()
    with pytest.raises(DirectionError, match=r"position -2.*hold -1"):
        biprojected_directions(Direction(CONCEPT, 1.0, SITES[0], "-2"), activations)
    with pytest.raises(DirectionError, match="no site of resid_mid"):
        biprojected_directions(Direction(CONCEPT, 1.0, Site(0, "resid_mid")), activations)
    with pytest.raises(DirectionError, match="d_model 3"):
        biprojected_directions(Direction(torch.ones(3), 1.0, SITES[0]), activations)
    positives = Activations(activations.values, SITES, ("-1",), torch.ones(2 * N, dtype=torch.bool))
    with pytest.raises(DirectionError, match="negative prompts"):
        biprojected_directions(Direction(CONCEPT, 1.0, SITES[0]), positives)


@dataclass
class Writers:
    n_layers = 4
    writers = (Site(0, "embed"), *sites_of(("attn_out", "mlp_out"), range(4)))


def test_a_plan_by_layer_removes_each_layers_direction_from_what_that_layer_writes() -> None:
    items = [Direction(draw(layer, D), 1.0, Site(layer, "resid_post")) for layer in (1, 3)]
    plan = ablate_by_layer(Writers(), items, strength=0.5, norm_preserving=True)
    assert [[str(s) for s in edit.sites] for edit in plan] == [
        [f"blocks.{n}.hook_attn_out", f"blocks.{n}.hook_mlp_out"] for n in (1, 3)
    ]
    for edit, item in zip(plan, items):
        assert torch.equal(edit.vectors[0], item.vector) and set(edit.amounts) == {0.5}
        assert edit.norm_preserving
    with pytest.raises(PlanError, match=r"of layer 9.*layers 0 to 3"):
        ablate_by_layer(Writers(), [Direction(CONCEPT, 1.0, Site(9, "resid_post"))])
