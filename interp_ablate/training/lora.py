"""The modules of a decoder that a LoRA adapts: all linear layers, or those that only read the stream.

Knows: module names. Does not know: training.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from interp_ablate.errors import ExportError, RunError
from interp_ablate.models.architectures import architecture_of
from interp_ablate.sites import sites_of
from interp_ablate.training.recipe import LoraRecipe
from interp_ablate.training.trainable_model import require_extra

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
