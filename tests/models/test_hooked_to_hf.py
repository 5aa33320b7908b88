"""HookedTransformer state dicts to Hugging Face and back: every bit, every architecture, edits included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import D_MODEL, HAS_HOOKED, N_LAYERS, forward, make, rows_of, shared, tiny, unit
from torch import Tensor
from transformers import GPT2Config

from interp_ablate.errors import ExportError
from interp_ablate.models.backends.hooked_to_hf import hooked_to_hf
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

pytestmark = pytest.mark.skipif(not HAS_HOOKED, reason="no HookedTransformer in TransformerLens 4")


def hooked_state(kind: str = "llama_gqa", *, tied: bool = False) -> dict[str, Tensor]:
    return dict(shared(kind, "hooked", tied=tied).tl.state_dict())


def config(kind: str = "llama_gqa", **options: Any) -> Any:
    return tiny(kind, **options)[0].config


def test_there_and_back_is_bit_identical(kind: str, tied: bool) -> None:
    hf, _ = tiny(kind, tied=tied)
    found = hooked_to_hf(hooked_state(kind, tied=tied), hf.config)
    want = hf.state_dict()
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and found[name].is_contiguous(), name
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def test_in_bfloat16_too() -> None:
    hf, tokenizer = tiny("qwen2")
    hf = hf.bfloat16()
    found = hooked_to_hf(from_hf(hf, tokenizer, backend="hooked").tl.state_dict(), hf.config)
    for name, tensor in hf.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_edited_matrices_land_in_the_right_places(kind: str) -> None:
    """W_E, W_O and W_out orthogonalized in TransformerLens' layout; then plain Hugging Face runs them."""
    model, r = make(kind, "hooked"), unit().float()
    tl, heads = model.tl, config(kind).num_attention_heads
    with torch.no_grad():
        for weight in (tl.embed.W_E, *(m for b in tl.blocks for m in (b.attn.W_O, b.mlp.W_out))):
            weight.sub_((weight @ r)[..., None] * r)
    found = hooked_to_hf(tl.state_dict(), config(kind))
    hf, _ = tiny(kind)
    before = hf.state_dict()
    width = heads * tl.cfg.d_head
    shapes = {
        "model.embed_tokens.weight": (264, D_MODEL),
        **{f"model.layers.{i}.self_attn.o_proj.weight": (D_MODEL, width) for i in range(N_LAYERS)},
        **{f"model.layers.{i}.mlp.down_proj.weight": (D_MODEL, 48) for i in range(N_LAYERS)},
    }
    for name, tensor in found.items():
        if name in shapes:
            assert tuple(tensor.shape) == shapes[name]
            across = tensor if "embed" in name else tensor.T
            assert (across @ r).abs().max() < 1e-6 < (before[name] - tensor).abs().max()
        else:
            assert torch.equal(tensor, before[name]), name
    hf.load_state_dict(found)
    row = rows_of(9)[0]
    want = tl(torch.tensor([row]))[0]
    torch.testing.assert_close(forward(hf, row), want, atol=2e-5, rtol=0)


def test_an_edited_embedding_unties() -> None:
    model = make("llama_gqa", "hooked", tied=True)
    with torch.no_grad():
        model.tl.embed.W_E[7] += 1
    found = hooked_to_hf(model.tl.state_dict(), model.hf_config)
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    assert torch.equal(found["lm_head.weight"], tiny(tied=True)[0].lm_head.weight)


# --------------------------------------------------------------------------------- what is refused


def test_folded_norms_are_refused() -> None:
    state = {
        k: v for k, v in hooked_state().items() if not k.endswith(("ln1.w", "ln2.w", "final.w"))
    }
    with pytest.raises(ExportError, match=r"folded.*from_pretrained_no_processing"):
        hooked_to_hf(state, config())


@pytest.mark.parametrize("name", ("embed.W_X", "blocks.0.attn.W_X", "blocks.1.mlp.experts.0.W_in"))
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=rf"no place for '{name}' \(3,\)"):
        hooked_to_hf({**hooked_state(), name: torch.ones(3)}, config())


@pytest.mark.parametrize("name", ("blocks.1.attn.b_O", "blocks.0.mlp.b_out", "unembed.b_U"))
def test_a_bias_without_a_place_is_refused(name: str) -> None:
    state = hooked_state()
    hooked_to_hf(state, config())  # zeros are fine
    with pytest.raises(
        ExportError, match=rf"{name} is not zero, but this checkpoint has no .*bias"
    ):
        hooked_to_hf({**state, name: torch.ones_like(state[name])}, config())


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ExportError, match=r"model type 'gpt2'.*llama, mistral, qwen2, qwen3"):
        hooked_to_hf(hooked_state(), GPT2Config())
    for kind, other in (("llama_gqa", "llama"), ("qwen3", "llama_gqa"), ("llama_gqa", "qwen3")):
        with pytest.raises(ExportError, match=r"not of this architecture|no place|not zero"):
            hooked_to_hf(hooked_state(kind), config(other))
    with pytest.raises(ExportError, match=r"model.layers.3.* missing .* more"):
        hooked_to_hf(hooked_state(), config(num_hidden_layers=4))


def test_a_missing_layer_is_refused() -> None:
    with pytest.raises(ExportError, match=r"no model.layers.2.*hf_config is another model's"):
        hooked_to_hf(hooked_state(), config(num_hidden_layers=2))


def test_wrapping_needs_the_config_only_for_this() -> None:
    wrapped = Model.wrap(shared("qwen2", "hooked").tl, hf_config=config("qwen2"))
    assert torch.equal(
        wrapped.hf_state_dict()["model.layers.1.self_attn.k_proj.bias"],
        tiny("qwen2")[0].model.layers[1].self_attn.k_proj.bias,
    )
