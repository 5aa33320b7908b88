"""The damage that an edit did, and what healing regains of it, measured on held-out prompts.

Knows: the held-out prompts and what is measured on them. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp_ablate.activations.collection import collect
from interp_ablate.edits.kinds import Ablate, Clamp, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import answer_metrics
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import sites_of
from interp_ablate.stats.intervals import mean_with_interval

# what is reported of the answers to benign prompts
_DAMAGE = ("behaviour_benign", "repetition", "kl_first_token", "kl_continuation")


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
        n_test: int = 32,
        seed: int = 0,
    ) -> HeldOut:
        """The test part of a contrast set's split: positive prompts as requests, negative ones as benign.

        `seed` is the split's: that of the run that made the edit, whose test part made nothing of it.

        Raises:
            PromptError: too few prompts.
        """
        test = contrast.split(1, 1, n_test, seed=seed).test
        return cls(test.positive, test.negative, expression, source=test.source)


def measure_damage(
    model: Model, by: HeldOut, baseline: ModelOutputs | None = None
) -> tuple[dict[str, list[float | None]], ModelOutputs]:
    """Measure a model's answers to held-out prompts, a value a prompt; also returns its benign answers.

    `behaviour` and `behaviour_benign` are 1 where an answer expresses the behaviour; `repetition` and, with a
    baseline, the KL to it are those of benign prompts (`answer_metrics`).
    """
    requests = ModelOutputs(model, by.requests, max_new_tokens=by.max_new_tokens)
    benign = ModelOutputs(model, by.benign, max_new_tokens=by.max_new_tokens)
    metrics = answer_metrics(benign, baseline, {"behaviour_benign": by.expression})
    names = [name for name in _DAMAGE if name in metrics]
    behaviour = by.expression.score_texts(requests.texts).tolist()
    return {"behaviour": behaviour, **{name: metrics[name] for name in names}}, benign


def residual_share_along(model: Model, plan: Plan, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The share of the residual stream along what a plan removes: |x . v| / |x| at the last prompt token.

    v is what an ablation, clamp or erasure reads. The mean over prompts at resid_post of every layer, and of
    these the mean and the largest; empty for a plan that only adds.
    """
    reads = [edit.vectors[-1:] if isinstance(edit, Erase) else edit.vectors for edit in plan
             if isinstance(edit, (Ablate, Clamp, Erase))]  # fmt: skip
    if not reads:
        return {}
    vectors = torch.cat(reads)
    vectors = torch.unique(vectors / vectors.norm(dim=1, keepdim=True), dim=0)
    sites = sites_of(("resid_post",), range(model.n_layers))
    values = collect(model, list(prompts), sites, (-1,)).values[:, 0].cpu().double()
    share = (values @ vectors.T).norm(dim=-1) / values.norm(dim=-1).clamp(min=1e-30)
    by_layer = share.mean(0)
    return {"mean": float(by_layer.mean()), "largest": float(by_layer.max())}


def mean_measures(values: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """The mean and interval of every measure; those of behaviours are rates."""
    return {
        name: mean_with_interval(per_prompt, proportion=name.startswith("behaviour"))
        for name, per_prompt in values.items()
    }
