"""TransformerLens' own models in half precision: they compute the checkpoint, or are refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.family_models import build, config_classes, tiny_config
from support.tiny import HAS_HOOKED, make_tokenizer, tiny
from transformers import AutoModelForCausalLM

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.load import from_hf

HALF = (torch.bfloat16, torch.float16)
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


def falcon_with_alibi() -> torch.nn.Module:
    config = tiny_config(config_classes()["falcon"])
    config.alibi, config.new_decoder_architecture, config.ffn_hidden_size = True, False, 96
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("make", (falcon_with_alibi, lambda: tiny("cohere")[0]))
def test_a_bridge_of_other_logits_is_refused_in_half_precision_too(
    make: Any, dtype: torch.dtype
) -> None:
    """Both differ by less than 64 steps of bfloat16, which was the limit, but by more than what rounding does."""
    with pytest.raises(ModelError, match="differs from the checkpoint"):
        from_hf(make().to(dtype), make_tokenizer(), backend="bridge")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ("qwen3_moe", "glm4", "olmo2", "gpt2"))
def test_rounding_alone_is_not_refused(kind: str, dtype: torch.dtype) -> None:
    """Routers that choose other experts at a position, and attention of another kernel."""
    hf = tiny(kind)[0].to(dtype)
    model = from_hf(hf, make_tokenizer(), backend="bridge")
    assert model.dtype == dtype and model.backend == "bridge"
    assert all(p.dtype == dtype for p in model.tl.parameters())
