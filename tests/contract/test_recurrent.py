"""Recurrent and hybrid decoders: rows together, prefixes, plans and cached answers are what one row alone gives.

The oracle is plain transformers, a row at a time, without a cache; plans are a torch hook on a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from support.family_models import build
from support.tiny import make_tokenizer, rows_of
from torch import Tensor
from torch.testing import assert_close

from interp_ablate import Ablate, Plan, Site, collect
from interp_ablate.directions.direction import Direction
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

TYPES = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
    "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv",
    "zamba", "zamba2",
)  # fmt: skip
SITE = Site(2, "resid_post")
N_NEW = 5
# Lengths beyond the tiny models' chunks (16), some alike, with a prefix that all share, and without.
TOGETHER = (rows_of(30, 17, 12, 12, prefix=10), rows_of(23, 3, 12, 12, seed=2))
NEAR = {"rtol": 1e-4, "atol": 2e-5}


@cache
def built(model_type: str) -> tuple[Model, Any]:
    hf = build(model_type)
    model = from_hf(hf, make_tokenizer())
    model.__dict__["eos_token_ids"] = frozenset()
    return model, build(model_type)


def vector(model: Model) -> Tensor:
    v = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return v / v.norm()


@contextmanager
def ablated(model: Model, hf: Any, v: Tensor) -> Iterator[None]:
    """A block of the checkpoint with one direction taken out of what it returns."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        x = out if isinstance(out, Tensor) else out[0]
        x = x - (x @ v)[..., None] * v
        return x if isinstance(out, Tensor) else (x, *out[1:])

    blocks = hf.get_submodule(blocks_path(hf))
    handle = blocks[SITE.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def blocks_path(hf: Any) -> str:
    lists = [n for n, m in hf.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4]
    return min(lists, key=len)


@torch.no_grad()
def alone(hf: Any, row: list[int]) -> Tensor:
    return hf(torch.tensor([row]), use_cache=False).logits[0].float()


def answer(hf: Any, row: list[int]) -> tuple[int, ...]:
    found: list[int] = []
    for _ in range(N_NEW):
        found.append(int(alone(hf, [*row, *found])[-1].argmax()))
    return tuple(found)


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_together_are_rows_alone(model_type: str) -> None:
    """granitemoehybrid without rotary positions did not load: an error of TransformerLens' came out as it was."""
    model, hf = built(model_type)
    plan = Plan((Ablate(vector(model), SITE),))
    for rows in TOGETHER:
        for got, row in zip(model.logits(rows, keep=3), rows):
            assert_close(got, alone(hf, row)[-3:], **NEAR)
        with model.applied_each([plan, None, plan, None]):
            each = model.logits(rows)
        with model.applied(plan):
            edited = model.logits(rows)
        with ablated(model, hf, vector(model)):
            want = [alone(hf, row)[-1:] for row in rows]
        moved = [float((x - alone(hf, row)[-1:]).abs().max()) for x, row in zip(want, rows)]
        assert min(moved) > 1e-3
        for i, row in enumerate(rows):
            assert_close(edited[i], want[i], **NEAR)
            assert_close(each[i], alone(hf, row)[-1:] if i % 2 else want[i], **NEAR)


@pytest.mark.parametrize("model_type", TYPES)
def test_answers_and_activations_are_those_of_rows_alone(model_type: str) -> None:
    model, hf = built(model_type)
    plan = Plan((Ablate(vector(model), SITE),))
    direction = Direction(vector(model), 1.0, SITE)
    for rows in TOGETHER:
        got = [each.tokens for each in model.generate(rows, max_new_tokens=N_NEW)]
        assert got == [answer(hf, row) for row in rows]
        watched = model.monitor(rows[0], direction, max_new_tokens=N_NEW)
        assert tuple(token.id for token, _ in watched) == got[0]
        with model.applied(plan), ablated(model, hf, vector(model)):
            edited = [each.tokens for each in model.generate(rows, max_new_tokens=N_NEW)]
            assert edited == [answer(hf, row) for row in rows]
        values = collect(model, rows).values
        single = torch.cat([collect(model, [row]).values for row in rows])
        assert_close(values, single, rtol=1e-4, atol=1e-4)
