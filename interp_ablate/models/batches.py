"""Rows of tokens as left-padded batches, and batches as forward calls, with or without a shared prefix.

Knows: padding, attention masks, positions, batches that are halved where memory runs out. Does not know: plans, sites, or what a model computes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from interp_ablate.errors import OutOfMemoryError
from interp_ablate.jobs.bars import bar
from interp_ablate.models.backends.backend import Backend, ForwardCall

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
    padded: bool = True
    """False where all rows have one length."""

    def rows(self, some: slice) -> Batch:
        """A part of the batch, padded as it is."""
        return Batch(
            self.tokens[some],
            self.mask[some],
            self.row_lengths[some],
            self.prompt_lengths[some],
            self.index[some],
            self.padded,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device: layers may be on several."""
        if device == self.tokens.device:
            return self
        tensors = (self.tokens, self.mask, self.row_lengths, self.prompt_lengths)
        return Batch(*(tensor.to(device) for tensor in tensors), self.index, self.padded)  # type: ignore[call-arg, arg-type]

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
    one_length: bool = False,
) -> list[Batch]:
    """Rows without their first `prefix` tokens, in batches of at most `size`, the longest first.

    `one_length`: no padding; the rows of a batch have one length.
    """
    lengths = list(prompt_lengths or [len(row) for row in rows])
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    alike = [list(g) for _, g in groupby(order, lambda i: len(rows[i]))] if one_length else [order]
    parts = []
    for index in (tuple(g[k : k + size]) for g in alike for k in range(0, len(g), size)):
        tokens, mask = pad_left([rows[i][prefix:] for i in index])
        parts.append(
            Batch(
                tokens.to(device),
                mask.to(device),
                torch.tensor([len(rows[i]) for i in index], device=device),
                torch.tensor([lengths[i] for i in index], device=device),
                index,
                padded=len({len(rows[i]) for i in index}) > 1,
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


def in_parts(parts: Sequence[Batch], run: Callable[[Batch], Result], what: str) -> Iterator[Result]:
    """Run every batch, under a bar that counts rows; where memory runs out, its halves, and no larger ones after that.

    Raises:
        OutOfMemoryError: a single row does not fit.
    """
    total = sum(len(batch.index) for batch in parts) if parts[1:] else 1  # one batch is one step
    with bar(what, total) as advance:
        yield from _in_parts(parts, run, advance)


def _in_parts(
    parts: Sequence[Batch], run: Callable[[Batch], Result], advance: Callable[[int], Any]
) -> Iterator[Result]:
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
            if not _out_of_memory(error):
                raise
            if size == 1:
                raise _no_memory(f"in a pass over {batch.tokens.shape[1]} tokens") from error
        else:
            yield result
            advance(size)
            continue
        # outside of `except`, which would keep the failed call's tensors alive
        most = (size + 1) // 2
        logger.warning("out of memory with %d rows a batch; going on with %d", size, most)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        waiting.appendleft(batch)


@contextmanager
def telling_of_memory(when: str) -> Iterator[None]:
    """Make the error of memory that ran out one message.

    Raises:
        OutOfMemoryError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise _no_memory(when) from error


def _no_memory(when: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"memory ran out {when}: use --dtype bfloat16, a device with more memory, shorter prompts or "
        "smaller batches. The same command goes on where it stopped"
    )


def _out_of_memory(error: Exception) -> bool:
    """True if an error means out of memory: of a device, or of the host (a plain RuntimeError)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory")  # the last is MPS's
    return any(words in str(error) for words in said)


@dataclass(frozen=True)
class SharedPrefix:
    """The leading tokens that all rows share, run once for all of them (once a plan)."""

    n_tokens: int = 0
    cache: Any = None
    """The backend's KV cache of these tokens, one row a plan; None where nothing is shared."""


def prefix_call(
    backend: Backend, tokens: Sequence[int], prompt_length: int, plan_of_row: list[int] | None
) -> ForwardCall:
    """The forward call of the leading tokens that all rows share, with a cache: one row a plan."""
    device = next(backend.tl.parameters()).device
    size = 1 if plan_of_row is None else max(plan_of_row) + 1
    rows = torch.tensor([list(tokens)], device=device).expand(size, -1)
    return ForwardCall(
        rows,
        torch.ones_like(rows),
        torch.arange(len(tokens), device=device).expand(size, -1),
        torch.tensor([prompt_length], device=device).expand(size),
        backend.new_cache(size),
        None if plan_of_row is None else torch.arange(size, device=device),
        padded=False,
    )


def call_of(
    backend: Backend,
    batch: Batch,
    prefix: SharedPrefix,
    plan_of_row: list[int] | None,
    *,
    cached: bool = False,
) -> ForwardCall:
    """The forward call of a batch after its shared prefix; `cached`: with a KV cache in any case."""
    size, device = len(batch.index), batch.tokens.device
    plans = torch.tensor([plan_of_row[i] if plan_of_row else 0 for i in batch.index], device=device)
    cache = None
    if prefix.n_tokens:
        cache = backend.gathered_cache(prefix.cache, plans)
    elif cached:
        cache = backend.new_cache(size)
    return ForwardCall(
        batch.tokens,
        torch.cat([batch.mask.new_ones(size, prefix.n_tokens), batch.mask], 1),
        batch.positions + prefix.n_tokens,
        batch.prompt_lengths,
        cache,
        plans if plan_of_row else None,
        padded=batch.padded,
    )
