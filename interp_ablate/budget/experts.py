"""Experts: the stacked weights that a router chooses from, by their shapes.

Knows: the modules that hold them, what a token takes. Does not know: passes, blocks or bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def stacks(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Shapes of the weights of stacked experts, experts first; none of any other module.

    Where they are stacked in two axes (DBRX's), the module says how many there are.
    """
    if "xperts" not in type(module).__name__:
        return ()
    own = tuple(tuple(p.shape) for p in module._parameters.values() if p is not None)
    if any(len(shape) == 3 for shape in own):
        return own
    inner, number = [p.shape for p in module.parameters()], getattr(module, "num_experts", 0)
    lists = any(isinstance(part, nn.ModuleList) for part in module.modules())
    if lists or not number or any(len(shape) != 2 or shape[0] % number for shape in inner):
        return ()
    return tuple((number, shape[0] // number, shape[1]) for shape in inner)


@dataclass(frozen=True)
class Experts:
    """The stacked experts of one block, and what one token takes of them."""

    shapes: tuple[tuple[int, ...], ...]
    """Of their tensors: experts first."""
    chosen: int
    """Experts that a token takes."""
    run: int
    """Experts that are run for a token: the same, or all of them."""
    counted: bool
    """True where the pass ran them, so that it has their operations and what they keep."""
    d_model: int

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def number(self) -> int:
        return self.shapes[0][0]

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """Shapes of one expert's matrices; the last one writes."""
        return [shape[1:] for shape in self.shapes if len(shape) == 3]

    @property
    def inner(self) -> int:
        """Numbers inside the experts that run for a token."""
        return self.run * min(min(shape) for shape in self.matrices)

    @property
    def flops(self) -> int:
        """Operations for a token of experts that were not run; none of those that were."""
        return 0 if self.counted else 2 * self.run * sum(map(math.prod, self.matrices))

    @property
    def saved(self) -> int:
        """Numbers that a gradient keeps of a token: the gate, the rest and their product; what is weighed."""
        return 0 if self.counted else 3 * self.inner + self.run * self.d_model


def experts_of(decoder: Any, chosen: Mapping[str, tuple[int, bool]]) -> list[Experts]:
    """Stacked experts; tensors that have a module each (JetMoE's) are together those of what holds them.

    Beside experts that are given choices, others are every token's: shared ones.
    """
    config, found = decoder.config, []
    said = next((k for name in _TOP_K if (k := getattr(config, name, None))), None)
    together: dict[str, list[tuple[int, ...]]] = {}
    choices: dict[str, tuple[int, bool]] = {}
    for name, module in decoder.named_modules():
        if shapes := stacks(module):
            place = name if len(shapes) > 1 else name.rpartition(".")[0]
            together.setdefault(place, []).extend(shapes)
            if name in chosen:
                choices[place] = chosen[name]
    for place, stacked in together.items():
        number = stacked[0][0]
        run, counted = choices.get(place, (number, True))
        taken = run if chosen else said or run
        found.append(Experts(tuple(stacked), taken, run, counted, config.hidden_size))
    return found
