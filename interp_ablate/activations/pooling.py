"""Pooling: an answer's activations as one vector a site.

Knows: means over response and prompt, the prompt's last token. Does not know: scores, directions, or what the answers were made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.activations.activations import RESPONSE_MEAN, Moments, masked_mean, response_mean
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.sites import Site


class TokenizedAnswer(Protocol):
    """The parts of an answer that pooling reads: its prompt, and its tokens without the end token."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...


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
    sites: Sequence[Site],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Moments:
    """Moments over answers of the activations at the sites, pooled in each of the three ways.

    The answer's own tokens follow the rendered prompt's; nothing is tokenized again. Shape of the mean:
    [pooling, site, d_model], in the order of `POOLINGS`; float64.

    Raises:
        InterpAblateError: no answers, or an empty one.
        DirectionError: NaN or infinity.
    """
    blocks = _blocks(model, answers, sites, _pool, batch_size, on_batch, whole=True)
    return reduce(Moments.merge, (Moments.of(block) for _, block in blocks))


def response_activations(
    model: Model,
    answers: Sequence[TokenizedAnswer],
    sites: Sequence[Site],
    *,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "answer site d_model"]:
    """Mean over each answer's own tokens, read after its own prompt; float32.

    Raises:
        InterpAblateError: no answers, or an empty one.
        DirectionError: NaN or infinity.
    """
    means = torch.empty(len(answers), len(sites), model.d_model)
    for index, block in _blocks(model, answers, sites, response_mean, batch_size, on_batch):
        means[index] = block.float()
    return means


def _blocks(
    model: Model,
    answers: Sequence[TokenizedAnswer],
    sites: Sequence[Site],
    pool: Callable[[Tensor, Batch], Tensor],
    batch_size: int | None,
    on_batch: Callable[[int], None] | None,
    *,
    whole: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, the answers' indices and their pooled activations, [batch, ..., site, d_model].

    A pool that looks at prompts needs `whole` rows; else those of the answers' tokens will do.
    """
    if not answers or not all(answer.tokens for answer in answers):
        raise InterpAblateError(f"{len(answers)} answers, one of them empty: nothing to pool over")
    prompts = model.encode_all([answer.prompt for answer in answers])
    rows = [row + list(answer.tokens) for row, answer in zip(prompts, answers)]
    stream = model.stream(
        rows,
        keep=0,
        prompt_lengths=[len(row) for row in prompts],
        capture=dict.fromkeys(sites, pool),
        batch_size=batch_size,
        tail=max(map(len, rows)) if whole else max(len(answer.tokens) for answer in answers),
    )
    for batch, _, captured in stream:
        block = torch.stack([captured[site] for site in sites], -2).cpu()
        if not torch.isfinite(block).all():
            raise DirectionError(
                "NaN or infinity in the activations: float16 overflows on many models; use --dtype "
                "bfloat16 or float32"
            )
        yield torch.as_tensor(batch.index), block
        if on_batch:
            on_batch(len(batch.index))


def _pool(
    x: Float[Tensor, "batch pos d_model"], batch: Batch
) -> Float[Tensor, "batch pooling d_model"]:
    """Means over the response, at the prompt's last token, and over the prompt. Rows end at the last column."""
    width = x.shape[1]
    column = torch.arange(width, device=x.device)[None]
    start = width - batch.row_lengths[:, None]
    border = start + batch.prompt_lengths[:, None]  # the first column of the response
    masks = (
        column >= border,
        column == border - 1,
        (column >= start) & (column < border),
    )
    return torch.stack([masked_mean(x, mask) for mask in masks], 1)
