"""Sizes of mixtures of experts, hybrids and multimodal models, against what torch and transformers count of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.family_models import build
from torch.utils.flop_counter import FlopCounterMode

from interp_ablate.budget.costs import config_at
from interp_ablate.budget.sizes import Dimensions, dimensions_of
from interp_ablate.budget.stages import budget
from interp_ablate.errors import InterpAblateError

EXPERTS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "dbrx",
    "jetmoe",
    "minimax",
)
RECURRENT = (
    "mamba",
    "mamba2",
    "bamba",
    "falcon_h1",
    "lfm2",
    "qwen3_next",
    "jamba",
    "granitemoehybrid",
)
TOWERS = ("gemma3", "llama4", "qwen2_5_vl", "llava", "qwen3_5")
KINDS = sorted({*EXPERTS, *RECURRENT, *TOWERS, "gemma3_text", "deepseek_v2", "rwkv", "glm4_moe"})
# A class that the config alone names, positions from a shape, writing into embeddings, attention chosen where it is built,
# shared experts, weights made on the CPU, and what is before the unembedding or holds it.
KINDS += ["evolla", "pegasus", "ctrl", "git", "inkling_text", "xlnet", "modernbert-decoder"]
KINDS += ["nemotron_h_omni"]


def sized(kind: str, folder: Path) -> tuple[Any, Dimensions]:
    """A tiny model, and what its config.json alone says of it."""
    hf = build(kind)
    hf.config.architectures = [type(hf).__name__]
    hf.config.save_pretrained(folder)
    return hf, dimensions_of(config_at(folder), 4)


def text_pass(hf: Any, tokens: int, past: Any = None) -> Any:
    with torch.no_grad():
        return hf(input_ids=torch.randint(3, 200, (1, tokens)), use_cache=True)


def cached_tensors(out: Any) -> list[torch.Tensor]:
    """Every tensor in a cache, written without the package's own search for them."""
    held = out.get("past_key_values", out.get("cache_params", out.get("state")))
    found, left = [], [held]
    while left:
        part = left.pop()
        if isinstance(part, torch.Tensor):
            found += [part] if part.ndim > 1 else []
        elif isinstance(part, (list, tuple)):
            left += part
        elif isinstance(part, dict):
            left += part.values()
        elif hasattr(part, "__dict__") and "transformers" in type(part).__module__:
            left += [v for v in vars(part).values() if not callable(v)]
    return found


@pytest.mark.parametrize(
    "kind", [*KINDS, "unlimited_ocr"]
)  # whose prompts are kept whole beside a window
def test_parameters_and_caches(kind: str, tmp_path: Path) -> None:
    """Exactly torch's count, and exactly the bytes that a real pass leaves: below a window of 16, and past it."""
    hf, sizes = sized(kind, tmp_path)
    assert sizes.parameters == sum(p.numel() for p in hf.parameters())
    for tokens in (5, 40):
        kept = {x.data_ptr(): x for x in cached_tensors(text_pass(hf, tokens)) if x.numel()}
        assert sizes.cache_bytes(tokens) == sum(x.nbytes for x in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_pass(kind: str, tmp_path: Path) -> None:
    """As torch counts them where experts are run one by one; 64 tokens fill every chunk."""
    hf, sizes = sized(kind, tmp_path)
    hf.set_attn_implementation("eager")
    hf.requires_grad_(False)  # else torch's counter stumbles over DBRX's views
    if kind in (*EXPERTS, "deepseek_v2", "glm4_moe", "inkling_text", "nemotron_h_omni"):
        hf.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        text_pass(hf, 64)
    found = counter.get_total_flops() - 64 * sizes.logit_flops
    assert found == pytest.approx(64 * sizes.token_flops + sizes.pair_flops(0, 64), rel=0.003)


def taken_of(choice: Any) -> set[int]:
    """The experts of a choice: their numbers, or how many rows each has (JetMoE)."""
    if isinstance(choice, list):
        return {i for i, rows in enumerate(choice) if rows}
    return set(choice.flatten().tolist())


@pytest.mark.parametrize("kind", EXPERTS)
def test_active_parameters(kind: str, tmp_path: Path) -> None:
    """Without the experts that a token does not take, which change nothing of what it computes."""
    hf, sizes = sized(kind, tmp_path)
    hf.set_experts_implementation("eager")
    experts = {n: m for n, m in hf.named_modules() if type(m).__name__.endswith("Experts")}
    taken: dict[str, set[int]] = {}
    for name, module in experts.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: taken.__setitem__(name, taken_of(args[1]))
        )
    ids = torch.tensor([[7]])
    with torch.no_grad():
        before, idle = hf(input_ids=ids).logits, 0
        for name, module in experts.items():
            for p in module.parameters():
                stacked = p.view(
                    getattr(module, "num_experts", len(p)), -1
                )  # DBRX's are in two axes
                others = [i for i in range(len(stacked)) if i not in taken[name]]
                stacked[others] = torch.nan
                idle += stacked[others].numel()
        assert torch.equal(hf(input_ids=ids).logits, before)
    assert idle > 0 and sizes.active == sizes.parameters - idle


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_are_what_text_does_not_pass(kind: str, tmp_path: Path) -> None:
    hf, sizes = sized(kind, tmp_path)
    towers = [
        p
        for name, p in hf.named_parameters()
        if any(part in name for part in ("vision", "visual", "projector"))
    ]
    assert sizes.towers == sum(p.numel() for p in towers) > 0
    note = budget(sizes)["note"][0]
    assert "other towers" in note and ("active" in note) == (kind == "llama4")


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_next"])
def test_a_step_reads_few_experts_of_one_token_and_all_of_many(kind: str, tmp_path: Path) -> None:
    sizes = sized(kind, tmp_path)[1]
    outside = 0 if sizes.tied else sizes.unembedding
    assert sizes.parameters_a_step(1) == sizes.active - outside
    assert sizes.parameters_a_step(10_000) == sizes.parameters - outside


def test_published_models() -> None:
    """From the configs of transformers' own defaults: the counts that their papers give."""
    from transformers import DeepseekV3Config, MixtralConfig

    mixtral, deepseek = dimensions_of(MixtralConfig()), dimensions_of(DeepseekV3Config())
    assert mixtral.parameters == pytest.approx(46.7e9, rel=0.01)
    assert mixtral.active == pytest.approx(12.9e9, rel=0.01)
    assert deepseek.parameters == pytest.approx(671e9, rel=0.01)
    assert deepseek.active == pytest.approx(37e9, rel=0.02)
    assert deepseek.cache_bytes(1000) == 1000 * 61 * (512 + 64) * 2


REFUSED = {
    "deepseek_v4": "does not grow by the token",
    "xmod": r"torch.nonzero\(\).*at `lang_hidden_states = hidden_states\[lang_mask\]` in modeling_xmod.py",
    "pi0": "missing 1 required positional argument: 'action_embeds'",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_counted_is_refused(kind: str) -> None:
    """A cache that is compressed every so many tokens, rows found by their values, more than tokens."""
    hf = build(kind)
    with pytest.raises(
        InterpAblateError, match=f"no arithmetic for this {kind} model.*{REFUSED[kind]}"
    ):
        dimensions_of(hf.config)
