"""`verify`: an exported folder against the model it came from.

Knows: flags and what is printed. Does not know: how folders are compared.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from interp_ablate.cli.export import TIED
from interp_ablate.cli.options import ModelSettings, chosen_in_run, load
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Verify(ModelSettings):
    """What is compared with what."""

    paths: tuple[str, ...] = setting(
        help="A B; or an exported folder; or a run folder",
        positional=True,
        nargs="+",
        metavar="PATH",
    )
    plan: str | None = setting(None, "plan JSON (default: the one in B's manifest)")
    tied: Any = setting(None, "default: what B's manifest or tensors say", choices=TIED)
    tensors_only: bool = setting(False, "compare files; load no model, compare no logits")
    write: bool = setting(False, "keep a passed certificate in B, and say so on its card")


add = adding(Verify)


def run(args: Namespace) -> int:
    """Print the comparison; status 1 where it fails."""
    settings, folder, plan_path = _what_to_verify(args)
    from interp_ablate.edits.plan import Plan
    from interp_ablate.export.auditing import audit
    from interp_ablate.export.certification import certify, coarsest_dtype
    from interp_ablate.export.model_card import write_certificate
    from interp_ablate.models.model_files import check_folder
    from interp_ablate.storage.safetensors_reader import Checkpoint

    plan = Plan.load(plan_path)
    origin, model = _origin(settings)
    report = audit(origin, plan, folder, tied=settings.tied)
    result: dict[str, Any] = {
        "source": settings.model, "plan": str(plan_path), "tensors": report.to_dict(),
        "passed": report.passed,
    }  # fmt: skip
    if model is not None:
        check_folder(folder)
        certificate = certify(
            model,
            report.weights.plan,
            folder,
            stored_dtype=coarsest_dtype(Checkpoint.open(folder), report.weights),
            unembed_map=report.weights.unembed_map,
            asked=report.weights.asked,
        )
        result = {**certificate, **result, "passed": report.passed and certificate["passed"]}
        if settings.write and result["passed"]:
            write_certificate(folder, certificate)
    print(json_text(result))
    return 0 if result["passed"] else 1


def _origin(settings: Verify) -> tuple[Any, Any]:
    """What the folder is compared with, and the loaded model unless only tensors are compared."""
    from interp_ablate.export.auditing import AuditSource

    name = str(settings.model)
    is_folder = (Path(name) / "config.json").is_file()
    if settings.tensors_only:
        if not is_folder:
            raise RunError(f"--tensors-only compares two folders; {name} is none")
        return AuditSource.of_folder(name), None
    model = load(settings, name)
    if is_folder:
        return AuditSource.of_folder(name), model
    if model.source.kind == "hub":
        from huggingface_hub import snapshot_download

        return AuditSource.of_folder(snapshot_download(name, local_files_only=True)), model
    return AuditSource.of_model(model), model


def _what_to_verify(args: Namespace) -> tuple[Verify, Path, Path]:
    """The settings with the model that is compared with, the folder, and the file of its plan."""
    settings = settings_from(args, Verify)
    if len(settings.paths) > 2:
        raise RunError("verify takes A B, or one exported folder, or one run folder")
    folder = Path(settings.paths[-1])
    if len(settings.paths) == 2:
        if settings.model:
            raise RunError("--model says what B came from: give it, or A, not both")
        settings = replace(settings, model=settings.paths[0])
    elif (folder / "run.json").exists():
        stored, selected = chosen_in_run(str(folder))
        settings = settings_from(args, Verify, under={**stored, "plan": str(selected)})
        folder = folder / "export"
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} is not an exported checkpoint (no config.json)")
    manifest = folder / "interp_ablate.json"
    if settings.model is None:
        if not manifest.exists():
            raise RunError(
                f"{folder} has no interp_ablate.json that says what it came from: give A B"
            )
        settings = replace(settings, model=_source_of(manifest))
        if Path(str(settings.model)).resolve() == folder.resolve():
            raise RunError(f"{manifest} names {folder} itself as its source: give A B")
    if settings.plan is None and not manifest.exists():
        raise RunError(f"{folder} has no manifest with a plan: give --plan FILE")
    return settings, folder, Path(settings.plan) if settings.plan else manifest


def _source_of(manifest: Path) -> str:
    """What an export's manifest says it came from, as a name that loads."""
    from interp_ablate.models.sources import BUNDLED

    try:
        source = incoming_object(manifest, advice="give A B")["source"]
        name, path = source["name"], source["path"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{manifest} is not an export's manifest ({error!r}): give A B") from error
    return str(name if name in BUNDLED or not path else path)
