"""Metrics of a model's outputs, one number a prompt: target log-odds, KL divergences, repetition, length.

Knows: what each metric computes from outputs and a baseline's. Does not know: which plan is better, or how
expressions match.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.errors import InterpAblateError
from interp_ablate.evaluation.outputs import ModelOutputs, answered_parts
from interp_ablate.models.thinking import has_thought
from interp_ablate.precision import to_float64
from interp_ablate.scoring.behaviour import EXPRESSED, Behaviour

# A metric takes outputs and a baseline's outputs on the same prompts; None is a prompt without a value.
Metric = Callable[[ModelOutputs, ModelOutputs], Float[Tensor, " prompt"] | Sequence[float | None]]
_NO_METRICS: Mapping[str, Metric] = {}


def answer_metrics(
    outputs: ModelOutputs,
    baseline: ModelOutputs | None = None,
    scorers: Mapping[str, Metric] = _NO_METRICS,
) -> dict[str, list[float | None]]:
    """Measure a model's answers to prompts: a list of values for every metric, one a prompt.

    `repetition` is the share of repeated 3-grams, `length` the number of tokens, `empty` 1 for an answer
    without a word, `no_answer` (where there are thoughts) 1 for one that never ended. With a baseline come
    `kl_first_token` and `kl_continuation` (`divergences`). Each of `scorers` adds its values under its name.
    """
    answers = outputs.generations
    values: dict[str, list[float | None]] = {
        "repetition": [repetition(answer.tokens) for answer in answers],
        "length": [float(len(answer.tokens)) for answer in answers],
        "empty": [float(not answer.text.strip()) for answer in answers],
    }
    if any(map(has_thought, answers)):
        values["no_answer"] = [float(answer.answer is None) for answer in answers]
    for name, scorer in scorers.items():
        scores = scorer(outputs, outputs if baseline is None else baseline)
        values[name] = scores.tolist() if isinstance(scores, Tensor) else list(scores)
    return values if baseline is None else values | divergences(outputs, baseline)


def unanswered(outputs: ModelOutputs) -> Float[Tensor, " prompt"]:
    """1 for every answer of which nothing is there to be read: a thought was begun and did not end."""
    return torch.tensor([float(g.answer is None and not g.text) for g in outputs.generations])


def behaviour_left(
    scorer: Behaviour, outputs: ModelOutputs, baseline: ModelOutputs
) -> Float[Tensor, " prompt"]:
    """1 for every prompt of which it is not shown that its answer lacks the behaviour.

    A thought that did not end has no answer, and so no verdict: it must not count as a success of an edit.
    """
    return torch.maximum(scorer(outputs, baseline), unanswered(outputs))


def divergences(outputs: ModelOutputs, baseline: ModelOutputs) -> dict[str, list[float | None]]:
    """KL divergences from the baseline in nats, one a prompt: at the first token, and along answers.

    `kl_continuation` is the mean over the tokens of the baseline's own answer; it is None where that
    answer is empty, because there is no token at which the two could differ. Where the baseline thinks, both
    are read after its own thoughts, and the first token is the answer's.
    """
    scores = continuation_scores(outputs, baseline)
    answers = baseline.generations
    along = {
        name: [kl if answer.tokens else None for kl, answer in zip(scores[name].tolist(), answers)]
        for name in ("kl_first_token", "kl_continuation")
    }
    if not any(map(has_thought, answers)):
        along["kl_first_token"] = first_token_kl(outputs, baseline).tolist()
    return along


def answer_kl(outputs: ModelOutputs, baseline: ModelOutputs) -> list[float | None]:
    """The KL of `divergences` at the answer's first token alone: one pass over the prompts where nothing thinks."""
    if any(map(has_thought, baseline.generations)):
        return divergences(outputs, baseline)["kl_first_token"]
    return first_token_kl(outputs, baseline).tolist()


