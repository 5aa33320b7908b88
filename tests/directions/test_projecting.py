"""Projections by hand: operators of a direction in every dtype, the tidy table, frames and named axes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import D_MODEL, N_LAYERS, shared, unit

from interp_ablate import (
    ContrastSet,
    Direction,
    Directions,
    Site,
    collect,
    estimate_directions,
    project,
)
from interp_ablate.directions.direction import Separation
from interp_ablate.errors import DirectionError, InterpAblateError

DIRECTION = Direction(3 * unit(), 2.0, Site(1, "resid_post"), separation=Separation(0.75, 1.5))
PAIRS = ContrastSet.from_texts(["one dog", "a cat", "my cow"], ["Why?", "Name it", "Tell me"])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_activations_are_projected_from_either_side(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.einsum("abd,d->ab", x.double(), unit())
    for got in (DIRECTION @ x, x @ DIRECTION, torch.matmul(x, DIRECTION)):  # type: ignore[arg-type, call-overload]
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    array = x.float().numpy()
    for values in (DIRECTION @ array, array @ DIRECTION):
        assert isinstance(values, np.ndarray)
        np.testing.assert_allclose(values, want.numpy(), atol=1e-12)
    gradients = torch.randn(D_MODEL, requires_grad=True)
    assert not (gradients @ DIRECTION).requires_grad  # type: ignore[operator]


def test_other_operations_and_widths_are_refused() -> None:
    with pytest.raises(DirectionError, match=f"{D_MODEL}"):
        DIRECTION @ torch.ones(3)
    with pytest.raises(TypeError):
        torch.ones(D_MODEL) + DIRECTION  # type: ignore[operator]
    with pytest.raises(DirectionError, match="zeros"):
        DIRECTION.cosine(torch.zeros(D_MODEL))


def test_the_opposite_and_the_cosine() -> None:
    opposite = -DIRECTION
    assert torch.equal(opposite.vector, -DIRECTION.vector) and opposite.norm == 2.0
    assert opposite.separation == Separation(0.25, -1.5)
    assert torch.equal((-opposite).vector, DIRECTION.vector)
    other = Direction(unit(1), 1.0, Site(0, "embed"))
    assert DIRECTION.cosine(opposite) == pytest.approx(-1) and abs(DIRECTION.cosine(other)) < 1
    assert DIRECTION.cosine(7 * unit(1).float()) == pytest.approx(float(unit() @ unit(1)), abs=1e-6)
    assert DIRECTION @ other == pytest.approx(float(unit() @ unit(1)))


def test_the_table_holds_every_product(backend: str) -> None:
    model = shared(backend=backend)
    activations = collect(model, PAIRS, positions=(-1, -2))
    directions = estimate_directions(activations)
    frame = project(activations, directions)
    assert list(frame.columns) == [
        "layer", "point", "position", "token", "label", "prompt", "projection", "unit", "direction",
    ]  # fmt: skip
    assert len(frame) == 6 * len(directions) and set(frame["unit"]) == {"activation"}
    texts = [p.text for p in (*PAIRS.positive, *PAIRS.negative)]
    for item in directions:
        rows = frame[frame["direction"] == item.name]
        sites = activations.sites.index(item.site), activations.positions.index(item.position)
        x = activations.values[:, sites[1], sites[0]].double()
        np.testing.assert_allclose(rows["projection"], (x @ item.vector).numpy(), atol=1e-12)
        assert (
            list(rows["prompt"]) == texts
            and list(rows["label"]) == ["positive"] * 3 + ["negative"] * 3
        )
        assert set(rows["token"]) == {"\n" if item.position == "-1" else "t"}
    elsewhere = project(activations, Direction(unit(), 1.0, Site(0, "resid_post"), "response_mean"))
    assert set(elsewhere["position"]) == {"-1", "-2"}


def test_units_and_what_is_refused() -> None:
    activations = collect(shared(), PAIRS)
    directions = estimate_directions(activations).of("difference_in_means")
    in_norms = project(activations, directions, unit="norm")
    for _, rows in in_norms.groupby("direction"):
        means = rows.groupby("label")["projection"].mean()
        assert means["positive"] - means["negative"] == pytest.approx(1, abs=1e-4)
    for wrong in ({"unit": "metre"}, {"directions": ()}):
        with pytest.raises(DirectionError, match="activation, norm"):
            project(activations, **{"directions": directions, **wrong})  # type: ignore[arg-type]
    with pytest.raises(InterpAblateError, match="no activations at"):
        project(activations, Direction(unit(), 1.0, Site(0, "mlp_out")))
    assert list(project(collect(shared(), ["Hi"]), DIRECTION)["label"]) == [""]


def test_frames_and_named_axes() -> None:
    activations = collect(shared(), PAIRS, positions=(-1, -2))
    frame = activations.to_frame()
    assert frame.shape == (6 * 2 * len(activations.sites), D_MODEL)
    some = frame.xs((4, "negative", "-2", 2, "resid_post")).to_numpy()
    np.testing.assert_array_equal(some, activations.at("2.resid_post", -2)[4].numpy())
    xarray = pytest.importorskip("xarray")
    array = activations.to_xarray()
    assert isinstance(array, xarray.DataArray)
    picked = array.sel(position="-2", site="blocks.2.hook_resid_post").isel(prompt=4)
    np.testing.assert_array_equal(picked.to_numpy(), some)
    assert list(array.label.to_numpy()) == ["positive"] * 3 + ["negative"] * 3
    directions = estimate_directions(activations)
    table = directions.to_frame()
    assert len(table) == len(directions) and table["layer"].max() == N_LAYERS - 1
    assert table["auc"].isna().all() == (directions.items[0].separation is None)
    assert isinstance(Directions(()).to_frame(), pd.DataFrame) and repr(Directions(()))


def test_a_cache_gives_the_texts_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = collect(shared(), PAIRS, cache=tmp_path)
    again = collect(shared(), PAIRS, cache=tmp_path)
    assert again.prompts == first.prompts and again.tokens == first.tokens and first.prompts
