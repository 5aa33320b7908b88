"""Tiny random models whose passes cannot share padding, a prefix or a KV cache as a Llama's can.

Each is of a kind that was once answered wrongly, without a word: distances by index, windows and chunks,
positions that are scaled by the longest row, masks and caches that are ignored, recurrent states.
"""

from __future__ import annotations

from typing import Any

from tiny import make_tokenizer, randomized
from transformers import AutoConfig, AutoModelForCausalLM

from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model

_IDS: dict[str, Any] = {
    "vocab_size": 264,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_STATES: dict[str, Any] = {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
_LOCAL = {"attention_types": [[["global", "local", "global"], 1]], "window_size": 16}
_HYBRID = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "head_dim": 8,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 8.0,
}
_CHUNKS = {
    "attention_chunk_size": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 8,
    "no_rope_layers": [1, 0, 1],
    "interleave_moe_layer_step": 2,
}
# model type (before a colon) -> its config
CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {**_IDS, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {**_IDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
    "gpt_neo": {
        **_IDS, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 128,
        "max_position_embeddings": 256, **_LOCAL,
    },
    "llama4_text": {**_PLAIN, **_CHUNKS},
    "mistral": {**_PLAIN, "sliding_window": 16},
    "gemma3_text": {**_PLAIN, "head_dim": 8, "sliding_window": 16},
    "phi3:longrope": {
        **_PLAIN, "original_max_position_embeddings": 32, "rope_parameters": _LONG_ROPE,
    },
    "openai-gpt": {**_IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "rwkv": {
        **_IDS, "hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32,
        "intermediate_size": 48, "context_length": 256,
    },
    "mamba": _STATES,
    "mamba2": {**_STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_h1": {**_PLAIN, **_HYBRID},
    "recurrent_gemma": {**_PLAIN, "lru_width": 32, "attention_window_size": 16},
    "lfm2": _PLAIN,
}  # fmt: skip


def uncommon_hf(kind: str, **config: Any) -> Any:
    """The Hugging Face model of one of `CONFIGS`, or of another model type with a whole config."""
    fields = {**CONFIGS.get(kind, {}), **config}
    settings = AutoConfig.for_model(kind.partition(":")[0], **fields)
    return randomized(AutoModelForCausalLM.from_config(settings))


def uncommon(kind: str, backend: str = "bridge", **config: Any) -> Model:
    return from_hf(uncommon_hf(kind, **config), make_tokenizer(), backend=backend)  # type: ignore[arg-type]
