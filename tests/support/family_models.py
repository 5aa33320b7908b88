"""Every decoder type of transformers as a tiny random model, from its own config class with small sizes.

The sizes are rules by the names that configs use; what a family needs besides is in `_OWN`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

N_LAYERS, D_MODEL, D_VOCAB = 4, 64, 300
TOO_LARGE = 20_000_000  # parameters that no size below made small: not built
# Names that configs have for one size, and the size.
_SIZES: dict[tuple[str, ...], Any] = {
    ("hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "dim", "emb_dim"): D_MODEL,
    ("embedding_dim", "out_hidden_size", "text_hidden_size", "projection_dim"): D_MODEL,
    ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "dim_ff"): 96,
    ("shared_expert_intermediate_size", "shared_intermediate_size", "block_ff_dim"): 96,
    ("intermediate_size_mlp", "dense_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim"): 96,
    ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size"): 32,
    ("expert_ffn_hidden_size", "share_expert_dim", "moe_shared_expert_intermediate_size"): 32,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"): N_LAYERS,
    ("num_blocks", "encoder_layers", "depth"): N_LAYERS,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("encoder_attention_heads",): 4,
    ("num_kv_heads", "n_kv_heads", "num_global_key_value_heads"): 2,
    ("global_head_dim", "kv_channels", "attention_head_dim"): 16,
    ("vocab_size", "vocab_size_per_layer_input"): D_VOCAB,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"): 256,
    ("num_experts", "num_local_experts", "moe_num_experts"): 4,
    ("moe_topk", "moe_k", "top_k_experts"): 2,
    ("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"): 1,
    ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "mamba_d_head", "mamba_head_dim"): 16,
    ("q_lora_rank",): 24,
    ("qk_rope_head_dim", "state_size", "mamba_d_state", "ssm_state_size"): 8,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "hidden_size_per_layer_input"): 8,
    ("mamba_d_ssm",): 128,
    ("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"): 16,
    ("mamba_chunk_size", "chunk_size", "zero_expert_num"): 16,
    ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"): 16,
    ("lru_width", "word_embed_proj_dim", "moe_hidden_size", "projector_hidden_size"): D_MODEL,
    ("pad_token_id", "num_nextn_predict_layers"): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
    ("image_size",): 32,
    ("patch_size",): 8,
    ("use_mamba_kernels",): False,
}  # fmt: skip
# The same where a config has the name and no value for it.
_EVEN_FOR_NONE: dict[tuple[str, ...], Any] = {
    ("num_key_value_heads",): 2,
    ("head_dim",): 16,
    ("num_experts_per_tok", "num_experts_per_token"): 2,
    ("n_routed_experts",): 4,
    ("n_shared_experts",): 1,
}
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
# Multipliers that are not one.
_MULTIPLIERS: dict[str, float] = {
    "residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_FULL_AND_SLIDING = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
_SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32, "num_embeddings": 32}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_IMAGE_WORDS = {"<image>": 5} | {f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDEFGH")}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_DOTS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_PE = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_large_patch14_336",
    "do_pooling": False,
    "model_args": {"embed_dim": D_MODEL, "depth": 2, "num_heads": 4, "img_size": (32, 32), "patch_size": 8, "global_pool": "", "ref_feat_shape": (4, 4)},
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "chameleon_vqgan": _SMALL_VQ,
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": _FULL_AND_SLIDING},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": D_MODEL, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "emu3_vqgan": _SMALL_VQ | {"latent_channels": 4, "codebook_size": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": D_MODEL, "adapter_out_dim": D_MODEL},
    "dots3_note_text": _DOTS | {"index_n_heads": 4, "index_head_dim": 16, "per_layer_config": {1: _DOTS, 3: _DOTS}},
    "dots3_note_vision_encoder": {"adapter_in_dim": D_MODEL, "adapter_out_dim": D_MODEL, "mlp_layer_types": ["dense"] * N_LAYERS},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 16], "rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}},
    "fast_vlm": {"vision_config": _CLIP},
    "florence_vision": {"embed_dim": [16, 16, 32, D_MODEL], "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": _MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], N_LAYERS // 2]]},
    "gptj": {"rotary_dim": 8},
    "granite_docling_vision": {"deepstack_visual_indexes": [0, 1, 2]},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [(0, 0), (1, 2)], "spatial_target_layers": [1, 2]},
    "granitemoehybrid": _HYBRID,
    "hunyuan_vl_text": {"rope_parameters": _MROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "janus_vqgan": _SMALL_VQ,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mistral4": {"qk_nope_head_dim": 8, "head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 32, 64]},
    "nemotron_h_omni": {"vision_hidden_size": D_MODEL},
    "perception_lm": {"vision_config": _PE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 8, "ngram_vocab_size_base": 64},
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 16},
    "step3p5": {"sliding_window": 16},
    "xlstm": {"chunk_size": 32, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * D_MODEL, "attention_head_dim": 32, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "zamba2": {"num_key_value_heads": 4, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Types whose class in the mapping of decoders does not take their config.
_CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}


def config_classes() -> dict[str, Any]:
    """The config class of every model type that generates text, or text from images."""
    classes = [*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    return {config.model_type: config for config in sorted(classes, key=lambda c: c.model_type)}


def tiny_config(kind: Any) -> Any:
    """A config of a class with small sizes, its inner configs too."""
    own = _OWN.get(kind.model_type, {})
    base = kind(**{name: own[name] for name in getattr(kind, "sub_configs", {}) if name in own})
    values = base.to_dict()
    small: dict[str, Any] = {}
    for names, size in _SIZES.items():
        for name in names:
            if values.get(name) is not None and not isinstance(values[name], (list, dict)):
                small[name] = size
    for names, size in _EVEN_FOR_NONE.items():
        small |= {name: size for name in names if name in values}
    small |= {name: value for name, value in _MULTIPLIERS.items() if name in values}
    for name in _KINDS_OF_LAYERS:
        kinds = values.get(name)
        if isinstance(kinds, list) and kinds and not isinstance(kinds[0], list):
            distinct = list(dict.fromkeys(kinds))
            small[name] = [distinct[i % len(distinct)] for i in range(N_LAYERS)]
    if values.get("kv_lora_rank"):  # latent attention: one rotary part a head
        small |= {"num_key_value_heads": 4, "head_dim": 8}
    rope = values.get("rope_parameters") or {}
    if "mrope_section" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": _MROPE["mrope_section"]}
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(base, name, None)
        if inner is not None and name not in own:
            small[name] = tiny_config(type(inner))
    return kind(**small | own)


def build(model_type: str, *, text: bool = False, tied: bool | None = None) -> Any:
    """A tiny random model of a type; norm weights and biases are random too.

    Args:
        text: the class for text alone, where the type has one for images too.
        tied: whether embedding and unembedding are one tensor; None as the config class has it.

    Raises:
        anything that transformers raises for a config that it cannot make a model of.
    """
    config = tiny_config(config_classes()[model_type])
    if tied is not None:
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = tied
    wrapped = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)

    whole = getattr(transformers, _CLASSES.get(model_type, ""), wrapped)

    def made() -> Any:
        return whole(config) if whole and not text else AutoModelForCausalLM.from_config(config)

    with torch.device("meta"):
        size = sum(p.numel() for p in made().parameters())
    if size > TOO_LARGE:
        raise ValueError(f"its tiny config still has {size:,} parameters")
    torch.manual_seed(0)
    model = made().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if p.ndim <= 1 or "norm" in name.lower():
                p.add_(0.1 * noise)
            elif p.numel() > 1 and float(p.std()) < 0.05:
                p.copy_(0.08 * noise)
    return model
