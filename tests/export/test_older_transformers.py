"""config.json and tokenizer_config.json as transformers 4.57 reads them: its rules, written down here once more.

The real transformers 4 runs in tests/slow/test_transformers4.py, in an environment of its own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import D_MODEL, DECLARED, make, rows_of, tiny, unit
from transformers import AutoConfig

from interp_ablate import Ablate, Plan
from interp_ablate.export.auditing import AuditSource, audit
from interp_ablate.export.checkpoint import export_checkpoint, export_folder
from interp_ablate.export.older_transformers import (
    config_for_both,
    tokenizer_for_both,
    unreadable_in_4,
)
from interp_ablate.models.load import from_hf
from interp_ablate.storage.safetensors_reader import Checkpoint

ROWS = rows_of(9)
_HEAD = D_MODEL // 4
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
_TWO = {
    "head_dim": 8,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# name -> (kind, rope_parameters, other config fields)
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama_gqa", {"rope_type": "default", "rope_theta": 1e5}, {}),
    "linear": ("llama_gqa", {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4}, {}),
    "dynamic": ("llama_gqa", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 2e4}, {"max_position_embeddings": 16}),
    "llama3": ("llama_gqa", {**_LLAMA3, "rope_theta": 5e5}, {}),
    "yarn": ("qwen3", _YARN, {}),
    "yarn_full": ("qwen2", {**_YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3}, {"head_dim": 8}),
    "longrope": ("phi3", {"rope_type": "longrope", **_FACTORS, "rope_theta": 3e4}, {"original_max_position_embeddings": 16}),
    "partial": ("phi3", {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}, {}),
    "stablelm": ("stablelm", {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}, {}),
    "neox": ("gpt_neox", {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}, {}),
    "neox_linear": ("gpt_neox", {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4, "partial_rotary_factor": 0.5}, {}),
    "gemma3": ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}, _TWO),
    "gemma3_plain": ("gemma3_text", {"full_attention": {"rope_type": "default", "rope_theta": 2e6},
                                     "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}, _TWO),
    "olmo2": ("olmo2", {"rope_type": "default", "rope_theta": 5e5}, {}),
    "mixtral": ("mixtral", {"rope_type": "default", "rope_theta": 1e6}, {}),
}  # fmt: skip


def rope_config(name: str) -> tuple[str, dict[str, Any]]:
    kind, rope, more = ROPES[name]
    return kind, {**more, "rope_parameters": json.loads(json.dumps(rope))}


def frequencies_of_457(
    config: dict[str, Any], *, sliding: bool = False
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor of cosines, from the fields that transformers 4.57 reads."""
    names = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}.get(config["model_type"])
    base_name, share_name = names or ("rope_theta", "partial_rotary_factor")
    base = config["rope_local_base_freq" if sliding else base_name]
    share = config.get(share_name, 0.25 if names else 1.0)
    size = int((config.get("head_dim") or _HEAD) * share)
    exponents = torch.arange(0, size, 2).double() / size
    plain = 1.0 / base**exponents
    scaling = None if sliding else config.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if scaling else "default"
    longest = config["max_position_embeddings"]
    if kind in ("default", "dynamic"):  # dynamic: as long as no row is longer than the maximum
        return plain, 1.0
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "longrope":
        before = config.get("original_max_position_embeddings", longest)
        ratio = longest / before
        factor = math.sqrt(1 + math.log(ratio) / math.log(before)) if ratio > 1 else 1.0
        return plain / torch.tensor(scaling["short_factor"]).double(), scaling.get(
            "attention_factor", factor
        )
    before = scaling.get("original_max_position_embeddings", longest)
    if kind == "llama3":
        turns = before * plain / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / scaling["factor"]), 1.0
    assert kind == "yarn"

    def dimension(rotations: float) -> float:
        return size * math.log(before / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), size - 1)
    ramp = ((torch.arange(size // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    factor = scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1.0
    return plain / scaling["factor"] * ramp + plain * (1 - ramp), factor


@pytest.mark.parametrize("streamed", (False, True), ids=("memory", "stream"))
@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_read_by_the_rules_of_4_57(
    tmp_path: Path, name: str, streamed: bool
) -> None:
    kind, settings = rope_config(name)
    if streamed and kind not in DECLARED:
        pytest.skip("read off the Bridge's component map: no stream without a loaded model")
    hf, tokenizer = tiny(kind, **settings)
    if streamed:
        hf.save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        export_folder(tmp_path / "source", Plan(), tmp_path / "out")
        assert audit(AuditSource.of_folder(tmp_path / "source"), Plan(), tmp_path / "out").passed
    else:
        model = from_hf(hf, tokenizer)
        export_checkpoint(model, None, tmp_path / "out", prompts=ROWS)
        assert audit(AuditSource.of_model(model), Plan(), tmp_path / "out").passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert unreadable_in_4(config) is None and config["torch_dtype"] == config["dtype"] == "float32"
    rotary = next(m for n, m in hf.named_modules() if n.endswith("rotary_emb"))
    two = name.startswith("gemma3")
    for sliding in (False, True)[: 1 + two]:
        prefix = f"{('full', 'sliding')[sliding]}_attention_" if two else ""
        got, factor = frequencies_of_457(config, sliding=sliding)
        want = getattr(rotary, f"{prefix}inv_freq").double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"))
    again = AutoConfig.from_pretrained(tmp_path / "out")
    before = {k: v for k, v in hf.config.rope_parameters.items() if k != "type"}
    assert {k: v for k, v in again.rope_parameters.items() if k != "type"} == before


def test_what_transformers_4_cannot_say_is_said() -> None:
    layers = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    other = {**layers, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = {"model_type": "olmo3", "rope_parameters": other}
    assert "one kind of rotary positions" in (unreadable_in_4(config) or "")
    assert config_for_both(config) == config
    scaled = {"rope_type": "longrope", **_FACTORS, "rope_theta": 1e4, "attention_factor": 1.5}
    assert "attention_factor" in (
        unreadable_in_4({"model_type": "phi3", "rope_parameters": scaled}) or ""
    )
    inside = {"model_type": "some", "text_config": config}
    assert unreadable_in_4(inside) and unreadable_in_4({"model_type": "gpt2"}) is None


def test_parts_of_a_config_and_fields_that_are_there() -> None:
    text = {"model_type": "gemma3_text", "rope_parameters": ROPES["gemma3"][1]}
    spelled = config_for_both(
        {"model_type": "gemma3", "text_config": text, "_name_or_path": "/home/a"}
    )
    assert spelled["text_config"]["rope_theta"] == 1e6
    assert spelled["text_config"]["rope_local_base_freq"] == 3e4
    assert "_name_or_path" not in spelled
    old = {"model_type": "llama", "rope_theta": 5.0, "torch_dtype": "float16"}
    assert config_for_both(old) == old


def test_a_tokenizers_class_and_special_tokens() -> None:
    written = {
        "tokenizer_class": "TokenizersBackend", "is_local": True, "local_files_only": True,
        "backend": "tokenizers", "extra_special_tokens": ["<x>"], "eos_token": "</s>",
    }  # fmt: skip
    both = tokenizer_for_both(written, {})
    assert both == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>"], "eos_token": "</s>",
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    named = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert tokenizer_for_both(named, {}) == named == tokenizer_for_both(named, None)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("bos", (False, True))
def test_a_token_in_front_where_tokenizer_json_says_so(bos: bool, nested: bool) -> None:
    """Llama's and Gemma's tokenizers of transformers 4 put one there unless a field forbids it."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
    }
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * bos + [{"Sequence": {"id": "A"}}]
    post: dict[str, Any] = {"type": "TemplateProcessing", "single": single}
    post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, post]} if nested else post
    spelled = tokenizer_for_both(config, {"post_processor": post})
    assert spelled == {**config, "add_bos_token": bos, "add_eos_token": False}
    assert tokenizer_for_both({**config, "add_bos_token": True}, {}) == {
        **config,
        "add_bos_token": True,
    }
    assert tokenizer_for_both(config, {"post_processor": None})["add_bos_token"] is False


@pytest.mark.parametrize("kind", sorted(DECLARED))
def test_an_unembedding_that_is_untied_has_the_name_that_checkpoints_have(
    kind: str, tmp_path: Path
) -> None:
    """GPT-NeoX's is `embed_out.weight`, which transformers 5 calls lm_head: 4 answered from random numbers."""
    model = make(kind, tied=True)
    export_checkpoint(model, Plan((Ablate(unit(), model.writers),)), tmp_path / "out")
    tiny(kind, tied=False)[0].save_pretrained(tmp_path / "untied")
    names = [set(Checkpoint.open(tmp_path / place).tensors) for place in ("out", "untied")]
    assert names[0] == names[1]
