"""Cached residual stream of unedited passes; passes under a plan resume at the first edited block.

Knows: which positions of which rows are kept, how much fits into memory, where a pass may resume. Does not know: prompts, or what a plan does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import ResumePoint, SiteMap
from interp_ablate.models.batches import (
    Batch,
    SharedPrefix,
    batches,
    call_of,
    common_prefix,
    in_parts,
)
from interp_ablate.models.fingerprint import ModelFingerprint
from interp_ablate.models.forward import Capture, ForwardPasses, Resume
from interp_ablate.models.sources import free_memory
from interp_ablate.settings import STREAM_ROWS
from interp_ablate.sites import Site

logger = logging.getLogger(__name__)

# At most this share of the free memory is filled; where all layers need more, every k-th is kept.
SHARE = 0.25


def layers_to_keep(n_layers: int, bytes_a_layer: int, free: int) -> tuple[int, ...]:
    """Every layer, every k-th, or none: as many as fit into the share of the free memory."""
    fitting = int(SHARE * free) // max(bytes_a_layer, 1)
    if fitting < 1:
        return ()
    apart = -(-n_layers // fitting)
    return tuple(range(apart - 1, n_layers, apart))


def n_tokens(rows: Sequence[Sequence[int]]) -> int:
    """The number of positions that are kept for some rows: their shared leading tokens count once."""
    shared = common_prefix(rows, keep=1)
    return shared + sum(len(row) - shared for row in rows)


@dataclass(eq=False)
class ResidualCache:
    """The unedited residual stream after the blocks of some layers, at every position of some rows."""

    rows: Sequence[Sequence[int]]
    """Token rows; tokens that all of them share in front are kept once."""
    layers: tuple[int, ...]
    """The layers that are kept; none where passes cannot resume."""
    weights_version: object = None
    """A mark of the weights under which the cache was filled."""
    _resid_post: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = common_prefix(self.rows, keep=1)
        self._starts: dict[tuple[int, ...], int] = {}
        end = self.prefix
        for row in map(tuple, self.rows):
            if row not in self._starts:
                self._starts[row] = end
                end += len(row) - self.prefix
        self._end = end

    def holds(self, rows: Sequence[Sequence[int]]) -> bool:
        """True if every one of the rows, whole, is in the cache."""
        return all(tuple(row) in self._starts for row in rows)

    def first_block(self, layer: int) -> int:
        """The last block at or below `layer` whose input is cached; 0 if there is none."""
        return max((cached + 1 for cached in self.layers if cached < layer), default=0)

    def add(self, layer: int, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> None:
        """Store what left a block in a pass over a batch of the rows (or over their shared tokens)."""
        if layer not in self._resid_post:
            self._resid_post[layer] = x.new_empty(self._end, x.shape[-1])
        real = batch.mask.bool()
        rows = [self.rows[i] for i in batch.index]
        first = batch.row_lengths[:, None] - batch.mask.sum(1, keepdim=True)
        indices = self._indices(rows, batch.positions + first)
        self._resid_post[layer][indices[real]] = x.detach()[real]

    def entering(
        self, block: int, rows: Sequence[Sequence[int]], positions: Int[Tensor, "batch new"]
    ) -> Float[Tensor, "batch new d_model"]:
        """The stream that enters a block at some positions of some of the rows.

        Positions count from each row's first token; those of padding give values that do not matter.
        """
        stored = self._resid_post[block - 1]
        return stored[self._indices(rows, positions).to(stored.device)]

    def _indices(
        self, rows: Sequence[Sequence[int]], positions: Int[Tensor, "batch new"]
    ) -> Int[Tensor, "batch new"]:
        starts = [self._starts[tuple(row)] - self.prefix for row in rows]
        own = torch.tensor(starts, device=positions.device)[:, None] + positions
        return torch.where(positions < self.prefix, positions, own)


class ResidualCaching:
    """Fills residual caches for one model, and says where its passes may resume from one."""

    def __init__(
        self, passes: ForwardPasses, site_map: SiteMap, fingerprint: ModelFingerprint
    ) -> None:
        self._passes, self._site_map, self._fingerprint = passes, site_map, fingerprint
        self._backend, self._plans = passes.backend, passes.plans

    def filled(self, rows: Sequence[Sequence[int]]) -> ResidualCache:
        """See `Model.cache_residuals`."""
        if self._plans.is_edited:
            raise PlanError(
                "a residual cache is the unedited model's: call cache_residuals outside of applied(...)"
            )
        cfg, parameter = self._backend.tl.cfg, next(self._backend.tl.parameters())
        used = n_tokens(rows) * cfg.d_model * parameter.dtype.itemsize
        layers: tuple[int, ...] = ()
        if not self._backend.is_hooked_below(cfg.n_layers + 1) and self._backend.can_resume:
            layers = layers_to_keep(cfg.n_layers, used, free_memory(parameter.device))
        logger.debug("caching %d of %d layers, %d bytes each", len(layers), cfg.n_layers, used)
        cache = ResidualCache(rows, layers, self._fingerprint.weights_version)
        if layers:
            self._fill(cache)
        return cache

    def _fill(self, cache: ResidualCache) -> None:
        passes, rows, lengths = self._passes, cache.rows, [len(row) for row in cache.rows]
        in_force, width = passes.plans.in_force, max(lengths)

        def reader(layer: int) -> Capture:
            def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
                cache.add(layer, x, batch)
                return x[:0]

            return read

        capture = {Site(layer, "resid_post"): reader(layer) for layer in cache.layers}
        n_shared, prefix = passes.shared_length(rows, lengths, width, keep=1), SharedPrefix()
        if n_shared:
            (front,) = batches([rows[0][:n_shared]], size=1, device=passes.device)
            with passes.capturing(capture, front):
                prefix = passes.share(rows[0][:n_shared], min(lengths), None, in_force)

        def run(batch: Batch) -> None:
            with passes.capturing(capture, batch):
                passes.run(call_of(passes.backend, batch, prefix, None), 0, in_force)

        size = passes.rows_that_fit(width, 0, 0, STREAM_ROWS)
        parts = passes.batches(rows, size, width, prefix=n_shared)
        for _ in in_parts(parts, run, "passes"):
            pass

    def resume(
        self, cache: ResidualCache | None, rows: Sequence[Sequence[int]], captured: Iterable[Site]
    ) -> Resume | None:
        """Where passes over rows may start, under the applied plans; None where all blocks must run."""
        if cache is None or not cache.layers or self._plans.with_gradients:
            return None
        read = {condition.site for condition in self._plans.conditions}
        reached = {*self._plans.sites, *read, *captured}
        block = cache.first_block(self._site_map.first_block(reached))
        if not block or not cache.holds(rows) or self._backend.is_hooked_below(block):
            return None
        if cache.weights_version != self._fingerprint.weights_version:
            logger.warning(
                "the weights have changed since residuals were cached: running all blocks"
            )
            return None
        return lambda index, positions: ResumePoint(
            block, cache.entering(block, [rows[i] for i in index], positions)
        )
