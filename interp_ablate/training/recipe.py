"""How a LoRA is trained: numbers, base model, extras.

Knows: the recipe. Does not know: data.
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, field, replace
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


# ---- what is trained, and how ---------------------------------------------------------------------


@dataclass(frozen=True)
class LoraRecipe:
    """The numbers of a training run.

    Rank 32, alpha 64 and rank-stabilized scaling are those of Chen et al. 2025
    (https://arxiv.org/abs/2507.21509), who train an epoch of some thousand samples at a learning rate of
    1e-5; the default rate is for the few steps that show an effect on a small model.

    Args:
        steps: optimizer steps; a step sees `batch_size` rows.
        rslora: the adapter's output is scaled by alpha / sqrt(rank), not alpha / rank (Kalajdzievski
            2023, https://arxiv.org/abs/2312.03732).
        max_length: tokens of a row; a longer answer is cut, a prompt that leaves no room is left out.
        save_every: steps between checkpoints from which a killed run goes on.

    Raises:
        RunError: a number that cannot be.
    """

    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 1e-4
    rank: int = 32
    alpha: int = 64
    rslora: bool = True
    max_length: int = 512
    seed: int = 0
    save_every: int = 20
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "alpha", "save_every"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)}: it is at least 1")
        if not (0 < self.learning_rate < 1):
            raise RunError(f"learning_rate={self.learning_rate}: accepted is above 0 and below 1")
        if self.max_length < 2:
            raise RunError(f"max_length={self.max_length}: a row has a prompt and an answer")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


RECIPE = LoraRecipe()


@dataclass(frozen=True, eq=False)
class TrainableModel:
    """What is trained: a Hugging Face model in memory, its tokenizer and where it came from."""

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
    """A model to train, on one device.

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
    """The packages `peft` and `trl`.

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
