"""Two ways in which a Bridge does less than its whole forward pass, with the same result.

Knows: transformers' dynamic cache layer; how a Bridge's blocks, attentions and norms wrap the checkpoint's modules, and whose hooks are in them. Does not know: sites, plans or prompts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.backends.checks import logit_difference
from interp_ablate.models.backends.foreign_hooks import foreign_hooks

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


def gathered_cache(cache: Any, rows: Int[Tensor, " row"]) -> Any:
    """A cache of some rows (one may come several times); the old one stays as it is."""
    gathered = copy.copy(cache)  # layers replace their tensors, they never write into them
    gathered.layers = [_copied_layer(layer) for layer in cache.layers]
    return select_cache(gathered, rows)


def select_cache(cache: Any, rows: Int[Tensor, " row"]) -> Any:
    """The cache of some rows; the old one is not used again."""
    for layer in cache.layers:
        # takes any rows (batch_select_indices leaves out recurrent states), to the device of its block
        layer.reorder_cache(rows)
    return cache


def _copied_layer(layer: Any) -> Any:
    """A cache layer with tables of its own; recurrent ones hold their tensors in dicts."""
    copied = copy.copy(layer)
    tables = {name: dict(v) for name, v in vars(layer).items() if isinstance(v, dict)}
    vars(copied).update(tables)
    return copied


Forward = Callable[[ForwardCall, int], Tensor | None]
FixedCalls = Callable[[], Iterator[ForwardCall]]


class OwnParts:
    """The checkpoint's own attentions and norms, in place of the Bridge's.

    The Bridge computes the same step by step, for the sake of hooks on patterns, scores and scales (norms
    twice). Its parts stay where somebody uses those hooks, or where logits differ.
    """

    def __init__(self, tl: Any) -> None:
        self.tl = tl
        self.enabled = False

    def enable_if_same(self, forward: Forward, calls: FixedCalls, tolerance: float) -> None:
        """Use the checkpoint's parts from now on, if the logits of some fixed calls stay the same."""
        if not self._attentions and not self._norms:
            return
        logits: list[Tensor] = []
        for self.enabled in (False, True):
            for call in calls():
                with torch.no_grad():
                    out = forward(call, call.tokens.shape[1])
                assert out is not None
                logits.append(out.float())
        half = len(logits) // 2
        want, got = torch.cat(logits[:half], 1), torch.cat(logits[half:], 1)
        error, limit = logit_difference(got, want, self.tl.original_model.dtype, tolerance)
        self.enabled = error <= limit

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the checkpoint's parts run, as far as they are enabled and nobody's hooks need the Bridge's."""
        replaced: list[Any] = []
        for parts, own in ((self._attentions, _own_attention), (self._norms, _own_norm)):
            if self.enabled and not any(any(foreign_hooks(p)) for _, inner in parts for p in inner):
                for part, _ in parts:
                    part.__dict__["forward"] = functools.partial(own, part)
                replaced += parts
        try:
            yield
        finally:
            for part, _ in replaced:
                part.__dict__.pop("forward", None)

    @cached_property
    def _attentions(self) -> list[tuple[Any, list[nn.Module]]]:
        """Attentions that the Bridge computes itself, with the hook points that it alone passes."""
        from transformer_lens.hook_points import HookPoint
        from transformer_lens.model_bridge.generalized_components import (
            PositionEmbeddingsAttentionBridge,
        )

        attentions: list[tuple[Any, list[nn.Module]]] = []
        for block in self.tl.blocks:
            attn = block.attn if "attn" in block.submodules else None
            if type(attn) is PositionEmbeddingsAttentionBridge:
                ends = (attn.hook_in, attn.hook_out)
                inner: list[nn.Module] = [
                    m for m in attn.children() if isinstance(m, HookPoint) and m not in ends
                ]
                attentions.append((attn, inner))
        return attentions

    @cached_property
    def _norms(self) -> list[tuple[Any, list[nn.Module]]]:
        """Norms whose output is the checkpoint's own, with the hook points that the Bridge alone passes."""
        from transformer_lens.model_bridge.generalized_components import (
            NormalizationBridge,
            RMSNormalizationBridge,
        )

        return [
            (norm, [norm.hook_scale, norm.hook_normalized])
            for norm in self.tl.modules()
            if type(norm) in (NormalizationBridge, RMSNormalizationBridge)
            and norm.use_native_layernorm_autograd
        ]


def _own_attention(attn: Any, *args: Any, **kwargs: Any) -> Any:
    """The checkpoint's own attention between the Bridge's hooks at its input and output."""
    if args:
        args = (attn.hook_in(args[0]), *args[1:])
    else:
        kwargs["hidden_states"] = attn.hook_in(kwargs["hidden_states"])
    output, *rest = attn.original_component(*args, **kwargs)
    return (attn.hook_out(output), *rest)


def _own_norm(norm: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The checkpoint's own norm between the Bridge's hooks at its input and output."""
    x = norm.hook_in(hidden_states)
    return norm.hook_out(norm.original_component(x).to(x.dtype))
