"""The parts that one module writes along a vector in a pass: its attention heads, its neurons, experts or branches.

A part's share is computed from what enters the writing weight in that pass. Where a norm follows, its gain is
taken into the vector, and its scale of that pass stays as it was. Whether the parts add up to what the module
wrote is measured at every token; a module whose parts do not is given whole.

Knows: writing weights and their inputs, experts, norms after them. Does not know: prompts, or what is done with the shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.models.architectures import Layout
from interp_ablate.models.backends.backend import SiteMap
from interp_ablate.models.batches import Batch
from interp_ablate.models.forward import Capture
from interp_ablate.models.module_calls import stream_of
from interp_ablate.models.quantized_modules import packed_modules
from interp_ablate.precision import to_float64
from interp_ablate.sites import Site

Kind = Literal[
    "embed", "pos_embed", "attn", "head", "mlp", "neuron", "expert", "branch", "bias", "rest"
]
_EXPERT = re.compile(r"(?:^|\.)experts\.(?:(\d+)\.)?")


@dataclass(frozen=True)
class Term:
    """One summand of a projection."""

    kind: Kind
    layer: int | None = None
    """None for the embeddings."""
    module: Literal["embed", "attn", "mlp", "block"] = "embed"
    """The module that the summand is of, or a part of."""
    index: int | None = None
    """The number of the head, neuron or expert."""
    name: str = ""
    """Such as `L3.H5`; unique in one attribution."""


def tolerance(dtype: torch.dtype) -> float:
    """The share of an activation's norm below which a difference is rounding of the model's dtype."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


