"""Scores: what a plan did to behaviour and to everything else, one number a prompt.

Knows: evidence (logits and text under a plan, computed once and shared by scorers), target log-odds, KL
divergences, perplexity, repetition, length; hands on the expressions. Does not know: which plan is better, how
expressions match (`expressions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.edits import Plan
from interp_ablate.errors import InterpAblateError
from interp_ablate.expressions import EXPRESSIONS as EXPRESSIONS
from interp_ablate.expressions import EXPRESSIONS_OF_CONTRAST as EXPRESSIONS_OF_CONTRAST
from interp_ablate.expressions import ExpressionScorer as ExpressionScorer
from interp_ablate.expressions import Match as Match
from interp_ablate.expressions import fold as fold
from interp_ablate.model import Generation, Model, PromptLike
from interp_ablate.remembered import Remembered

Goal = Literal["min", "max", "limit"]


class Evidence:
    """What a model does on some prompts under a plan (None: unedited); computed when first read.

    `continuations` are token lists, one a prompt, for teacher-forced scores.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[PromptLike],
        plan: Plan | None = None,
        *,
        new_tokens: int = 32,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.plan = model, plan
        self.rows = model.encode_all(prompts)
        self.new_tokens, self.batch_size = new_tokens, batch_size
        self._unedited: Evidence | None = None  # whose passes are remembered

    def under(self, plan: Plan | None) -> Evidence:
        """The same prompts under a plan.

        Its first-token scores are run from the first block on that the plan's edits reach; what enters
        there is remembered of the unedited model, in one pass when it is first needed.
        """
        found = Evidence(
            self.model, self.rows, plan, new_tokens=self.new_tokens, batch_size=self.batch_size
        )
        found._unedited = self
        return found

    @cached_property
    def remembered(self) -> Remembered:
        """What left the unedited model's blocks on these prompts (`Model.remembering`), whatever the plan.

        Raises:
            PlanError: a plan is applied to the model now.
        """
        return self.model.remembering(self.rows)

    def _below(self) -> Remembered | None:
        """What the blocks below the plan gave without it, where that is worth knowing."""
        if self._unedited is None or self.plan is None or not self.model.first_block(self.plan):
            return None
        # other plans are outside of this one: what they leave of the model is not what is remembered
        return None if self.model.is_edited else self._unedited.remembered

    def first(self, n: int) -> Evidence:
        """The same for the first `n` prompts; what is known of them already is kept."""
        return self.part(range(min(n, len(self.rows))))

    def part(self, index: Sequence[int]) -> Evidence:
        """The same for some of the prompts, by their places; what is known of them already is kept."""
        part = Evidence(
            self.model,
            [self.rows[i] for i in index],
            self.plan,
            new_tokens=self.new_tokens,
            batch_size=self.batch_size,
        )
        part._unedited = self._unedited
        if "first_logprobs" in self.__dict__:
            part.__dict__["first_logprobs"] = self.first_logprobs[list(index)]
        if "generations" in self.__dict__:
            part.__dict__["generations"] = [self.generations[i] for i in index]
        return part

    def _under_plan(self) -> Any:
        return self.model.applied(self.plan) if self.plan is not None else nullcontext()

    @cached_property
    def first_logprobs(self) -> Float[Tensor, "prompt d_vocab"]:
        """Log-probabilities of the first token of the answer, float32."""
        below = self._below()
        with self._under_plan():
            found = self.model.logits(self.rows, batch_size=self.batch_size, below=below)
        return _finite(found[:, -1].float().log_softmax(-1), "first-token logits")

    @cached_property
    def generations(self) -> list[Generation]:
        """Greedy answers of at most `new_tokens` tokens."""
        with self._under_plan():
            return self.model.generate(
                self.rows, max_new_tokens=self.new_tokens, batch_size=self.batch_size
            )

    @property
    def texts(self) -> list[str]:
        return [generation.text for generation in self.generations]

    def continuation_logprobs(
        self, continuations: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities at every token of given continuations (teacher-forced), a tensor a prompt."""
        # the last token is not fed: what follows it is not asked for
        rows = [row + list(end)[:-1] for row, end in zip(self.rows, continuations)]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        keep = max(1, *(len(end) for end in continuations))
        stream = self.model.stream(
            rows,
            keep=keep,
            prompt_lengths=[len(row) for row in self.rows],
            batch_size=batch_size,
        )
        with self._under_plan():
            for batch, logits, _ in stream:
                assert logits is not None
                for i, row in zip(batch.index, logits):
                    length = len(continuations[i])
                    kept = row[len(row) - length :].float().log_softmax(-1)
                    found[i] = _finite(kept, "continuation logits")
        return found


def _finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise InterpAblateError(
            f"{what} hold NaN or infinity: the plan broke the model, or its dtype did"
        )
    return values


def generate_together(evidences: Sequence[Evidence]) -> None:
    """The answers of several evidences of one model in one batch, each under its own plan.

    Decoding is bound by memory: many rows cost little more than few.
    """
    waiting = [evidence for evidence in evidences if "generations" not in evidence.__dict__]
    if len({(evidence.new_tokens, id(evidence.model)) for evidence in waiting}) > 1:
        raise InterpAblateError(
            "what is generated together has one model and one number of new tokens"
        )
    if not waiting:
        return
    rows = [row for evidence in waiting for row in evidence.rows]
    plans = [evidence.plan for evidence in waiting for _ in evidence.rows]
    first = waiting[0]
    with first.model.applied_each(plans):
        found = iter(
            first.model.generate(rows, max_new_tokens=first.new_tokens, batch_size=first.batch_size)
        )
    for evidence in waiting:
        evidence.__dict__["generations"] = [next(found) for _ in evidence.rows]


class Scorer(Protocol):
    """A score: subclass nothing, just have these. Returns one number a prompt; their mean is the score.

    `goal` says whether a smaller or larger number is better, or whether it is only held under a limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def goal(self) -> Goal: ...

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]: ...


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

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return self.of_logprobs(evidence.first_logprobs)


