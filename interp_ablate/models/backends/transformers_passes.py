"""The part that a Bridge and a plain Hugging Face model share as backends: both run transformers' own forward pass.

Knows: the arguments of that pass, its KV caches, late starts, hooks of others. Does not know: sites or plans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp_ablate.models.architectures import text_config
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.backends.block_skipping import BlockSkipping
from interp_ablate.models.backends.bridge_shortcuts import (
    gathered_cache,
    growing_cache,
    select_cache,
)
from interp_ablate.models.backends.checks import fixed_calls
from interp_ablate.models.backends.foreign_hooks import hook_ids, without_hooks
from interp_ablate.models.embedding_anatomy import unembedding_of


class TransformersPasses(ABC):
    """The members of a backend that transformers' forward pass decides."""

    tl: Any
    module: nn.Module
    hf: Any
    hf_config: Any
    _skipping: BlockSkipping

    @abstractmethod
    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        """See `Backend.forward`."""

    @staticmethod
    def arguments(call: ForwardCall) -> dict[str, Any]:
        """A call as transformers' forward pass takes it."""
        return {
            "input_ids": call.tokens,
            # some models and Bridges take a mask only where there is padding (openai-gpt)
            "attention_mask": call.mask if call.padded or call.cache is not None else None,
            "position_ids": call.positions,
            "past_key_values": call.cache,
            "use_cache": call.cache is not None,
        }

    @contextmanager
    def whole_products(self) -> Iterator[None]:
        """Inside the block the unembedding reads the last positions of all rows in one matrix product.

        What transformers hands it is a view of the stream, for which torch reads the weight once a row: six times
        as long on SmolLM2 (16 rows, 8 positions).
        """
        head = self._head
        if head is None:
            yield
            return
        before, forward = head.__dict__.get("forward"), head.forward

        def of_a_copy(*args: Any, **kwargs: Any) -> Any:
            whole = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
            return forward(*whole, **kwargs)

        head.__dict__["forward"] = of_a_copy
        try:
            yield
        finally:
            head.__dict__.pop("forward", None)
            if before is not None:  # accelerate's, where layers are on several devices
                head.__dict__["forward"] = before

    @cached_property
    def _head(self) -> nn.Module | None:
        """The unembedding, if the model has one that it names."""
        return unembedding_of(self.hf)

    def new_cache(self, batch: int) -> Any:
        return growing_cache(text_config(self.hf_config))

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return gathered_cache(cache, rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return select_cache(cache, rows)

    def fixed_calls(self) -> Iterator[ForwardCall]:
        """The calls on which a shortcut is tried."""
        device = next(self.module.parameters()).device
        return fixed_calls(self.tl.cfg.d_vocab, device, self.new_cache(1))

    def head_sizes(self) -> list[int | None]:
        """The last axis of the values that each layer's cache keeps of fixed tokens: attention is what keeps them."""
        call = next(iter(self.fixed_calls()))
        with self.unhooked(), torch.no_grad():
            self.forward(call, 0)
        kept = [getattr(layer, "values", None) for layer in call.cache.layers]
        sizes: list[int | None] = [
            x.shape[-1]
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == call.tokens.shape[1]
            else None
            for x in kept
        ]
        return [*sizes, *[None] * (self.tl.cfg.n_layers - len(sizes))]

    @cached_property
    def can_resume(self) -> bool:
        """True if a pass may start at a later block (tried once, on fixed tokens)."""
        layers = self.new_cache(1).layers
        return self._skipping.is_exact(self.forward, self.fixed_calls, layers)

    def hook_ids(self) -> frozenset[int]:
        return hook_ids(self._skipping.root)

    def unhooked(self) -> AbstractContextManager[None]:
        return without_hooks(self._skipping.root)

    def is_hooked_below(self, block: int) -> bool:
        return self._skipping.is_hooked_below(block)
