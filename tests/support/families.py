"""Every decoder type of transformers as a tiny random model, from its own config class with small sizes.

`python tests/support/families.py [TYPE ...]` takes each from loading to a certified export, checks the export in
plain transformers, and prints a table and a JSON line; without types, all of them (`make families`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

N_LAYERS, D_MODEL, D_VOCAB = 4, 64, 300
TOO_LARGE = 20_000_000  # parameters that no size below made small: not built
# Names that configs have for one size, and the size.
_SIZES: dict[tuple[str, ...], Any] = {
    ("hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "dim", "emb_dim"): D_MODEL,
    ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "dim_ff"): 96,
    ("shared_expert_intermediate_size", "shared_intermediate_size", "block_ff_dim"): 96,
    ("intermediate_size_mlp", "dense_intermediate_size", "decoder_ffn_dim"): 96,
    ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size"): 32,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"): N_LAYERS,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_global_key_value_heads"): 2,
    ("head_dim", "global_head_dim", "kv_channels", "attention_head_dim"): 16,
    ("vocab_size", "vocab_size_per_layer_input"): D_VOCAB,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"): 256,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"): 2,
    ("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"): 1,
    ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "mamba_d_head", "mamba_head_dim"): 16,
    ("q_lora_rank",): 24,
    ("qk_rope_head_dim", "state_size", "mamba_d_state", "ssm_state_size"): 8,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "hidden_size_per_layer_input"): 8,
    ("mamba_d_ssm",): 128,
    ("linear_num_key_heads", "linear_num_value_heads"): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "mamba_chunk_size", "chunk_size"): 16,
    ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"): 16,
    ("lru_width", "word_embed_proj_dim", "attention_hidden_size"): D_MODEL,
    ("pad_token_id", "num_nextn_predict_layers"): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
    ("image_size",): 32,
    ("patch_size",): 8,
    ("use_mamba_kernels",): False,
}
_KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
# Sizes that a family needs besides, and multipliers that are not one.
_MULTIPLIERS: dict[str, float] = {
    "residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "head_dim": 8}  # latent attention: one rotary part a head
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SHARED = {  # blocks of attention that read the stream beside the embedding: twice as wide
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_HYBRID, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "glm4_moe_lite": _MLA,
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {
        **_MLA,
        "num_experts_per_token": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": _MLA,
    "ministral": {"head_dim": 16},
    "youtu": _MLA,
    "zamba": {**_SHARED, "n_mamba_heads": 2, "mamba_dt_rank": 8},
    "zamba2": {**_SHARED, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
}


def types() -> list[str]:
    """Every model type that has a class for text generation, or for text from images."""
    classes = [*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    return sorted({config.model_type for config in classes})


def tiny_config(kind: type) -> Any:
    """A config of a class with small sizes, its inner configs too."""
    base = kind()  # type: ignore[call-arg]
    values = base.to_dict()
    small: dict[str, Any] = {}
    for names, size in _SIZES.items():
        for name in names:
            if (
                name in values
                and values[name] is not None
                and not isinstance(values[name], (list, dict))
            ):
                small[name] = size
    small |= {name: value for name, value in _MULTIPLIERS.items() if name in values}
    for name in _KINDS_OF_LAYERS:
        kinds = values.get(name)
        if isinstance(kinds, list) and kinds and not isinstance(kinds[0], list):
            distinct = list(dict.fromkeys(kinds))
            small[name] = [distinct[i % len(distinct)] for i in range(N_LAYERS)]
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(base, name, None)
        if inner is not None:
            small[name] = tiny_config(type(inner))
    small |= _OWN.get(kind.model_type, {})  # type: ignore[attr-defined]
    return kind(**small)


def build(model_type: str) -> Any:
    """A tiny random model of a type; norm weights and biases are random too.

    Raises:
        anything that transformers raises for a config or a pass that it cannot make.
    """
    kind = CONFIG_MAPPING[model_type]
    config = tiny_config(kind)
    mapping = next(
        m for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING) if kind in m
    )
    cls = mapping[kind]
    cls = cls[0] if isinstance(cls, tuple) else cls
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > TOO_LARGE:
        raise ValueError(f"its tiny config still has {size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if p.ndim <= 1 or "norm" in name.lower():
                p.add_(0.1 * noise)
            elif p.numel() > 1 and float(p.std()) < 0.05:
                p.copy_(0.08 * noise)
        model(input_ids=torch.arange(3, 23)[None])
    return model


def left_along(folder: Path, r: Tensor, rows: Sequence[Sequence[int]]) -> float:
    """What an exported folder has left along r in plain transformers: the largest share, at any hidden state.

    The class is the one that config.json names; nothing of the package runs.
    """
    import transformers

    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    hf = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    unit, worst = r.float() / r.float().norm(), 0.0
    for row in rows:
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([list(row)]), output_hidden_states=True)
        for hidden in out.hidden_states[:-1]:  # the last one is after the final norm
            worst = max(worst, float(((hidden @ unit).abs() / hidden.norm(dim=-1)).max()))
    return worst


def carried(model_type: str, folder: Path) -> tuple[str, str]:
    """(outcome, detail) of one type: exact, wrong, refused, raw or not built."""
    from support.tiny import make_tokenizer

    from interp_ablate import Plan
    from interp_ablate.edits.kinds import Ablate
    from interp_ablate.errors import InterpAblateError
    from interp_ablate.export.checkpoint import export_checkpoint
    from interp_ablate.models.load import from_hf

    try:
        hf = build(model_type)
    except Exception as error:  # whatever transformers raises for a config of ours
        return (
            "not built",
            f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
        )
    rows = [list(range(5, 17)), [*range(5, 14), 99, 98], [3, 4, 5]]
    stage = "load"
    try:
        model = from_hf(hf, make_tokenizer())
        stage = "generate"
        model.generate(rows, max_new_tokens=3)
        stage = "plan"
        r = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
        plan = Plan((Ablate(r, model.writers),))
        stage = "export"
        shutil.rmtree(folder, ignore_errors=True)
        certificate = export_checkpoint(model, plan, folder, prompts=rows)
        stage = "check"
        left = left_along(folder, r, rows)
    except InterpAblateError as error:
        return "refused", f"{stage}: {str(error).splitlines()[0][:300]}"
    except Exception as error:  # a raw exception is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        return (
            "raw",
            f"{stage}: {type(error).__name__}: {reason} ({Path(at.filename).name}:{at.lineno})",
        )
    outcome = "exact" if certificate["passed"] and left < 1e-5 else "wrong"
    return (
        outcome,
        f"{model.backend}, {left:.0e} left, effect {certificate['max_abs_logit_effect_of_plan']:.2f}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; status 1 if a type is wrong or raises something raw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for model_type in parser.parse_args(argv).types or types():
            outcome, detail = carried(model_type, Path(place) / "out")
            outcomes[model_type] = outcome
            print(f"{model_type:28} {outcome:10} {detail}", flush=True)
    counts = Counter(outcomes.values())
    print(json.dumps({"benchmark": "families", **counts, "types": outcomes}))
    return 1 if counts["wrong"] or counts["raw"] else 0


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    raise SystemExit(main())
