"""Three ways in which a Bridge does less than its whole forward pass, with the same result.

Knows: transformers' dynamic cache layer; how a Bridge's blocks, attentions and norms wrap the checkpoint's modules, and whose hooks are in them. Does not know: sites, plans or prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from interp_ablate.models.backends.backend import ForwardCall, ResumePoint
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


class BlockSkipping:
    """Forward calls that start at a later block, where what enters that block is known."""

    def __init__(self, tl: Any) -> None:
        self.tl = tl
        # How many values each block returns beside the stream, in a tuple; None: the stream alone.
        self._extra_outputs: list[int | None] = []

    @contextmanager
    def resumed(self, call: ForwardCall) -> Iterator[None]:
        """Blocks below the call's resume point are skipped; the last of them returns what enters there."""
        resume = call.resume
        if resume is None:
            yield
            return
        skipped = range(resume.block)
        with self._skipping(skipped, {resume.block - 1: resume.entering}):
            yield
        if call.cache is not None:  # masks are made as wide as the first layer's cache is long
            batch, new = call.tokens.shape
            placeholder = resume.entering.new_zeros(batch, 1, new, 1)
            for i in skipped:
                call.cache.layers[i].update(placeholder, placeholder)

    @contextmanager
    def _skipping(self, skipped: Iterable[int], outputs: dict[int, Tensor]) -> Iterator[None]:
        """Some blocks return what `outputs` has for them, else their input; the Bridge's hooks around them stay.

        The checkpoint's block inside the Bridge's is the one that is not run.
        """
        inner = {i: self.tl.blocks[i].original_component for i in skipped}
        before = {i: block.__dict__.get("forward") for i, block in inner.items()}
        try:
            for i, block in inner.items():
                block.__dict__["forward"] = functools.partial(
                    _skipped_block, outputs.get(i), self._extra_outputs[i]
                )
            yield
        finally:
            for i, block in inner.items():
                block.__dict__.pop("forward", None)
                if before[i] is not None:  # accelerate's, where layers are on several devices
                    block.__dict__["forward"] = before[i]

    def is_exact(self, forward: Forward, calls: FixedCalls, cache_layers: Sequence[Any]) -> bool:
        """True if all that reaches a block from the blocks below it is the stream that enters it.

        (Some models have blocks that take an earlier one's keys and values.) Each block is run alone on
        fixed calls and must give exactly what it gave in a whole pass; with the last one, so must the model.
        """
        if len(cache_layers) != len(self.tl.blocks) or not all(map(_is_plain_cache, cache_layers)):
            return False
        whole = self._fixed_outputs(forward, calls)
        shapes = {x.shape for outputs in whole[:-1] for x in outputs}
        if any(len(shape) != 3 or shape[-1] != self.tl.cfg.d_model for shape in shapes):
            return False
        for i in range(1, len(cache_layers) + 1):
            try:
                alone = self._fixed_outputs(forward, calls, i, whole[i - 1])
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
                return False  # it looked for what the blocks below would have left somewhere
            if not all(map(torch.equal, whole[i], alone[i])):
                return False
        return True

    def _fixed_outputs(
        self, forward: Forward, calls: FixedCalls, only: int = 0, entering: Sequence[Tensor] = ()
    ) -> list[list[Tensor]]:
        """The output of every block in each fixed call, and last the logits.

        If `entering` is given, no block runs but number `only` (the number of blocks: the final norm), and
        there are logits only if it is the last one or the norm.
        """
        inner = [block.original_component for block in self.tl.blocks]
        outputs: list[list[Tensor]] = [[] for _ in (*inner, None)]
        extra_outputs: list[int | None] = [None for _ in inner]

        def reader(i: int) -> Callable[..., None]:
            def read(module: nn.Module, args: Any, out: Any) -> None:
                outputs[i].append(out if isinstance(out, Tensor) else out[0])
                extra_outputs[i] = None if isinstance(out, Tensor) else len(out) - 1

            return read

        handles = [block.register_forward_hook(reader(i)) for i, block in enumerate(inner)]
        above = range(only + 1, len(inner)) if entering else ()
        try:
            for n, call in enumerate(calls()):
                call.resume = ResumePoint(only, entering[n]) if entering else None
                keep = 0 if above else call.tokens.shape[1]
                with torch.no_grad(), self._skipping(above, {}):
                    logits = forward(call, keep)
                outputs[-1].extend([logits] if logits is not None else [])
        finally:
            for handle in handles:
                handle.remove()
        if not entering:
            self._extra_outputs = extra_outputs
        return outputs

    def is_hooked_below(self, block: int) -> bool:
        """True if hooks of others would not be called, or would change what enters a block.

        From the number of layers + 1 on, the answer is about hooks anywhere in the model.
        """
        # the last skipped block hands on to its hook_out, which is called
        last = self.tl.blocks[max(block - 1, 0) : block]
        passed = {*self.tl.blocks[block:], *(each.hook_out for each in last)}
        waiting = [self.tl]
        while waiting:
            module = waiting.pop()
            if module in passed:
                continue
            if any(foreign_hooks(module)):
                return True
            passed.add(module)
            waiting.extend(part for part in module._modules.values() if part is not None)
        return False


def _is_plain_cache(layer: Any) -> bool:
    """True for a cache layer that holds keys and values by position and nothing else."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)


def _skipped_block(output: Tensor | None, n_extra: int | None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a block's forward: returns `output`, else the input, in the form that the block returns."""
    x = output if output is not None else args[0] if args else kwargs["hidden_states"]
    return x if n_extra is None else (x, *[None] * n_extra)


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
