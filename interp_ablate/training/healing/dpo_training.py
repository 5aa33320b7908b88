"""Direct preference optimization that keeps an edit (Rafailov et al. 2023).

Knows: the loss and the projection. Does not know: data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.errors import PlanError, RunError
from interp_ablate.training.healing.case import EditedCheckpoint
from interp_ablate.training.healing.settings import HealingConfig
from interp_ablate.training.lora import Where, lora_config
from interp_ablate.training.recipe import RECIPE, LoraRecipe
from interp_ablate.training.rows import TrainingRow
from interp_ablate.training.trainable_model import require_extra
from interp_ablate.training.trainer import common_arguments, make_trainer, without_telemetry
from interp_ablate.weights.plan_to_weights import WeightPlan

_WHERE: dict[str, Where] = {"freeze-writers": "readers", "reproject": "all", "none": "all"}


def dpo(
    case: EditedCheckpoint,
    rows: Sequence[tuple[TrainingRow, TrainingRow]],
    work: Path,
    *,
    healing: HealingConfig = HealingConfig(),  # noqa: B008
    recipe: LoraRecipe = RECIPE,
) -> Any:
    """TRL's DPOTrainer with a fresh adapter over the edited model; its reference is the model without it.

    Raises:
        RunError: TRL or PEFT is missing; a KL term without the original.
    """
    from datasets import Dataset

    _, trl = require_extra()
    if healing.kl_weight and case.original is None:
        raise RunError("--kl-weight needs the original model: give --original MODEL")
    data = Dataset.from_dict(
        {
            "prompt_ids": [list(chosen.prompt) for chosen, _ in rows],
            "chosen_ids": [list(chosen.answer) for chosen, _ in rows],
            "rejected_ids": [list(rejected.answer) for _, rejected in rows],
        }
    )
    losses = ["sigmoid", "sft"] if healing.sft_weight else ["sigmoid"]
    settings = {
        **common_arguments(case.edited, recipe, work),
        "beta": healing.beta,
        "loss_type": losses,
        "loss_weights": [1.0, healing.sft_weight][: len(losses)],
    }
    kind = without_telemetry(trl.DPOTrainer)
    if healing.kl_weight and case.original is not None:
        kind = _with_kl(kind, case.original.hf, healing.kl_weight)
    return make_trainer(
        kind,
        trl.DPOConfig,
        case.edited,
        settings=settings,
        train_dataset=data,
        peft_config=lora_config(case.edited.hf, recipe, where=_WHERE[healing.preserve_edit]),
    )


def _with_kl(kind: Any, original: Any, weight: float) -> Any:
    """The trainer with weight * KL(original || model), a token of the chosen answers, in its loss."""

    class WithKL(kind):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any
        ) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **rest)
            return loss + weight * _kl_to(original, model, inputs)

    return WithKL


def _kl_to(original: Any, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean KL(original || model) over the tokens of the chosen answers, with a gradient for the model."""
    chosen = len(inputs["input_ids"]) // 2  # chosen rows come first
    width = int(inputs["attention_mask"][:chosen].sum(1).max())
    tokens = {name: inputs[name][:chosen, :width] for name in ("input_ids", "attention_mask")}
    counted = inputs["completion_mask"][:chosen, 1:width].bool()
    with torch.no_grad():
        reference = (
            original(**tokens, use_cache=False).logits[:, :-1][counted].float().log_softmax(-1)
        )
    logprobs = model(**tokens, use_cache=False).logits[:, :-1][counted].float().log_softmax(-1)
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
    parameters = dict(peft_model.named_parameters())
    for name, edit in weights.edits.items():
        module = name.rpartition(".")[0]
        weight = parameters.get(f"base_model.model.{module}.lora_B.default.weight")
        if weight is None or edit.layout not in ("linear", "conv1d"):
            continue
        wide = weight.detach().cpu().double()
        weight.copy_(edit.affine.linear(wide.T).T.to(weight))
        changed += 1
    return changed
