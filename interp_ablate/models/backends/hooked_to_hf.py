"""HookedTransformer state dicts as Hugging Face Llama-style state dicts, bit for bit.

The other way round is TransformerLens' own converter.

Knows: both layouts of Llama, Mistral, Qwen 2 and Qwen 3. Does not know: plans or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import ExportError

# Model types whose HookedTransformer form has the layout below (RMS norm before each branch, gated MLP).
CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3")


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.T


def _heads_in(
    x: Float[Tensor, "n_heads d_model d_head"],
) -> Float[Tensor, "n_heads*d_head d_model"]:
    return rearrange(x, "n m h -> (n h) m")


def _heads_out(
    x: Float[Tensor, "n_heads d_head d_model"],
) -> Float[Tensor, "d_model n_heads*d_head"]:
    return rearrange(x, "n h m -> m (n h)")


def _flat(x: Float[Tensor, "n_heads d_head"]) -> Float[Tensor, " n_heads*d_head"]:
    return rearrange(x, "n h -> (n h)")


# HookedTransformer name -> (Hugging Face name, change of layout); {l} is the layer.
_TOP: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "embed.W_E": ("model.embed_tokens.weight", _same),
    "ln_final.w": ("model.norm.weight", _same),
    "unembed.W_U": ("lm_head.weight", _transposed),
    "unembed.b_U": ("lm_head.bias", _same),
}
_BLOCK: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "ln1.w": ("input_layernorm.weight", _same),
    "ln2.w": ("post_attention_layernorm.weight", _same),
    "attn.W_Q": ("self_attn.q_proj.weight", _heads_in),
    "attn.W_K": ("self_attn.k_proj.weight", _heads_in),
    "attn.W_V": ("self_attn.v_proj.weight", _heads_in),
    "attn.W_O": ("self_attn.o_proj.weight", _heads_out),
    "attn.b_Q": ("self_attn.q_proj.bias", _flat),
    "attn.b_K": ("self_attn.k_proj.bias", _flat),
    "attn.b_V": ("self_attn.v_proj.bias", _flat),
    "attn.b_O": ("self_attn.o_proj.bias", _same),
    "attn.q_norm.w": ("self_attn.q_norm.weight", _same),
    "attn.k_norm.w": ("self_attn.k_norm.weight", _same),
    "mlp.W_in": ("mlp.up_proj.weight", _transposed),
    "mlp.W_gate": ("mlp.gate_proj.weight", _transposed),
    "mlp.W_out": ("mlp.down_proj.weight", _transposed),
    "mlp.b_in": ("mlp.up_proj.bias", _same),
    "mlp.b_out": ("mlp.down_proj.bias", _same),
}
_NOT_WEIGHTS = re.compile(r".*\.(mask|IGNORE|rotary_sin|rotary_cos)")
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)")


def _hf_entry(name: str) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    match = _BLOCK_KEY.fullmatch(name)
    if match is None:
        return _TOP.get(name)
    # grouped-query attention stores its keys and values under _W_K, _W_V, _b_K, _b_V
    entry = _BLOCK.get(match[2].replace("attn._", "attn."))
    return entry and (f"model.layers.{match[1]}.{entry[0]}", entry[1])


def hooked_to_hf(state: Mapping[str, Tensor], hf_config: Any) -> dict[str, Tensor]:
    """A HookedTransformer's state dict under Hugging Face names, shapes and layout.

    Values are moved, never recomputed: `HF -> HookedTransformer -> HF` is bit-identical, for edited
    weights too. `lm_head.weight` is always there; the caller decides whether it is still tied.

    Args:
        state: raw weights (`from_pretrained_no_processing`, or processing flags off).
        hf_config: the Hugging Face config of the same architecture; says which biases exist.

    Raises:
        ExportError: another architecture, folded LayerNorms, unknown tensors, wrong shapes, or a bias
            that is not zero where the checkpoint has no place for one.
    """
    if hf_config.model_type not in CONVERTIBLE:
        raise ExportError(
            f"no HookedTransformer conversion for model type {hf_config.model_type!r}: there is one "
            f"for {', '.join(CONVERTIBLE)}; for others load the model with backend='bridge'"
        )
    if "ln_final.w" not in state:
        raise ExportError(
            "the state dict has no ln_final.w: its LayerNorms were folded into the weights. Load the "
            "model with HookedTransformer.from_pretrained_no_processing(...) and edit that"
        )
    expected = _expected_shapes(hf_config)
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        entry = _hf_entry(name)
        if entry is None:
            raise ExportError(
                f"no place for {name!r} {tuple(tensor.shape)} in a Llama-style checkpoint"
            )
        target, layout = entry
        if target in expected:
            converted[target] = layout(tensor.detach())
        elif bool(tensor.any()):
            raise ExportError(
                f"{name} is not zero, but this checkpoint has no {target}: the edit has no exact "
                f"weight form in {hf_config.model_type}, or hf_config is another model's"
            )
    wrong = [
        f"{name} {tuple(converted[name].shape) if name in converted else 'missing'} (wanted {shape})"
        for name, shape in expected.items()
        if name not in converted or tuple(converted[name].shape) != shape
    ]
    if wrong:
        raise ExportError(
            f"the state dict is not of this architecture: {'; '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    return {name: converted[name].contiguous() for name in expected}


def _expected_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, from the architecture itself (no memory used)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
