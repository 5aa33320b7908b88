"""One pass of a decoder without data: operations, what a gradient would keep, and the caches.

Torch counts operations, transformers builds the caches, and what a gradient would keep is recorded. Routed experts are
not run, since a router has no values to decide by: each token takes as many as the router says.

Knows: torch's meta device, attention and experts as transformers calls them. Does not know: what the counts are for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from interp_ablate.budget.experts import stacks

ATTENTION = "interp_ablate_counted"
"""The name under which transformers is given `counted_attention`."""


class _Attention(torch.autograd.Function):
    """Attention without a softmax: the operations and the kept tensors of a kernel that keeps no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query @ key.transpose(-1, -2) @ value
        ctx.save_for_backward(query, key, value, out)
        return out


def counted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, which also notes its widths at its module."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    heads, widths = query.shape[1], key.shape[-1] + value.shape[-1]
    module.__dict__["counted"] = (2 * heads * widths, heads * widths * key.element_size())
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _NoNumbers(TorchFunctionMode):
    """Inside it a list of a tensor's values is a list of None: whatever computes with them fails."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return [None] * len(args[0])
        return func(*args, **(kwargs or {}))


class CountedPass:
    """One pass of a decoder over tokens of no value: operations, what a gradient would keep, and the caches."""

    def __init__(self, decoder: Any, tokens: int) -> None:
        self.kept: dict[int, Tensor] = {}
        self.used: set[int] = set()
        """The id of every parameter of a module that ran."""
        self._weights = {p.untyped_storage()._cdata for p in decoder.parameters()}
        embedding = decoder.get_input_embeddings()
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        # a copy, for some models write into what they embedded
        handles = [
            embedding.register_forward_hook(lambda _, __, out: out.requires_grad_().clone()),
            register_module_forward_pre_hook(
                lambda module, _: self.used.update(map(id, module._parameters.values()))
            ),
        ]
        try:
            with (
                _routed(decoder, tokens) as self.experts,
                _NoNumbers(),
                FlopCounterMode(display=False) as counter,
                saved_tensors_hooks(self._keep, lambda x: x),
                _streams(decoder) as self.read,
            ):
                out = decoder(input_ids=ids, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        self.flops, self.tokens = counter.get_total_flops(), tokens
        self.saved = sum(x.untyped_storage().nbytes() for x in self.kept.values())
        self.caches = _caches(out)

    def _keep(self, x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in self._weights:
            self.kept[x.untyped_storage()._cdata] = x
        return x


@contextmanager
def _routed(decoder: Any, tokens: int) -> Iterator[dict[str, tuple[int, bool]]]:
    """Inside the block experts that are given choices note how many each token takes, and whether they were counted.

    Those given experts' numbers pass uncounted. Those given rows that are sorted by expert have all of them go through
    the first one. Those given neither are run as they are.
    """
    chosen: dict[str, tuple[int, bool]] = {}

    def stands_in(name: str, run: Any) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            given = [*args, *kwargs.values()]
            numbers = [a for a in given if isinstance(a, Tensor) and not a.is_floating_point()]
            if numbers:
                chosen[name] = (numbers[0].shape[-1], False)
                return x.clone()
            if args and isinstance(args[0], list):
                chosen[name] = (len(x) // tokens, True)
                args = ([len(x), *[0] * (len(args[0]) - 1)], *args[1:])
            return run(x, *args, **kwargs)

        return forward

    found = {name: m for name, m in decoder.named_modules() if _is_routed(m)}
    for name, module in found.items():
        module.__dict__["forward"] = stands_in(name, module.forward)
    try:
        yield chosen
    finally:
        for module in found.values():
            module.__dict__.pop("forward", None)


def _is_routed(module: nn.Module) -> bool:
    """True for stacked experts whose choices come as arguments; Llama 4's compute every expert for every token."""
    return bool(stacks(module)) and len(inspect.signature(type(module).forward).parameters) > 2


@contextmanager
def _streams(decoder: Any) -> Iterator[dict[str, int]]:
    """Inside the block: for every linear layer that reads what a norm over the stream made, that tensor's number."""
    read: dict[str, int] = {}
    made: dict[int, Tensor] = {}
    width = decoder.get_input_embeddings().weight.shape[-1]

    def norm_made(_: Any, __: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.shape[-1] == width:
            made[out.untyped_storage()._cdata] = out

    def reads(name: str) -> Any:
        def note(_: Any, args: Any) -> None:
            if not args or not isinstance(args[0], Tensor):  # positions may get a shape
                return
            if (storage := args[0].untyped_storage()._cdata) in made:
                read[name] = storage

        return note

    handles = []
    for name, module in decoder.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if name and own and all(p.ndim == 1 for p in own):
            handles.append(module.register_forward_hook(norm_made))
        elif own:
            handles.append(module.register_forward_pre_hook(reads(name)))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _caches(out: Any) -> list[dict[str, Any]]:
    """Of every layer of a cache its tensors by name, and its window; first of what the cache has beside its layers."""
    for name in ("past_key_values", "cache_params", "state"):
        cache = out.get(name) if hasattr(out, "get") else None
        if cache is None:
            continue
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or []
        parts = [(dict(_tensors(part)), getattr(part, "sliding_window", None)) for part in layers]
        known = {id(x) for tensors, _ in parts for x in tensors.values()}
        beside = {key: x for key, x in _tensors(cache) if id(x) not in known}
        # prompts that are kept whole beside a window (Unlimited-OCR's) are not its keys
        return [{"tensors": beside, "window": None}] + [
            {"tensors": tensors, "window": window if ".keys" in tensors else None}
            for tensors, window in parts
        ]
    return []


def _tensors(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        if part.ndim > 1:
            yield name, part
    elif isinstance(part, Mapping):
        for key, each in part.items():
            yield from _tensors(each, f"{name}.{key}")
    elif isinstance(part, (list, tuple)):
        yield from _tensors(dict(enumerate(part)), name)
    elif hasattr(part, "__dict__"):
        yield from _tensors(vars(part), name)
