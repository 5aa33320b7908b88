"""The validation bench: prompts on which trials are scored.

Knows: scores of a plan. Does not know: how plans are proposed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch

from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.metrics import (
    Empty,
    FirstTokenKL,
    Length,
    Repetition,
    TargetLogOdds,
    UneditedAnswerLogProb,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.stats.intervals import bootstrap_interval

KL_LEVEL = 0.8  # the KL limit is held against the upper end of this interval (90%, one-sided)


class ValidationBench:
    """The validation prompts with their baselines: scores any plan the same way."""

    def __init__(
        self,
        model: Model,
        positive: Sequence[PromptLike],
        negative: Sequence[PromptLike],
        *,
        target: TargetLogOdds,
        expression: ExpressionScorer,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.model, self.target, self.expression = model, target, expression
        self.positive = ModelOutputs(model, positive, max_new_tokens=max_new_tokens)
        self.negative = ModelOutputs(model, negative, max_new_tokens=max_new_tokens)
        self.max_new_tokens = max_new_tokens
        generate_outputs_together([self.positive, self.negative])
        self.unedited_answer_logprob = UneditedAnswerLogProb(expression)

    @property
    def n_prompts(self) -> int:
        """Of the longer side."""
        return max(len(self.positive.rows), len(self.negative.rows))

    def head(self, n: int) -> ValidationBench:
        """The same bench over `n` prompts of each side: enough to rank by, at part of the cost.

        The first ones; of the positive those first whose own answers express the behaviour, which alone tell
        what becomes of it (`UneditedAnswerLogProb`).
        """
        expressed = self.expression.score_texts(self.positive.texts).bool().tolist()
        telling = sorted(range(len(expressed)), key=lambda i: not expressed[i])[:n]
        small = copy.copy(self)
        for known in ("repetition", "baseline"):
            small.__dict__.pop(known, None)
        small.positive, small.negative = (
            self.positive.subset(sorted(telling)),
            self.negative.head(n),
        )
        return small

    @cached_property
    def repetition(self) -> float:
        """Repetition of the unedited model's answers to all prompts."""
        return _repetition(self.positive, self.negative)

    @cached_property
    def baseline(self) -> dict[str, float]:
        """The unedited model's own soft scores, under the names the trials' table uses."""
        soft = self._soft_scores(self.positive)
        addition = float(self.target(self.negative, self.negative).mean())
        return {**{f"{k}_baseline": v for k, v in soft.items()}, "addition_baseline": addition}

    def _soft_scores(self, on_positive: ModelOutputs) -> dict[str, float]:
        """Target log-odds and own words from one pass over prompts and their answers' first tokens."""
        logprobs = self.unedited_answer_logprob.logprobs(on_positive, self.positive)
        first = torch.stack([rows[0] for rows in logprobs])
        return {
            "behaviour": float(self.target.of_logprobs(first).mean()),
            "unedited_answer_logprob": float(
                self.unedited_answer_logprob.of_logprobs(logprobs, self.positive).mean()
            ),
        }

    def score(self, plan: Plan, *, generate: bool) -> dict[str, float]:
        """Means over prompts: behaviour and KL under the plan; with `generate` also text scores."""
        on_positive, on_negative = self.outputs_under(plan)
        found = {**self._soft_scores(on_positive), **bounded_kl(on_negative, self.negative)}
        return found | self.text_scores(on_positive, on_negative) if generate else found

    def objectives(self, plan: Plan | None) -> dict[str, float]:
        """What a search makes small, at the least cost: answers to positive prompts, KL on negative ones.

        `repetition` and `length` are those of the answers to positive prompts.
        """
        return self.objectives_of([plan])[0]

    def objectives_of(self, plans: Sequence[Plan | None]) -> list[dict[str, float]]:
        """`objectives` of several plans, whose answers are written in one batch."""
        sides = [self.outputs_under(plan) for plan in plans]
        generate_outputs_together([on_positive for on_positive, _ in sides])
        return [self._objectives(*both) for both in sides]

    def _objectives(self, on_positive: ModelOutputs, on_negative: ModelOutputs) -> dict[str, float]:
        return {
            "expression_rate": float(self.expression(on_positive, self.positive).mean()),
            **bounded_kl(on_negative, self.negative),
            "repetition": float(Repetition()(on_positive, self.positive).mean()),
            "length": float(Length()(on_positive, self.positive).mean()),
            "empty": float(Empty()(on_positive, self.positive).mean()),
        }

    def beside(self, plan: Plan | None) -> dict[str, float]:
        """What `objectives` leaves out: own words, and what answers to negative prompts say."""
        on_positive, on_negative = self.outputs_under(plan)
        return {
            "unedited_answer_logprob": self._soft_scores(on_positive)["unedited_answer_logprob"],
            "negative_expression_rate": float(self.expression(on_negative, self.negative).mean()),
            "negative_repetition": float(Repetition()(on_negative, self.negative).mean()),
        }

    def outputs_under(self, plan: Plan | None) -> tuple[ModelOutputs, ModelOutputs]:
        """The positive and the negative prompts under a plan (None: the baselines); nothing is run yet."""
        if plan is None:
            return self.positive, self.negative
        return self.positive.with_plan(plan), self.negative.with_plan(plan)

    def text_scores(self, on_positive: ModelOutputs, on_negative: ModelOutputs) -> dict[str, float]:
        """What the answers say: the expression rate, repetition and length of all answers."""
        generate_outputs_together([on_positive, on_negative])
        lengths = [
            float(Length()(on, base).mean())
            for on, base in ((on_positive, self.positive), (on_negative, self.negative))
        ]
        return {
            "expression_rate": float(self.expression(on_positive, self.positive).mean()),
            "negative_expression_rate": float(self.expression(on_negative, self.negative).mean()),
            "repetition": _repetition(on_positive, on_negative),
            "length": sum(lengths) / 2,
            "empty": float(Empty()(on_positive, self.positive).mean()),
        }

    def addition(self, plan: Plan) -> float:
        """Target log-odds on negative prompts under an addition: run from its layer on."""
        return float(self.target(self.negative.with_plan(plan), self.negative).mean())


def bounded_kl(evidence: ModelOutputs, baseline: ModelOutputs) -> dict[str, float]:
    """First-token KL, and the upper end of its interval: what a limit is held against."""
    kl = FirstTokenKL()(evidence, baseline).numpy()
    return {"kl": float(kl.mean()), "kl_high": bootstrap_interval(kl, level=KL_LEVEL)[1]}


def _repetition(positive: ModelOutputs, negative: ModelOutputs) -> float:
    """Mean over the answers to both sides' prompts."""
    both = [Repetition()(side, side) for side in (positive, negative)]
    return float(torch.cat(both).mean())