@dataclass
class WrittenParts:
    """What one site's module writes along a vector, whole and in parts, in each pass while it is watched."""

    site_map: SiteMap
    site: Site
    """`attn_out` or `mlp_out` of a layer."""
    r: Float[Tensor, " d_model"]
    tolerance: float
    neurons: bool = False
    """Whether an MLP is split by the columns of its writing weight."""
    terms: list[Term] = field(default_factory=list)
    reason: str = ""
    """Why there are no parts; empty where there are some."""
    _parts: Tensor | None = None
    _rest: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        gain, *others = self.site_map.post_norm_gains(self.site.projection)
        self._one_projection = not others
        self._gain = torch.ones_like(self.r) if gain is None or others else gain
        self._through = self.r * self._gain
        self._modules = self.site_map.writing_modules(self.site)

    @property
    def module(self) -> Literal["attn", "mlp"]:
        """The module's word in names of terms."""
        return "attn" if self.site.point == "attn_out" else "mlp"

    @property
    def whole(self) -> Term:
        """The module as one summand."""
        return Term(self.module, self.site.layer, self.module, None, self.prefix + self.module)

    @property
    def prefix(self) -> str:
        """The layer in names of terms."""
        return f"L{self.site.layer}."

    def captures(self) -> dict[Site, Capture]:
        """What to read of a pass: what the site adds along r, and the sizes before and after the norm."""
        reads: dict[Site, Capture] = {self.site: _along(self.r)}
        before = self.site.projection
        if (
            self._one_projection
            and self.site_map.has(before)
            and self.site_map.hook_point(before) is not self.site_map.hook_point(self.site)
        ):
            reads[before] = _along(self._through, self._gain)
        return reads

    def watch(self, d_model: int) -> list[Any]:
        """Hooks that compute the parts; their handles. None where the module has no parts of a known kind."""
        if len(self._modules) > 1:
            return self._watch_branches()
        return self._watch_heads() if self.module == "attn" else self._watch_mlp(d_model)

    def _watch_branches(self) -> list[Any]:
        found: dict[int, Tensor] = {}
        names = [type(module.output).__name__ for module in self._modules]

        def hook_of(i: int, scale: float) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                x = stream_of(output)
                assert x is not None
                found[i] = scale * (to_float64(x) @ self.r.to(to_float64(x)))
                if len(found) == len(names):
                    flat = [found[j].flatten() for j in range(len(names))]
                    self._parts = torch.stack(flat, -1).cpu()

            return hook

        self.terms = [
            Term(
                "branch", self.site.layer, self.module, i, f"{self.prefix}{self.module}.{i}.{name}"
            )
            for i, name in enumerate(names)
        ]
        return [
            module.output.register_forward_hook(hook_of(i, module.scale))
            for i, module in enumerate(self._modules)
        ]

    def _watch_heads(self) -> list[Any]:
        size = self.site_map.head_sizes[self.site.layer]
        if size is None:
            self.reason = "no attention that keeps values of each token"
            return []
        return self._watch_columns("head", "H", size)

    def _watch_columns(self, kind: Kind, letter: str, size: int) -> list[Any]:
        """Parts by groups of `size` columns of the one weight that writes."""
        projection = self.site_map.projection(self.site)
        if projection is None or projection[1].ndim != 2 or projection[1].shape[1] % size:
            self.reason = f"its output is not one matrix of {kind}s"
            return []
        point, weight = projection
        read = to_float64(weight).T @ self._through.to(to_float64(weight))

        def hook(module: nn.Module, args: Any, z: Tensor) -> None:
            wide = to_float64(z).reshape(-1, weight.shape[1])
            self._parts = (wide * read.to(wide)).unflatten(-1, (-1, size)).sum(-1).cpu()

        self.terms = [
            Term(kind, self.site.layer, self.module, i, f"{self.prefix}{letter}{i}")
            for i in range(weight.shape[1] // size)
        ]
        return [point.register_forward_hook(hook)]

    def _watch_mlp(self, d_model: int) -> list[Any]:
        """Parts by experts where there are some, else by neurons if they are asked for."""
        handles = self._watch_experts(d_model)
        if not self.neurons or handles or self.reason:
            return handles
        return self._watch_columns("neuron", "N", 1)

    def _watch_experts(self, d_model: int) -> list[Any]:
        if len(self._modules) != 1:
            return []
        module, layouts = self._modules[0].projection, self._modules[0].layouts
        groups = expert_groups(dict(module.named_parameters()), layouts)
        if len(groups) < 2:
            return []
        if packed_modules(module):
            self.reason = "its experts are quantized"
            return []
        if len(groups) > d_model:
            self.reason = f"{len(groups)} experts, and d_model is {d_model}"
            return []
        replaced = one_column_a_group(
            dict(module.named_parameters()), layouts, groups, self._through
        )
        holder = _WithoutHooks(module)

        def hook(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            again = torch.func.functional_call(
                holder, {f"inner.{name}": value for name, value in replaced.items()}, args, kwargs
            )
            columns = stream_of(again)
            assert columns is not None
            self._parts = to_float64(columns).flatten(0, -2)[:, : len(groups)].cpu()

        self.terms = [
            Term(
                "expert",
                self.site.layer,
                "mlp",
                None if name else e,
                f"{self.prefix}{name or f'E{e}'}",
            )
            for e, name in enumerate(groups)
        ]
        return [module.register_forward_hook(hook, with_kwargs=True)]

    def take(
        self, captured: dict[Site, Tensor], batch: Batch
    ) -> Float[Tensor, "batch pos part"] | None:
        """The parts of the pass that has just run; None where there are none. What is left is the last one."""
        parts, self._parts = self._parts, None
        if self.terms and parts is None:
            self.terms, self.reason = (
                [],
                "the pass did not call the modules that its parts are read from",
            )
        if not self.terms or parts is None:
            return None
        wrote = captured[self.site]
        before = captured.get(self.site.projection, wrote)
        scale = wrote[..., 1] / before[..., 1].clamp(min=1e-300)
        if len(self._modules) > 1:
            scale = torch.ones_like(scale)
        shares = parts.reshape(*wrote.shape[:2], -1) * scale[..., None]
        rest = wrote[..., 0] - shares.sum(-1)
        real = batch.mask.bool().cpu()
        # what is left must be one bias, before the norm
        bias = (rest / scale.clamp(min=1e-300))[real]
        size = before[..., 1][real].max()
        self._rest.append((float(bias.min() / size), float(bias.max() / size)))
        return torch.cat([shares, rest[..., None]], -1)

    @property
    def bias_name(self) -> Term:
        """The summand that is left beside the parts."""
        return Term("bias", self.site.layer, self.module, None, f"{self.prefix}{self.module}.bias")

    def verdict(self) -> Literal["exact", "with bias", "whole"]:
        """Whether the parts are the module, or they and a constant, or something else was left in some pass."""
        if not self.terms or not self._rest:
            return "whole"
        low, high = min(low for low, _ in self._rest), max(high for _, high in self._rest)
        if high - low > 2 * self.tolerance:
            self.terms, self.reason = (
                [],
                f"its parts leave up to {max(high, -low):.1%} of what it writes",
            )
            return "whole"
        return "with bias" if max(abs(low), abs(high)) > self.tolerance else "exact"


class _WithoutHooks(nn.Module):
    """Calls a module's own computation and none of the hooks on it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def _along(
    r: Float[Tensor, " d_model"], gain: Tensor | None = None
) -> Callable[[Tensor, Batch], Tensor]:
    """A reader of the projection on r, and of the norm (after a gain): [batch, pos, 2], float64 on the CPU."""

    def read(x: Tensor, batch: Batch) -> Tensor:
        wide = to_float64(x)
        along = wide @ r.to(wide)
        size = (wide if gain is None else wide * gain.to(wide)).norm(dim=-1)
        return torch.stack([along, size], -1).cpu()

    return read


def expert_groups(parameters: dict[str, Tensor], layouts: dict[str, Layout]) -> list[str]:
    """What writes in a module of experts: an empty name for each expert in order, then the names of others."""
    stacked = [parameters[n].shape[0] for n, lay in layouts.items() if lay.startswith("experts")]
    numbered = {int(m[1]) for n in layouts if (m := _EXPERT.search(n)) and m[1]}
    others = sorted({_owner(n) for n, lay in layouts.items() if not _is_of_expert(n, lay)})
    n_experts = max([*stacked, *(n + 1 for n in numbered)], default=0)
    return [""] * n_experts + others if n_experts else []


def _owner(name: str) -> str:
    return name.split(".")[0]


def _is_of_expert(name: str, layout: Layout) -> bool:
    return layout.startswith("experts") or bool(_EXPERT.search(name))


def one_column_a_group(
    parameters: dict[str, Tensor],
    layouts: dict[str, Layout],
    groups: list[str],
    r: Float[Tensor, " d_model"],
) -> dict[str, Tensor]:
    """Writing parameters with which a module's output has in its k-th column what group k writes along r.

    A module is linear in what writes its output, so that no column holds anything else.
    """
    n_experts = groups.count("")
    replaced: dict[str, Tensor] = {}
    for name, layout in layouts.items():
        weight = parameters[name]
        axis = {"linear": 0, "conv1d": 1, "bias": 0, "experts": 1, "experts_conv1d": 2}[layout]
        moved = to_float64(weight.detach()).movedim(axis, -1)
        along = moved @ r.to(moved)
        new = torch.zeros_like(moved)
        match = _EXPERT.search(name)
        if layout.startswith("experts") or (match and not match[1]):  # all experts in one tensor
            for e in range(n_experts):
                new[e, ..., e] = along[e]
        else:
            new[..., int(match[1]) if match else groups.index(_owner(name))] = along
        replaced[name] = new.movedim(-1, axis).to(weight)
    return replaced
