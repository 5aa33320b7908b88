"""Batches: token lists of different lengths as left-padded tensors, sorted by length, and back.

Knows: padding, attention masks, positions in rows, shared prefixes. Does not know: models, plans or text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Left-padded rows of tokens."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    row_lengths: Int[Tensor, " batch"]
    """The tokens of each whole row; a shared prefix that the batch does not hold is counted."""
    prompt_lengths: Int[Tensor, " batch"]
    """Those of them that are prompt; what follows was generated."""
    index: tuple[int, ...]
    """The index of each row in the caller's list."""

    def rows(self, some: slice) -> Batch:
        """A part of the batch, padded as it is."""
        return Batch(
            self.tokens[some],
            self.mask[some],
            self.row_lengths[some],
            self.prompt_lengths[some],
            self.index[some],
        )

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Position of every token in its own row; 0 on padding."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows aligned at their last token, and the mask of what is real. Padding is token 0, masked."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return tokens, mask


def batches(
    rows: Sequence[Sequence[int]],
    *,
    size: int,
    prompt_lengths: Sequence[int] | None = None,
    prefix: int = 0,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Rows without their first `prefix` tokens, in batches of at most `size`, the longest first."""
    lengths = list(prompt_lengths or [len(row) for row in rows])
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    parts = []
    for start in range(0, len(order), size):
        index = tuple(order[start : start + size])
        tokens, mask = pad_left([rows[i][prefix:] for i in index])
        parts.append(
            Batch(
                tokens.to(device),
                mask.to(device),
                torch.tensor([len(rows[i]) for i in index], device=device),
                torch.tensor([lengths[i] for i in index], device=device),
                index,
            )
        )
    return parts


def common_prefix(rows: Sequence[Sequence[int]], *, keep: int) -> int:
    """The number of leading tokens that all rows share, leaving at least `keep` tokens of each row."""
    limit = min(len(row) for row in rows) - keep
    first = rows[0]
    for i in range(max(limit, 0)):
        if any(row[i] != first[i] for row in rows):
            return i
    return max(limit, 0)


def in_parts(parts: Sequence[Batch], run: Callable[[Batch], Result]) -> Iterator[Result]:
    """Run every batch; where memory runs out, its halves, and no larger ones after that.

    Raises:
        the error itself where a single row does not fit.
    """
    waiting, most = deque(parts), max(len(batch.index) for batch in parts)
    while waiting:
        batch = waiting.popleft()
        size = len(batch.index)
        if size > most:
            waiting.extendleft(
                batch.rows(slice(start, start + most)) for start in reversed(range(0, size, most))
            )
            continue
        try:
            result = run(batch)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
        else:
            yield result
            continue
        # outside of `except`, which would keep the failed call's tensors alive
        most = (size + 1) // 2
        logger.warning("out of memory with %d rows a batch; going on with %d", size, most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        waiting.appendleft(batch)


def _out_of_memory(error: Exception) -> bool:
    """True if an error means out of memory: of a device, or of the host (a plain RuntimeError)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
