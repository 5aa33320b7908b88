"""Scores: what a plan did to behaviour and to everything else, one number a prompt.

Knows: evidence (logits and text under a plan, computed once and shared by scorers), target log-odds, KL
divergences, perplexity, repetition, length; hands on the expressions. Does not know: which plan is better, how
expressions match (`expressions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.scoring.expressions import ExpressionScorer

Goal = Literal["min", "max", "limit"]


class Scorer(Protocol):
    """A score: subclass nothing, just have these. Returns one number a prompt; their mean is the score.

    `goal` says whether a smaller or larger number is better, or whether it is only held under a limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def goal(self) -> Goal: ...

    def __call__(
        self, evidence: ModelOutputs, baseline: ModelOutputs
    ) -> Float[Tensor, " prompt"]: ...


@dataclass(frozen=True)
class TargetLogOdds:
    """log p - log(1 - p) of the first token being one of the target tokens, a prompt.

    Source: the refusal metric of Arditi et al. 2024, https://arxiv.org/abs/2406.11717.

    Raises:
        InterpAblateError: no token, or an id that the vocabulary does not have.
    """

    tokens: tuple[int, ...]
    name: str = "behaviour"
    goal: Goal = "min"

    def __post_init__(self) -> None:
        if min(self.tokens, default=-1) < 0:
            raise InterpAblateError(
                f"target tokens are one or more ids from 0; got {self.tokens}: find_target_tokens "
                "finds those that tell the two sets apart"
            )

    def of_logprobs(self, logprobs: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        """From first-token log-probabilities, without cancellation near p = 0 and p = 1."""
        if max(self.tokens) >= logprobs.shape[-1]:
            raise InterpAblateError(
                f"target token {max(self.tokens)} is beyond the vocabulary of {logprobs.shape[-1]}: "
                "are the ids of another model's tokenizer?"
            )
        chosen = torch.zeros(logprobs.shape[-1], dtype=torch.bool, device=logprobs.device)
        chosen[list(self.tokens)] = True
        wide = logprobs.double()
        inside = wide[:, chosen].logsumexp(-1)
        outside = wide[:, ~chosen].logsumexp(-1)
        return inside - outside

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return self.of_logprobs(evidence.first_logprobs)


@dataclass(frozen=True)
class UneditedAnswerLogProb:
    """Log-probability of the first tokens of the unedited model's own answers that express the behaviour.

    Teacher-forced over `tokens` tokens, summed; one number for each prompt whose unedited answer holds
    an expression (all prompts where none does). Finer than a rate, and it sees past the first token.
    """

    expression: ExpressionScorer
    tokens: int = 4
    name: str = "unedited_answer_logprob"
    goal: Goal = "min"

    def _answers(self, baseline: ModelOutputs) -> list[list[int]]:
        # an answer that ended at once stands for itself with any token: it is not among the expressing
        return [list(g.tokens)[: self.tokens] or [0] for g in baseline.generations]

    def logprobs(
        self, evidence: ModelOutputs, baseline: ModelOutputs
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities at the first tokens of every unedited answer; row 0 is the first token's."""
        return evidence.continuation_logprobs(self._answers(baseline), batch_size=32)

    def of_logprobs(
        self, logprobs: Sequence[Float[Tensor, "pos d_vocab"]], baseline: ModelOutputs
    ) -> Float[Tensor, " prompt"]:
        """The score, from what `logprobs` returned."""
        answers = self._answers(baseline)
        expressed = self.expression.score_texts(baseline.texts).bool().tolist()
        chosen = [i for i, yes in enumerate(expressed) if yes] or range(len(answers))
        return torch.stack([chosen_logprobs(logprobs[i], answers[i]).sum() for i in chosen])

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return self.of_logprobs(self.logprobs(evidence, baseline), baseline)


def chosen_logprobs(
    logprobs: Float[Tensor, "pos d_vocab"], tokens: Sequence[int]
) -> Float[Tensor, " pos"]:
    """Log-probability of each token of a continuation, float64."""
    index = torch.tensor(list(tokens), device=logprobs.device)[:, None]
    return logprobs.double().gather(1, index)[:, 0]


def find_target_tokens(
    positive: Float[Tensor, "prompt d_vocab"],
    negative: Float[Tensor, "prompt d_vocab"],
    *,
    at_most: int = 8,
    share: float = 0.25,
) -> list[tuple[int, float, float]]:
    """The tokens whose mean first-token probability differs most between the two sets.

    Keeps tokens that are likelier after positive prompts by at least `share` of the largest gap.
    Returns (token, mean p after positive, mean p after negative), the largest gap first.

    Raises:
        InterpAblateError: no token is likelier by 0.01 or more: the sets don't differ at the first token.
    """
    p, q = positive.exp().mean(0), negative.exp().mean(0)
    gaps, tokens = (p - q).topk(min(at_most, len(p)))
    if float(gaps[0]) < 0.01:
        raise InterpAblateError(
            "no token is likelier by 0.01 as the first of the answer after positive prompts: give the "
            "target tokens (--target-tokens), or choose by expressions on generated text"
        )
    kept = gaps >= share * gaps[0]
    return [(int(t), float(p[t]), float(q[t])) for t in tokens[kept]]


def kl_divergence(
    reference: Float[Tensor, "*n d_vocab"], other: Float[Tensor, "*n d_vocab"]
) -> Float[Tensor, "*n"]:
    """KL(reference || other) in nats from log-probabilities; no epsilon, summed in float64."""
    wide = reference.double()
    return (wide.exp() * (wide - other.double())).sum(-1)


@dataclass(frozen=True)
class FirstTokenKL:
    """KL of the unedited model's first-token distribution from the edited one's, nats."""

    name: str = "kl"
    goal: Goal = "limit"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return kl_divergence(baseline.first_logprobs, evidence.first_logprobs)


def continuation_scores(
    evidence: ModelOutputs, baseline: ModelOutputs
) -> dict[str, Float[Tensor, " prompt"]]:
    """KL a token, and perplexity before and after, over the unedited model's own answers, in one pass.

    Teacher-forced; an empty answer has KL 0 and perplexity 1.
    """
    n = len(evidence.rows)
    found = {
        "kl_continuation": torch.zeros(n, dtype=torch.float64),
        "perplexity_before": torch.ones(n, dtype=torch.float64),
        "perplexity_after": torch.ones(n, dtype=torch.float64),
    }
    answers = [list(generation.tokens) for generation in baseline.generations]
    # a few prompts at a time: every token's whole distribution is held for both models
    for start in range(0, n, 8):
        part = [i for i in range(start, min(start + 8, n)) if answers[i]]
        if not part:
            continue
        ends = [answers[i] for i in part]
        before, after = (
            ModelOutputs(e.model, [e.rows[i] for i in part], e.plan).continuation_logprobs(ends)
            for e in (baseline, evidence)
        )
        for i, end, reference, other in zip(part, ends, before, after):
            found["kl_continuation"][i] = kl_divergence(reference, other).mean()
            found["perplexity_before"][i] = (-chosen_logprobs(reference, end).mean()).exp()
            found["perplexity_after"][i] = (-chosen_logprobs(other, end).mean()).exp()
    return found


@dataclass(frozen=True)
class ContinuationKL:
    """Mean KL per token, teacher-forced over the unedited model's own answer, nats."""

    name: str = "kl_continuation"
    goal: Goal = "limit"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return continuation_scores(evidence, baseline)["kl_continuation"]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the unedited model's own answer, a prompt."""

    name: str = "perplexity"
    goal: Goal = "min"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return continuation_scores(evidence, baseline)["perplexity_after"]


def repetition(tokens: Sequence[int] | Int[Tensor, " pos"], n: int = 3) -> float:
    """Share of n-grams that occurred before in the same text; 0 for texts shorter than n + 1 tokens."""
    grams = len(tokens) - n + 1
    return 1 - (grams - len(repeats(tokens, n))) / grams if grams > 1 else 0.0


def repeats(tokens: Sequence[int] | Int[Tensor, " pos"], n: int = 3) -> list[int]:
    """The places of tokens that complete an n-gram which occurred before in the same text."""
    plain, seen, places = [int(token) for token in tokens], set(), []
    for last in range(n - 1, len(plain)):
        gram = tuple(plain[last - n + 1 : last + 1])
        if gram in seen:
            places.append(last)
        seen.add(gram)
    return places


@dataclass(frozen=True)
class Repetition:
    """Share of repeated 3-grams in what is generated: loops score high."""

    name: str = "repetition"
    goal: Goal = "limit"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return torch.tensor([repetition(g.tokens) for g in evidence.generations])


@dataclass(frozen=True)
class Length:
    """Generated tokens (without the end of sequence); an empty answer is 0."""

    name: str = "length"
    goal: Goal = "limit"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return torch.tensor([float(len(g.tokens)) for g in evidence.generations])


@dataclass(frozen=True)
class Empty:
    """Whether an answer has no word: 1.0 or 0.0. Silence expresses nothing, and is no removal either."""

    name: str = "empty"
    goal: Goal = "limit"

    def __call__(self, evidence: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return torch.tensor([float(not text.strip()) for text in evidence.texts])
