"""The backend that a Hugging Face model gets where none was asked for.

Knows: when a Bridge computes and writes what the checkpoint does. Does not know: how a model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.architectures import declared_architecture
from interp_ablate.models.backends.backend import Backend
from interp_ablate.models.backends.bridge import BridgeBackend
from interp_ablate.models.backends.checks import fixed_tokens
from interp_ablate.models.backends.hf import HFBackend, measured_anatomy
from interp_ablate.models.backends.proof import site_values, sums_that_fail
from interp_ablate.models.quantized_modules import packed_modules
from interp_ablate.sites import EMBEDDING_POINTS

logger = logging.getLogger(__name__)


def chosen_backend(hf: Any, tokenizer: Any) -> Backend:
    """A Bridge where it gives the checkpoint's logits and its writers are all that write; else plain transformers.

    Its sites must add up to the residual stream. Where no architecture is declared, what writes to the stream is
    measured first, and the Bridge's own component map must say the same; else it is measured when it is needed.

    Raises:
        ModelError: neither can run the model.
    """
    if packed_modules(hf):
        logger.info("%s runs in plain transformers: its weights are quantized", type(hf).__name__)
        return HFBackend(hf)
    anatomy = None
    if declared_architecture(hf.config.model_type) is None:
        anatomy = measured_anatomy(hf)
    before = _fixed_logits(hf)
    try:
        with _undone_on_error(hf):
            bridge = BridgeBackend.from_hf(hf, tokenizer)
            if anatomy is None:
                faults = sums_that_fail(bridge)
            else:
                bridge.anatomy, faults = anatomy, _faults_of_undeclared(bridge)
            if faults:
                raise ModelError("; ".join(faults))
            return bridge
    except ModelError as error:
        if not torch.equal(_fixed_logits(hf), before):
            raise  # the Bridge has changed the model itself, which is not to be believed now
        logger.info("%s runs in plain transformers: %s", type(hf).__name__, error)
        return HFBackend(hf, anatomy)


def _faults_of_undeclared(bridge: BridgeBackend) -> list[str]:
    """Why a Bridge is not taken on a model of no declared architecture."""
    try:
        bridge.architecture  # noqa: B018 - it raises
    except ExportError as error:
        return [str(error)]
    values = site_values(bridge).items()
    return [
        f"{site} has axes {tuple(x.shape)}"
        for site, x in values
        if x.ndim != 3 and site.point not in EMBEDDING_POINTS
    ]


@torch.no_grad()
def _fixed_logits(hf: Any) -> Tensor:
    """Logits of fixed tokens: without NaN, so that they can be compared."""
    weight = hf.get_input_embeddings().weight
    return hf(fixed_tokens(weight.shape[0], 8).to(weight.device)).logits.nan_to_num()


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
