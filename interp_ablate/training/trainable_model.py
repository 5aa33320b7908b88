"""The model that is trained, and the packages that training needs.

Knows: how it is loaded onto one device, and copied. Does not know: data, or how it is trained.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from interp_ablate.errors import RunError
from interp_ablate.models.load import from_hf, hf_from_name
from interp_ablate.models.loading import DEFAULTS as LOADING
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource, weights_fingerprint

INSTALL = "pip install 'interp-ablate[train]'"


@dataclass(frozen=True, eq=False)
class TrainableModel:
    """A Hugging Face model in memory that can be trained, its tokenizer and its source."""

    hf: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    source: ModelSource
    template: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def fingerprint(self) -> str:
        """sha256 over every weight's name, shape, dtype and bytes; computed anew each time."""
        return weights_fingerprint(self.hf.state_dict())

    @cached_property
    def model(self) -> Model:
        """The same weights with hook points, in place: what has been measured so is not trained any more."""
        return from_hf(self.hf, self.tokenizer, source=self.source, template=self.template)

    def copy(self) -> TrainableModel:
        """Weights of its own, to be trained while these stay as they are."""
        return replace(self, hf=copy.deepcopy(self.hf))


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = LOADING.dtype,
    device: str = LOADING.device,
    template: str | None = LOADING.template,
    trust_remote_code: bool = LOADING.trust_remote_code,
) -> TrainableModel:
    """Load a model to train, on one device.

    Raises:
        ModelError: as `load_model`.
        RunError: device "auto": layers over several GPUs are not trained here.
    """
    if device == "auto":
        raise RunError(
            "training runs on one device: give --device cpu or cuda. For several GPUs run the "
            "axolotl.yaml that `interp-ablate heal` writes"
        )
    hf, tokenizer, source = hf_from_name(
        name, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    return TrainableModel(hf, tokenizer, source, template)


def require_extra() -> tuple[Any, Any]:
    """Import the packages `peft` and `trl`.

    Raises:
        RunError: one of them is missing; how to install it.
    """
    # their version checks and first imports ask the hub for nothing, their trainers would
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import peft
        import trl
    except ImportError as error:
        raise RunError(f"training needs TRL and PEFT ({error}): {INSTALL}") from error
    return peft, trl
