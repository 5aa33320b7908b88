"""The table of export formats: each by name, from a loaded model or from a folder that is streamed.

A format is a file of this folder and a line in `FORMATS`. Another package registers an `ExportFormat` under the
entry-point group `interp_ablate.export_formats`.

Knows: which function writes each format, and what it needs. Does not know: flags, or how anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interp_ablate.errors import ExportError
from interp_ablate.storage.atomic_files import folder_made, temporary_folder
from interp_ablate.storage.entry_points import entry_named

if TYPE_CHECKING:
    from interp_ablate.edits.plan import Plan
    from interp_ablate.models.model import Model

GROUP = "interp_ablate.export_formats"
GGUF = b"GGUF"  # how such a file begins


@dataclass(frozen=True)
class ExportRequest:
    """A plan to write, and where; a format reads the fields that concern it."""

    plan: Plan | None
    out: Path
    load: Callable[[], Model]
    """Loads the model, for a format that needs one."""
    source: Path | None = None
    """Hugging Face folder to edit as a stream of tensors, without loading it."""
    tied: Any = "untie"
    report: dict[str, Any] | None = None
    """Test-split numbers for the card."""
    overwrite: bool = False
    gguf_dtype: Any = "f16"
    model_hint: str | None = None
    """Model type that a control vector is for; default: the model's."""


class ExportFormat(NamedTuple):
    """A format: the function that writes it and returns what the command prints, and its needs."""

    export: Callable[[ExportRequest], dict[str, Any]]
    default_out: str
    """Name of the result in a run folder."""
    needs_plan: bool = True
    adds: bool = False
    """True for a format that holds additions: it takes a run's addition plan, not its ablation."""
    begins: bytes | None = None
    """First bytes of the file that it writes, whose like may be replaced; None for a folder."""


def _check(plan: Plan | None) -> None:
    """Refuse a plan with an edit that only hooks can do, before anything is loaded."""
    from interp_ablate.weights.weight_form import require_weight_form

    if plan is not None:
        require_weight_form(plan)


def _checkpoint(request: ExportRequest) -> dict[str, Any]:
    from interp_ablate.edits.plan import Plan
    from interp_ablate.export.checkpoint import export_checkpoint, export_folder

    _check(request.plan)
    plan, source, out = request.plan or Plan(), request.source, request.out
    options: dict[str, Any] = {
        "tied": request.tied, "report": request.report, "overwrite": request.overwrite
    }  # fmt: skip
    if source is None:
        return export_checkpoint(request.load(), plan, out, **options)
    manifest = export_folder(source, plan, out, **options)
    counts = {key: len(manifest[key]) for key in ("edited", "added", "unchanged")}
    compared = f"no logits: interp-ablate verify {source} {out}"
    more = {"tied": manifest["tied"], "left_out": manifest["left_out"], "compared": compared}
    return {**counts, **more}


def _lora(request: ExportRequest) -> dict[str, Any]:
    from interp_ablate.edits.plan import Plan
    from interp_ablate.export.lora import export_lora

    _check(request.plan)
    return export_lora(
        request.load(), request.plan or Plan(), request.out, tied=request.tied,
        report=request.report, overwrite=request.overwrite,
    )  # fmt: skip


def _gguf(request: ExportRequest) -> dict[str, Any]:
    """One file from a folder as it is, or from a checkpoint that is written first and deleted after."""
    from interp_ablate.export.gguf import export_gguf

    _check(request.plan)
    if request.plan is None:
        if request.source is None:
            raise ExportError(
                "a model as GGUF needs a plan (a folder as it is needs none: --source)"
            )
        return _gguf_counts(
            export_gguf(
                request.source, request.out, dtype=request.gguf_dtype, overwrite=request.overwrite
            )
        )
    out = request.out.resolve()
    with folder_made(out.parent), temporary_folder(out.name, out.parent) as place:
        edited = Path(place) / "checkpoint"
        certificate = _checkpoint(replace(request, out=edited, overwrite=False))
        written = export_gguf(
            edited, request.out, dtype=request.gguf_dtype, overwrite=request.overwrite
        )
        return {"checkpoint": certificate, **_gguf_counts(written)}


def _gguf_counts(written: dict[str, Any]) -> dict[str, Any]:
    return {**written, "tensors": len(written["tensors"])}


def _control_vector(request: ExportRequest) -> dict[str, Any]:
    from interp_ablate.edits.plan import Plan
    from interp_ablate.export.control_vector import write_control_vector
    from interp_ablate.models.sources import read_hf_config

    _check(request.plan)
    config = read_hf_config(request.source) if request.source else request.load().hf_config
    return write_control_vector(
        request.plan or Plan(), request.out, model_hint=request.model_hint or config.model_type,
        n_layers=config.num_hidden_layers, d_model=config.hidden_size,
    )  # fmt: skip


FORMATS: dict[str, ExportFormat] = {
    "checkpoint": ExportFormat(_checkpoint, "export"),
    "lora": ExportFormat(_lora, "lora"),
    "gguf": ExportFormat(_gguf, "edited.gguf", needs_plan=False, begins=GGUF),
    "control-vector": ExportFormat(_control_vector, "control_vector.gguf", adds=True, begins=GGUF),
}


def format_named(name: str) -> ExportFormat:
    """The export format of this name, of this package or of another one.

    Raises:
        ExportError: no such name.
        InterpAblateError: the package that registers it fails to load.
    """
    return entry_named(name, FORMATS, GROUP, what="export format", error=ExportError)
