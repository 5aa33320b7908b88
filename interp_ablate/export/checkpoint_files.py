"""Files of a Hugging Face checkpoint: config, weights, tokenizer.

Knows: the names and contents of these files. Does not know: plans.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.export.older_transformers import config_for_both
from interp_ablate.export.side_files import copy_side_files, spell_tokenizer
from interp_ablate.models.architectures import Architecture, is_tied
from interp_ablate.models.checkpoint_names import NamesError, in_checkpoint_names
from interp_ablate.models.hf_classes import without_data
from interp_ablate.models.model import Model
from interp_ablate.models.model_files import QUANTIZATION, read_config
from interp_ablate.storage.safetensors_reader import INDEX
from interp_ablate.storage.strict_json import json_text
from interp_ablate.weights.plan_to_weights import WeightPlan

logger = logging.getLogger(__name__)

MAX_SHARD = "5GB"


def float_dtype_of(tensors: Iterable[Tensor]) -> str:
    """Name of the first floating tensor's dtype, such as "bfloat16"."""
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, value: Any) -> None:
    """JSON as every file of an export has it."""
    path.write_text(json_text(value, indent=1), encoding="utf-8")


def _write_config_file(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json as transformers reads it: some configs hold infinity (Falcon H1's `time_step_limit`)."""
    text = json.dumps(config_for_both(dict(config)), indent=1)
    (folder / "config.json").write_text(text, encoding="utf-8")


def untied_or_not(model: Model) -> dict[str, Tensor]:
    """The model's tensors; the unembedding only where it is not the embedding itself."""
    state = model.hf_state_dict()
    embed, unembed = model.architecture.embed, model.architecture.unembed
    if is_tied(model.hf_config) and unembed in state and torch.equal(state[embed], state[unembed]):
        del state[unembed]
    return state


def published(model: Model, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Architecture]:
    """A model's tensors, and its architecture, under the names and shapes of published checkpoints.

    Version 5 of transformers fuses the experts of a mixture in memory; files hold them one by one, as every
    version reads them. Where what writes to the stream is no tensor of its own in such files, all names are those in
    memory, which transformers reads as well.
    """
    from transformers.core_model_loading import revert_weight_conversion

    hf = without_data(model.hf_config)
    files = revert_weight_conversion(hf, dict(state))
    shapes = {name: tuple(tensor.shape) for name, tensor in files.items()}
    try:
        return files, in_checkpoint_names(model.architecture, hf, shapes)
    except NamesError as error:
        logger.info("the export has the names of tensors in memory: %s", error)
        return state, model.architecture


def write_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Safetensors in shards of at most `MAX_SHARD`, with an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if len({tensor.data_ptr() for tensor in plain.values() if tensor.numel()}) < len(plain):
        # an untied pair shares memory
        plain = {name: tensor.clone() for name, tensor in plain.items()}
    split = split_torch_state_dict_into_shards(
        plain, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({n: plain[n] for n in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def write_config(model: Model, state: dict[str, Tensor], weights: WeightPlan, folder: Path) -> None:
    """config.json of a model in memory, with the tie undone where lm_head has values of its own."""
    config = {"tie_word_embeddings": is_tied(model.hf_config), **model.hf_config.to_diff_dict()}
    config["dtype"] = float_dtype_of(state.values())
    config["architectures"] = _architectures(model)
    config["model_type"] = model.hf_config.model_type
    config.pop("quantization_config", None)
    if is_tied(model.hf_config) and model.architecture.unembed in state:
        config["tie_word_embeddings"] = False
    _write_config_file(folder, {**config, **weights.config})


def _architectures(model: Model) -> list[str]:
    if model.hf_config.architectures:
        return list(model.hf_config.architectures)
    return [type(without_data(model.hf_config)).__name__]


def write_side_files(model: Model, folder: Path, *, own: Collection[str] = ()) -> list[str]:
    """Tokenizer, chat template, generation config of a model in memory; returns what stays behind.

    Args:
        own: as for `copy_side_files`.
    """
    if model.source.kind == "folder":
        return copy_side_files(Path(model.source.path or ""), folder, own=own)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
        spell_tokenizer(folder)
    if (
        model.generation_config is not None
    ):  # its own `save_pretrained` refuses what loading accepts
        text = model.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return []


def write_source_files(
    source: Path, folder: Path, changes: dict[str, Any], *, own: Collection[str]
) -> list[str]:
    """The source folder's config with the changes, and its other files as they are; returns what stays behind."""
    config = {**read_config(source), **changes}
    if config.get(QUANTIZATION, "") is None:
        del config[QUANTIZATION]
    _write_config_file(folder, config)
    return copy_side_files(source, folder, own=own)
