"""Preflight: before anything is computed, whether the export at the end of the work can be made.

Knows: what an export needs of a source, a model and a place. Does not know: how it is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from interp_ablate.edits.kinds import Ablate
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.source_folder import opened, weights_config
from interp_ablate.models.architectures import declared_architecture, text_config
from interp_ablate.models.model import Model
from interp_ablate.models.model_files import check_folder
from interp_ablate.models.sources import ModelSource
from interp_ablate.sites import Site
from interp_ablate.storage.output_folder import check_output_path
from interp_ablate.storage.safetensors_reader import INDEX, SINGLE
from interp_ablate.weights.plan_to_weights import Tied, check_tie, weight_plan


def check_source_exports(source: ModelSource, out: str | Path, *, overwrite: bool = False) -> None:
    """Before a model is loaded: everything that its files and the place of the export already show.

    Raises:
        ExportError: tensors that write to the stream are missing, quantized or of a wrong shape; a source
            inside `out`; a place that cannot be written, or has too little room.
        ModelError: a config that cannot be read.
    """
    folder = Path(source.path or "")
    if source.kind != "folder" or not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        check_place(out, 0, source=source, overwrite=overwrite)
        return
    check_folder(folder)
    checkpoint, config = opened(folder), weights_config(folder)
    nbytes = sum(file.size for file in checkpoint.files)
    check_place(out, nbytes, source=source, overwrite=overwrite)
    entry = declared_architecture(config.model_type)
    if entry is None:  # its writers can be found in the loaded model alone
        return
    check_tie(entry, config, checkpoint.tensors, checkpoint.read)
    plan = _everywhere(entry.writer_sites(text_config(config).num_hidden_layers), config)
    weight_plan(
        plan, config, checkpoint.tensors, checkpoint.read, entry=entry, describe=checkpoint.describe
    )


def check_model_exports(
    model: Model,
    out: str | Path,
    *,
    plan: Plan | None = None,
    tied: Tied = "untie",
    overwrite: bool = False,
) -> None:
    """The rest, once the model is loaded: its plan (default: an ablation at every writer) has a weight form.

    Raises:
        ExportError: an architecture whose writers are not known, or no exact form of the plan; and what
            `check_source_exports` refuses.
    """
    if model.hf_config is None:
        raise ExportError(
            "the model was wrapped without its Hugging Face config: Model.wrap(..., hf_config=...)"
        )
    state = model.hf_state_dict()
    nbytes = sum(tensor.nbytes for tensor in state.values())
    check_place(out, nbytes, source=model.source, overwrite=overwrite)
    if plan is None:
        plan = _everywhere(model.writers, model.hf_config)
    weight_plan(
        plan, model.hf_config, state, state.__getitem__, tied=tied, entry=model.architecture
    )


def _everywhere(sites: Sequence[Site], hf_config: Any) -> Plan:
    """An ablation at every site that writes to the stream, of a direction that does not matter."""
    vector = torch.ones(text_config(hf_config).hidden_size, dtype=torch.float64)
    return Plan((Ablate(vector, tuple(sites), label="preflight"),))


def check_place(
    out: str | Path, nbytes: int, *, source: ModelSource, overwrite: bool = False
) -> None:
    """Refuse a place that is taken, cannot be written, or has less room than the weights take; nothing is left.

    Raises:
        ExportError: which of these, and what to do.
    """
    check_output_path(out, overwrite=overwrite, source=source.path)
    parent = Path(out).absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ExportError(
            f"cannot write {out}: {parent}: {error.strerror or error}. Choose another --out"
        ) from error
    if nbytes > free:
        raise ExportError(
            f"{out} takes {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {parent}: free space or "
            "choose another --out"
        )
