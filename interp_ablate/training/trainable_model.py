"""The model that is trained, the modules of it that a LoRA adapts, and the packages that training needs.

Knows: how it is loaded onto one device and copied, module names. Does not know: data, or how it is trained.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from interp_ablate.errors import ExportError, RunError
from interp_ablate.models.architectures import architecture_of
from interp_ablate.models.load import from_hf, hf_from_name
from interp_ablate.models.loading import DEFAULTS as LOADING
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource, weights_fingerprint
from interp_ablate.sites import sites_of
from interp_ablate.training.recipe import LoraRecipe

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


Where = Literal["all", "readers"]


def linear_modules(hf: Any) -> list[str]:
    """Names of the linear layers of a decoder, its unembedding left out."""
    from transformers.pytorch_utils import Conv1D

    head = hf.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return [
        name for name, part in hf.named_modules() if isinstance(part, kinds) and part is not head
    ]


def writing_modules(hf: Any) -> set[str]:
    """Names of the modules that write to the residual stream, embeddings included.

    Raises:
        ExportError: an architecture without an entry.
    """
    entry, names = architecture_of(hf.config), set(hf.state_dict())
    sites = sites_of(entry.writer_points(), range(hf.config.num_hidden_layers))
    tensors = [name for site in sites for name in entry.writers(site, names, hf.config)]
    return {name.rpartition(".")[0] for name in tensors}


def lora_targets(hf: Any, where: Where = "all") -> list[str]:
    """Choose the modules for an adapter: "all" linear ones, or only the "readers" of the stream.

    Readers are what does not write to the stream itself (queries, keys, values, gate and up
    projections): with them, every weight that an ablation edited stays as it is, bit for bit.
    Short names (`q_proj`) where they mean just those modules, full names otherwise.

    Raises:
        ExportError: readers of an architecture without an entry; no linear layer to train.
    """
    if where not in get_args(Where):
        raise RunError(f"where={where!r}: accepted are {', '.join(get_args(Where))}")
    linear = linear_modules(hf)
    writers = writing_modules(hf) if where == "readers" else set()
    targets = [name for name in linear if name not in writers]
    if not targets:
        raise ExportError("no linear layer to train: the architecture has none that PEFT adapts")
    ends = {name.rpartition(".")[2] for name in targets}
    same = {n for n, _ in hf.named_modules() if n.rpartition(".")[2] in ends} == set(targets)
    return sorted(ends) if same else targets


def lora_config(hf: Any, recipe: LoraRecipe, *, where: Where = "all") -> Any:
    """PEFT's configuration of the adapter: no dropout, no bias.

    Raises:
        RunError: PEFT is missing.
        ExportError: see `lora_targets`.
    """
    from transformers.pytorch_utils import Conv1D

    peft, _ = require_extra()
    return peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=lora_targets(hf, where),
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in hf.modules()),
        task_type="CAUSAL_LM",
    )