@dataclass(frozen=True)
class TargetLogOdds:
    """log p - log(1 - p) of the first token of the answer being one of the target tokens.

    Source: the refusal metric of Arditi et al. 2024, https://arxiv.org/abs/2406.11717.

    Raises:
        InterpAblateError: no token, or an id that the vocabulary does not have.
    """

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.tokens, default=-1) < 0:
            raise InterpAblateError(
                f"target tokens are one or more ids from 0; got {self.tokens}: find_target_tokens "
                "finds those that tell the two sets apart"
            )

    def of_logprobs(self, logprobs: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        """Log-odds from first-token log-probabilities, without cancellation near p = 0 and p = 1."""
        if max(self.tokens) >= logprobs.shape[-1]:
            raise InterpAblateError(
                f"target token {max(self.tokens)} is beyond the vocabulary of {logprobs.shape[-1]}: "
                "are the ids of another model's tokenizer?"
            )
        wide = to_float64(logprobs)
        chosen = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
        chosen[list(self.tokens)] = True
        inside = wide[:, chosen].logsumexp(-1)
        outside = wide[:, ~chosen].logsumexp(-1)
        return (inside - outside).cpu()

    def __call__(self, outputs: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        outputs.require_answer_next()
        return self.of_logprobs(outputs.first_logprobs)


@dataclass(frozen=True)
class UneditedAnswerLogProb:
    """Log-probability of the first tokens of the unedited model's own answers that express the behaviour.

    Teacher-forced over `tokens` tokens, summed; one number for each prompt whose unedited answer holds
    an expression (all prompts where none does). Finer than a rate, and it sees past the first token.
    """

    expression: Behaviour
    tokens: int = 4

    def _answers(self, baseline: ModelOutputs) -> list[list[int]]:
        # an answer that ended at once stands for itself with any token: it is not among the expressing
        return [list(g.tokens)[: self.tokens] or [0] for g in baseline.generations]

    def logprobs(
        self, outputs: ModelOutputs, baseline: ModelOutputs
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Log-probabilities at the first tokens of every unedited answer; row 0 is the first token's."""
        leads = [generation.lead for generation in baseline.generations]
        return outputs.continuation_logprobs(self._answers(baseline), leads=leads, batch_size=32)

    def of_logprobs(
        self, logprobs: Sequence[Float[Tensor, "pos d_vocab"]], baseline: ModelOutputs
    ) -> Float[Tensor, " prompt"]:
        """The score, from what `logprobs` returned."""
        answers = self._answers(baseline)
        expressed = (self.expression(baseline, baseline) >= EXPRESSED).tolist()
        chosen = [i for i, yes in enumerate(expressed) if yes] or range(len(answers))
        scores = [chosen_logprobs(logprobs[i], answers[i]).sum() for i in chosen]
        return torch.stack(scores).cpu()

    def __call__(self, outputs: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
        return self.of_logprobs(self.logprobs(outputs, baseline), baseline)


def chosen_logprobs(
    logprobs: Float[Tensor, "pos d_vocab"], tokens: Sequence[int]
) -> Float[Tensor, " pos"]:
    """Log-probability of each token of a continuation, float64."""
    wide = to_float64(logprobs)
    return wide.gather(1, torch.tensor(list(tokens), device=wide.device)[:, None])[:, 0]


def find_target_tokens(
    positive: Float[Tensor, "prompt d_vocab"],
    negative: Float[Tensor, "prompt d_vocab"],
    *,
    at_most: int = 8,
    share: float = 0.25,
) -> list[tuple[int, float, float]]:
    """Find the tokens whose mean first-token probability differs most between two sets of prompts.

    Keeps tokens that are likelier after positive prompts by at least `share` of the largest gap.
    Returns (token, mean p after positive, mean p after negative), the largest gap first.

    Raises:
        InterpAblateError: no token is likelier by 0.01 or more: the sets don't differ at the first token.
    """
    p, q = positive.exp().mean(0), negative.exp().mean(0)
    gaps, tokens = (p - q).topk(min(at_most, len(p)))
    if float(gaps[0]) < 0.01:
        raise InterpAblateError(
            "no token is likelier by 0.01 as the first of the answer after positive prompts. Give prompts that "
            "the model answers differently from the first word on; in Python, `TargetLogOdds` takes token ids"
        )
    return [(int(t), float(p[t]), float(q[t])) for t in tokens[gaps >= share * gaps[0]]]


def kl_divergence(
    reference: Float[Tensor, "*n d_vocab"], other: Float[Tensor, "*n d_vocab"]
) -> Float[Tensor, "*n"]:
    """KL(reference || other) in nats from log-probabilities; no epsilon, summed in float64."""
    wide = to_float64(reference)
    return (wide.exp() * (wide - to_float64(other).to(wide.device))).sum(-1)


def first_token_kl(outputs: ModelOutputs, baseline: ModelOutputs) -> Float[Tensor, " prompt"]:
    """KL of the baseline's first-token distribution from the outputs', in nats.

    Raises:
        InterpAblateError: see `ModelOutputs.require_answer_next`.
    """
    outputs.require_answer_next()
    return kl_divergence(baseline.first_logprobs, outputs.first_logprobs).cpu()


def continuation_scores(
    outputs: ModelOutputs, baseline: ModelOutputs
) -> dict[str, Float[Tensor, " prompt"]]:
    """KL at the first token and mean KL a token, perplexity before and after, over the baseline's own answers.

    One pass, teacher-forced, after the baseline's own thoughts; an empty answer has KL 0 and perplexity 1.
    """
    n = len(outputs.rows)
    scores = {
        "kl_first_token": torch.zeros(n, dtype=torch.float64),
        "kl_continuation": torch.zeros(n, dtype=torch.float64),
        "perplexity_before": torch.ones(n, dtype=torch.float64),
        "perplexity_after": torch.ones(n, dtype=torch.float64),
    }
    answers = [list(generation.tokens) for generation in baseline.generations]
    for part in answered_parts(baseline.generations):
        ends, leads = [answers[i] for i in part], [baseline.generations[i].lead for i in part]
        before = baseline.answer_logprobs(part)
        after = outputs.subset(part).continuation_logprobs(ends, leads=leads)
        for i, end, reference, other in zip(part, ends, before, after):
            kl = kl_divergence(reference, other)
            scores["kl_first_token"][i], scores["kl_continuation"][i] = kl[0], kl.mean()
            scores["perplexity_before"][i] = (-chosen_logprobs(reference, end).mean()).exp()
            scores["perplexity_after"][i] = (-chosen_logprobs(other, end).mean()).exp()
    return scores


def repetition(tokens: Sequence[int] | Int[Tensor, " pos"], n: int = 3) -> float:
    """Share of n-grams that occurred before in the same text; 0 for texts shorter than n + 1 tokens."""
    grams = len(tokens) - n + 1
    return 1 - (grams - len(repeats(tokens, n))) / grams if grams > 1 else 0.0


def repeats(tokens: Sequence[int] | Int[Tensor, " pos"], n: int = 3) -> list[int]:
    """Positions of tokens that complete an n-gram which occurred before in the same text."""
    ids, seen, positions = [int(token) for token in tokens], set(), []
    for last in range(n - 1, len(ids)):
        gram = tuple(ids[last - n + 1 : last + 1])
        if gram in seen:
            positions.append(last)
        seen.add(gram)
    return positions
