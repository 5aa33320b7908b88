"""Forward passes over rows of tokens: in batches that fit into memory, shared leading tokens run once.

Knows: padding, attention masks, batches, captures, KV caches of shared prefixes. Does not know: prompts, or what a plan does.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.applied_plans import AppliedPlans
from interp_ablate.models.backends.backend import Backend, ForwardCall, ResumePoint, SiteMap
from interp_ablate.models.sources import free_memory
from interp_ablate.settings import STREAM_ROWS
from interp_ablate.sites import Site

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

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device: layers may be on several."""
        if device == self.tokens.device:
            return self
        tensors = (self.tokens, self.mask, self.row_lengths, self.prompt_lengths)
        return Batch(*(tensor.to(device) for tensor in tensors), self.index)  # type: ignore[call-arg, arg-type]

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
        ModelError: a single row does not fit.
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
            if not _out_of_memory(error):
                raise
            if size == 1:
                raise _no_memory(f"in a pass over {batch.tokens.shape[1]} tokens") from error
        else:
            yield result
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
        ModelError: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise _no_memory(when) from error


def _no_memory(when: str) -> ModelError:
    return ModelError(
        f"memory ran out {when}: use --dtype bfloat16, a device with more memory, shorter prompts or "
        "smaller batches. The same command goes on where it stopped"
    )


def _out_of_memory(error: Exception) -> bool:
    """True if an error means out of memory: of a device, or of the host (a plain RuntimeError)."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory")  # the last is MPS's
    return any(words in str(error) for words in said)


# A function that takes what it wants from the activations of one site: (activations, batch) -> tensor. The batch
# is on the activations' device.
Capture = Callable[[Float[Tensor, "batch pos d_model"], Batch], Tensor]
# A function that says where a call on some rows (their indices), at some positions, may start.
Resume = Callable[[Sequence[int], Int[Tensor, "batch new"]], ResumePoint]

# Sharing a prefix costs one more forward call; below this many tokens it is not worth it.
MIN_SHARED_PREFIX = 8


@dataclass(frozen=True)
class SharedPrefix:
    """The leading tokens that all rows share, run once for all of them (once a plan)."""

    n_tokens: int = 0
    cache: Any = None
    """The backend's KV cache of these tokens, one row a plan; None where nothing is shared."""


