"""Sites on the modules of a plain Hugging Face decoder, by the anatomy that was measured of it.

Knows: which module's input or output is which site, how a branch's output becomes a site's activation and
back. Does not know: plans, tokens or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.models.anatomy import Anatomy, BlockAnatomy, Branch
from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.models.module_calls import stream_argument, stream_of, with_stream
from interp_ablate.sites import Point, Site


class SitePoint(nn.Module):
    """A place to hook: what enters it leaves it, as its hooks have changed it."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.part = 0
        """Which of several projections that write at the site is shown now."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def is_hooked(self) -> bool:
        """True if somebody reads or writes here."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)

    def __repr__(self) -> str:
        return f"SitePoint({self.site!r})"


class HFSites:
    """The hook points of one model. Its own hooks stay in the modules, and do nothing where no point is hooked."""

    def __init__(self, hf: Any, anatomy: Anatomy) -> None:
        self.points: dict[Site, SitePoint] = {}
        self.unembed_input = SitePoint("unembed.hook_in")
        self.inputs: dict[Site, SitePoint] = {}
        """The input of the one linear map that writes at a projection site, where there is one."""
        self._hf = hf
        self._output_point(hf.get_submodule(anatomy.embed), Site(0, "embed"))
        if anatomy.pos_embed:
            self._output_point(hf.get_submodule(anatomy.pos_embed), Site(0, "pos_embed"))
        if "embed_bias" in anatomy.embeddings:
            norm = hf.get_submodule(anatomy.embed_norms[0].path)
            _hook_bias(norm, self.point(0, "embed_bias"))
        head = unembedding_of(hf)
        if head is not None:
            _hook_input(head, self.unembed_input)
        for layer, block in enumerate(anatomy.blocks):
            _BlockSites(self, layer, block, hf.get_submodule(f"{anatomy.blocks_path}.{layer}"))

    @property
    def all_points(self) -> list[SitePoint]:
        """Every hook point, those without a site too."""
        return [*self.points.values(), *self.inputs.values(), self.unembed_input]

    def point(self, layer: int, point: Point) -> SitePoint:
        """A new hook point of a site."""
        site = Site(layer, point)
        self.points[site] = SitePoint(str(site))
        return self.points[site]

    def _output_point(self, module: nn.Module, site: Site) -> None:
        _hook_output(module, self.point(site.layer, site.point))

    def projection_points(
        self, layer: int, kind: Point, branches: tuple[Branch, ...], block: _BlockSites
    ) -> None:
        """The points of what a site's projections return and, where it is one linear map, reads."""
        parts = [part for branch in branches for part in branch.parts]
        if len(parts) > 1 and not any(part.norms for part in parts):
            return
        if len(parts) == 1 and not parts[0].norms and branches[0].scale == 1.0:
            out: Point = "attn_out" if kind == "attn_proj" else "mlp_out"
            self.points[Site(layer, kind)] = self.points[Site(layer, out)]  # one place, two names
        else:
            point = self.point(layer, kind)
            for i, part in enumerate(parts):
                _hook_output(self._hf.get_submodule(part.projection), point, block, i)
        if len(parts) > 1:
            return
        (branch,) = branches
        weights = [
            name for name, layout in branch.writers.items() if layout in ("linear", "conv1d")
        ]
        if len(weights) == 1 and set(branch.writers.values()) <= {"linear", "conv1d", "bias"}:
            owner = self._hf.get_submodule(weights[0].rpartition(".")[0])
            self.inputs[Site(layer, kind)] = SitePoint(f"{weights[0]} input")
            _hook_input(owner, self.inputs[Site(layer, kind)])

    def is_hooked(self, sites: Iterable[Site]) -> bool:
        """True if somebody reads or writes at one of the sites."""
        return any(self.points[site].is_hooked for site in sites if site in self.points)


