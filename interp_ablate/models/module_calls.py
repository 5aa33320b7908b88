"""Calls of modules: recorded with their inputs and outputs, and the activations found in them.

Knows: arguments and outputs of any module. Does not know: what a module is for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from interp_ablate.models.quantized_modules import packed_parameters, with_plain_weights


@dataclass(eq=False)
class Recorded:
    """One call of a module: its inputs, and a copy of the tensor in its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def stream_of(output: Any) -> Tensor | None:
    """The activations in a module's output: a tensor, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((part for part in output if isinstance(part, Tensor)), None)
    return None


def with_stream(output: Any, x: Tensor) -> Any:
    """The same output with other activations."""
    if isinstance(output, Tensor):
        return x
    at = next(i for i, part in enumerate(output) if isinstance(part, Tensor))
    parts = [x if i == at else part for i, part in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def stream_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Which argument of a block is the stream: the first floating tensor with three axes."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in named:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            return key
    return None


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Recorded]]]:
    """Every call of some modules inside the block that returns a tensor, in the order in which calls end."""
    calls: dict[str, list[Recorded]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # copies: some models add to an output in place
            own_args, own_kwargs = pytree.tree_map(_copied, (args, kwargs))
            x = stream_of(output)
            if x is not None:
                call = Recorded(own_args, own_kwargs, _copied(x))
                calls.setdefault(name, []).append(call)

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def stream_in(call: Recorded) -> Tensor:
    """The stream that entered a block in a recorded call."""
    key = stream_argument(call.args, call.kwargs)
    assert key is not None
    return call.args[key] if isinstance(key, int) else call.kwargs[key]


def probe_of(block: nn.Module, call: Recorded) -> tuple[nn.Module, Recorded]:
    """A block and its call as they are measured: in float32, on the block's device, no weight all zeros.

    The block itself where it is so already, else a copy. A weight of zeros (of a block that was added to a model, or
    pruned) and a bias of zeros (as training begins) write nothing that could be seen; they get noise, for what writes
    is a matter of the code. A single number of zero is a factor of something, and stays.
    """
    codes = packed_parameters(block)
    own = [p for p in block.parameters() if p.is_floating_point() and id(p) not in codes]
    dtype, device = (
        (own[0].dtype, own[0].device) if own else (call.output.dtype, call.output.device)
    )
    if codes:
        block = with_plain_weights(block)

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device).float() if x.dtype == dtype and dtype.itemsize < 4 else x.to(device)

    zeros = [name for name, p in block.named_parameters() if p.numel() > 1 and _is_zero(p)]
    if zeros or dtype.itemsize < 4:
        block = copy.deepcopy(block).float() if dtype.itemsize < 4 else copy.deepcopy(block)
        generator = torch.Generator().manual_seed(4)
        for name in zeros:
            p = block.get_parameter(name)
            p.data = 0.02 * torch.randn(p.shape, generator=generator).to(p)
    args, kwargs = pytree.tree_map(moved, (call.args, call.kwargs))
    return block, Recorded(args, kwargs, call.output)


def _is_zero(p: Tensor) -> bool:
    return not bool(p.flatten()[:1024].any()) and not bool(p.any())
