"""What a LoRA in training adapts: the linear layers of a decoder and its stacked experts, as they were measured.

Knows: which parameters write to the stream, PEFT's two ways to adapt a weight. Does not know: data, or how it is trained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from interp_ablate.errors import ExportError, ModelError, RunError
from interp_ablate.models.architectures import Layout, declared_architecture
from interp_ablate.models.backends.hf import measured_anatomy
from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.training.recipe import LoraRecipe
from interp_ablate.training.trainable_model import require_extra

Where = Literal["all", "readers"]
# In models with stacked experts PEFT takes modules of these names for the experts, whatever they are.
_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Mamba's kernels read `out_proj` past the module: PEFT refuses it in these.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class LoraTargets:
    """What an adapter is put on."""

    modules: tuple[str, ...]
    """Linear layers, by the modules' names."""
    parameters: tuple[str, ...] = ()
    """Parameters: those of all experts at once, and the linear layers that PEFT would take for experts."""
    left_out: tuple[str, ...] = ()
    """Linear layers that PEFT cannot adapt."""

    @property
    def weights(self) -> list[str]:
        """Every adapted parameter's name."""
        return sorted([*(f"{name}.weight" for name in self.modules), *self.parameters])


def in_words(weights: Iterable[str]) -> str:
    """Parameters by their names inside a block, with the number of each."""
    kinds = Counter(re.sub(r"^.*?\.\d+\.", "", n).removesuffix(".weight") for n in weights)
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def linear_modules(hf: Any) -> list[str]:
    """Names of the linear layers of a decoder, its unembedding and other towers left out.

    Routers that are linear layers with more outputs than one (Llama 4's) are none.
    """
    from transformers.pytorch_utils import Conv1D

    plain = (nn.Linear.forward, Conv1D.forward)
    head, decoder = unembedding_of(hf), hf
    if hasattr(hf, "get_decoder") and hf.config is not hf.config.get_text_config(decoder=True):
        decoder = hf.get_decoder()
    inside = {id(part) for part in decoder.modules()}
    return [
        name
        for name, part in hf.named_modules()
        if type(part).forward in plain and part is not head and id(part) in inside
    ]


def writing_parameters(hf: Any, *, all_of_them: bool = True) -> dict[str, Layout]:
    """Names of the parameters that write to the residual stream, embeddings included, with their layouts.

    The declared entry's, or those that were measured.

    Raises:
        ExportError: `all_of_them`, and something else writes there too.
        ModelError: nothing can be measured.
    """
    if entry := declared_architecture(hf.config.model_type):
        names, sites = set(hf.state_dict()), entry.writer_sites(hf.config.num_hidden_layers)
        return {n: lay for s in sites for n, lay in entry.writers(s, names, hf.config).items()}
    anatomy = measured_anatomy(hf)
    if all_of_them and anatomy.problems:
        raise ExportError(
            f"what writes to the residual stream of this {hf.config.model_type} model is not all known, so an "
            f"adapter cannot keep off it: {'; '.join(anatomy.problems[:3])}. Use --preserve-edit none"
        )
    writers: dict[str, Layout] = {
        name: "bias" if point == "embed_bias" else "embedding"
        for point, name in anatomy.embeddings.items()
    }
    for block in anatomy.blocks:
        for branch in (*block.attn, *block.mlp):
            writers |= branch.writers
    return writers


def lora_targets(hf: Any, where: Where = "all") -> LoraTargets:
    """Choose what an adapter is put on: "all" linear layers and experts, or only the "readers" of the stream.

    Readers are what does not write to the stream itself (queries, keys, values, gate and up
    projections): with them, every weight that an ablation edited stays as it is, bit for bit.

    Raises:
        ExportError: readers of a model whose writers are not all known; no linear layer to train.
    """
    if where not in get_args(Where):
        raise RunError(f"where={where!r}: accepted are {', '.join(get_args(Where))}")
    try:
        writers = writing_parameters(hf, all_of_them=where == "readers")
    except ModelError:  # several streams: no experts are known, and no readers
        if where == "readers":
            raise
        writers = {}
    experts = _stacked_experts(hf, writers)
    linear, kept_off = linear_modules(hf), writers if where == "readers" else {}
    chosen = [name for name in linear if f"{name}.weight" not in kept_off]
    mamba = hf.config.model_type in _MAMBA
    gone = [name for name in chosen if mamba and name.endswith(".out_proj")]
    chosen = [name for name in chosen if name not in gone]
    apart = [n for n in chosen if experts and n.rpartition(".")[2] in _TAKEN_FOR_EXPERTS]
    parameters = [f"{name}.weight" for name in apart]
    parameters += [name for name in experts if name not in kept_off]
    if not chosen and not parameters:
        raise ExportError("no linear layer to train: the architecture has none that PEFT adapts")
    modules = tuple(name for name in chosen if name not in apart)
    return LoraTargets(modules, tuple(sorted(parameters)), tuple(gone))


def _stacked_experts(hf: Any, writers: Mapping[str, Layout]) -> list[str]:
    """Parameters of all experts at once: the three-dimensional ones of the modules in which some write."""
    modules = {n.rpartition(".")[0] for n, lay in writers.items() if lay.startswith("experts")}
    return [
        name
        for name, parameter in hf.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[0] in modules
    ]


def lora_config(hf: Any, recipe: LoraRecipe, targets: LoraTargets) -> Any:
    """PEFT's configuration of the adapter: no dropout, no bias.

    Raises:
        RunError: PEFT is missing.
    """
    from transformers.pytorch_utils import Conv1D

    peft, _ = require_extra()
    ends = {name.rpartition(".")[2] for name in targets.modules}
    # short names (`q_proj`) where they mean just those modules, full names otherwise
    same = {n for n, _ in hf.named_modules() if n.rpartition(".")[2] in ends} == {*targets.modules}
    return peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ends) if same else list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in hf.modules()),
        task_type="CAUSAL_LM",
    )


def adapted_layers(peft_model: Any) -> dict[str, Any]:
    """PEFT's layers of an adapted model, by the name of the parameter that each adapts."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, part in peft_model.named_modules():
        if isinstance(part, LoraLayer):
            module = name.removeprefix("base_model.model.").replace(".base_layer", "")
            layers[f"{module}.{getattr(part, 'parameter_name', 'weight')}"] = part
    return layers
