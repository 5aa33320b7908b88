"""The architecture of a folder's tensors: declared, or measured and told in the folder's own names.

Knows: which of the two a model type has. Does not know: how anything is measured, renamed or edited.
"""

from __future__ import annotations

from typing import Any

from interp_ablate.models.architectures import Architecture, declared_architecture
from interp_ablate.models.checkpoint_names import in_checkpoint_names, without_data
from interp_ablate.models.model_files import check_folder
from interp_ablate.models.stand_in import measured_without_data
from interp_ablate.storage.safetensors_reader import Checkpoint


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
        return entry
    if entry is None:
        check_folder(checkpoint.folder)  # no model is built of what is not checked
    hf = without_data(hf_config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return in_checkpoint_names(entry or measured_without_data(hf_config, hf), hf, shapes)
