"""Sites: names in both directions, the order of a forward pass, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from interp_ablate.errors import InterpAblateError
from interp_ablate.sites import (
    EMBEDDING_POINTS,
    POINTS,
    PROJECTION_POINTS,
    RESIDUAL_POINTS,
    WRITER_POINTS,
    Site,
    sites_of,
)

IN_BLOCKS = [point for point in POINTS if point not in EMBEDDING_POINTS]
EVERY = [Site(layer, point) for layer in range(12) for point in IN_BLOCKS]
EVERY += [Site(0, point) for point in EMBEDDING_POINTS]


@pytest.mark.parametrize("site", EVERY, ids=str)
def test_a_name_reads_back_as_the_site(site: Site) -> None:
    assert Site.parse(str(site)) == site
    short = site.point if site.point in EMBEDDING_POINTS else f"{site.layer}.{site.point}"
    assert Site.parse(short) == site


def test_names_are_those_of_transformer_lens_and_all_different() -> None:
    assert str(Site(3, "resid_mid")) == "blocks.3.hook_resid_mid"
    assert str(Site(0, "embed")) == "hook_embed" and str(Site(0, "pos_embed")) == "hook_pos_embed"
    assert str(Site(3, "attn_proj")) == "blocks.3.attn.hook_out"
    assert str(Site(3, "mlp_proj")) == "blocks.3.mlp.hook_out"
    assert len({str(site) for site in EVERY}) == len({hash(site) for site in EVERY}) == len(EVERY)


def test_forward_order() -> None:
    """Within a layer: read, attention writes, middle, MLP writes, end; embeddings before everything.

    A projection comes before what its norm makes of it.
    """
    layer = (
        *("resid_pre", "attn_proj", "attn_out", "resid_mid"),
        *("mlp_proj", "mlp_out", "resid_post"),
    )
    expected = [
        Site(0, "embed"),
        Site(0, "pos_embed"),
        Site(0, "embed_bias"),
        *(Site(i, p) for i in range(12) for p in layer),
    ]  # type: ignore[arg-type]
    assert set(layer) == set(IN_BLOCKS)
    shuffled = random.Random(0).sample(EVERY, len(EVERY))
    assert sorted(shuffled) == expected
    assert all(a < b and not b < a for a, b in pairwise(expected))


@pytest.mark.parametrize("layers", [range(0), range(1), range(5), [4, 2, 2, 9]])
@pytest.mark.parametrize("points", [POINTS, RESIDUAL_POINTS, WRITER_POINTS, ("mlp_out", "embed")])
def test_sites_of_names_every_site_once_in_order(points: tuple, layers: range | list[int]) -> None:
    found = sites_of(points, layers)
    assert list(found) == sorted(set(found))
    wanted = {(0 if p in EMBEDDING_POINTS else layer, p) for layer in layers for p in points}
    assert {(site.layer, site.point) for site in found} == wanted


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Site(0, "resid"), ["'resid'", *POINTS]),  # type: ignore[arg-type]
        (lambda: Site(-1, "resid_pre"), ["layer -1", "from 0"]),
        (lambda: Site(1, "embed"), ["layer 1", "Site(0, 'embed')"]),
        (lambda: Site.parse("blocks.3.hook_resid"), ["'blocks.3.hook_resid'", "resid_mid"]),
        (lambda: Site.parse("blocks.-1.hook_resid_pre"), ["as a site"]),
        (lambda: Site.parse("blocks.3.hook_resid_pre.x"), ["as a site"]),
        (lambda: Site.parse("resid_pre"), ["as a site", "3.resid_post"]),
        (lambda: Site.parse("3.embed"), ["layer 3"]),
        (lambda: Site(2, "pos_embed"), ["layer 2"]),
        (lambda: Site.parse("blocks.3.attn.hook_in"), ["as a site"]),
        (lambda: Site.parse("blocks.3.attn.hook_out.x"), ["as a site"]),
        (lambda: Site.parse("blocks.x.mlp.hook_out"), ["as a site"]),
        (lambda: Site.parse(""), ["as a site"]),
    ],
)
def test_refused(make: Callable[[], Site], parts: list[str]) -> None:
    with pytest.raises(InterpAblateError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("layer", ["3", 1.5, None, True])
def test_a_layer_is_an_integer(layer: object) -> None:
    with pytest.raises(InterpAblateError, match="a layer is an integer"):
        Site(layer, "resid_pre")  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [np.int64(3), torch.tensor(3)])
def test_a_layer_of_numpy_or_torch_is_kept_as_an_integer(layer: Any) -> None:
    site = Site(layer, "resid_pre")
    assert type(site.layer) is int and site == Site(3, "resid_pre")
    assert hash(site) == hash(Site(3, "resid_pre"))


def test_the_kinds_of_points_are_all_points_once() -> None:
    assert set(POINTS) == {*RESIDUAL_POINTS, *WRITER_POINTS}
    assert not set(RESIDUAL_POINTS) & set(WRITER_POINTS)
    assert {*EMBEDDING_POINTS, *PROJECTION_POINTS} < set(WRITER_POINTS)
    assert len(set(POINTS)) == len(POINTS)