@dataclass(frozen=True)
class OwnWords:
    """Log-probability of the first tokens of the unedited model's own answers that express the behaviour.

    Teacher-forced over `tokens` tokens, summed; one number for each prompt whose unedited answer holds
    an expression (all prompts where none does). Finer than a rate, and it sees past the first token.
    """

    expression: ExpressionScorer
    tokens: int = 4
    name: str = "own_words"
    goal: Goal = "min"

    def _answers(self, baseline: Evidence) -> list[list[int]]:
        # an answer that ended at once stands for itself with any token: it is not among the expressing
        return [list(g.tokens)[: self.tokens] or [0] for g in baseline.generations]

    def logprobs(
        self, evidence: Evidence, baseline: Evidence
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities at the first tokens of every unedited answer; row 0 is the first token's."""
        return evidence.continuation_logprobs(self._answers(baseline), batch_size=32)

    def of_logprobs(
        self, logprobs: Sequence[Float[Tensor, "pos d_vocab"]], baseline: Evidence
    ) -> Float[Tensor, " prompt"]:
        """The score, from what `logprobs` returned."""
        answers = self._answers(baseline)
        expressed = self.expression.score_texts(baseline.texts).bool().tolist()
        chosen = [i for i, yes in enumerate(expressed) if yes] or range(len(answers))
        return torch.stack([chosen_logprobs(logprobs[i], answers[i]).sum() for i in chosen])

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
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

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return kl_divergence(baseline.first_logprobs, evidence.first_logprobs)


def continuation_scores(
    evidence: Evidence, baseline: Evidence
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
            Evidence(e.model, [e.rows[i] for i in part], e.plan).continuation_logprobs(ends)
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

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return continuation_scores(evidence, baseline)["kl_continuation"]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the unedited model's own answer, a prompt."""

    name: str = "perplexity"
    goal: Goal = "min"

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
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

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return torch.tensor([repetition(g.tokens) for g in evidence.generations])


@dataclass(frozen=True)
class Length:
    """Generated tokens (without the end of sequence); an empty answer is 0."""

    name: str = "length"
    goal: Goal = "limit"

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return torch.tensor([float(len(g.tokens)) for g in evidence.generations])


@dataclass(frozen=True)
class Empty:
    """Whether an answer has no word: 1.0 or 0.0. Silence expresses nothing, and is no removal either."""

    name: str = "empty"
    goal: Goal = "limit"

    def __call__(self, evidence: Evidence, baseline: Evidence) -> Float[Tensor, " prompt"]:
        return torch.tensor([float(not text.strip()) for text in evidence.texts])
