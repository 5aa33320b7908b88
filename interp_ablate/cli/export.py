"""`export`: a plan as an artefact that others load.

Knows: flags and what is printed. Does not know: formats, or how anything is compared.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import (
    PLAN,
    REPLACE,
    ModelSettings,
    check_new,
    chosen_in_run,
    load,
)
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.export.formats import FORMATS, ExportFormat, ExportRequest, format_named
from interp_ablate.settings import setting
from interp_ablate.storage.incoming_files import incoming_json, incoming_object
from interp_ablate.storage.strict_json import json_text

TIED = ("untie", "skip-embedding", "accept")


@dataclass(frozen=True)
class Export(ModelSettings):
    """What is exported, and where it goes."""

    run_folder: str | None = setting(None, "run folder: exports its chosen plan", positional=True)
    source: str | None = setting(
        None, "HF folder to edit as a stream of tensors, never loaded", metavar="DIR"
    )
    plan: str | None = setting(None, PLAN)
    format: str = setting(
        "checkpoint",
        f"{', '.join(FORMATS)}, or one that another package registers. A loaded model's checkpoint and a lora are "
        "compared with the hooked model by logits; a streamed checkpoint is not before `verify`; a gguf file and a "
        "control-vector are not",
    )
    tied: str = setting(
        "untie",
        "an edited embedding that is the unembedding too: write the old values as lm_head (untie), leave the "
        "embedding out of the plan (skip-embedding, whether tied or not), or accept that both change",
        choices=TIED,
    )
    gguf_dtype: str = setting("f16", "of a gguf file", choices=("f16", "f32"))
    model_hint: str | None = setting(
        None, "control vector: llama, qwen2, ... (default: the model's)"
    )
    out: str | None = setting(None, "folder, or .gguf file")
    force: bool = setting(False, REPLACE)


add = adding(Export)


def run(args: Namespace) -> int:
    """Write the artefact, and print what its certificate says."""
    settings, report = settings_from(args, Export), None
    chosen = format_named(settings.format)
    if settings.run_folder:
        stored, selected = chosen_in_run(settings.run_folder)
        report = incoming_object(selected).get("test")
        out = str(Path(settings.run_folder) / chosen.default_out)
        settings = settings_from(args, Export, under={**stored, "plan": str(selected), "out": out})
    if not settings.out or (chosen.needs_plan and not settings.plan):
        raise RunError("give a run folder; or --plan, --out and one of --model and --source")
    if settings.model and settings.source:
        raise RunError("--model is loaded, --source is streamed: give one of them")
    if not (settings.model or settings.source):
        raise RunError("no model: give --model (loaded and certified) or --source DIR (streamed)")
    begins = chosen.begins
    ours = None if begins is None else lambda beginning: beginning.startswith(begins)
    if settings.source:  # threads that spin while they wait for work take the core that writes
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, below
    check_new(settings.out, settings.force, ours=ours, source=settings.source)
    _check_before_loading(settings)
    request = ExportRequest(
        _plan(settings.plan, chosen) if settings.plan else None,
        Path(settings.out),
        lambda: load(settings, settings.model or settings.source),
        source=Path(settings.source) if settings.source else None,
        tied=settings.tied,
        report=report,
        overwrite=settings.force,
        gguf_dtype=settings.gguf_dtype,
        model_hint=settings.model_hint,
    )
    result = chosen.export(request)
    if settings.format == "checkpoint" and report is not None:
        _keep_run(settings)
    print(json_text({"out": settings.out, "format": settings.format, **result}))
    return 0


def _keep_run(settings: Export) -> None:
    """Say in the manifest which run the export comes from, where it is the plan that the run chose."""
    from interp_ablate.export.model_card import add_run
    from interp_ablate.runs.recipe import recipe_of

    chosen = Path(str(settings.run_folder)) / "selected.json"
    if settings.plan == str(chosen) and (recipe := recipe_of(chosen.parent)):
        add_run(str(settings.out), recipe)


def _check_before_loading(settings: Export) -> None:
    """What the source's files alone already refuse, for a checkpoint of a model that would be loaded first."""
    from interp_ablate.export.preflight import check_source_exports
    from interp_ablate.models.sources import resolve

    if settings.model and settings.format == "checkpoint":
        source = resolve(settings.model, settings.revision)
        check_source_exports(source, str(settings.out), overwrite=settings.force)


def _plan(path: str, chosen: ExportFormat) -> Any:
    """The plan of a file; for a format that adds, a run's addition in place of its ablation."""
    from interp_ablate.edits.plan import Plan

    if chosen.adds:
        data = incoming_json(path)
        if isinstance(data, dict) and data.get("addition_plan"):
            return Plan.from_dict(data["addition_plan"])
    return Plan.load(path)
