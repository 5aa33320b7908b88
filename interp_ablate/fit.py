"""Fit: how strongly to ablate a direction at each site, found by gradient on training prompts.

Knows: the loss (the model's own expressing answers become unlikely, other prompts' first token stays),
its optimisation under a KL budget. Does not know: which direction is worth it, or validation prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from interp_ablate.directions import Direction
from interp_ablate.errors import InterpAblateError
from interp_ablate.model import Model
from interp_ablate.scores import Evidence, ExpressionScorer, kl_divergence
from interp_ablate.sites import Site

N_TOKENS = 4  # tokens of each expressing answer that are made unlikely
UNLIKELY = -9.0  # nats: below this log-probability an answer counts as gone and adds no gradient
STRONGEST = 2.0
LEARNING_RATE = 0.15  # at the start; it falls along a cosine


class NothingToFit(InterpAblateError):
    """No training prompt's answer expresses the behaviour."""


@dataclass(frozen=True)
class FitData:
    """Training rows: expressing answers of the unedited model, and other prompts with their logits."""

    positive: list[list[int]]  # prompt followed by the first tokens of its answer
    prompt_lengths: list[int]
    answers: list[list[int]]
    negative: list[list[int]]
    reference: Float[Tensor, "prompt d_vocab"]

    def with_answers(self, evidence: Evidence, expression: ExpressionScorer) -> FitData:
        """The same, and answers that still express the behaviour under a plan: other words for it."""
        rows, answers = _expressing(evidence, expression)
        return replace(
            self,
            positive=self.positive + [row + end for row, end in zip(rows, answers)],
            prompt_lengths=self.prompt_lengths + [len(row) for row in rows],
            answers=self.answers + answers,
        )


def _expressing(
    evidence: Evidence, expression: ExpressionScorer
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts whose answers express the behaviour, and the first tokens of those answers."""
    expressed = expression.score_texts(evidence.texts).bool().tolist()
    answers = [list(g.tokens)[:N_TOKENS] for g in evidence.generations]
    chosen = [i for i, yes in enumerate(expressed) if yes and len(answers[i]) == N_TOKENS]
    return [evidence.rows[i] for i in chosen], [answers[i] for i in chosen]


def fit_data(positive: Evidence, negative: Evidence, expression: ExpressionScorer) -> FitData:
    """What the fit needs, from evidence of the unedited model on training prompts.

    Raises:
        NothingToFit: no positive prompt's answer expresses the behaviour.
    """
    empty = FitData([], [], [], negative.rows, negative.first_logprobs)
    found = empty.with_answers(positive, expression)
    if not found.positive:
        raise NothingToFit(
            "no training prompt's answer expresses the behaviour, so strengths cannot be fitted to "
            "remove it: is this the right list of expressions?"
        )
    return found


def fit_strengths(
    model: Model,
    direction: Direction,
    sites: Sequence[Site],
    data: FitData,
    *,
    kl_budget: float,
    steps: int = 20,
    start: Sequence[float] | None = None,
    on_step: Callable[[], None] | None = None,
) -> tuple[float, ...]:
    """Ablation strengths at the sites, in [0, 2], that remove the behaviour for the KL they may cost.

    Adam on the log-probability of the expressing answers plus a multiplier times the first-token KL;
    the multiplier rises while the KL is above its budget and falls while it is below. Deterministic.
    `start` goes on from strengths found before.
    """
    first = [0.3] * len(sites) if start is None else list(start)
    strengths = torch.tensor(first, requires_grad=True, device=model.device)
    optimizer = torch.optim.Adam([strengths], lr=LEARNING_RATE, betas=(0.8, 0.95))
    multiplier = 20.0
    with model.ablating(direction.vector, sites, strengths):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (
                    0.15 + 0.85 * 0.5 * (1 + math.cos(math.pi * step / steps))
                )
            optimizer.zero_grad()
            softplus(_own_words(model, data) - UNLIKELY).mean().backward()
            kl = _first_token_kl(model, data)
            (multiplier * kl + 0.1 * strengths.square().mean()).backward()
            optimizer.step()
            with torch.no_grad():
                strengths.clamp_(0.0, STRONGEST)
            excess = float(kl.detach()) / kl_budget - 1
            multiplier = min(max(multiplier * math.exp(0.25 * min(excess, 4.0)), 2.0), 300.0)
            if on_step:
                on_step()
    return tuple(round(value, 3) for value in strengths.detach().tolist())


def _own_words(model: Model, data: FitData) -> Float[Tensor, " prompt"]:
    """Log-probability of each expressing answer's first tokens."""
    found = []
    stream = model.stream(
        data.positive,
        keep=N_TOKENS + 1,
        prompt_lengths=data.prompt_lengths,
        batch_size=len(data.positive),
    )
    for batch, logits, _ in stream:
        assert logits is not None
        answers = torch.tensor([data.answers[i] for i in batch.index], device=logits.device)
        chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, answers[..., None])
        found.append(chosen[..., 0].sum(-1))
    return torch.cat(found)


def _first_token_kl(model: Model, data: FitData) -> Float[Tensor, ""]:
    """Mean KL of the unedited first-token distribution from the edited one."""
    found = []
    for batch, logits, _ in model.stream(data.negative, keep=1, batch_size=len(data.negative)):
        assert logits is not None
        reference = data.reference[list(batch.index)]
        found.append(kl_divergence(reference, logits[:, -1].float().log_softmax(-1)))
    return torch.cat(found).mean()
