"""A healing's training as a configuration for axolotl, which trains on several GPUs.

Source of the keys: https://docs.axolotl.ai/docs/config-reference.html, https://docs.axolotl.ai/docs/rlhf.html.

Knows: axolotl's keys. Does not know: the training in this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interp_ablate.training.healing.case import HealingRun
from interp_ablate.training.healing.settings import HealingConfig
from interp_ablate.training.recipe import LoraRecipe

REPORT, PREFERENCES, AXOLOTL = "heal.json", "preferences.jsonl", "axolotl.yaml"


def axolotl_config(
    base_model: str, treatment: HealingRun, *, targets: Sequence[str]
) -> dict[str, Any]:
    """The same training in axolotl's terms, for several GPUs.

    A KL term has no key there; `reproject` is done by `interp-ablate` after the training only.
    """
    healing, recipe = treatment.healing, treatment.recipe
    config: dict[str, Any] = {
        "base_model": base_model,
        "model_type": "AutoModelForCausalLM",
        "tokenizer_type": "AutoTokenizer",
        "rl": "dpo",
        "rl_beta": healing.beta,
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": PREFERENCES,
                "ds_type": "json",
                "split": "train",
                "type": "chat_template.default",
                "field_messages": "prompt",
            }
        ],
        "val_set_size": 0.0,
        **_axolotl_lora(recipe, targets, treatment.qlora),
        "sequence_len": recipe.max_length,
        "sample_packing": False,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": recipe.steps,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "learning_rate": recipe.learning_rate,
        "warmup_steps": max(1, recipe.steps // 10),
        "weight_decay": 0.0,
        "bf16": "auto",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "seed": recipe.seed,
        "output_dir": "./axolotl-out",
    }
    if healing.sft_weight:
        config["dpo_loss_type"] = ["sigmoid", "sft"]
        config["dpo_loss_weights"] = [1.0, healing.sft_weight]
    return config


def _axolotl_lora(recipe: LoraRecipe, targets: Sequence[str], quantized: bool) -> dict[str, Any]:
    return {
        "adapter": "qlora" if quantized else "lora",
        "load_in_4bit": quantized,
        "load_in_8bit": False,
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(targets),
        "peft_use_rslora": recipe.rslora,
    }


def axolotl_text(config: Mapping[str, Any], healing: HealingConfig) -> str:
    import yaml

    lines = [
        "# The recovery of this checkpoint in axolotl's terms, for several GPUs:",
        "#     cd into this folder; axolotl train axolotl.yaml",
        "# base_model is the edited checkpoint; max_steps and the learning rate are those of this folder's",
        "# own small training: for a large model raise the one and lower the other (5e-6 is usual for DPO).",
        "# Answers that a limit of new tokens cut are whole answers to axolotl: make them longer there.",
    ]
    if healing.kl_weight:
        lines.append("# The KL term of the training here has no key in axolotl.")
    if healing.preserve_edit == "reproject":
        lines.append(
            "# lora_target_modules has writers of the edit too: the edit is not kept by axolotl."
        )
    return "\n".join(lines) + "\n" + yaml.safe_dump(dict(config), sort_keys=False)
