"""Growing KV cache layers: what transformers' own layer holds, at every step, without its copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from tiny import tiny
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from interp_ablate.models.backends.bridge_shortcuts import SPARE, GrowingLayer, growing_cache

HEADS, WIDTH = 2, 4
Layers = Sequence[DynamicLayer]


def states(batch: int, new: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, HEADS, new, WIDTH, generator=generator)
    return both[0], both[1]


def step(layers: Layers, new: int = 1, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The same states into every layer; what came back, and what is held, is the same."""
    first = layers[0].keys
    batch = 3 if first is None or not first.numel() else len(first)
    found = [layer.update(*states(batch, new, seed)) for layer in layers]
    same(layers)
    for layer, (keys, values) in zip(layers, found):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)  # type: ignore[arg-type]
    return found


def same(layers: Layers) -> None:
    want = layers[0]
    for layer in layers[1:]:
        assert torch.equal(layer.keys, want.keys) and torch.equal(layer.values, want.values)  # type: ignore[arg-type]
        assert layer.get_seq_length() == want.get_seq_length()
        assert layer.get_mask_sizes(3) == want.get_mask_sizes(3)


@torch.no_grad()
def test_prefill_steps_and_rows_that_leave() -> None:
    """Past the spare room more than once, with a step of several tokens, rows leaving on the way."""
    layers = (DynamicLayer(), GrowingLayer())
    step(layers, 7)
    for n in range(2 * SPARE + 10):
        step(layers, 5 if n == 20 else 1, seed=n + 1)
        if n in (3, 4, SPARE):
            rows = torch.tensor([2, 0, 1] if n == 3 else [1, 2] if n == 4 else [1])
            for layer in layers:
                layer.batch_select_indices(rows)
            same(layers)
    assert layers[0].get_seq_length() == 7 + 2 * SPARE + 10 + 4 and len(layers[1].keys) == 1  # type: ignore[arg-type]
    step(layers, 3 * SPARE)  # more at once than there is room for
    step(layers)


@torch.no_grad()
def test_a_step_writes_into_the_room_there_is() -> None:
    """A step copies nothing, and does not write over what was returned before."""
    layer = GrowingLayer()
    layer.update(*states(3, 7))
    returned = []
    for n in range(SPARE):
        keys, values = layer.update(*states(3, 1, seed=n))
        returned.append((keys, values, keys.clone(), values.clone()))
    assert len({keys.data_ptr() for keys, *_ in returned}) == 1
    for keys, values, keys_then, values_then in returned:
        assert torch.equal(keys, keys_then) and torch.equal(values, values_then)


@torch.no_grad()
@pytest.mark.parametrize("prompt_steps", (0, 3))
def test_copies_of_a_prefix_do_not_share_a_buffer(prompt_steps: int) -> None:
    """One prefix's cache serves several batches: each goes on for itself, and so does the first."""
    layers = (DynamicLayer(), GrowingLayer())
    step(layers, 6)
    for n in range(prompt_steps):  # now there is a buffer with room
        step(layers, seed=50 + n)
    copies = []
    for rows in ([0, 1, 2], [0, 0, 2, 1], [1]):
        some = [copy.copy(layer) for layer in layers]
        for layer in some:
            layer.batch_select_indices(torch.tensor(rows))
        copies.append(some)
    for n in range(4):  # in turns, each with states of its own
        for i, some in enumerate([*copies, layers]):
            step(some, seed=100 * i + n)
    for some in [*copies, layers]:
        same(some)
    assert not torch.equal(copies[0][1].keys, layers[1].keys)  # type: ignore[arg-type]


def test_gradients_are_those_of_transformers_own_layer() -> None:
    """Under gradients nothing is written into what a graph holds; with and without turns about."""
    found = []
    for layer in (DynamicLayer(), GrowingLayer()):
        parts = [states(3, new, seed=new) for new in (4, 1, 2)]
        leaves = [part.clone().requires_grad_() for pair in parts for part in pair]
        total = torch.zeros(())
        for i in range(0, len(leaves), 2):
            keys, values = layer.update(leaves[i], leaves[i + 1])
            total = total + (keys.square() * values.sin()).sum()
        found.append(torch.autograd.grad(total, leaves))
    assert all(torch.equal(want, got) for want, got in zip(*found))
    assert all(bool((got != 0).all()) for got in found[1])


def test_a_graph_survives_the_steps_that_follow_it() -> None:
    layers = (DynamicLayer(), GrowingLayer())
    with torch.no_grad():
        step(layers, 5)
        step(layers, seed=1)
    leaf = states(3, 1, seed=2)[0].requires_grad_()
    sums = [layer.update(leaf, leaf)[0].square().sum() for layer in layers]
    with torch.no_grad():
        step(layers, seed=3)
        step(layers, seed=4)
    gradients = [torch.autograd.grad(total, leaf)[0] for total in sums]
    assert torch.equal(*gradients) and torch.equal(gradients[1], 2 * leaf)


@torch.no_grad()
def test_cut_and_emptied() -> None:
    layers = (DynamicLayer(), GrowingLayer())
    step(layers, 6)
    step(layers, seed=1)
    for layer in layers:
        layer.crop(-2)
    same(layers)
    step(layers, seed=2)
    for layer in layers:
        layer.reset()
    step(layers, 2, seed=3)
    step(layers, seed=4)


@torch.no_grad()
def test_half_precision_stays() -> None:
    layer = GrowingLayer()
    for new in (4, 1, 1):
        keys, values = layer.update(*(part.bfloat16() for part in states(3, new)))
    assert keys.dtype == values.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ("llama_gqa", "gemma2"))
def test_a_cache_has_transformers_own_kinds_of_layers(kind: str) -> None:
    """Plain layers grow; sliding windows stay as they are."""
    config = tiny(kind)[0].config
    plain, growing = DynamicCache(config=config).layers, growing_cache(config).layers
    assert len(plain) == len(growing)
    for old, new in zip(plain, growing):
        assert type(new) is (GrowingLayer if type(old) is DynamicLayer else type(old))
    assert any(type(layer) is GrowingLayer for layer in growing)
    assert any(type(layer) is not GrowingLayer for layer in growing) == (kind == "gemma2")
    assert len({id(layer) for layer in growing}) == len(growing)
