"""A plan as a Hugging Face folder that plain transformers loads: from a model in memory, or folder to folder.

Knows: where the source's tensors and side files are, and whole-or-nothing writing. Does not know: which tensors a
plan changes (`weights` does), bytes and shards (`storage` does), or how good the plan is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from interp_ablate import __version__
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.certification import PROBES, certify, coarsest_dtype, require_passed
from interp_ablate.export.checkpoint_files import (
    float_dtype_of,
    published,
    untied_or_not,
    write_config,
    write_side_files,
    write_source_files,
    write_weights,
)
from interp_ablate.export.model_card import CARD, CERTIFICATE, export_manifest, write_documents
from interp_ablate.export.older_transformers import note_on_4
from interp_ablate.export.source_folder import (
    architecture_in,
    as_written,
    opened,
    said_of_loaded,
    said_of_quantization,
    weights_config,
)
from interp_ablate.jobs.bars import waiting
from interp_ablate.models.architectures import Architecture
from interp_ablate.models.backends.hooked_to_hf import CONVERTIBLE
from interp_ablate.models.checkpoint_names import NamesError
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.model_files import check_loadable, read_config
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.sites import Site
from interp_ablate.storage.atomic_files import folder_made, remove_left_overs, temporary_folder
from interp_ablate.storage.dequantized_checkpoint import DequantizedCheckpoint
from interp_ablate.storage.dequantized_tensor import DequantizedTensor
from interp_ablate.storage.output_folder import (
    StreamedFolder,
    check_output_path,
    put_in_place,
    streamed_folder,
)
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.storage.safetensors_reader import INDEX, SINGLE, Checkpoint, TensorSource
from interp_ablate.storage.safetensors_writer import NewTensor, TensorEditor, copy_checkpoint
from interp_ablate.weights.plan_to_weights import (
    BLOCK,
    AddedTensor,
    TensorEdit,
    Tied,
    WeightPlan,
    check_tie,
    edited_blocks,
    edited_state_dict,
    edited_tensor,
    weight_plan,
)

_ROWS_AT_A_TIME = 16  # blocks of `weights` that are read from disk together


@contextmanager
def atomic_folder(
    out: str | Path, *, overwrite: bool = False, source: ModelSource | None = None
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, or disappears.

    Raises:
        ExportError: `out` exists (and overwrite is off, or it is no export), holds the source, or cannot
            be written.
    """
    out = Path(os.path.abspath(out))
    remove_left_overs(out.parent)
    check_output_path(out, overwrite=overwrite, source=source.path if source else None)
    try:
        with folder_made(out.parent), temporary_folder(out.name, out.parent) as place:
            yield Path(place)
            Path(place).chmod(0o755)
            put_in_place(Path(place), out)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"cannot write {out}: {reason}; nothing is left") from error


def export_into(model: Model, plan: Plan | None, place: Path) -> dict[str, Any]:
    """A certified checkpoint's files in a folder that is there and takes more of them; returns the certificate.

    The folder is one that `atomic_folder` gave: what belongs together is in its place at once.

    Raises:
        ExportError: see `export_checkpoint`.
    """
    inside = place / "checkpoint"
    certificate = export_checkpoint(model, plan, inside)
    for path in sorted(inside.iterdir()):
        os.replace(path, place / path.name)
    inside.rmdir()
    return certificate


