"""Forward calls that start at a later block, with the same result.

Knows: blocks, transformers' cache layers, whose hooks would not be called. Does not know: sites, plans or prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from interp_ablate.models.backends.backend import ForwardCall, ResumePoint
from interp_ablate.models.backends.bridge_shortcuts import FixedCalls, Forward, GrowingLayer
from interp_ablate.models.backends.foreign_hooks import foreign_hooks


class BlockSkipping:
    """Forward calls that start at a later block, where what enters that block is known.

    Args:
        blocks: the checkpoint's own blocks, whose forward is replaced where they are skipped.
        root: everything in which hooks are looked for.
        still_called: from the first block that runs to the modules whose hooks are called all the same.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        d_model: int,
        root: nn.Module,
        still_called: Callable[[int], set[nn.Module]],
    ) -> None:
        self._blocks, self._d_model, self.root = list(blocks), d_model, root
        self._still_called = still_called
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
        """Some blocks return what `outputs` has for them, else their input; hooks around them are called."""
        inner = {i: self._blocks[i] for i in skipped}
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
        if len(cache_layers) != len(self._blocks) or not all(map(_is_plain_cache, cache_layers)):
            return False
        whole = self._fixed_outputs(forward, calls)
        shapes = {x.shape for outputs in whole[:-1] for x in outputs}
        if any(len(shape) != 3 or shape[-1] != self._d_model for shape in shapes):
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
        inner = self._blocks
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
        passed = self._still_called(block)
        waiting: list[nn.Module] = [self.root]
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
