"""TransformerLens' own models in half precision: they compute the checkpoint, or are refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from support.family_models import build
from support.tiny import HAS_HOOKED, make_tokenizer

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.load import from_hf

ROWS = [list(range(5, 17)), [3, 4, 5]]


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has none")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_mixture_of_experts_as_a_hooked_transformer(dtype: torch.dtype) -> None:
    """TransformerLens leaves the router in float32, and feeds it half precision."""
    exact, half = build("mixtral"), build("mixtral").to(dtype)
    tokens = [torch.tensor([row]) for row in ROWS]
    want = torch.cat([exact(row).logits[:, -1] for row in tokens])
    rounding = (torch.cat([half(row).logits[:, -1] for row in tokens]).float() - want).abs().max()
    got = from_hf(half, make_tokenizer(), backend="hooked").logits(ROWS)[:, -1].float()
    assert float((got - want).abs().max()) < 3 * float(rounding)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has none")
@pytest.mark.parametrize("model_type", ("mixtral", "falcon", "olmoe", "bloom", "phi", "gptj", "opt"))  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_conversion_that_fails_is_one_sentence(model_type: str, dtype: torch.dtype) -> None:
    try:
        model = from_hf(build(model_type).to(dtype), make_tokenizer(), backend="hooked")
    except ModelError as error:
        assert "\n" not in str(error) and "HookedTransformer" in str(error)
    else:
        assert model.logits(ROWS).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_map_that_names_all_but_plain_matrices_says_so(dtype: torch.dtype) -> None:
    model = from_hf(build("falcon").to(dtype), make_tokenizer(), backend="bridge")
    said = r"mlp\.dense_4h_to_h is a FalconLinear, neither Linear nor Conv1D.*backend='hf' measures what writes"
    with pytest.raises(ExportError, match=said):
        _ = model.architecture