@waiting("export")
def export_checkpoint(
    model: Model,
    plan: Plan | None,
    out: str | Path,
    *,
    tied: Tied = "untie",
    prompts: Sequence[PromptLike] = PROBES,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model under the plan as a Hugging Face folder, reload it, and certify it.

    Edited tensors keep the source's dtype (rounded once); all others are the same bytes. A model that
    came from a folder is streamed from that folder, shard by shard. Tokenizer, chat template and
    generation config come along; README.md is the model card, interp_ablate.json the manifest,
    certificate.json the comparison with the hooked model.

    Args:
        plan: None writes the model's weights as they are (of an edited HookedTransformer, say).
        tied: what becomes of a tied embedding that the plan edits; see `weight_plan`.
        report: the test-split numbers for the card (`selected.json`'s `test`).

    Returns the certificate.

    Raises:
        ExportError: no exact weight form, unknown architecture, a place that cannot be written, a
            certificate that fails. Nothing is left at `out` then.
    """
    check_model(model)
    if model.hf_config is None:
        raise ExportError(
            "the model was wrapped without its Hugging Face config: Model.wrap(..., hf_config=...)"
        )
    plan = plan or Plan()
    source = _opened(model.source) if len(plan) else None
    entry = None
    if source is not None:
        with suppress(NamesError):  # its folder cannot be streamed
            entry = architecture_in(source, model.hf_config, model.architecture)
    if source is not None and entry is not None:
        weights = _streamed_plan(source, plan, model.hf_config, tied, entry)
        _check_unchanged(model, source, entry)
        with streamed_folder(
            out, source=source, fingerprint=_fingerprint(weights), overwrite=overwrite
        ) as folder:
            written = _write_streamed(source, weights, folder)
            return _certified(model, weights, written, folder.path, prompts, report)
    state, entry = published(model, untied_or_not(model))
    weights = weight_plan(plan, model.hf_config, state, state.__getitem__, tied=tied, entry=entry)
    state, _ = edited_state_dict(state, weights)
    with atomic_folder(out, overwrite=overwrite, source=model.source) as place:
        write_weights(state, place)
        write_config(model, state, weights, place)
        left_out = write_side_files(model, place, own=_own_files(_opened(model.source)))
        dtype = float_dtype_of(state.values())
        said = said_of_loaded(model.source, dtype)
        written = Written(tuple(state), dtype, left_out, said)
        return _certified(model, weights, written, place, prompts, report)


@dataclass(frozen=True)
class Written:
    """The content of an export's weight files."""

    names: tuple[str, ...]
    dtype: str
    """Dtype of the floating tensors; the certificate's limits follow it."""
    left_out: Sequence[str] = ()
    """Files of the source that nothing here edits or checks, and that therefore stay behind."""
    dequantized: str | None = None
    """What became of a quantized source."""


def _certified(
    model: Model,
    weights: WeightPlan,
    written: Written,
    folder: Path,
    prompts: Sequence[PromptLike],
    report: dict[str, Any] | None,
) -> dict[str, Any]:
    """Compare what was written with the hooked model; write certificate, card and manifest, or raise."""
    certificate = certify(
        model, weights.plan, folder, prompts=prompts, stored_dtype=written.dtype,
        unembed_map=weights.unembed_map, asked=weights.asked,
    )  # fmt: skip
    require_passed(certificate, "export")
    certificate |= _said(written)
    manifest = _manifest(
        model.source,
        weights,
        written,
        folder,
        report,
        backend=model.backend,
        chat_format=model.chat_format.to_dict(),
    )
    return write_documents(folder, manifest, certificate)


def _manifest(
    source: ModelSource,
    weights: WeightPlan,
    written: Written,
    folder: Path,
    report: Any,
    **more: Any,
) -> dict[str, Any]:
    config = read_config(folder)
    return export_manifest(
        "checkpoint", source, weights, written.names, written.dtype, report,
        untied=weights.tied == "untie", config_changed=weights.config, added=[*weights.added],
        left_out=[*written.left_out], dequantized=written.dequantized, transformers_4=note_on_4(config), **more,
    )  # fmt: skip


def _said(written: Written) -> dict[str, Any]:
    return {"dequantized": written.dequantized} if written.dequantized else {}


@waiting("export")
def export_folder(
    source: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    tied: Tied = "untie",
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Edit a local Hugging Face folder tensor by tensor; the model is never loaded.

    Shard layout, index, metadata, config, tokenizer and generation config are kept; tensors that the
    plan leaves alone are copied as bytes. Nothing is compared by logits: `verify` does that. Killed at
    any point it leaves no folder that looks finished; the same call again goes on.

    Returns the manifest.

    Raises:
        ExportError: no safetensors folder, an architecture that cannot be edited exactly, no exact weight
            form, a place that cannot be written.
    """
    checkpoint = opened(source)
    hf_config = weights_config(checkpoint.folder)
    entry = architecture_in(checkpoint, hf_config)
    weights = _streamed_plan(checkpoint, plan, hf_config, tied, entry)
    check_loadable(checkpoint.folder)
    origin = ModelSource(
        checkpoint.folder.resolve().name, "folder", str(checkpoint.folder.resolve())
    )
    with streamed_folder(
        out, source=checkpoint, fingerprint=_fingerprint(weights), overwrite=overwrite
    ) as folder:
        written = _write_streamed(checkpoint, weights, folder)
        manifest = _manifest(origin, weights, written, folder.path, report)
        certificate = {"compared": "no", "passed": None, "limits": {}, **_said(written)}
        write_documents(folder.path, manifest, certificate)
    return manifest


def _opened(source: ModelSource) -> Checkpoint | None:
    """The source's folder, if it has one with safetensors."""
    folder = Path(source.path or "")
    if source.kind != "folder" or not any((folder / n).is_file() for n in (INDEX, SINGLE)):
        return None
    return opened(folder)


def _own_files(source: Checkpoint | None) -> set[str]:
    """Names of a source folder's files that an export writes anew."""
    weights = [file.name for file in source.files] if source else []
    return {*weights, INDEX, "config.json", CARD, CERTIFICATE, MANIFEST}


def _streamed_plan(
    source: Checkpoint, plan: Plan, hf_config: Any, tied: Tied, entry: Architecture
) -> WeightPlan:
    check_tie(entry, hf_config, source.tensors, source.read)  # whatever the plan edits
    return weight_plan(
        plan,
        hf_config,
        source.tensors,
        source.read,
        tied=tied,
        entry=entry,
        describe=source.describe,
    )


def _check_unchanged(model: Model, source: Checkpoint, entry: Architecture) -> None:
    """Refuse a model in memory that is no longer what the folder, which gets streamed, holds."""
    if model.backend == "hooked" and model.hf_config.model_type not in CONVERTIBLE:
        return
    state, _ = published(model, model.hf_state_dict())
    embed = [*entry.writers(Site(0, "embed"), source.tensors, model.hf_config)]
    for name in source.tensors:
        if name not in state or name in embed[1:]:
            continue
        # rows of an embedding in several tensors are compared together: transformers divides them anew
        parts = embed if name in embed else [name]
        stored, value = (_rows([*map(read, parts)]) for read in (source.read, state.__getitem__))
        if isinstance(source, DequantizedCheckpoint) and name in source.dequantized:
            value = value.to(stored.dtype)  # transformers dequantizes to the model's dtype
        if not _same(stored.to(value), value):
            raise ExportError(
                f"{name} in memory is not what {source.folder} holds: the model was edited since it was "
                "loaded. Write those weights first (export_checkpoint(model, None, out)) and export the "
                "plan from there"
            )


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """All rows of tensors; of one it is that tensor itself, and no copy."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _same(a: Tensor, b: Tensor) -> bool:
    """True for equal values; a NaN, as rows hold that nothing reads, is itself."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _fingerprint(weights: WeightPlan) -> str:
    text = json.dumps([weights.plan.to_dict(), weights.tied, weights.config, BLOCK, __version__])
    return hashlib.sha256(text.encode()).hexdigest()


def _write_streamed(source: Checkpoint, weights: WeightPlan, folder: StreamedFolder) -> Written:
    source, weights = as_written(source, weights)
    edits = {name: _edit(edit) for name, edit in weights.edits.items()}
    extra = [_new_tensor(source, name, added) for name, added in weights.added.items()]
    if isinstance(source, DequantizedCheckpoint):
        extra += [
            _dequantized(tensor, edits.pop(n, None)) for n, tensor in source.dequantized.items()
        ]
        without = [part for parts in source.parts.values() for part in parts]
        written = copy_checkpoint(source.stored, folder, edit=edits, extra=extra, without=without)
    else:
        written = copy_checkpoint(source, folder, edit=edits, extra=extra)
    left_out = write_source_files(
        source.folder, folder.path, weights.config, own=_own_files(source)
    )
    dtype = coarsest_dtype(source, weights)
    return Written(tuple(written.tensors), dtype, left_out, said_of_quantization(source))


def _dequantized(tensor: DequantizedTensor, edit: TensorEditor | None) -> NewTensor:
    """A tensor in place of those that stand for it, edited or not."""
    info = tensor.info

    def content() -> Iterable[Tensor]:
        return edit(tensor) if edit else (block for _, block in tensor.blocks())

    return NewTensor(info.name, info.dtype, info.shape, tensor.parts[0].info.name, content)


def _edit(edit: TensorEdit) -> TensorEditor:
    """The function that edits one tensor while it streams: the blocks that `edited_tensor` would make."""

    def change(source: TensorSource) -> Iterable[Tensor]:
        shape = source.info.shape
        if edit.layout in ("bias", "linear"):
            whole = source.read()
            if edit.layout == "bias":
                return iter((edited_tensor(whole, edit),))
            return edited_blocks(lambda a, b: whole[a:b], shape, edit)
        row = source.info.nbytes // max(1, shape[0])
        rows = 1 if edit.layout == "experts" else max(1, BLOCK // shape[1]) * _ROWS_AT_A_TIME
        blocks = (block for _, block in source.blocks(max_bytes=rows * row))
        return (edited_tensor(block, edit) for block in blocks)

    return change


def _new_tensor(source: Checkpoint, name: str, added: AddedTensor) -> NewTensor:
    beside = source.tensors[added.beside]
    if added.copy_of is not None:
        return NewTensor.copy_of(name, source.tensors[added.copy_of])
    bias = added.bias(beside.shape[0], beside.dtype)
    return NewTensor(name, beside.dtype, tuple(bias.shape), beside.name, lambda: (bias,))
