"""Direct preference optimization that keeps an edit (Rafailov et al. 2023), here and as a file for axolotl.

Source of the keys: https://docs.axolotl.ai/docs/config-reference.html, https://docs.axolotl.ai/docs/rlhf.html.

Knows: the loss, the projection, axolotl's keys. Does not know: data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.errors import PlanError
from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.training.healing.case import EditedCheckpoint, HealingRun
from interp_ablate.training.lora_targets import Where, adapted_layers
from interp_ablate.training.recipe import HEALING, RECIPE, HealingConfig, LoraRecipe
from interp_ablate.training.rows import TrainingRow
from interp_ablate.training.trainable_model import TrainableModel, require_extra
from interp_ablate.training.trainer import common_arguments, make_trainer, without_telemetry
from interp_ablate.weights.plan_to_weights import WeightPlan

_WHERE: dict[str, Where] = {"freeze-writers": "readers", "reproject": "all", "none": "all"}


def dpo(
    case: EditedCheckpoint,
    rows: Sequence[tuple[TrainingRow, TrainingRow]],
    work: Path,
    *,
    healing: HealingConfig = HEALING,
    recipe: LoraRecipe = RECIPE,
) -> Any:
    """TRL's DPOTrainer with a fresh adapter over the edited model; its reference is the model without it.

    The edited model is taken from the case. Of the original, for a KL term, its unembedding is held.

    Raises:
        RunError: TRL or PEFT is missing; a KL term without the original.
    """
    from datasets import Dataset

    _, trl = require_extra()
    if healing.kl_weight:
        _ = case.needed_original
    data = Dataset.from_dict(
        {
            "prompt_ids": [list(chosen.prompt) for chosen, _ in rows],
            "chosen_ids": [list(chosen.answer) for chosen, _ in rows],
            "rejected_ids": [list(rejected.answer) for _, rejected in rows],
        }
    )
    losses = ["sigmoid", "sft"] if healing.sft_weight else ["sigmoid"]
    kind = without_telemetry(trl.DPOTrainer)
    if healing.kl_weight:
        reference = _Reference(case.needed_original, [chosen for chosen, _ in rows])
        kind = _with_kl(kind, reference, healing.kl_weight)
    edited = case.edited.take()
    settings = {
        **common_arguments(edited, recipe, work),
        "beta": healing.beta,
        "loss_type": losses,
        "loss_weights": [1.0, healing.sft_weight][: len(losses)],
    }
    return make_trainer(
        kind,
        trl.DPOConfig,
        edited,
        recipe,
        where=_WHERE[healing.preserve_edit],
        settings=settings,
        train_dataset=data,
    )


class _Reference:
    """The original's distribution at the tokens of some answers, without the original.

    Held are the states that its unembedding reads there, on the CPU, and the unembedding. Where logits are not
    what the unembedding gives (soft caps, scales), the logits are held.
    """

    @torch.no_grad()
    def __init__(self, original: TrainableModel, rows: Sequence[TrainingRow]) -> None:
        hf = original.take().hf
        self.head = unembedding_of(hf)
        self.of_row: dict[tuple[int, ...], tuple[Tensor, bool]] = {}
        read: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for row in rows:
            tokens, at_answer = (*row.prompt, *row.answer), slice(len(row.prompt) - 1, -1)
            ids = torch.tensor([tokens], device=original.device)
            logits = hf(input_ids=ids, use_cache=False).logits[0, at_answer]
            states = read[-1][0, at_answer]
            plain = torch.equal(self.head(states).float(), logits.float())
            self.of_row[tokens] = (states if plain else logits).cpu(), plain
            read.clear()
        handle.remove()

    def logprobs(self, rows: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
        """At the answers' tokens of some rows, one row after the other: [token, d_vocab], float32."""
        stored = (self.of_row[row] for row in rows)
        logits = [self.head(x.to(like)) if plain else x.to(like.device) for x, plain in stored]
        return torch.cat(logits).float().log_softmax(-1)


def _with_kl(kind: Any, reference: _Reference, weight: float) -> Any:
    """The trainer with weight * KL(original || model), a token of the chosen answers, in its loss."""

    class WithKL(kind):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any
        ) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **rest)
            return loss + weight * _kl_to(reference, model, inputs)

    return WithKL


def _kl_to(original: _Reference, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean KL(original || model) over the tokens of the chosen answers, with a gradient for the model."""
    chosen = len(inputs["input_ids"]) // 2  # chosen rows come first
    width = int(inputs["attention_mask"][:chosen].sum(1).max())
    tokens = {name: inputs[name][:chosen, :width] for name in ("input_ids", "attention_mask")}
    counted = inputs["completion_mask"][:chosen, 1:width].bool()
    lengths = tokens["attention_mask"].sum(1).tolist()
    rows = [tuple(row[:n]) for row, n in zip(tokens["input_ids"].tolist(), lengths)]
    logits = model(**tokens, use_cache=False).logits[:, :-1][counted]
    logprobs = logits.float().log_softmax(-1)
    with torch.no_grad():
        reference = original.logprobs(rows, next(original.head.parameters()))
    return (reference.exp() * (reference - logprobs)).sum(-1).mean()


@torch.no_grad()
def project(peft_model: Any, weights: WeightPlan) -> int:
    """Put what an adapter writes to the stream through the edit, in place; how many modules it was.

    With W = M W0 the edited weight of a writer and B A its adapter, B becomes M B: the merged weight is
    M (W0 + B A), the edit of the trained original.

    Raises:
        PlanError: a norm-preserving edit, which is no linear map of the weight.
    """
    rescaled = [name for name, edit in weights.edits.items() if edit.keeps_norm]
    if rescaled:
        raise PlanError(
            f"{rescaled[0]} was edited with its norms preserved, which is no linear map: "
            "--preserve-edit freeze-writers"
        )
    changed = 0
    layers = adapted_layers(peft_model)
    for name, edit in weights.edits.items():
        if (layer := layers.get(name)) is None:
            continue
        transposed = getattr(layer.get_base_layer(), "is_transposed", False)
        if edit.layout == "experts_conv1d" and not transposed:
            # PEFT takes the last axis for the one that is read: its A writes
            factor = layer.lora_A["default"].weight
            projected = edit.affine.linear(factor.detach().cpu().double())
        else:
            factor = layer.lora_B["default"].weight
            projected = edit.affine.linear(factor.detach().cpu().double().T).T
        factor.copy_(projected.to(factor))
        changed += 1
    return changed


REPORT, PREFERENCES, AXOLOTL = "heal.json", "preferences.jsonl", "axolotl.yaml"


def axolotl_config(
    base_model: str,
    treatment: HealingRun,
    *,
    targets: Sequence[str],
    parameters: Sequence[str] = (),
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
        "adapter": "qlora" if treatment.qlora else "lora",
        "load_in_4bit": treatment.qlora,
        "load_in_8bit": False,
        "lora_r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "lora_target_modules": list(targets),
        "peft_use_rslora": recipe.rslora,
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
    if parameters:
        config["lora_target_parameters"] = list(parameters)
    if healing.sft_weight:
        config["dpo_loss_type"] = ["sigmoid", "sft"]
        config["dpo_loss_weights"] = [1.0, healing.sft_weight]
    return config


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
