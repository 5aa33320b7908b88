"""Edits of chosen layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import N_LAYERS, editing, forward, rows_of, shared, source_of, unit
from torch.testing import assert_close

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Add
from interp_ablate.edits.plan import Plan, ablate_layers, add_to_layers, layers_of
from interp_ablate.errors import PlanError
from interp_ablate.sites import Site

# --------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(10)),
        (3, [3]),
        (-1, [9]),
        (range(2, 5), [2, 3, 4]),
        ([5, 1, -2], [1, 5, 8]),
        ("4", [4]),
        ("2-4", [2, 3, 4]),
        (" 2 - 4 ", [2, 3, 4]),
        ("20%-80%", range(2, 9)),
        ("0%-100%", range(10)),
        ("55%", [5]),
        ("3-100%", range(3, 10)),
    ],
)
def test_ways_to_name_layers(layers: Any, expected: Any) -> None:
    assert layers_of(10, layers) == tuple(expected)


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        (10, r"\[10\]: the model has 0 to 9"),
        (-11, "0 to 9"),
        ([], "no layers"),
        ([1, 1], "named twice"),
        ([1, -9], "named twice"),
        ([True], "no layers"),
        ([1.5], "no layers"),
        ("4-2", "no layers"),
        ("2-12", r"\[10, 11, 12\]"),
        ("a-b", "cannot read layers"),
        ("20%-80", "0 to 9"),
        ("", "cannot read layers"),
    ],
)
def test_layers_that_are_none(layers: Any, part: str) -> None:
    with pytest.raises(PlanError, match=part):
        layers_of(10, layers)


# --------------------------------------------------------------------------------- plans


def direction(layer: int = 1) -> Direction:
    return Direction(unit(1), 3.0, Site(layer, "resid_post"))


def test_ablating_layers_is_ablating_what_they_write() -> None:
    model, one = shared(), direction()
    plan = ablate_layers(model, one, [1, 2], strength=0.5)
    assert plan == Plan(
        (Ablate(one, [s for s in model.writers if s.layer in (1, 2)], strength=0.5),)
    )
    assert Site(0, "embed") not in ablate_layers(model, one).sites
    assert ablate_layers(model, one, 0).sites == (Site(0, "attn_out"), Site(0, "mlp_out"))
    post_norm = shared("gemma2")
    assert {s.point for s in ablate_layers(post_norm, one).sites} == {"attn_proj", "mlp_proj"}


def test_ablating_inputs_is_what_a_wrapped_decoder_layer_does() -> None:
    """Against the blocks' own modules with their input changed, as a wrapper around them would."""
    model, one = shared(), direction()
    plan = ablate_layers(model, one, range(1, N_LAYERS), inputs=True)
    [row] = rows_of(12)
    with model.applied(plan):
        found = model.logits([row])[0]
    hf = source_of("llama_gqa")
    r = one.vector.float()
    handles = [
        hf.model.layers[i].register_forward_pre_hook(
            lambda module, args, kwargs: (
                (args[0] - (args[0] @ r)[..., None] * r, *args[1:]),
                kwargs,
            ),
            with_kwargs=True,
        )
        for i in range(1, N_LAYERS)
    ]
    try:
        with torch.no_grad():
            expected = hf(torch.tensor([row])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    assert_close(found[-1], expected, atol=1e-4, rtol=1e-4)
    assert (expected - forward(hf, row)[-1]).abs().max() > 0.01


def test_adding_to_layers() -> None:
    model, one = shared(), direction(1)
    plan = add_to_layers(model, one, coefficient=2)
    assert plan == Plan((Add(one, Site(1, "resid_pre"), coefficient=2),))
    several = add_to_layers(model, one, [0, 2], point="resid_post", positions="generated")
    assert several.sites == (Site(0, "resid_post"), Site(2, "resid_post"))
    assert [edit.positions for edit in several] == ["generated"]
    [row] = rows_of(9)
    with model.applied(plan):
        found = model.logits([row])[0, -1]
    assert_close(
        found, forward(source_of("llama_gqa"), row, editing(plan))[-1], atol=1e-4, rtol=1e-4
    )
