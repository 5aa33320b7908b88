"""What healing costs and regains on held-out prompts.

Knows: measures before and after. Does not know: training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp_ablate.activations.collection import collect
from interp_ablate.edits.kinds import Ablate, Clamp, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import continuation_scores, kl_divergence, repetition
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import sites_of
from interp_ablate.stats.summaries import mean_with_interval

# ---- what the edit cost ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Prompts that neither made the edit nor the preferences: requests and answerable ones."""

    requests: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
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
    """What a model does on held-out prompts, a value a prompt; the KL is to the baseline's model, in nats.

    `behaviour` and `behaviour_benign`: 1 where the answer expresses the behaviour. `kl_first_token`, and
    `kl_continuation`: a token, over the baseline's own greedy answers, None where such an answer is empty.
    `repetition`: of benign answers.
    """
    requests = ModelOutputs(model, by.requests, max_new_tokens=by.max_new_tokens)
    benign = ModelOutputs(model, by.benign, max_new_tokens=by.max_new_tokens)
    found: dict[str, list[float | None]] = {
        "behaviour": by.expression.score_texts(requests.texts).tolist(),
        "behaviour_benign": by.expression.score_texts(benign.texts).tolist(),
        "repetition": [repetition(g.tokens) for g in benign.generations],
    }
    if baseline is not None:
        first = kl_divergence(baseline.first_logprobs, benign.first_logprobs)
        found["kl_first_token"] = first.tolist()
        along = continuation_scores(benign, baseline)["kl_continuation"].tolist()
        # an empty answer has no token at which the two could differ
        found["kl_continuation"] = [
            v if g.tokens else None for v, g in zip(along, baseline.generations, strict=True)
        ]
    return found, benign


def residual_share_along(model: Model, plan: Plan, prompts: Sequence[Prompt]) -> dict[str, float]:
    """How much of the stream lies along what a plan removes: |x . v| / |x| at the last prompt token.

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
    values = collect(model, list(prompts), sites, (-1,)).values[:, 0].double().cpu()
    share = (values @ vectors.T).norm(dim=-1) / values.norm(dim=-1).clamp(min=1e-30)
    by_layer = share.mean(0)
    return {"mean": float(by_layer.mean()), "largest": float(by_layer.max())}


_RATES = ("behaviour", "behaviour_benign")


def mean_measures(found: Mapping[str, list[float | None]]) -> dict[str, Any]:
    return {name: mean_with_interval(v, proportion=name in _RATES) for name, v in found.items()}
