"""Pooling: an answer's activations as one vector a site, or as their projections on directions.

Knows: means over response and prompt, the prompt's last token. Does not know: scores, files, or what the answers were made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.activations.activations import (
    RESPONSE_MEAN,
    Moments,
    check_finite,
    masked_mean,
    response_lengths,
    response_mean,
    stacked,
)
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError, InterpAblateError, ModelError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model, check_model
from interp_ablate.precision import to_float64
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.sites import SiteLike, as_sites


class TokenizedAnswer(Protocol):
    """The parts of an answer that pooling reads: its prompt, its tokens without the end token, and those between."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def lead(self) -> tuple[int, ...]: ...


Pooling = Literal["response_mean", "prompt_last", "prompt_mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
# How a direction names its position: activations call the last token of the prompt -1.
POSITIONS: dict[str, str] = {
    "response_mean": RESPONSE_MEAN,
    "prompt_last": "-1",
    "prompt_mean": "prompt_mean",
}
POOLED_ROWS = 16  # always: a sum's last bits depend on it, and name the plans that choose the layer


def pooled(
    model: Model,
    answers: Sequence[TokenizedAnswer],
    sites: Sequence[SiteLike],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Moments:
    """Moments over answers of the activations at the sites, pooled in each of the three ways.

    The answer's own tokens follow the rendered prompt's and its thought's, which is in no mean; nothing is
    tokenized again. Shape of the mean:
    [pooling, site, d_model], in the order of `POOLINGS`; float64.

    Raises:
        InterpAblateError: no answers, or an empty one.
        DirectionError: NaN or infinity.
    """
    check_model(model)
    blocks = _blocks(model, answers, sites, _pool, batch_size, on_batch, whole=True)
    return reduce(Moments.merge, (Moments.of(block) for _, block in blocks))


def response_activations(
    model: Model,
    answers: Sequence[TokenizedAnswer],
    sites: Sequence[SiteLike],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "answer site d_model"]:
    """Mean over each answer's own tokens, read after its own prompt; float32.

    Raises:
        InterpAblateError: no answers, or an empty one.
        DirectionError: NaN or infinity.
    """
    check_model(model)
    means = torch.empty(len(answers), len(sites), model.d_model)
    pool = lambda x, _, lengths: response_mean(x, lengths)  # noqa: E731
    for index, block in _blocks(model, answers, sites, pool, batch_size, on_batch):
        means[index] = block.float()
    return means


def _blocks(
    model: Model,
    answers: Sequence[TokenizedAnswer],
    sites: Sequence[SiteLike],
    pool: Callable[[Tensor, Batch, Tensor], Tensor],
    batch_size: int | None,
    on_batch: Callable[[int], None] | None,
    *,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, the answers' indices and their pooled activations, [batch, ..., site, d_model].

    The third argument of a pool is each answer's length. One that looks at prompts needs `whole` rows; else those
    of the answers' tokens will do.
    """
    if not answers or not all(answer.tokens for answer in answers):
        raise InterpAblateError(f"{len(answers)} answers, one of them empty: nothing to pool over")
    places = as_sites(sites)
    prompts = model.encode_all([answer.prompt for answer in answers])
    rows = [[*row, *answer.lead, *answer.tokens] for row, answer in zip(prompts, answers)]
    starts = [len(row) - len(answer.tokens) for row, answer in zip(rows, answers)]
    stream = model.stream(
        rows,
        keep=0,
        prompt_lengths=list(map(len, prompts)),
        capture=dict.fromkeys(
            places, lambda x, batch: pool(x, batch, response_lengths(batch, starts))
        ),
        batch_size=batch_size,
        tail=max(map(len, rows)) if whole else max(len(answer.tokens) for answer in answers),
    )
    for batch, _, captured in stream:
        block = stacked(captured, places, -2)
        check_finite(block, error=DirectionError)
        yield torch.as_tensor(batch.index), block
        if on_batch:
            on_batch(len(batch.index))


def _pool(
    x: Float[Tensor, "batch pos d_model"], batch: Batch, lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch pooling d_model"]:
    """Means over the response, at the prompt's last token, and over the prompt. Rows end at the last column."""
    width = x.shape[1]
    column = torch.arange(width, device=x.device)[None]
    start = width - batch.row_lengths[:, None]
    border = width - lengths[:, None]
    end = start + batch.prompt_lengths[:, None]
    masks = (
        column >= border,
        column == end - 1,
        (column >= start) & (column < end),
    )
    return torch.stack([masked_mean(x, mask) for mask in masks], 1)


def project_responses(
    model: Model,
    exchanges: Sequence[PromptResponse],
    direction: Direction,
    *,
    response_tokens: int | None = None,
    batch_size: int | None = None,
) -> list[float | None]:
    """Mean projection of each answer's tokens, read after its prompt, on the unit vector at its site.

    In the units of the activations; under whatever plan is applied. None where there is nothing to read:
    an empty answer, or a prompt that fills the model's context. An answer that does not fit is cut.

    Source: Chen et al. 2025, https://arxiv.org/abs/2507.21509.

    Raises:
        ModelError: no tokenizer, a site the model lacks, NaN or infinity in the activations.
        DirectionError: a direction of another d_model.
    """
    check_model(model)
    means = response_means(
        model, exchanges, (direction,), response_tokens=response_tokens, batch_size=batch_size
    )
    return [None if math.isnan(value) else value for value in means[:, 0].tolist()]


def response_means(
    model: Model,
    exchanges: Sequence[PromptResponse],
    directions: Sequence[Direction],
    *,
    response_tokens: int | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "exchange direction"]:
    """`project_responses` on several directions in one pass; float64, NaN where nothing can be read."""
    wrong = [len(item.vector) for item in directions if len(item.vector) != model.d_model]
    if wrong or not directions:
        raise DirectionError(
            f"projections need directions of the model's d_model {model.d_model}; got {wrong or 'none'}"
        )
    means = torch.full((len(exchanges), len(directions)), float("nan"), dtype=torch.float64)
    rows, lengths, starts, indices = _rows(model, exchanges, response_tokens)
    if not rows:
        return means
    vectors = {
        site: torch.stack([item.vector for item in directions if item.site == site], 1)
        for site in dict.fromkeys(item.site for item in directions)
    }
    stream = model.stream(
        rows,
        keep=0,
        prompt_lengths=lengths,
        capture={site: _reader(matrix, starts) for site, matrix in vectors.items()},
        batch_size=batch_size,
        tail=max(len(row) - start for row, start in zip(rows, starts)),
    )
    for batch, _, captured in stream:
        at = torch.tensor([indices[i] for i in batch.index])
        for site, values in captured.items():
            columns = [j for j, item in enumerate(directions) if item.site == site]
            on_cpu = values.cpu()
            means[at[:, None], torch.tensor(columns)] = on_cpu
            check_finite(on_cpu, f" at {site}")
    return means


def _reader(
    matrix: Float[Tensor, "d_model k"], starts: Sequence[int]
) -> Callable[[Tensor, Batch], Tensor]:
    """A function that averages projections over the answers' tokens: [batch, k], float64."""

    def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        # rows end at the last column, and the answer with them
        wide = to_float64(x.detach())
        along, count = wide @ matrix.to(wide), response_lengths(batch, starts).to(wide)
        width = along.shape[1]
        inside = torch.arange(width, device=wide.device)[None] >= width - count[:, None]
        return (along * inside[..., None]).sum(1) / count[:, None]

    return read


def _rows(
    model: Model, exchanges: Sequence[PromptResponse], response_tokens: int | None
) -> tuple[list[list[int]], list[int], list[int], list[int]]:
    """Token rows, their prompts' lengths, where their answers begin, and the index of each row's exchange."""
    if model.tokenizer is None:
        raise ModelError("answers are text: the model was wrapped without a tokenizer")
    rows, lengths, starts, indices = [], [], [], []
    for index, exchange in enumerate(exchanges):
        prompt = model.encode(exchange.prompt)
        before = [*prompt, *model.thinking.before(prompt)]
        answer = list(model.tokenizer(exchange.answer, add_special_tokens=False)["input_ids"])
        room = model.tl.cfg.n_ctx - len(before)
        answer = answer[: max(0, room if response_tokens is None else min(room, response_tokens))]
        if answer:
            rows.append(before + answer)
            lengths.append(len(prompt))
            starts.append(len(before))
            indices.append(index)
    return rows, lengths, starts, indices
