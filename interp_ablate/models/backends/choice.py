"""The backend that a Hugging Face model gets where none was asked for.

Knows: when a Bridge computes and writes what the checkpoint does. Does not know: how a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.anatomy import Anatomy
from interp_ablate.models.architectures import declared_architecture
from interp_ablate.models.backends.backend import Backend, ForwardCall
from interp_ablate.models.backends.bridge import BridgeBackend
from interp_ablate.models.backends.checks import fixed_tokens
from interp_ablate.models.backends.hf import WIDTH, HFBackend, measured_anatomy
from interp_ablate.models.measured_architecture import architecture_from
from interp_ablate.sites import Point, Site, sites_of

logger = logging.getLogger(__name__)


def chosen_backend(hf: Any, tokenizer: Any) -> Backend:
    """A Bridge where it gives the checkpoint's logits and its writers are all that write; else plain transformers.

    The architectures of the declared table are taken as they are. For any other, what writes to the stream
    is measured first, and the Bridge's own component map must say the same.

    Raises:
        ModelError: neither can run the model.
    """
    anatomy = None
    if declared_architecture(hf.config.model_type) is None:
        anatomy = measured_anatomy(hf)
    before = _fixed_logits(hf)
    try:
        with _undone_on_error(hf):
            bridge = BridgeBackend.from_hf(hf, tokenizer)
            if anatomy is not None and not _same_writers(bridge, anatomy):
                raise ModelError("its component map does not name what was measured to write")
            if anatomy is not None and not sites_add_up(bridge):
                raise ModelError("what its sites hold does not add up to the residual stream")
            return bridge
    except ModelError as error:
        if not torch.equal(_fixed_logits(hf), before):
            raise  # the Bridge has changed the model itself, which is not to be believed now
        logger.info("%s runs in plain transformers: %s", type(hf).__name__, error)
        return HFBackend(hf, anatomy)


@torch.no_grad()
def _fixed_logits(hf: Any) -> Tensor:
    """Logits of fixed tokens: without NaN, so that they can be compared."""
    weight = hf.get_input_embeddings().weight
    return hf(fixed_tokens(weight.shape[0], 8).to(weight.device)).logits.nan_to_num()


def _same_writers(bridge: BridgeBackend, anatomy: Anatomy) -> bool:
    """True if a Bridge names the very parameters that were measured to write."""
    names = bridge.hf_state_dict()
    try:
        entry, measured = bridge.architecture, architecture_from(anatomy, "", bridge.hf_config)
        sites = measured.writer_sites(len(anatomy.blocks))
        return not anatomy.embed_norms and all(
            set(entry.writers(site, names, bridge.hf_config))
            == set(measured.writers(site, names, bridge.hf_config))
            for site in sites
        )
    except ExportError:
        return False


def sites_add_up(backend: Backend) -> bool:
    """True if resid_pre + attn_out + mlp_out is resid_post in every block, with resid_mid between where there is one.

    Measured on fixed tokens. Every site must have the axes [batch, pos, d_model].
    """
    cfg, device = backend.tl.cfg, next(backend.tl.parameters()).device
    tokens = fixed_tokens(cfg.d_vocab, WIDTH).to(device)
    ones, positions = torch.ones_like(tokens), torch.arange(WIDTH, device=device)[None]
    points: tuple[Point, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    values: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, x: Tensor) -> None:
            values[site] = x.detach()

        return read

    handles = []
    for site in sites_of(points, range(cfg.n_layers)):
        place = backend.hook_point(site)
        if place is not None:
            handles.append(place.register_forward_hook(reader(site)))
    try:
        with torch.no_grad():
            backend.forward(ForwardCall(tokens, ones, positions, ones.sum(1)), 0)
    finally:
        for handle in handles:
            handle.remove()
    if any(x.shape != (1, WIDTH, cfg.d_model) for x in values.values()):
        return False
    for layer in range(cfg.n_layers):
        total: Tensor | None = None
        for point in points:
            x = values.get(Site(layer, point))
            if x is None:
                continue
            if total is None or point.endswith("_out"):
                total = x.double() if total is None else total + x.double()
                continue
            limit = 16 * torch.finfo(x.dtype).eps * float(x.abs().max())
            if float((total - x.double()).abs().max()) > limit:
                return False
    return True


@contextmanager
def _undone_on_error(hf: Any) -> Iterator[None]:
    """A Bridge replaces modules in place: put back what was there if the block raises."""
    owners: list[Any] = list(hf.modules())
    owners += {
        id(m.config): m.config
        for m in hf.modules()
        if isinstance(getattr(m, "config", None), PreTrainedConfig)
    }.values()
    before = [(owner, dict(vars(owner))) for owner in owners]
    # submodules, parameters, hooks: tables that are changed in place
    tables = [
        (table, dict(table)) for _, v in before for table in v.values() if isinstance(table, dict)
    ]
    try:
        yield
    except ModelError:
        for mapping, values in [*tables, *((vars(owner), values) for owner, values in before)]:
            mapping.clear()
            mapping.update(values)
        raise
