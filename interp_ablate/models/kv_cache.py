"""KV cache layers that grow in place: a decoding step writes its own keys and values, and copies nothing.

Knows: transformers' dynamic cache layer. Does not know: models or plans.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

SPARE = 64  # places for further tokens that a buffer is made with


class GrowingLayer(DynamicLayer):
    """A dynamic layer over a buffer with room to grow; transformers' own copies the whole cache every step."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Float[Tensor, "batch head new d_head"],
        value_states: Float[Tensor, "batch head new d_head"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; what is returned is all there is so far."""
        if torch.is_grad_enabled() or not self.get_seq_length():
            self._buffers = None  # gradients need tensors that nobody writes into
            return super().update(key_states, value_states, *args, **kwargs)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < held + new:
            assert self.keys is not None and self.values is not None
            self._buffers = _with_room(self.keys, new), _with_room(self.values, new)
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer[..., held : held + new, :] = states
        self.keys, self.values = (buffer[..., : held + new, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " row"]) -> None:
        """Keep some rows, in tensors of their own: a copy of this layer must not write into its buffer."""
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def reorder_cache(self, beam_idx: Int[Tensor, " row"]) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._buffers = None


def _with_room(states: Tensor, new: int) -> Tensor:
    *outer, held, width = states.shape
    buffer = states.new_empty(*outer, held + new + SPARE, width)
    buffer[..., :held, :] = states
    return buffer


def growing_cache(config: Any) -> DynamicCache:
    """transformers' cache for a config, its plain layers growing in place (sliding windows stay as they are)."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
