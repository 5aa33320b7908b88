"""The validation bench: prompts on which trials are scored.

Knows: scores of a plan. Does not know: how plans are proposed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.float32_kl import float32_first_token_kl
from interp_ablate.evaluation.metrics import (
    TargetLogOdds,
    UneditedAnswerLogProb,
    answer_metrics,
    behaviour_left,
    first_token_kl,
    unanswered,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.scoring.behaviour import EXPRESSED, Behaviour, settles
from interp_ablate.search.objective_scores import ObjectiveScores, PromptScores
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.stats.intervals import upper_bound


class ValidationBench:
    """The validation prompts with their baselines: scores any plan the same way."""

    def __init__(
        self,
        model: Model,
        positive: Sequence[PromptLike],
        negative: Sequence[PromptLike],
        *,
        target: TargetLogOdds,
        expression: Behaviour,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        check_model(model)
        self.model, self.target, self.expression = model, target, expression
        self.objectives = ObjectiveScores()
        # scores the finalists, where there are prompts that no trial was chosen on
        self.finalists: ValidationBench | None = None
        self.positive = ModelOutputs(model, positive, max_new_tokens=max_new_tokens)
        self.negative = ModelOutputs(model, negative, max_new_tokens=max_new_tokens)
        self.max_new_tokens = max_new_tokens
        generate_outputs_together([self.positive, self.negative])
        self.unedited_answer_logprob = UneditedAnswerLogProb(expression)
        self._repetition: float | None = None
        self._baseline: dict[str, float] | None = None
        self._head: tuple[int, ValidationBench] | None = None

    def score_by(self, objectives: ObjectiveScores) -> None:
        """Score plans by a search's objectives, finalists too."""
        self.objectives = objectives
        if self.finalists is not None:
            self.finalists.objectives = objectives

    @property
    def n_prompts(self) -> int:
        """Number of prompts on the larger of the two sides."""
        return max(len(self.positive.rows), len(self.negative.rows))

    def head(self, n: int) -> ValidationBench:
        """The same bench over `n` prompts of each side: enough to rank by, at part of the cost.

        The first ones; of the positive those first whose own answers express the behaviour, which alone tell
        what becomes of it (`UneditedAnswerLogProb`).
        """
        if n >= self.n_prompts:
            return self
        if self._head is None or self._head[0] != n:
            expressed = (self.expression(self.positive, self.positive) >= EXPRESSED).tolist()
            telling = sorted(range(len(expressed)), key=lambda i: not expressed[i])[:n]
            small = copy.copy(self)
            small.positive = self.positive.subset(sorted(telling))
            small.negative = self.negative.head(n)
            small._repetition = small._baseline = small._head = None
            self._head = n, small
        return self._head[1]

    @property
    def repetition(self) -> float:
        """Repetition of the unedited model's answers to all prompts."""
        if self._repetition is None:
            self._repetition = _repetition(self.positive, self.negative)
        return self._repetition

    @property
    def baseline(self) -> dict[str, float]:
        """The unedited model's own soft scores, under the names that the table of trials uses."""
        if self._baseline is None:
            soft = self._soft_scores(self.positive)
            addition = float(self.target(self.negative, self.negative).mean())
            self._baseline = {f"{name}_baseline": value for name, value in soft.items()}
            self._baseline["addition_baseline"] = addition
        return self._baseline

    def _soft_scores(self, on_positive: ModelOutputs) -> dict[str, float]:
        """Target log-odds and own words from one pass over prompts and their answers' first tokens."""
        logprobs = self.unedited_answer_logprob.logprobs(on_positive, self.positive)
        first = torch.stack([rows[0] for rows in logprobs])
        return {
            "target_log_odds": float(self.target.of_logprobs(first).mean()),
            "unedited_answer_logprob": float(
                self.unedited_answer_logprob.of_logprobs(logprobs, self.positive).mean()
            ),
        }

    def score(self, plan: Plan, *, generate: bool) -> PromptScores:
        """Means over prompts: behaviour and KL under the plan.

        With `generate` the KL is measured in float32, and text scores and objectives come with it.
        """
        on_positive, on_negative = self.outputs_under(plan)
        scores = self._soft_scores(on_positive)
        if not generate:
            return PromptScores(scores | bounded_kl(first_token_kl(on_negative, self.negative)), {})
        (kl,) = float32_first_token_kl(self.negative, [plan])
        text = self.text_scores(on_positive, on_negative)
        found = self._objectives(on_positive, on_negative, kl)
        return PromptScores(scores | text | found, found.by_prompt)

    def objectives_of(self, plans: Sequence[Plan]) -> list[PromptScores]:
        """A search's objectives at the least cost: answers to positive prompts, KL on negative ones.

        Negative prompts are answered only where an objective is of these answers. The answers under all the
        plans are written in one batch. Where no objective reads whole answers, one ends when the behaviour has been
        found in it for good (`settles`), and repetition is not among the scores.
        """
        sides = [self.outputs_under(plan) for plan in plans]
        n_read = 2 if self.objectives.reads_negative else 1
        settled = None if self.objectives.reads_whole else settles(self.expression)
        generate_outputs_together(
            [side for both in sides for side in both[:n_read]],
            settled=settled,
        )
        return [
            self._objectives(*both, first_token_kl(both[1], self.negative), cut=settled is not None)
            for both in sides
        ]

    def _objectives(
        self,
        on_positive: ModelOutputs,
        on_negative: ModelOutputs,
        kl: Float[Tensor, " prompt"],
        *,
        cut: bool = False,
    ) -> PromptScores:
        own = self.objectives.values(
            self.expression, (on_positive, on_negative), (self.positive, self.negative)
        )
        values = self._positive_values(on_positive) | own
        if cut:
            del values["positive_repetition"]
        means = {name: fmean(each) for name, each in values.items()} | bounded_kl(kl)
        return PromptScores(means, values | {"kl": kl.tolist()})

    def _positive_values(self, on_positive: ModelOutputs) -> dict[str, list[float]]:
        """A number a positive prompt, of its answer."""
        answers = answer_metrics(on_positive)
        left = behaviour_left(self.expression, on_positive, self.positive)
        return {
            "expression_rate": left.tolist(),
            "no_answer": unanswered(on_positive).tolist(),
            "positive_repetition": [value or 0.0 for value in answers["repetition"]],
            "empty": [value or 0.0 for value in answers["empty"]],
        }

    def _positive_scores(self, on_positive: ModelOutputs) -> dict[str, float]:
        return {name: fmean(each) for name, each in self._positive_values(on_positive).items()}

    def outputs_under(self, plan: Plan) -> tuple[ModelOutputs, ModelOutputs]:
        """The positive and the negative prompts under a plan; nothing is run yet."""
        return self.positive.with_plan(plan), self.negative.with_plan(plan)

    def text_scores(self, on_positive: ModelOutputs, on_negative: ModelOutputs) -> dict[str, float]:
        """What the answers say: the expression rate, repetition and length of all answers.

        `no_answer` is the share of positive prompts after which a thought did not end; the expression rate
        holds them for answers with the behaviour.
        """
        generate_outputs_together([on_positive, on_negative])
        lengths = [_mean(answer_metrics(side)["length"]) for side in (on_positive, on_negative)]
        return {
            **self._positive_scores(on_positive),
            "negative_expression_rate": float(self.expression(on_negative, self.negative).mean()),
            "repetition": _repetition(on_positive, on_negative),
            "length": sum(lengths) / 2,
        }

    def unedited_text_scores(self) -> dict[str, float]:
        """`text_scores` of the unedited model's own answers."""
        return self.text_scores(self.positive, self.negative)

    def addition(self, plan: Plan) -> float:
        """Target log-odds on negative prompts under an addition: run from its layer on."""
        return float(self.target(self.negative.with_plan(plan), self.negative).mean())


def bounded_kl(kl: Float[Tensor, " prompt"]) -> dict[str, float]:
    """The mean of first-token KLs, and what a limit is held against: its `upper_bound`, if it has one."""
    bound = upper_bound(kl.numpy())
    return {"kl": float(kl.mean())} | ({} if bound is None else {"kl_high": bound})


def _repetition(positive: ModelOutputs, negative: ModelOutputs) -> float:
    """Mean over the answers to both sides' prompts."""
    both = [answer_metrics(side)["repetition"] for side in (positive, negative)]
    return _mean([*both[0], *both[1]])


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)
