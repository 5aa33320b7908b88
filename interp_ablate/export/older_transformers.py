"""config.json and tokenizer_config.json in a spelling that transformers 4 and 5 read alike.

transformers 5 writes `rope_parameters`, `dtype` and `TokenizersBackend`; transformers 4 ignores the first, so that
positions are silently those of theta 10000, and refuses the last. The older fields stand beside the newer ones here.

Knows: how both versions name rotary positions, dtypes and tokenizer classes. Does not know: weights, plans, folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The version of transformers 4 in which `make test-transformers4` reloads exports of these model types.
CHECKED_VERSION = "4.57.6"
CHECKED_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma", "gemma2", "gemma3_text", "olmo2",
    "gpt2", "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
# model_type -> (theta, rotated share of a head) where transformers 4 has names of its own.
_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# Types of model whose layers have two thetas in transformers 4 -> (of full attention, of sliding attention).
_TWO_THETAS = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
}
# model_type -> {name in transformers 5: name in transformers 4}
_RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Tokenizers of transformers 4 that put tokens around a text by fields of their own, not by tokenizer.json.
_ADDING_TOKENIZERS = tuple(
    f"{name}Tokenizer" for name in ("CodeLlama", "Cohere", "Gemma", "GPTNeoX", "Llama")
)
_LONGROPE = ("type", "short_factor", "long_factor")  # Phi-3 refuses any other field
# Fields of a config that only repeat what `rope_parameters` says.
OLD_ROPE_FIELDS = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings",
    *(name for names in (*_NAMES.values(), *_TWO_THETAS.values()) for name in names),
)  # fmt: skip
# What a config or a tokenizer remembers of the machine and the file that it was loaded from.
ORIGINS = ("_name_or_path", "_model_name_or_path")
_TOKENIZER_ORIGINS = ("is_local", "local_files_only", "backend")


def config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the older fields beside `rope_parameters` and `dtype`, in parts too.

    Fields that are there already stay as they are. So do rotary positions that transformers 4 has no words
    for; see `unreadable_in_4`.
    """
    result = {
        key: config_for_both(value)
        if isinstance(value, Mapping) and "model_type" in value
        else value
        for key, value in config.items()
        if key not in ORIGINS
    }
    if result.get("dtype") is not None:
        result.setdefault("torch_dtype", result["dtype"])
    for newer, older in _RENAMED.get(str(result.get("model_type")), {}).items():
        if newer in result:
            result.setdefault(older, result[newer])
    fields, reason = _old_rope(result)
    return result if reason else {**fields, **result}


def unreadable_in_4(config: Mapping[str, Any]) -> str | None:
    """Why transformers 4 would compute other rotary positions from a config.json; None where it does not."""
    parts = [part for part in config.values() if isinstance(part, Mapping) and "model_type" in part]
    reasons = (_old_rope(part)[1] for part in (config, *parts))
    return next((reason for reason in reasons if reason), None)


def note_on_4(config: Mapping[str, Any]) -> str:
    """A sentence for the card: what is known of an exported config.json in transformers 4."""
    kind, reason = config.get("model_type"), unreadable_in_4(config)
    if reason:
        return f"transformers 4 computes something else from it: {reason}."
    if kind in CHECKED_TYPES:
        return (
            f"Its files are spelled for transformers 4 too: exports of model type `{kind}` are reloaded in "
            f"{CHECKED_VERSION} by the tests of interp_ablate, this one was not."
        )
    return f"Exports of model type `{kind}` are not tried in transformers 4."


def tokenizer_for_both(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of a tokenizer_config.json with a class and special tokens that both versions know.

    Args:
        tokenizer: the content of the tokenizer.json beside it, if there is one.
    """
    result = {key: value for key, value in config.items() if key not in _TOKENIZER_ORIGINS}
    if isinstance(result.get("extra_special_tokens"), list):  # transformers 4: names -> tokens
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    if tokenizer is None:
        return result
    kind = str(result.get("tokenizer_class"))
    if kind == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
        # by default that class adds token types, which decoders refuse
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if kind.removesuffix("Fast") in _ADDING_TOKENIZERS and "add_bos_token" not in result:
        added = _template_tokens(tokenizer.get("post_processor"))
        for name in ("bos", "eos"):
            token = result.get(f"{name}_token")
            text = token.get("content") if isinstance(token, Mapping) else token
            result[f"add_{name}_token"] = text is not None and text in added
    return result


def _template_tokens(post_processor: Any) -> set[str]:
    """The special tokens that a tokenizer.json's post-processor puts around a single text."""
    if not isinstance(post_processor, Mapping):
        return set()
    parts = post_processor.get("processors", ())
    single = post_processor.get("single", ())
    own = {piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece}
    return own.union(*map(_template_tokens, parts))


def _old_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The older fields for `rope_parameters`; and why there are none, where they cannot say the same."""
    rope, kind = config.get("rope_parameters"), str(config.get("model_type"))
    if not isinstance(rope, Mapping) or not rope:
        return {}, None
    layered = any(isinstance(value, Mapping) or value is None for value in rope.values())
    full = rope.get("full_attention") if layered else rope
    if not isinstance(full, Mapping):
        return (
            {},
            f"{kind} has rotary positions for {', '.join(rope)}, which transformers 4 cannot say",
        )
    theta, share = _NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
    fields: dict[str, Any] = {theta: full.get("rope_theta")}
    if "partial_rotary_factor" in full:
        fields[share] = full["partial_rotary_factor"]
    if layered:
        sliding = rope.get("sliding_attention") or full
        names = _TWO_THETAS.get(kind, (theta, theta))
        one_theta = names[0] == names[1] and sliding.get("rope_theta") != full.get("rope_theta")
        if (
            set(rope) > {"full_attention", "sliding_attention"}
            or one_theta
            or _type(sliding) != "default"
        ):
            return {}, f"transformers 4 has one kind of rotary positions for all layers of {kind}"
        fields = {**fields, names[1]: sliding.get("rope_theta"), names[0]: full.get("rope_theta")}
    if _type(full) == "default":
        return fields, None
    scaling = {
        k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor", "type")
    }
    scaling["rope_type"] = _type(full)
    if _type(full) == "longrope":
        fields["original_max_position_embeddings"] = full.get("original_max_position_embeddings")
    if kind == "phi3":
        scaling["type"] = scaling.pop("rope_type")
        others = set(scaling) - {*_LONGROPE, "original_max_position_embeddings"}
        if others:
            return (
                {},
                f"transformers 4 has no {', '.join(sorted(others))} in the rotary scaling of phi3",
            )
        scaling = {key: scaling[key] for key in _LONGROPE}
    return {**fields, "rope_scaling": scaling}, None


def _type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"
