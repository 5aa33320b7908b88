"""Half-precision models in float32 for a while: the same tensors afterwards, and a far lower floor of the KL."""

from __future__ import annotations

import pytest
import torch
from tiny import BACKENDS, rows_of, tiny

from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.float32_kl import first_token_kl_floor, float32_first_token_kl
from interp_ablate.evaluation.metrics import first_token_kl
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models import float32
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

ROWS = rows_of(9, 14, 11, 20, 16)


def half_model(backend: str = "bridge", dtype: torch.dtype = torch.bfloat16) -> Model:
    hf, tokenizer = tiny()
    return from_hf(hf.to(dtype), tokenizer, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", (*BACKENDS, "hf"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_weights_are_the_same_tensors_afterwards(backend: str, dtype: torch.dtype) -> None:
    half = half_model(backend, dtype)
    configured = getattr(half.tl.cfg, "dtype", None)  # plain transformers have none of their own
    before = [(each.data_ptr(), each.dtype) for each in half.tl.parameters()]
    rounded, residuals = half.logits(ROWS), half.cache_residuals(ROWS)
    with pytest.raises(ZeroDivisionError), in_float32(half.tl):
        assert half.dtype == torch.float32
        exact = half.logits(ROWS)
        raise ZeroDivisionError
    assert half.dtype == dtype and getattr(half.tl.cfg, "dtype", None) == configured
    assert [(each.data_ptr(), each.dtype) for each in half.tl.parameters()] == before
    assert torch.equal(half.logits(ROWS), rounded)
    assert torch.equal(half.logits(ROWS, residual_cache=residuals), rounded)
    assert exact.dtype == torch.float32
    gap = (exact - rounded.float()).abs().max()
    assert 0 < gap < 0.1 * exact.abs().max()


def test_the_floor_is_far_below_that_of_bfloat16() -> None:
    model = half_model()
    unedited = ModelOutputs(model, ROWS)
    floor, dtype = first_token_kl_floor(unedited)
    weak = Plan((Ablate(torch.ones(model.d_model), model.writers, strength=1e-3),))
    (precise,), rounded = float32_first_token_kl(unedited, [weak]), first_token_kl(unedited.with_plan(weak), unedited)  # fmt: skip
    assert dtype == "float32" and floor < 1e-7
    assert float(precise.mean()) < 0.1 * float(
        rounded.mean()
    )  # which is rounding, nearly all of it


def test_without_the_memory_it_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    monkeypatch.setattr(float32, "free_memory", lambda device: 1000)
    with in_float32(model.tl):
        assert model.dtype == torch.bfloat16
    assert first_token_kl_floor(ModelOutputs(model, ROWS))[1] == "bfloat16"
