"""The inputs of a healing: the edited checkpoint with its original and its plan, held-out prompts, the settings.

Knows: how a checkpoint's plan is read, and how an edit's damage is measured. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from interp_ablate.activations.collection import collect
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import answer_metrics, unanswered
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.architectures import declared_architecture
from interp_ablate.models.backends.hf import measured_architecture
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import sites_of
from interp_ablate.stats.intervals import AT_LEAST_0, SHARE, Bounds, mean_with_interval
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.training.healing.preferences import PreferencePair
from interp_ablate.training.recipe import HEALING, RECIPE, HealingConfig, LoraRecipe
from interp_ablate.training.trainable_model import TrainableModel
from interp_ablate.weights.plan_to_weights import WeightPlan, weight_plan

# what is reported of the answers to benign prompts
_DAMAGE = ("behaviour_benign", "no_answer", "repetition", "kl_first_token", "kl_continuation")


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Prompts that neither made the edit nor the preferences."""

    requests: tuple[Prompt, ...]
    """Prompts after which the behaviour is expected."""
    benign: tuple[Prompt, ...]
    """Prompts that any model answers; KL and repetition are measured on these."""
    expression: ExpressionScorer
    max_new_tokens: int = MAX_NEW_TOKENS
    source: str = ""

    @classmethod
    def of(
        cls,
        contrast: ContrastSet,
        expression: ExpressionScorer,
        *,
        n_test: int | None = None,
        seed: int = 0,
    ) -> HeldOut:
        """The test part of a contrast set's split: positive prompts as requests, negative ones as benign.

        `seed` and `n_test` are the split's: those of the run that made the edit, whose test part made nothing of
        it. By default as many prompts as a run takes by default.

        Raises:
            PromptError: too few prompts.
        """
        size = contrast.split_sizes(n_test=n_test)["n_test"]
        test = contrast.split(1, 1, size, seed=seed).test
        return cls(test.positive, test.negative, expression, source=test.source)


def measure_damage(
    model: Model, by: HeldOut, baseline: ModelOutputs | None = None
) -> tuple[dict[str, list[float | None]], ModelOutputs]:
    """Measure a model's answers to held-out prompts, a value a prompt; also returns its benign answers.

    `behaviour` and `behaviour_benign` are 1 where an answer expresses the behaviour, the first None where a thought
    did not end; `no_answer` (of models that think), `repetition` and, with a
    baseline, the KL to it are those of benign prompts (`answer_metrics`).
    """
    requests = ModelOutputs(model, by.requests, max_new_tokens=by.max_new_tokens)
    benign = ModelOutputs(model, by.benign, max_new_tokens=by.max_new_tokens)
    metrics = answer_metrics(benign, baseline, {"behaviour_benign": by.expression})
    names = [name for name in _DAMAGE if name in metrics]
    scores = by.expression.score_texts(requests.texts).tolist()
    none = unanswered(requests).bool().tolist()
    behaviour = [None if cut else score for score, cut in zip(scores, none)]
    return {"behaviour": behaviour, **{name: metrics[name] for name in names}}, benign


def residual_share_along(model: Model, plan: Plan, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The share of the residual stream in the span of what a plan reads: |proj(x)| / |x| at the last prompt token.

    That span is of all its edits together (`reads`). The mean over prompts at resid_post of every layer, and of
    these the mean and the largest; empty for a plan that only adds.
    """
    nothing = torch.zeros(0, model.d_model, dtype=torch.float64)
    rows = torch.cat([nothing, *(edit.reads for edit in plan)])
    rows = rows[rows.any(dim=1)]
    if not len(rows):
        return {}
    _, sizes, axes = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    basis = axes[sizes > 1e-6]  # rows may depend on each other, or be one direction twice
    sites = sites_of(("resid_post",), range(model.n_layers))
    values = collect(model, list(prompts), sites, (-1,)).values[:, 0].cpu().double()
    share = (values @ basis.T).norm(dim=-1) / values.norm(dim=-1).clamp(min=1e-30)
    by_layer = share.mean(0)
    return {"mean": float(by_layer.mean()), "largest": float(by_layer.max())}


def bounds_of_damage(name: str) -> Bounds:
    """What a measure can be: those of behaviours and repetition are shares, a KL is at least 0."""
    return AT_LEAST_0 if name.startswith("kl") else SHARE


def mean_measures(values: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """The mean and interval of every measure."""
    return {
        name: mean_with_interval(per_prompt, bounds=bounds_of_damage(name))
        for name, per_prompt in values.items()
    }


@dataclass(frozen=True, eq=False)
class EditedCheckpoint:
    """An edited checkpoint and its origin."""

    edited: TrainableModel
    original: TrainableModel | None = None
    """The model before the edit, where it is known."""
    plan: Plan | None = None
    """The edit, where the checkpoint's manifest holds it."""

    @property
    def needed_original(self) -> TrainableModel:
        """The original.

        Raises:
            RunError: it was not given.
        """
        if self.original is None:
            raise RunError("the original model is needed here: give --original MODEL")
        return self.original

    @cached_property
    def weights(self) -> WeightPlan:
        """The edit, tensor by tensor.

        Raises:
            RunError: the checkpoint's manifest holds no plan.
            ExportError: see `weight_plan`.
        """
        if self.plan is None or not len(self.plan):
            raise RunError(
                "the checkpoint has no manifest with a plan, so what the edit is cannot be known: "
                "--preserve-edit freeze-writers or none"
            )
        hf = self.edited.hf
        state = hf.state_dict()
        entry = declared_architecture(hf.config.model_type) or measured_architecture(hf)
        return weight_plan(
            self.plan, hf.config, list(state), state.__getitem__, tied="untie", entry=entry
        )


def read_plan(folder: str | Path) -> tuple[Plan | None, dict[str, Any]]:
    """Read the plan and the source in an exported checkpoint's manifest; (None, {}) without a manifest.

    Raises:
        RunError: a manifest that cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None, {}
    try:
        manifest = incoming_object(path)
        if manifest.get("kind") != "checkpoint":
            raise RunError(
                f"{path} is of a {manifest.get('kind')}; an exported checkpoint is healed"
            )
        plan = Plan.from_dict(manifest["plan"])
        source = dict(manifest["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"cannot read {path}: {error}. Export the checkpoint again") from error
    return (plan if len(plan) else None), source


@dataclass(frozen=True, eq=False)
class HealingRun:
    """The preferences that are learned, the settings, and the prompts that are measured before and after."""

    pairs: Sequence[PreferencePair]
    healing: HealingConfig = HEALING
    recipe: LoraRecipe = RECIPE
    held_out: HeldOut | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """More about the preferences, for the report."""
    qlora: bool = False
    """The configuration for axolotl loads the checkpoint in 4 bits; the training here never does."""
