"""A source folder: its tensors (of quantized ones, the weights that they stand for), its config and its architecture.

Knows: which folders can be edited, and under which names. Does not know: how anything is measured, renamed or written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_ablate.models.architectures import Architecture, declared_architecture
from interp_ablate.models.checkpoint_names import (
    declared_in_files,
    in_checkpoint_names,
)
from interp_ablate.models.hf_classes import weights_in, without_data
from interp_ablate.models.model_files import QUANTIZATION, check_folder, read_config
from interp_ablate.models.sources import ModelSource, config_folder, read_hf_config
from interp_ablate.models.stand_in import measured_without_data
from interp_ablate.storage.dequantized_checkpoint import (
    PACKED,
    DequantizedCheckpoint,
    dequantized,
    method_of,
)
from interp_ablate.storage.safetensors_reader import Checkpoint
from interp_ablate.weights.plan_to_weights import WeightPlan


def opened(folder: str | Path) -> Checkpoint:
    """The tensors of a folder, as weights.

    Raises:
        ExportError: no safetensors, malformed files, or a quantization that cannot be undone exactly.
        ModelError: a config that cannot be read.
    """
    checkpoint = Checkpoint.open(folder)
    quantization = read_config(folder).get(QUANTIZATION) if _has_config(folder) else None
    if not quantization:
        return checkpoint
    if method_of(quantization) in PACKED:
        return weights_in(checkpoint.folder, read_hf_config(folder))
    return dequantized(checkpoint, quantization)


def _has_config(folder: str | Path) -> bool:
    return (
        Path(folder) / "config.json"
    ).is_file()  # what it lacks is said where the config is needed


def weights_config(folder: str | Path) -> Any:
    """The folder's config, as transformers reads it, of the weights that `opened` gives.

    Raises:
        ModelError: no config.json, or one that transformers does not understand.
    """
    config = read_hf_config(folder)
    if getattr(config, QUANTIZATION, None):
        delattr(config, QUANTIZATION)
    return config


def architecture_in(
    checkpoint: Checkpoint, hf_config: Any, measured: Architecture | None = None
) -> Architecture:
    """The architecture of a checkpoint, in the names of its tensors.

    Args:
        measured: that of the model in memory, where it is loaded; else a small stand-in is measured.

    Raises:
        ExportError: something writes to the stream that no edit of these tensors reaches.
        ModelError: a folder that is not of its config's model.
    """
    entry = measured or declared_architecture(hf_config.model_type)
    if entry is not None and not entry.discovered:
        return declared_in_files(entry, hf_config)
    if entry is None:
        check_folder(checkpoint.folder)  # no model is built of what is not checked
    hf = without_data(hf_config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return in_checkpoint_names(entry or measured_without_data(hf_config, hf), hf, shapes)


def as_written(checkpoint: Checkpoint, weights: WeightPlan) -> tuple[Checkpoint, WeightPlan]:
    """A checkpoint and its plan as an export has them: of FP8, what is not edited stays quantized.

    A list in the config (`modules_to_not_convert`) says which modules are not. Experts are quantized all or none, in
    both formats: where one tensor of theirs is edited, everything becomes bfloat16, and the config says so.
    """
    if not isinstance(checkpoint, DequantizedCheckpoint):
        return checkpoint, weights
    edited = [name for name in checkpoint.dequantized if name in weights.edits]
    if checkpoint.method != "fp8" or any(".experts." in name for name in edited):
        return checkpoint, replace(weights, config={**weights.config, QUANTIZATION: None})
    written = checkpoint.keeping([name for name in checkpoint.dequantized if name not in edited])
    about = read_config(checkpoint.folder)[QUANTIZATION]
    plain = [
        name.removesuffix(".weight")
        for name, info in written.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype.itemsize > 1
    ]
    plain += [name.removesuffix(".weight") for name in weights.added if name.endswith(".weight")]
    listed = [*(about.get("modules_to_not_convert") or ()), *plain]
    about = {**about, "modules_to_not_convert": list(dict.fromkeys(listed))}
    return written, replace(weights, config={**weights.config, QUANTIZATION: about})


def said_of_loaded(source: ModelSource, dtype: str) -> str | None:
    """What became of a quantized source whose model was written from memory, in a sentence; None for any other."""
    folder = config_folder(source)
    about = read_config(folder).get(QUANTIZATION) if folder and _has_config(folder) else None
    if not about:
        return None
    return f"The source is quantized ({method_of(about)}): its weights were dequantized, and written in {dtype}."


def said_of_quantization(checkpoint: Checkpoint) -> str | None:
    """What became of a quantized source, as `as_written` gives it, in one sentence; None for any other."""
    if not isinstance(checkpoint, DequantizedCheckpoint):
        return None
    n = len(checkpoint.dequantized)
    dtypes = {str(each.info.dtype) for each in checkpoint.dequantized.values()}
    to = " and ".join(sorted(each.removeprefix("torch.") for each in dtypes))
    kept = sum(
        info.dtype.itemsize == 1 and info.dtype.is_floating_point
        for info in checkpoint.tensors.values()
    )
    rest = (
        f"; {kept} that the plan leaves alone are quantized as before"
        if kept
        else ", which is all of them"
    )
    return f"The source is quantized ({checkpoint.method}): {n} of its tensors were written in {to}{rest}."