class _BlockSites:
    """The sites of one block: what enters, what its branches add, what leaves."""

    def __init__(self, sites: HFSites, layer: int, block: BlockAnatomy, module: nn.Module) -> None:
        self._sites = sites
        self.pre, self.post = sites.point(layer, "resid_pre"), sites.point(layer, "resid_post")
        self.mid = sites.point(layer, "resid_mid") if block.attn and not block.parallel else None
        self.shape = torch.Size()
        """The axes of the stream in the present pass; some modules flatten batch and position."""
        self._entering: Tensor | None = None
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave)
        for out, projection, branches in (
            ("attn_out", "attn_proj", block.attn), ("mlp_out", "mlp_proj", block.mlp),
        ):  # fmt: skip
            if branches:
                _Sum(self, sites.point(layer, out), branches, block.chained)  # type: ignore[arg-type]
                sites.projection_points(layer, projection, branches, self)  # type: ignore[arg-type]

    def hook_branch(self, branch: Branch, hook: Callable[..., Any]) -> None:
        """Install a hook on the module of a branch."""
        self._sites._hf.get_submodule(branch.path).register_forward_hook(hook)

    def added_at_attn(self, point: SitePoint, attn_out: Tensor) -> None:
        """Show the stream between the sites, after what is written at attn_out (which holds what is written at mid)."""
        if self.mid is not None and self.mid.is_hooked and point.site.endswith("attn_out"):
            assert self._entering is not None
            self.mid(self._entering + attn_out)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        middle = self.mid is not None and self.mid.is_hooked
        key = stream_argument(args, kwargs)
        x = args[key] if isinstance(key, int) else kwargs[key]
        self.shape = x.shape
        if not self.pre.is_hooked and not middle:
            return None
        x = self.pre(x)
        self._entering = x if middle else None
        if isinstance(key, int):
            return (*args[:key], x, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: x}

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._entering = None
        if not self.post.is_hooked:
            return None
        x = stream_of(output)
        assert x is not None
        return with_stream(output, self.post(x))


class _Sum:
    """One site at which one or several branches add to the stream.

    The point sees their sum. Branches that do not read each other change once, when the last has its
    output; where one reads what another added, each changes when its own output is there, and the
    point sees the sum so far.
    """

    def __init__(
        self,
        block: _BlockSites,
        point: SitePoint,
        branches: tuple[Branch, ...],
        chained: tuple[str, ...],
    ) -> None:
        self._block, self._point, self._branches = block, point, branches
        self._chained = any(branch.path in chained for branch in branches)
        self._raw: Tensor | None = None
        self._edited: Tensor | None = None
        for i, branch in enumerate(branches):
            block.hook_branch(branch, self._hook(i, branch.scale))

    def _hook(self, i: int, scale: float) -> Callable[..., Any]:
        last = i == len(self._branches) - 1

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            middle = self._block.mid
            watched = middle is not None and middle.is_hooked
            if not self._point.is_hooked and not watched:
                return None
            x = stream_of(output)
            assert x is not None
            added = _scaled(x.reshape(self._block.shape), scale)
            raw = added if i == 0 else self._raw + added  # type: ignore[operator]
            before, self._raw = self._edited, raw
            if not last and not self._chained:
                self._edited = raw
                return None
            edited = self._point(raw)
            self._edited = edited
            if last:
                self._block.added_at_attn(self._point, edited)
                self._raw = self._edited = None
            if edited is raw:
                return None
            own = edited if i == 0 or before is None else edited - before
            return with_stream(output, _scaled(own, 1 / scale).reshape(x.shape))

        return hook


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def _hook_output(
    module: nn.Module, point: SitePoint, block: _BlockSites | None = None, part: int = 0
) -> None:
    """The point is what a module returns, with the axes of the block's stream."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = stream_of(output)
        if not point.is_hooked or x is None:
            return None
        # positions may come without a batch axis
        shape = block.shape if block else (1, *x.shape)[-3:]
        point.part = part
        return with_stream(output, point(x.reshape(shape)).reshape(x.shape))

    module.register_forward_hook(hook)


def _hook_bias(norm: nn.Module, point: SitePoint) -> None:
    """The point is what a norm's bias adds, at every position."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        bias = module.get_parameter("bias").expand_as(output)
        return output + (point(bias) - bias) if point.is_hooked else None

    norm.register_forward_hook(hook)


def _hook_input(module: nn.Module, point: SitePoint) -> None:
    """The point is what a module reads."""

    def hook(module: nn.Module, args: Any) -> Any:
        return (point(args[0]), *args[1:]) if point.is_hooked and args else None

    module.register_forward_pre_hook(hook)
