"""Forward passes over rows of tokens: in batches that fit into memory, shared leading tokens run once.

Knows: which rows may go together, captures, the plans under which a pass began. Does not know: prompts, or what a plan does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.applied_plans import AppliedPlans
from interp_ablate.models.backends.backend import Backend, ForwardCall, ResumePoint, SiteMap
from interp_ablate.models.batches import (
    Batch,
    SharedPrefix,
    batches,
    call_of,
    common_prefix,
    in_parts,
    prefix_call,
)
from interp_ablate.models.pass_checks import PassChecks
from interp_ablate.models.sources import free_memory
from interp_ablate.settings import STREAM_ROWS
from interp_ablate.sites import Site

# A function that takes what it wants from the activations of one site: (activations, batch) -> tensor. The batch
# is on the activations' device.
Capture = Callable[[Float[Tensor, "batch pos d_model"], Batch], Tensor]
# A function that says where a call on some rows (their indices), at some positions, may start.
Resume = Callable[[Sequence[int], Int[Tensor, "batch new"]], ResumePoint]

# Sharing a prefix costs one more forward call; below this many tokens it is not worth it.
MIN_SHARED_PREFIX = 8


class ForwardPasses:
    """Runs rows of tokens through one backend, under the plans that are applied."""

    def __init__(self, backend: Backend, site_map: SiteMap, plans: AppliedPlans) -> None:
        self.backend, self.plans, self._site_map = backend, plans, site_map
        self.checks = PassChecks(backend, plans.lock)

    @property
    def device(self) -> torch.device:
        """The device of the embedding, which takes the tokens."""
        return next(self.backend.tl.parameters()).device

    def run(
        self, call: ForwardCall, keep: int, in_force: tuple[object, ...]
    ) -> Float[Tensor, "batch keep d_vocab"] | None:
        """One forward call; logits of the last `keep` positions, None for 0.

        Raises:
            PlanError: `in_force`, the plans under which the work began, are not those applied now.
        """
        with self.plans.lock:
            self.plans.require(in_force, "these passes began")
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
        with self.plans.lock:  # another thread's passes are not captured
            try:
                for site, read in capture.items():
                    if len(self.backend.post_norm_gains(site)) > 1:
                        raise ModelError(
                            f"several projections, with norms of their own, write at {site.output}: there is no "
                            f"one {site} to read; read {site.output}"
                        )
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
        plan_of_row, in_force = self.plans.plan_of_rows(len(rows)), self.plans.in_force
        width = max(map(len, rows))

        def results() -> Iterator[tuple[Batch, Tensor | None, dict[Site, Tensor]]]:
            n_shared = self.shared_length(rows, lengths, width, keep=max(keep, tail, 1))
            prefix = self.share(rows[0][:n_shared], min(lengths), plan_of_row, in_force, resume)

            def run(batch: Batch) -> tuple[Batch, Tensor | None, dict[Site, Tensor]]:
                call = call_of(self.backend, batch, prefix, plan_of_row)
                call.resume = resume and resume(batch.index, call.positions)
                with self.capturing(capture, batch) as captured:
                    logits = self.run(call, keep, in_force)
                return batch, logits, captured

            size = batch_size or self.rows_that_fit(width, keep, len(capture) * tail, STREAM_ROWS)
            parts = self.batches(rows, size, width, prompt_lengths=lengths, prefix=n_shared)
            yield from in_parts(parts, run, "passes")

        return results()

    def batches(
        self,
        rows: Sequence[Sequence[int]],
        size: int,
        width: int,
        *,
        prompt_lengths: Sequence[int] | None = None,
        prefix: int = 0,
    ) -> list[Batch]:
        """Rows that become up to `width` tokens long, in batches: padded where the model takes that."""
        pads = size > 1 and len(set(map(len, rows))) > 1
        return batches(
            rows,
            size=size,
            prompt_lengths=prompt_lengths,
            prefix=prefix,
            device=self.device,
            one_length=pads and not self.checks.padding_is_exact(width),
        )

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
        width: int,
        *,
        keep: int,
    ) -> int:
        """The number of leading tokens to run once for all rows: all of them prompt, in every row.

        0 where a model of rows up to `width` tokens would count the padding between prefix and rest.
        """
        if len(rows) < 2 or self.plans.conditions:  # a condition reads every prompt whole
            return 0
        n_shared = min(common_prefix(rows, keep=keep), *prompt_lengths)
        if n_shared < MIN_SHARED_PREFIX or not self.checks.sharing_is_exact(width):
            return 0
        return n_shared

    def share(
        self,
        tokens: Sequence[int],
        prompt_length: int,
        plan_of_row: list[int] | None,
        in_force: tuple[object, ...],
        resume: Resume | None = None,
    ) -> SharedPrefix:
        """Run shared leading tokens once, under each plan if there are several."""
        if not tokens:
            return SharedPrefix()
        call = prefix_call(self.backend, tokens, prompt_length, plan_of_row)
        call.resume = resume and resume([0] * len(call.tokens), call.positions)
        self.run(call, 0, in_force)
        return SharedPrefix(len(tokens), call.cache)
