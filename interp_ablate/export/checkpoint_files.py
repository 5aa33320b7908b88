"""Files of a Hugging Face checkpoint: config, weights, tokenizer.

Knows: the names and contents of these files. Does not know: plans.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.export.model_card import CERTIFICATE
from interp_ablate.models.architectures import is_tied
from interp_ablate.models.model import Model
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.storage.safetensors_reader import INDEX
from interp_ablate.weights.plan_to_weights import WeightPlan

MAX_SHARD = "5GB"
TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several templates
# Files of a source folder that are weights, or that are written anew.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".onnx", ".h5")
_WRITTEN = ("config.json", "README.md", MANIFEST, CERTIFICATE)


def float_dtype_of(tensors: Iterable[Tensor]) -> str:
    """Name of the first floating tensor's dtype, such as "bfloat16"."""
    dtype = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, value: Any) -> None:
    """JSON as every file of an export has it."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


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
    config = model.hf_config.to_diff_dict()
    config["dtype"] = float_dtype_of(state.values())
    config["architectures"] = _architectures(model)
    config["model_type"] = model.hf_config.model_type
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    if is_tied(model.hf_config) and model.architecture.unembed in state:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", {**config, **weights.config})


def _architectures(model: Model) -> list[str]:
    from transformers import AutoModelForCausalLM

    if model.hf_config.architectures:
        return list(model.hf_config.architectures)
    with torch.device("meta"):
        return [type(AutoModelForCausalLM.from_config(model.hf_config)).__name__]


def write_side_files(model: Model, folder: Path) -> None:
    """Tokenizer, chat template, generation config of a model in memory."""
    if model.source.kind == "folder":
        _copy_side_files(Path(model.source.path or ""), folder)
        return
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def write_source_files(source: Path, folder: Path, changes: dict[str, Any]) -> None:
    """The source folder's config with the changes, and its other files as they are."""
    _copy_side_files(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, **changes})


def _copy_side_files(source: Path, folder: Path) -> None:
    """Copy the model's files beside its weights; hidden files (.env, .cache) are left out."""
    for file in source.iterdir():
        if file.name == TEMPLATES and file.is_dir():
            shutil.copytree(file, folder / TEMPLATES)
        ours = file.name in _WRITTEN or file.name.endswith(_NOT_COPIED) or file.name.startswith(".")
        if file.is_file() and not ours:
            shutil.copy2(file, folder / file.name)
