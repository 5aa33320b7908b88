"""Projections of responses on a direction, sample by sample.

Knows: means over responses. Does not know: files, or what a direction means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.errors import DirectionError, ModelError
from interp_ablate.models.batches import Batch
from interp_ablate.models.model import Model
from interp_ablate.scoring.exchange import PromptResponse


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
    rows, lengths, indices = _rows(model, exchanges, response_tokens)
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
        capture={site: _reader(matrix) for site, matrix in vectors.items()},
        batch_size=batch_size,
        tail=max(len(row) - length for row, length in zip(rows, lengths)),
    )
    for batch, _, captured in stream:
        at = torch.tensor([indices[i] for i in batch.index])
        for site, values in captured.items():
            columns = [j for j, item in enumerate(directions) if item.site == site]
            means[at[:, None], torch.tensor(columns)] = values
            if not torch.isfinite(values).all():
                raise ModelError(
                    f"NaN or infinity in the activations at {site}: float16 overflows on many models; "
                    "use --dtype bfloat16 or float32"
                )
    return means


def _reader(matrix: Float[Tensor, "d_model k"]) -> Callable[[Tensor, Batch], Tensor]:
    """A function that averages projections over the answers' tokens: [batch, k], float64."""

    def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        # rows end at the last column; the answer is what follows the prompt
        count = (batch.row_lengths - batch.prompt_lengths).cpu()
        along = x.detach().cpu().double() @ matrix
        width = along.shape[1]
        inside = torch.arange(width)[None] >= width - count[:, None]
        return (along * inside[..., None]).sum(1) / count[:, None]

    return read


def _rows(
    model: Model, exchanges: Sequence[PromptResponse], response_tokens: int | None
) -> tuple[list[list[int]], list[int], list[int]]:
    """Token rows, their prompts' lengths, and the index of each row's exchange."""
    if model.tokenizer is None:
        raise ModelError("answers are text: the model was wrapped without a tokenizer")
    rows, lengths, indices = [], [], []
    for index, exchange in enumerate(exchanges):
        prompt = model.encode(exchange.prompt)
        answer = list(model.tokenizer(exchange.answer, add_special_tokens=False)["input_ids"])
        room = model.tl.cfg.n_ctx - len(prompt)
        answer = answer[: max(0, room if response_tokens is None else min(room, response_tokens))]
        if answer:
            rows.append(prompt + answer)
            lengths.append(len(prompt))
            indices.append(index)
    return rows, lengths, indices
