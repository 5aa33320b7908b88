"""The second checker of an export: plain transformers, and nothing of the package.

A direction is projected out of a model by hand, wherever its residual stream is: out of the embedding, out of
what enters and leaves every block, and out of every sum with the stream in between. Sums are seen below the
modules, by torch's dispatcher: the stream is what enters a block, and what an addition to it gives. An
export must give that model's logits, and have nothing along the direction at any block.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

MASKED = 1e30  # logits beyond are of tokens that a model never says
aten = torch.ops.aten
# Operations that hand a tensor on as it is, and those that give it in another form.
_SAME = (aten.view, aten._unsafe_view, aten.clone, aten.alias, aten.detach, aten._to_copy, aten.slice, aten.reshape)  # fmt: skip


def reloaded(folder: Path) -> Any:
    """An exported folder by the class that its config.json names."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def run_by(hf: Any, row: Sequence[int]) -> list[nn.Module]:
    """The modules that run on a row of tokens."""
    ran: dict[int, nn.Module] = {}
    with ExitStack() as stack:
        for module in hf.modules():
            hook = module.register_forward_hook(lambda m, *_: ran.setdefault(id(m), m) and None)
            stack.callback(hook.remove)
        passed(hf, row)
    return list(ran.values())


def blocks_of(hf: Any, row: Sequence[int]) -> list[nn.Module]:
    """The decoder's blocks: of the lists of modules that a row of tokens runs whole, the longest one."""
    ran = {id(module) for module in run_by(hf, row)}
    n_layers = getattr(hf.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [list(m) for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m)]
    whole = [parts for parts in lists if all(id(part) in ran for part in parts)]
    return max(whole, key=lambda parts: (len(parts) == n_layers, len(parts)))


@torch.no_grad()
def passed(hf: Any, row: Sequence[int]) -> Tensor:
    """The logits of one row of tokens, in one pass without a cache."""
    names = inspect.signature(hf.forward).parameters
    takes = "use_cache" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
    out = hf(input_ids=torch.tensor([list(row)]), **({"use_cache": False} if takes else {}))
    return out.logits.float()


