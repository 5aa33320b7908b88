"""Fit: an edit that removes a behaviour for little else, found by gradient on training prompts.

Knows: the loss (the model's own expressing answers become unlikely, so do its loops, other prompts'
answers keep their distribution) and its optimisation over strengths and vectors. Does not know: which
direction is worth starting from, or validation prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, softplus

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.evaluation.metrics import repeats
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.jobs.bars import with_bar
from interp_ablate.models.batches import telling_of_memory
from interp_ablate.models.model import Model, check_model
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.settings import STEP_ROWS
from interp_ablate.sites import Site

N_TOKENS = 4  # tokens of each expressing answer that are made unlikely
N_KEPT = 8  # tokens of each other answer whose distribution is kept
# Nats: below this log-probability an answer counts as gone and adds little gradient.
UNLIKELY = -9.0
# Tokens of unwanted passages are made less likely than this; how far answers are read for passages.
PASSAGE_LIMIT, PASSAGE_TOKENS, PASSAGE_WEIGHT = -3.0, 32, 1.0
STRONGEST = 2.0
START = 0.3  # strength at every site before the first step
# Steps of Adam at the start of a fit (they fall along a cosine): of a strength, and of a unit vector's length.
STRENGTH_RATE, VECTOR_RATE = 0.15, 0.25
# Nats of log-probability that a nat of KL outweighs.
KL_WEIGHT = 160.0


class NothingToFitError(InterpAblateError):
    """No training prompt's answer expresses the behaviour."""


