"""Proof: what a TransformerLens object is said to write to the stream with, held against what was measured.

Knows: measured anatomies, a backend's sites on fixed tokens, an architecture's entry. Does not know: TransformerLens' classes, plans.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.errors import ExportError
from interp_ablate.models.architectures import Architecture, text_config
from interp_ablate.models.backends.backend import Backend
from interp_ablate.models.backends.checks import fixed_tokens, plain_call
from interp_ablate.models.backends.foreign_hooks import foreign_hooks, is_point
from interp_ablate.models.backends.hf import WIDTH
from interp_ablate.models.measured_architecture import some_of
from interp_ablate.sites import EMBEDDING_POINTS, RESIDUAL_POINTS, Point, Site, sites_of

_POINTS: tuple[Point, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@contextmanager
def plain_modules(hf: Any) -> Iterator[None]:
    """Inside the block a model that a Bridge is built on has the modules that the checkpoint gave it."""
    bridged: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    waiting: list[nn.Module] = [hf]
    while waiting:
        module = waiting.pop()
        for name, part in module.named_children():
            own = part
            while (inner := own._modules.get("_original_component")) is not None:
                own = inner
            if own is not part:
                bridged.append((module, name, part, own))
            waiting.append(own)
    try:
        for module, name, _, own in bridged:
            module._modules[name] = own
        yield
    finally:
        for module, name, part, _ in bridged:
            module._modules[name] = part


class Proof:
    """That a model's writers are all that write: tried when it is first needed, and again once modules are others.

    Modules are others too if somebody hooks them (not: if hook points are).

    Args:
        root: holds all modules.
        fault: why they are not, from a measurement; empty if they are.
    """

    def __init__(self, root: nn.Module, fault: Callable[[], str]) -> None:
        self._root, self._measured = root, fault
        self._found: tuple[list[Any], str] | None = None

    def require(self) -> None:
        """Refuse writers that are not all.

        Raises:
            ExportError: it names what writes.
        """
        modules = [
            (id(m), type(m), *(n for _, n in foreign_hooks(m) if not is_point(m)))
            for m in self._root.modules()
        ]
        if self._found is None or self._found[0] != modules:
            self._found = modules, self._measured()
        if self._found[1]:
            raise ExportError(self._found[1])


def refusal(whose: str, faults: Sequence[str]) -> str:
    """Why the writers of a model are not exact, from the faults that were found; empty if there are none."""
    if not faults:
        return ""
    return (
        f"the sites of the {whose} are not all that writes to its residual stream: {some_of(faults)}. Plans run as "
        "hooks; backend='hf' edits what was measured"
    )


def unlike(entry: Architecture, measured: Architecture, names: Any, hf_config: Any) -> list[str]:
    """What was measured to write to a model's stream and its entry does not say, or says otherwise, in words."""
    n_layers, found = text_config(hf_config).num_hidden_layers, []
    for site in sorted({*entry.writer_sites(n_layers), *measured.writer_sites(n_layers)}):
        was, declared = (_written(each, site, names, hf_config) for each in (measured, entry))
        if was != declared:
            found.append(
                f"at {site} {_words(was)} was measured to write, and {_words(declared)} is declared"
            )
    if measured.scaled_embed and not entry.scaled_embed:
        found.append(f"{entry.embed} is scaled on its way to the stream")
    if measured.scales_stream and not entry.scales_stream:
        found.append("blocks multiply the whole stream by a factor")
    return found


def _written(entry: Architecture, site: Site, names: Any, hf_config: Any) -> Any:
    try:
        return entry.parts(site, names, hf_config)
    except ExportError:  # it has no such site
        return []


def _words(parts: Any) -> str:
    texts = [
        " + ".join(f"{name} [{layout}]" for name, layout in layouts.items())
        + "".join(f" behind {gain.name or 'a norm'}" for gain in gains)
        for gains, layouts in parts
    ]
    return "; ".join(texts) or "nothing"


def sums_that_fail(backend: Backend, embed_scales: Collection[float] = ()) -> list[str]:
    """Where the sites of a model do not add up to its residual stream on fixed tokens, in words.

    In each block resid_pre + attn_out + mlp_out must be resid_post, with resid_mid between where there is one, and
    resid_post must be what enters the next block. The word embedding times one of `embed_scales`, with the
    positions' where there is one, must be what enters the first.
    """
    faults = []
    totals: list[Tensor] = []
    for site, x in site_values(backend).items():
        # some blocks flatten batch and position, positions may have no batch; float64 is not on every device
        here = x.cpu().double().reshape(1, -1, x.shape[-1])
        if site.point == "embed":
            totals = [scale * here for scale in embed_scales]
        elif site.point not in RESIDUAL_POINTS:
            totals = [total + here for total in totals]
        else:
            limit = 16 * torch.finfo(x.dtype).eps * float(here.abs().max())
            beside = [total - here for total in totals]
            # NaN, as a spoiled weight makes it, is no fault of the sites
            if beside and all(float(each.abs().max()) > limit for each in beside):
                share = float(beside[0].norm() / here.norm())
                faults.append(f"{share:.2g} of {site} is nothing that the sites before it add")
            totals = [here]
    return faults


@torch.no_grad()
def site_values(backend: Backend) -> dict[Site, Tensor]:
    """The stream of fixed tokens, and what the sites of a model add to it, in the order of a pass."""
    cfg, device = backend.tl.cfg, next(backend.tl.parameters()).device
    tokens = fixed_tokens(cfg.d_vocab, min(WIDTH, cfg.n_ctx)).to(device)
    values: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, x: Tensor) -> None:
            values[site] = x.detach()

        return read

    sites = [*(Site(0, p) for p in EMBEDDING_POINTS), *sites_of(_POINTS, range(cfg.n_layers))]
    places = {site: place for site in sites if (place := backend.hook_point(site)) is not None}
    handles = [place.register_forward_hook(reader(site)) for site, place in places.items()]
    try:
        backend.forward(plain_call(tokens), 0)
    finally:
        for handle in handles:
            handle.remove()
    return {site: values[site] for site in sites if site in values}
