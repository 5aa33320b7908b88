"""Answers token by token: decoding with a KV cache, and watching directions while a model answers.

Knows: choosing tokens, rows that end, text that a token adds. Does not know: prompts, or what a plan does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.errors import ModelError
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.batches import Batch, SharedPrefix, batches, call_of, in_parts
from interp_ablate.models.forward import ForwardPasses
from interp_ablate.models.thinking import Budget
from interp_ablate.prompts.chat_format import ReadPart
from interp_ablate.settings import DECODED_ROWS
from interp_ablate.sites import Site

Choose = Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]


OVERFLOWS = "float16 overflows on many models; use --dtype bfloat16 or float32"


@dataclass(frozen=True)
class MonitoredToken:
    """One generated token and the text it adds."""

    id: int
    text: str
    """The added text: "" until a character of several tokens is whole."""
    part: ReadPart = "answer"
    """Whether it belongs to the answer, or to a thought before it (with its tags)."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Decoding:
    """Settings of one decoding.

    Raises:
        ModelError: fewer than one new token, a negative temperature.
    """

    max_new_tokens: int
    temperature: float
    """0 decodes greedily; above, tokens are sampled."""
    seed: int
    stop_tokens: frozenset[int]

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ModelError(
                f"max_new_tokens must be at least 1 and temperature at least 0; "
                f"got {self.max_new_tokens} and {self.temperature}"
            )

    def chooser(self, device: torch.device) -> Choose:
        """A function that chooses a token for each row of logits."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def choose(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
            if self.temperature == 0:
                return logits.argmax(-1)
            chances = (logits.float() / self.temperature).softmax(-1).nan_to_num(1.0)
            return torch.multinomial(chances, 1, generator=generator)[:, 0]

        return choose


def generate_tokens(
    passes: ForwardPasses,
    rows: Sequence[Sequence[int]],
    decoding: Decoding,
    budget: Budget,
    *,
    batch_size: int | None = None,
) -> list[tuple[list[int], bool]]:
    """For every row the tokens that follow it, and True if they ended with a stop token (left out)."""
    choose, in_force = decoding.chooser(passes.device), passes.plans.in_force
    lengths, plan_of_row = [len(row) for row in rows], passes.plans.plan_of_rows(len(rows))
    width = max(lengths) + budget.most
    cached = passes.checks.cache_is_exact(width)
    n_shared = passes.shared_length(rows, lengths, width, keep=1) if cached else 0
    prefix = passes.share(rows[0][:n_shared], min(lengths), plan_of_row, in_force)

    def run(batch: Batch) -> dict[int, tuple[list[int], bool]]:
        call = call_of(passes.backend, batch, prefix, plan_of_row, cached=cached)
        return _decode(passes, call, batch.index, decoding, budget, choose)

    size = batch_size or passes.rows_that_fit(width, 1, 0, DECODED_ROWS)
    answers: dict[int, tuple[list[int], bool]] = {}
    for part in in_parts(passes.batches(rows, size, width, prefix=n_shared), run, "answers"):
        answers.update(part)
    return [answers[i] for i in range(len(rows))]


def _check_finite(logits: Float[Tensor, "batch d_vocab"], in_force: tuple[object, ...]) -> None:
    """Refuse a model whose own logits say nothing; those of a plan are a result, and scored as one.

    Raises:
        ModelError: NaN or infinity, and no plan that could have made it.
    """
    if not in_force and not bool(logits.amax(-1).isfinite().all()):
        raise ModelError(
            f"the model's logits are NaN or infinite without any plan: {OVERFLOWS}, or look at its config.json "
            "and weights"
        )


def _decode(
    passes: ForwardPasses,
    call: ForwardCall,
    index: tuple[int, ...],
    decoding: Decoding,
    budget: Budget,
    choose: Choose,
) -> dict[int, tuple[list[int], bool]]:
    """Decode one batch; rows that ended leave it."""
    answers: dict[int, tuple[list[int], bool]] = {i: ([], False) for i in index}
    active, in_force = list(index), passes.plans.in_force
    for n in range(budget.most):
        logits = passes.run(call, 1, in_force)
        assert logits is not None
        if n == 0:
            _check_finite(logits[:, -1], in_force)
        tokens = choose(logits[:, -1])
        going = []
        for place, (i, token) in enumerate(zip(active, tokens.tolist())):
            if token in decoding.stop_tokens:
                answers[i] = (answers[i][0], True)
            else:
                answers[i][0].append(token)
                if not budget.is_spent(i, answers[i][0]):
                    going.append(place)
        if not going or n + 1 == budget.most:
            break
        if len(going) < len(active):
            rows = torch.tensor(going, device=passes.device)
            cache = call.cache and passes.backend.select_cache(call.cache, rows)
            call = call.of_rows(rows, cache)
            tokens, active = tokens[rows], [active[place] for place in going]
        call = call.followed_by(tokens)
    return answers


def monitored_tokens(
    passes: ForwardPasses,
    row: Sequence[int],
    directions: Sequence[Direction],
    decoding: Decoding,
    decode: Callable[[Sequence[int]], str],
    in_force: tuple[object, ...],
    budget: Budget,
) -> Iterator[tuple[MonitoredToken, tuple[float, ...]]]:
    """Generate token by token; with each, the projections of the stream on directions at their sites.

    Args:
        decode: gives the text of tokens.
        in_force: the plans that must be applied whenever a token is computed (`AppliedPlans.in_force`).

    Raises:
        PlanError: other plans are applied.
        ModelError: NaN or infinity in the activations.
    """

    def last(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, " d_model"]:
        return x[0, -1].detach().to(passes.device)

    def next_token(call: ForwardCall, sites: Sequence[Site]) -> tuple[int, dict[Site, Tensor]]:
        with passes.capturing(dict.fromkeys(sites, last), batch) as captured:
            logits = passes.run(call, 1, in_force)
        assert logits is not None
        if call.tokens.shape[1] > 1:
            _check_finite(logits[:, -1], in_force)
        return int(choose(logits[:, -1])), captured

    choose = decoding.chooser(passes.device)
    (batch,) = batches([row], size=1, device=passes.device)
    passes.plans.require(in_force, "monitor was called")
    cached = passes.checks.cache_is_exact(len(row) + budget.most)
    plan_of_row = passes.plans.plan_of_rows(1)
    call = call_of(passes.backend, batch, SharedPrefix(), plan_of_row, cached=cached)
    token, _ = next_token(call, ())
    tokens: list[int] = []
    shown = ""
    ended = token in decoding.stop_tokens
    while not ended:
        tokens.append(token)
        call = call.followed_by(call.tokens.new_tensor([token]))
        token, captured = next_token(call, [direction.site for direction in directions])
        at_sites = [captured[each.site] for each in directions]
        stream = torch.stack(at_sites).cpu().double() if at_sites else ()
        values = tuple(float(x @ each.vector) for x, each in zip(stream, directions))
        if not all(map(math.isfinite, values)):
            raise ModelError(
                f"NaN or infinity in the activations at token {len(tokens)}: {OVERFLOWS}"
            )
        ended = budget.is_spent(0, tokens) or token in decoding.stop_tokens
        text = decode(tokens)
        whole = ended or not text.endswith("\N{REPLACEMENT CHARACTER}")
        added = text[len(shown) :] if whole else ""
        shown += added
        yield MonitoredToken(tokens[-1], added, budget.part(0, tokens)), values
