"""Rows together give what each gives alone, whatever the model makes of padding, prefixes and caches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny import HAS_HOOKED, make, rows_of, shared, tiny, unit
from torch import Tensor
from torch.testing import assert_close
from uncommon import CONFIGS, uncommon, uncommon_hf

from interp_ablate import Ablate, Plan, Site
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.models.pass_checks import PassChecks

ROWS = rows_of(60, 45, 20, prefix=10)
SITE = Site(1, "resid_pre")
PLAN = Plan((Ablate(unit(), SITE),))
# What each may do with rows of 60 tokens: pad them, share a prefix, decode with a cache.
MAY = {
    "bloom": (True, True, True),
    "mpt": (True, False, False),
    "gpt_neo": (True, False, True),
    "llama4_text": (True, False, True),
    "mistral": (True, False, True),
    "gemma3_text": (True, False, True),
    "phi3:longrope": (False, False, False),
    "openai-gpt": (False, False, False),
    "rwkv": (False, False, False),
    "mamba": (True, False, False),
    "mamba2": (True, False, False),
    "falcon_h1": (True, False, True),
    "recurrent_gemma": (False, False, False),
    "lfm2": (True, True, True),
}
assert set(MAY) == set(CONFIGS)
kinds = pytest.mark.parametrize("kind", CONFIGS)


@cache
def models(kind: str) -> tuple[Model, Any]:
    """The model, and the checkpoint as it is in plain transformers."""
    return uncommon(kind), uncommon_hf(kind)


@torch.no_grad()
def alone(hf: Any, row: list[int]) -> Tensor:
    return hf(torch.tensor([row]), use_cache=False).logits[0]


def whole_passes(hf: Any, row: list[int], n: int) -> tuple[int, ...]:
    found: list[int] = []
    while len(found) < n and 2 not in found:
        found.append(int(alone(hf, [*row, *found])[-1].argmax()))
    return tuple(token for token in found if token != 2)


@kinds
def test_together_is_alone(kind: str) -> None:
    """Rows of three lengths with a prefix in common and without one."""
    model, hf = models(kind)
    for rows in (ROWS, rows_of(60, 45, 20, seed=3)):
        for row, got in zip(rows, model.logits(rows, keep=3)):
            assert_close(got, alone(hf, row)[-3:], atol=2e-5, rtol=2e-5)


@kinds
def test_answers_are_those_of_whole_passes(kind: str) -> None:
    model, hf = models(kind)
    rows = [*ROWS[1:], *rows_of(24, 28, seed=3)]  # answers that cross position 32
    got = model.generate(rows, max_new_tokens=8)
    assert [g.tokens for g in got] == [whole_passes(hf, row, 8) for row in rows]
    pairs = list(model.monitor(rows[-1], direction(), max_new_tokens=8))
    assert tuple(token.id for token, _ in pairs) == got[-1].tokens


@kinds
def test_under_plans_of_their_own(kind: str) -> None:
    model, _ = models(kind)
    plans = [PLAN, None, PLAN]
    with model.applied_each(plans):
        got = model.logits(ROWS)
        texts = model.generate(ROWS, max_new_tokens=4)
    for row, plan, logits, text in zip(ROWS, plans, got, texts):
        with model.applied(plan or Plan(())):
            assert_close(logits, model.logits([row])[0], atol=2e-5, rtol=2e-5)
            assert model.generate([row], max_new_tokens=4)[0].tokens == text.tokens


@kinds
def test_what_is_measured(kind: str) -> None:
    """The measurement allows what is exact: a model that decodes without a cache for nothing is slow."""
    assert may(models(kind)[0], 60) == MAY[kind]


def may(model: Model, width: int) -> tuple[bool, bool, bool]:
    checks = PassChecks(model._backend, model.plans.lock)
    practices = (checks.padding_is_exact, checks.sharing_is_exact, checks.cache_is_exact)
    return tuple(practice(width) for practice in practices)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2", "qwen3_moe", "mpt", "mistral"))
def test_rounding_is_not_held_against_a_model(kind: str, dtype: torch.dtype) -> None:
    hf = uncommon_hf(kind) if kind in CONFIGS else tiny(kind)[0]
    model = from_hf(hf.to(dtype), tiny()[1], backend="bridge")
    assert may(model, 60) == MAY.get(kind, (True, True, True))


@pytest.mark.parametrize("kind", ("llama_gqa", "gpt2", "qwen2", "gemma", "mixtral"))
def test_common_models_share_all(kind: str, backend: str) -> None:
    if backend == "hooked" and kind in ("gemma", "mixtral"):
        pytest.skip("TransformerLens does not convert it")
    assert may(shared(kind, backend), 60) == (True, True, True)


def test_a_window_is_in_the_way_only_beyond_it() -> None:
    model = uncommon("mistral", sliding_window=64)
    assert may(model, 40) == (True, True, True) != may(model, 70)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("kind", ("mistral", "gpt_neo"))
def test_wrapped_without_its_config(kind: str) -> None:
    """Nothing but the object says that there are windows."""
    hooked = uncommon(kind, "hooked").tl
    model, hf = Model.wrap(hooked), uncommon_hf(kind)
    assert model.hf_config is None and may(model, 60)[:2] == (True, False)
    for row, got in zip(ROWS, model.logits(ROWS)):
        assert_close(got[-1], alone(hf, row)[-1], atol=1e-4, rtol=1e-4)


def test_hooks_are_not_called_by_the_measurement(backend: str) -> None:
    """Neither a plan's nor the user's: they see the user's tokens only, and are there afterwards."""
    model, seen = make(backend=backend), []
    handle = model.hook_point(Site(1, "resid_post")).register_forward_hook(
        lambda module, args, x: seen.append(tuple(x.shape[:2]))
    )
    rows = rows_of(30, 25)
    with model.applied(PLAN):
        model.logits(rows)
        assert seen == [(2, 30)]
        model.generate(rows, max_new_tokens=2)
    assert len(seen) == 3 and seen[1:] == [(2, 30), (2, 1)]
    handle.remove()


def test_measured_once_and_for_longer_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = make(), []
    measured = PassChecks._measured

    def counted(self: PassChecks, practice: str, n: int, measure: Any) -> bool:
        lengths.append((practice, n))
        return measured(self, practice, n, measure)  # type: ignore[arg-type]

    monkeypatch.setattr(PassChecks, "_measured", counted)
    model.logits(rows_of(9))  # one row needs no measurement
    model.logits(rows_of(9, 9))
    assert lengths == []
    for _ in range(2):
        model.logits(rows_of(30, 25))
        model.logits(rows_of(20, 17))
    assert lengths == [("padding", 32)]
    model.logits(rows_of(40, 25))
    assert lengths == [("padding", 32), ("padding", 64)]


def direction() -> Any:
    from interp_ablate.directions.direction import Direction

    return Direction(unit(), 1.0, SITE)
