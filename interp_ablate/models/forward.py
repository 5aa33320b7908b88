"""Forward passes over rows of tokens: in batches that fit into memory, shared leading tokens run once.

Knows: batches, captures, KV caches of shared prefixes. Does not know: prompts, or what a plan does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.applied_plans import AppliedPlans
from interp_ablate.models.backends.backend import Backend, ForwardCall, ResumePoint
from interp_ablate.models.batches import Batch, batches, common_prefix, in_parts
from interp_ablate.models.site_map import SiteMap
from interp_ablate.models.sources import free_memory
from interp_ablate.sites import Site

# A function that takes what it wants from the activations of one site: (activations, batch) -> tensor.
Capture = Callable[[Float[Tensor, "batch pos d_model"], Batch], Tensor]
# A function that says where a call on some rows (their indices), at some positions, may start.
Resume = Callable[[Sequence[int], Int[Tensor, "batch new"]], ResumePoint]

# Sharing a prefix costs one more forward call; below this many tokens it is not worth it.
MIN_SHARED_PREFIX = 8
# More rows a batch bring nothing: forward passes are bound by arithmetic, and wide batches pad more;
# decoding gains until the weights' reading is shared by some hundred rows.
STREAM_ROWS, DECODED_ROWS = 32, 96


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

        def reader(site: Site, read: Capture) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, x: Tensor) -> None:
                captured[site] = read(x, batch)

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
        return max(1, min(most, free_memory(self.device) // (2 * (cache + activations + outputs))))

    # ---- shared prefixes -----------------------------------------------------------------------

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