class ForwardPasses:
    """Runs rows of tokens through one backend, under the plans that are applied."""

    def __init__(
        self,
        backend: Backend,
        site_map: SiteMap,
        plans: AppliedPlans,
        *,
        sliding_window: int | None = None,
    ) -> None:
        self.backend, self.plans = backend, plans
        self._site_map, self._sliding_window = site_map, sliding_window

    @property
    def device(self) -> torch.device:
        """The device of the embedding, which takes the tokens."""
        return next(self.backend.tl.parameters()).device

    def run(self, call: ForwardCall, keep: int) -> Float[Tensor, "batch keep d_vocab"] | None:
        """One forward call; logits of the last `keep` positions, None for 0."""
        self.plans.current_call = call
        try:
            with torch.set_grad_enabled(self.plans.with_gradients):
                return self.backend.forward(call, keep)
        finally:
            self.plans.current_call = None

    @contextmanager
    def capturing(self, capture: dict[Site, Capture], batch: Batch) -> Iterator[dict[Site, Tensor]]:
        """Reading hooks for one forward call; the dict is filled as the sites are reached."""
        captured: dict[Site, Tensor] = {}
        on_device = {batch.tokens.device: batch}

        def reader(site: Site, read: Capture) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, x: Tensor) -> None:
                if x.device not in on_device:
                    on_device[x.device] = batch.to(x.device)
                # some MLPs flatten batch and position
                rows = x.reshape(len(batch.index), -1, x.shape[-1])
                captured[site] = read(rows, on_device[x.device])

            return hook

        handles: list[Any] = []
        try:
            for site, read in capture.items():
                point = self._site_map.hook_point(site)
                handles.append(point.register_forward_hook(reader(site, read)))
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def stream(
        self,
        rows: Sequence[Sequence[int]],
        *,
        keep: int,
        prompt_lengths: Sequence[int] | None = None,
        capture: dict[Site, Capture] | None = None,
        batch_size: int | None = None,
        tail: int = 1,
        resume: Resume | None = None,
    ) -> Iterator[tuple[Batch, Tensor | None, dict[Site, Tensor]]]:
        """See `Model.stream`; `resume` says where passes may start."""
        capture = capture or {}
        if not 0 <= keep <= max(len(row) for row in rows):
            raise ModelError(f"keep={keep}: the longest row has {max(map(len, rows))} tokens")
        lengths = prompt_lengths or [len(row) for row in rows]
        plan_of_row = self.plans.plan_of_rows(len(rows))
        n_shared = self.shared_length(rows, lengths, keep=max(keep, tail, 1))
        prefix = self.share(rows[0][:n_shared], min(lengths), plan_of_row, resume)

        def run(batch: Batch) -> tuple[Batch, Tensor | None, dict[Site, Tensor]]:
            call = self.call_of(batch, prefix, plan_of_row)
            call.resume = resume and resume(batch.index, call.positions)
            with self.capturing(capture, batch) as captured:
                logits = self.run(call, keep)
            return batch, logits, captured

        width = max(map(len, rows))
        size = batch_size or self.rows_that_fit(width, keep, len(capture) * tail, STREAM_ROWS)
        parts = batches(
            rows, size=size, prompt_lengths=prompt_lengths, prefix=n_shared, device=self.device
        )
        yield from in_parts(parts, run)

    def rows_that_fit(self, width: int, keep: int, captured: int, most: int) -> int:
        """The number of rows of `width` tokens that fit into half of the free memory, by a rough count."""
        cfg = self.backend.tl.cfg
        size = next(self.backend.tl.parameters()).dtype.itemsize
        # the KV cache of every layer, a few copies of the widest activations, logits in fp32
        cache = 2 * cfg.n_layers * width * cfg.d_model * size
        activations = width * (6 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model)) * size
        outputs = captured * cfg.d_model * size + keep * cfg.d_vocab * (size + 8)
        devices = {parameter.device for parameter in self.backend.tl.parameters()}
        free = min(map(free_memory, devices))
        return max(1, min(most, free // (2 * (cache + activations + outputs))))

    def shared_length(
        self,
        rows: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        *,
        keep: int,
        max_new_tokens: int = 0,
    ) -> int:
        """The number of leading tokens to run once for all rows: all of them prompt, in every row.

        0 where a row outgrows a sliding window, which would count the padding between prefix and rest.
        """
        window = self._sliding_window
        if len(rows) < 2 or (window and max(map(len, rows)) + max_new_tokens > window):
            return 0
        n_shared = min(common_prefix(rows, keep=keep), *prompt_lengths)
        return n_shared if n_shared >= MIN_SHARED_PREFIX else 0

    def share(
        self,
        tokens: Sequence[int],
        prompt_length: int,
        plan_of_row: list[int] | None,
        resume: Resume | None = None,
    ) -> SharedPrefix:
        """Run shared leading tokens once, under each plan if there are several."""
        if not tokens:
            return SharedPrefix()
        size = 1 if plan_of_row is None else max(plan_of_row) + 1
        cache = self.backend.new_cache(size)
        rows = torch.tensor([list(tokens)], device=self.device).expand(size, -1)
        positions = torch.arange(len(tokens), device=self.device).expand(size, -1)
        call = ForwardCall(
            rows,
            torch.ones_like(rows),
            positions,
            torch.tensor([prompt_length], device=self.device).expand(size),
            cache,
            None if plan_of_row is None else torch.arange(size, device=self.device),
            resume and resume([0] * size, positions),
        )
        self.run(call, keep=0)
        return SharedPrefix(len(tokens), cache)

    def call_of(
        self,
        batch: Batch,
        prefix: SharedPrefix,
        plan_of_row: list[int] | None,
        *,
        decoding: bool = False,
    ) -> ForwardCall:
        """The forward call of a batch after its shared prefix; with a KV cache in any case for `decoding`."""
        size = len(batch.index)
        plans = torch.tensor(
            [plan_of_row[i] if plan_of_row else 0 for i in batch.index], device=self.device
        )
        cache = None
        if prefix.n_tokens:
            cache = self.backend.gathered_cache(prefix.cache, plans)
        elif decoding:
            cache = self.backend.new_cache(size)
        return ForwardCall(
            batch.tokens,
            torch.cat([batch.mask.new_ones(size, prefix.n_tokens), batch.mask], 1),
            batch.positions + prefix.n_tokens,
            batch.prompt_lengths,
            cache,
            plans if plan_of_row else None,
        )
