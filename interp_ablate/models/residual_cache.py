"""Remembered: what left each block in unedited passes over some rows, so that an edit that starts late can
start there.

Knows: rows of tokens, where each of their positions is kept, how much of it fits into memory. Does not
know: models, plans or hooks; what is kept comes from `model`, and goes back there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_ablate.models.batches import Batch, common_prefix

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
    """How many positions are kept for some rows: their shared leading tokens once."""
    shared = common_prefix(rows, keep=1)
    return shared + sum(len(row) - shared for row in rows)


@dataclass(eq=False)
class ResidualCache:
    """What left the blocks of some layers, unedited, at every position of some rows.

    Tokens that all rows share in front are kept once. `state` is the model's own mark of the weights
    under which it was made.
    """

    rows: Sequence[Sequence[int]]
    layers: tuple[int, ...]
    state: object = None
    _left: dict[int, Float[Tensor, "token d_model"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = common_prefix(self.rows, keep=1)
        self._starts: dict[tuple[int, ...], int] = {}
        end = self.prefix
        for row in map(tuple, self.rows):
            if row not in self._starts:
                self._starts[row] = end
                end += len(row) - self.prefix
        self._end = end

    @property
    def n_bytes(self) -> int:
        """What is kept takes this much memory."""
        return sum(x.numel() * x.element_size() for x in self._left.values())

    def holds(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether every one of the rows, whole, is among the remembered ones."""
        return all(tuple(row) in self._starts for row in rows)

    def first_block(self, layer: int) -> int:
        """The last block at or below `layer` whose input is kept; 0 where there is none."""
        return max((kept + 1 for kept in self.layers if kept < layer), default=0)

    def keep(self, layer: int, x: Float[Tensor, "batch pos d_model"], batch: Batch) -> None:
        """Take what left a block in a pass over a batch of the rows (or over their shared tokens)."""
        if layer not in self._left:
            self._left[layer] = x.new_empty(self._end, x.shape[-1])
        real = batch.mask.bool()
        rows = [self.rows[i] for i in batch.index]
        first = batch.row_lengths[:, None] - batch.mask.sum(1, keepdim=True)
        places = self._places(rows, batch.positions + first)
        self._left[layer][places[real].to(x.device)] = x.detach()[real]

    def entering(
        self, block: int, rows: Sequence[Sequence[int]], positions: Int[Tensor, "batch new"]
    ) -> Float[Tensor, "batch new d_model"]:
        """What enters a block at some positions of some of the rows.

        `positions` count from each row's first token; what padding stands at matters to nobody.
        """
        left = self._left[block - 1]
        return left[self._places(rows, positions).to(left.device)]

    def _places(
        self, rows: Sequence[Sequence[int]], positions: Int[Tensor, "batch new"]
    ) -> Int[Tensor, "batch new"]:
        starts = [self._starts[tuple(row)] - self.prefix for row in rows]
        own = torch.tensor(starts, device=positions.device)[:, None] + positions
        return torch.where(positions < self.prefix, positions, own)