def _stream(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


@contextmanager
def watching(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What enters and leaves every block inside the `with`."""
    seen: list[Tensor] = []

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _stream([*args, *kwargs.values()])
        assert x is not None
        seen.append(x.clone())

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        x = _stream(output)
        assert x is not None
        seen.append(x.clone())

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enters, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leaves).remove)
        yield seen


@dataclass
class Sums:
    """The sums of a pass that stay in the stream, by their number, and the norms whose outputs they add."""

    numbers: set[int] = field(default_factory=set)
    norms: set[nn.Module] = field(default_factory=set)


class _Projected(TorchDispatchMode):
    """Projects a unit vector out of the stream at its sums: all of them, or those of an earlier pass."""

    def __init__(self, unit: Tensor, only: Sums | None) -> None:
        super().__init__()
        self.unit, self.only, self.found, self.count = unit, only, Sums(), 0
        # Beside each tensor what is known of it; the tensor too, as an id is its own only while it lives.
        self.stream: dict[int, tuple[Tensor, frozenset[int]]] = {}
        self.normed: dict[int, tuple[Tensor, nn.Module]] = {}
        self.norm_of_sum: dict[int, nn.Module] = {}

    def clean(self, x: Tensor) -> Tensor:
        return x - (x @ self.unit)[..., None] * self.unit

    def enter(self, x: Tensor, sums: frozenset[int] = frozenset()) -> None:
        self.stream[id(x)] = (x, sums)

    def leave(self, x: Tensor) -> None:
        """The sums that made what leaves a block stay in the stream."""
        sums = self.stream[id(x)][1] if id(x) in self.stream else frozenset()
        self.found.numbers |= sums
        self.found.norms |= {self.norm_of_sum[n] for n in sums if n in self.norm_of_sum}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = [a for a in args if isinstance(a, Tensor) and a.numel() > 1]
        if not isinstance(out, Tensor) or not wide:
            return out
        kind, scaled = func.overloadpacket, len(wide) == 1
        base = next((a for a in wide if id(a) in self.stream and a.shape == out.shape), None)
        if kind in (aten.add, aten.add_) and base is not None and len(wide) == 2:
            other = wide[1] if wide[0] is base else wide[0]
            if other.shape == out.shape:
                self.count += 1
                if id(other) in self.normed:
                    self.norm_of_sum[self.count] = self.normed[id(other)][1]
                if self.only is None or self.count in self.only.numbers:
                    out.copy_(self.clean(out))
                self.enter(out, self.stream[id(base)][1] | {self.count})
        elif kind in _SAME or (kind in (aten.mul, aten.div, aten.mul_) and scaled):
            first = id(wide[0])
            if first in self.stream and out.shape[-1] == len(self.unit):
                self.enter(out, self.stream[first][1])
            if first in self.normed:
                self.normed[id(out)] = (out, self.normed[first][1])
        return out


def _is_norm(module: nn.Module, width: int) -> bool:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return all(s == (width,) for s in shapes) and "norm" in type(module).__name__.lower()


def _through(norm: nn.Module, unit: Tensor) -> Tensor:
    """The direction before a norm that it turns into `unit`: what of it enters leaves along it.

    Seen from outside: the gain of a channel by a one there and a minus one beside it, which have no mean; a norm
    that gives nothing for equal channels takes their mean off.
    """
    size = len(unit)
    pairs = 1e3 * (torch.eye(size) - torch.eye(size).roll(1, 1))
    ones = 1e3 * torch.ones(1, 1, size)
    gain = (norm.forward(pairs[None]) - norm.forward(-pairs[None]))[0].diagonal() / (
        2 * size
    ) ** 0.5
    of_equal = norm.forward(ones) - norm.forward(-ones)
    vector = gain * unit
    if float(of_equal.norm()) < 1e-3 * float(gain.norm()):
        vector = vector - vector.mean()
    return vector / vector.norm()


def norms_before(
    hf: Any, blocks: Sequence[nn.Module], width: int, row: Sequence[int]
) -> list[nn.Module]:
    """The norms outside the blocks that give what enters the first one, in the order of a pass."""
    inside = {id(part) for block in blocks for part in block.modules()}
    given: list[tuple[nn.Module, Tensor, Tensor]] = []
    entered: list[Tensor] = []
    with ExitStack() as stack:
        for module in hf.modules():
            if id(module) not in inside and _is_norm(module, width):
                stack.callback(
                    module.register_forward_hook(
                        lambda m, args, out: given.append((m, args[0].clone(), out.clone()))
                    ).remove
                )
        first = blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(_stream([*args, *kwargs.values()])),  # type: ignore[func-returns-value]
            with_kwargs=True,
        )
        stack.callback(first.remove)
        passed(hf, row)
    found, wanted = [], entered[0]
    for norm, read, gave in reversed(given):
        if gave.shape == wanted.shape and torch.equal(gave, wanted):
            found, wanted = [norm, *found], read
    return found


def hand_hooked(hf: Any, blocks: Sequence[nn.Module], unit: Tensor, row: Sequence[int]) -> Tensor:
    """Logits of a row where a unit vector is projected out of the stream of a plain model.

    Where a norm stands between what a block computes, or the embeddings, and the stream, its input is projected
    instead: that is where a weight can be edited.
    """
    return _pass(hf, unit, blocks, row, _pass(hf, unit, blocks, row, None)[1])[0]


def _pass(
    hf: Any, unit: Tensor, blocks: Sequence[nn.Module], row: Sequence[int], only: Sums | None
) -> tuple[Tensor, Sums]:
    """Logits, and the sums that stayed in the stream; `only` are those of an earlier pass."""
    mode = _Projected(unit, only)
    first = norms_before(hf, blocks, len(unit), row)
    assert len(first) < 2
    waiting = list(first)  # one norm may be before the blocks and after them

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if first else mode.clean(output)

    def before_first(module: nn.Module, args: Any) -> Any:
        return before_norm(module, args) if waiting else None

    def after_first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return mode.clean(output) if waiting and waiting.pop() else output

    def enters(module: nn.Module, args: Any, kwargs: Any) -> Any:
        named = [*enumerate(args), *kwargs.items()]
        key, x = next((k, v) for k, v in named if isinstance(v, Tensor) and v.is_floating_point())
        x = mode.clean(x)
        mode.enter(x)
        if isinstance(key, int):
            return (*args[:key], x, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: x}

    def leaves(module: nn.Module, args: Any, output: Any) -> Any:
        x = _stream(output)
        assert x is not None
        mode.leave(x)
        cleaned = mode.clean(x)
        if isinstance(output, Tensor):
            return cleaned
        return type(output)(cleaned if part is x else part for part in output)

    def normed(module: nn.Module, args: Any, output: Tensor) -> None:
        mode.normed[id(output)] = (output, module)

    def before_norm(module: nn.Module, args: Any) -> Any:
        inner = _through(module, unit)
        return (args[0] - (args[0] @ inner)[..., None] * inner, *args[1:])

    with ExitStack() as stack:
        stack.callback(hf.get_input_embeddings().register_forward_hook(embedded).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enters, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leaves).remove)
            for norm in block.modules():
                if _is_norm(norm, len(unit)):
                    stack.callback(norm.register_forward_hook(normed).remove)
        for norm in first:
            stack.callback(norm.register_forward_pre_hook(before_first).remove)
            stack.callback(norm.register_forward_hook(after_first).remove)
        for norm in only.norms if only else ():
            stack.callback(norm.register_forward_pre_hook(before_norm).remove)
        with torch.no_grad(), mode:
            return passed(hf, row), mode.found


def left_along(folder: Path, r: Tensor, rows: Sequence[Sequence[int]]) -> float:
    """The largest share along r of what enters or leaves a block of an exported folder."""
    export, unit = reloaded(folder), r.float() / r.float().norm()
    with watching(blocks_of(export, rows[0])) as seen:
        for row in rows:
            passed(export, row)
    return max(float(((x @ unit).abs() / x.norm(dim=-1)).max()) for x in seen)


def check(source: Any, folder: Path, r: Tensor, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """An export beside the model that it was made of: what is left along r, and the logits.

    Args:
        source: the model itself, unedited and unhooked.

    Returns `left` (the largest share of a block's input or output along r), `logits` (the largest difference
    from the hand-hooked model), and `effect` (the largest difference of that model from the source).
    """
    export, unit = reloaded(folder), r.float() / r.float().norm()
    blocks = blocks_of(source, rows[0])
    found = {"left": left_along(folder, r, rows), "logits": 0.0, "effect": 0.0}
    for row in rows:
        got, plain = passed(export, row), passed(source, row)
        want = hand_hooked(source, blocks, unit, row)
        said = plain.abs() < MASKED
        assert bool((got.abs() < MASKED).eq(said).all())
        plain, want, got = plain[said], want[said], got[said]
        spread = float(plain.std())
        found["logits"] = max(found["logits"], float((got - want).abs().max()) / spread)
        found["effect"] = max(found["effect"], float((plain - want).abs().max()) / spread)
    return found