@dataclass(frozen=True)
class FitData:
    """Training rows: expressing answers of the unedited model, and other prompts with what follows them."""

    positive: list[list[int]]  # prompt followed by the first tokens of its answer
    prompt_lengths: list[int]
    answers: list[list[int]]
    negative: list[list[int]]  # prompt followed by the first tokens of its answer but the last
    negative_lengths: list[int]
    reference: Float[Tensor, "prompt pos d_vocab"]  # log-probabilities of those tokens
    late: list[Passage] = field(default_factory=list)
    loops: list[Passage] = field(default_factory=list)

    @property
    def passages(self) -> list[Passage]:
        """All that should be unlikely beside the expressing answers: late expressions and loops."""
        return self.late + self.loops

    def with_answers(self, outputs: ModelOutputs, expression: ExpressionScorer) -> FitData:
        """The same, and answers that still express the behaviour under a plan: other words for it.

        What expresses it late in an answer becomes an unwanted passage of its own.
        """
        rows, answers, late = _expressing(outputs, expression)
        return replace(
            self,
            positive=self.positive + [row + end for row, end in zip(rows, answers)],
            prompt_lengths=self.prompt_lengths + [len(row) for row in rows],
            answers=self.answers + answers,
            late=self.late + late,
        )

    def some(self, step: int) -> FitData:
        """The rows of one step: `STEP_ROWS` of each kind, each row as often as any other over the steps."""

        def chosen(n: int, kind: int, size: int = STEP_ROWS) -> list[int]:
            if n <= size:
                return list(range(n))
            passes, order = step * size // n, []
            for number in (
                passes,
                passes + 1,
            ):  # a step may end one pass over the rows and begin another
                generator = torch.Generator().manual_seed(10 * number + kind)
                order += torch.randperm(n, generator=generator).tolist()
            start = step * size - passes * n
            return order[start : start + size]

        rows, others = chosen(len(self.positive), 0), chosen(len(self.negative), 1)
        late = chosen(len(self.late), 2, STEP_ROWS // 4)  # few, and loops are many
        return FitData(
            [self.positive[i] for i in rows],
            [self.prompt_lengths[i] for i in rows],
            [self.answers[i] for i in rows],
            [self.negative[i] for i in others],
            [self.negative_lengths[i] for i in others],
            self.reference[others],
            [self.late[i] for i in late],
            [self.loops[i] for i in chosen(len(self.loops), 3, STEP_ROWS // 2 - len(late))],
        )

    def with_loops(self, outputs: Sequence[ModelOutputs]) -> FitData:
        """The same, with what repeats itself in answers under a plan."""
        loops = [
            passage
            for side in outputs
            for row, generation in zip(side.rows, side.generations)
            if (passage := loop_of(row, generation.tokens)) is not None
        ]
        return replace(self, loops=self.loops + loops)


@dataclass(frozen=True)
class Passage:
    """A prompt with the beginning of an answer, and the places in it whose tokens should be unlikely."""

    prompt: list[int]
    answer: list[int]
    places: list[int]


def loop_of(prompt: Sequence[int], answer: Sequence[int]) -> Passage | None:
    """Where an answer repeats itself: tokens that complete three tokens seen before in it."""
    tokens = list(answer[:PASSAGE_TOKENS])
    places = repeats(tokens)
    return Passage(list(prompt), tokens[: places[-1] + 1], places) if places else None


def expression_of(
    outputs: ModelOutputs, number: int, expression: ExpressionScorer
) -> tuple[int, int] | None:
    """First and last token of the first expression in an answer; None where it has none."""
    tokens = outputs.generations[number].tokens[:PASSAGE_TOKENS]

    def has(part: Sequence[int]) -> bool:
        return bool(expression.matches(outputs.model.decode(part)))

    end = next((k for k in range(1, len(tokens) + 1) if has(tokens[:k])), None)
    if end is None:
        return None
    start = next(j for j in range(end - 1, -1, -1) if has(tokens[j:end]) or j == 0)
    return start, end - 1


def _expressing(
    outputs: ModelOutputs, expression: ExpressionScorer
) -> tuple[list[list[int]], list[list[int]], list[Passage]]:
    """Prompts whose answers express the behaviour, and those answers' first tokens; late expressions."""
    rows, answers, late = [], [], []
    for i, (row, generation) in enumerate(zip(outputs.rows, outputs.generations)):
        span = expression_of(outputs, i, expression)
        tokens = list(generation.tokens)
        if span is None or len(tokens) < N_TOKENS:
            continue
        start, end = span
        if start < N_TOKENS:
            rows.append(row)
            answers.append(tokens[:N_TOKENS])
        else:
            late.append(Passage(row, tokens[: end + 1], list(range(start, end + 1))))
    return rows, answers, late


def fit_data(
    positive: ModelOutputs, negative: ModelOutputs, expression: ExpressionScorer
) -> FitData:
    """What the fit needs, from outputs of the unedited model on training prompts.

    Raises:
        NothingToFit: no positive prompt's answer expresses the behaviour.
    """
    answers = [list(g.tokens)[:N_KEPT] for g in negative.generations]
    long = [i for i, answer in enumerate(answers) if len(answer) == N_KEPT]
    kept, ahead = (long, N_KEPT) if 2 * len(long) >= len(answers) else (range(len(answers)), 1)
    ends = [answers[i][:ahead] or [0] for i in kept]
    some = negative.subset(kept)
    data = FitData(
        [],
        [],
        [],
        [row + end[:-1] for row, end in zip(some.rows, ends)],
        [len(row) for row in some.rows],
        torch.stack(some.continuation_logprobs(ends, batch_size=32)),
    ).with_answers(positive, expression)
    if not data.positive:
        raise NothingToFitError(
            "no training prompt's answer expresses the behaviour, so no edit can be fitted to remove "
            "it: is this the right list of expressions?"
        )
    return data


def fit_edit(
    model: Model,
    direction: Direction,
    data: FitData,
    *,
    kl_weight: float = KL_WEIGHT,
    steps: int = 12,
    vectors: bool = True,
    start: Erase | Ablate | None = None,
    on_step: Callable[[], None] | None = None,
) -> Erase | Ablate:
    """A strength for every writer of the stream and, with `vectors`, what is read and written, from a direction on.

    Adam on the log-probability of the expressing answers plus `kl_weight` times the KL of what follows
    other prompts (half of it the first token's, half the mean over the first tokens), plus the
    log-probability of unwanted passages, which are loops and late expressions (unlikelihood, Welleck et al.
    2019, https://arxiv.org/abs/1908.04319), where the data has some. Deterministic.
    With `vectors` the edit is an `Erase` whose `read` and `write` both start at the direction and are
    shared by all sites; else an `Ablate` along the direction itself. `start` goes on from an edit found
    before, of the same sites. The idea of finding a direction by gradient is that of Wollschlaeger et al. 2025,
    https://arxiv.org/abs/2502.17420.
    """
    check_model(model)
    sites = model.writers
    read, write, strengths = _live(model, direction, sites, start)
    groups = [{"params": [strengths], "rate": STRENGTH_RATE}]
    if vectors:
        groups.append({"params": [read, write], "rate": VECTOR_RATE / model.d_model**0.5})
    optimizer = torch.optim.Adam(groups, lr=STRENGTH_RATE, betas=(0.8, 0.95))
    read.requires_grad_(vectors)
    write.requires_grad_(vectors)
    with (
        telling_of_memory("while an edit was fitted"),
        model.plans.fitting_erasure(read, write, sites, strengths),
    ):
        for step in with_bar(range(steps), "fit"):
            fall = 0.15 + 0.85 * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * fall
            optimizer.zero_grad()
            some = data.some(step)
            softplus(answer_logprobs(model, some) - UNLIKELY).mean().backward()
            if some.passages:
                (PASSAGE_WEIGHT * _unwanted(model, some)).backward()
            kl = _kl(model, some)
            (kl_weight * kl + 0.02 * strengths.square().mean().to(kl.device)).backward()
            optimizer.step()
            with torch.no_grad():
                strengths.clamp_(0.0, STRONGEST)
            if on_step:
                on_step()
    amounts, label = strengths.detach(), f"{direction.name}, fitted"
    if not vectors:
        along = direction if start is None else start.vectors[0]
        return Ablate(along, sites, strength=amounts.tolist(), label=label)
    amounts = amounts * (read @ write).detach()
    return Erase(write.detach(), read.detach(), sites, strength=amounts.tolist(), label=label)


def _live(
    model: Model, direction: Direction, sites: Sequence[Site], start: Erase | Ablate | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is optimised: read, write and strengths, of the direction or of an edit found before."""
    read, write, first = direction.vector, direction.vector, [START] * len(sites)
    if start is not None:
        if start.sites != tuple(sites):
            raise PlanError(f"the fit goes on from an edit of other sites: {start!r}")
        read, write, first = start.vectors[-1], start.vectors[0], list(start.amounts)
    strengths = torch.tensor(first, dtype=torch.float32, requires_grad=True, device=model.device)
    # clones: the optimizer must not write into a frozen direction
    return (
        read.float().to(model.device, copy=True),
        write.float().to(model.device, copy=True),
        strengths,
    )


def answer_logprobs(model: Model, data: FitData) -> Float[Tensor, " prompt"]:
    """Log-probability of each expressing answer's first tokens."""
    logprobs = []
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
        logprobs.append(chosen[..., 0].sum(-1))
    return torch.cat(logprobs)


def _unwanted(model: Model, data: FitData) -> Float[Tensor, ""]:
    """How far tokens of unwanted passages are above the limit: summed over a passage, mean over passages."""
    rows = [passage.prompt + passage.answer[:-1] for passage in data.passages]
    # what comes before a passage's first place is run, but nothing is asked of it
    keep = max(len(passage.answer) - passage.places[0] for passage in data.passages)
    excesses = []
    stream = model.stream(
        rows,
        keep=keep,
        prompt_lengths=[len(passage.prompt) for passage in data.passages],
        batch_size=len(rows),
    )
    for batch, logits, _ in stream:
        assert logits is not None
        for i, row in zip(batch.index, logits):
            passage = data.passages[i]
            places = [len(row) - len(passage.answer) + place for place in passage.places]
            chosen = row[places].float().log_softmax(-1)
            tokens = torch.tensor(
                [passage.answer[place] for place in passage.places], device=row.device
            )
            values = chosen.gather(-1, tokens[:, None])[:, 0]
            excesses.append(softplus(values - PASSAGE_LIMIT).sum())
    return torch.stack(excesses).mean()


def _kl(model: Model, data: FitData) -> Float[Tensor, ""]:
    """KL of what follows other prompts: half the first token's, half the mean over the first tokens."""
    kls = kept_kls(model, data)
    return ((kls[:, 0] + kls.mean(-1)) / 2).mean()


def kept_kls(model: Model, data: FitData) -> Float[Tensor, "prompt pos"]:
    """KL of the first tokens that follow other prompts from the unedited model's, in nats."""
    kls = []
    stream = model.stream(
        data.negative,
        keep=data.reference.shape[1],
        prompt_lengths=data.negative_lengths,
        batch_size=len(data.negative),
    )
    for batch, logits, _ in stream:
        assert logits is not None
        reference = data.reference[list(batch.index)].to(logits.device)
        # in float32: the sums of `kl_divergence`, in float64, took a quarter of the time of this term
        logprobs = logits.float().log_softmax(-1)
        kls.append(kl_div(logprobs, reference, reduction="none", log_target=True).sum(-1))
    return torch.cat(kls)
