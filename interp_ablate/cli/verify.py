"""`verify`: an exported folder against the model it came from.

Knows: flags and what is printed. Does not know: how folders are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import from_run, load
from interp_ablate.errors import RunError

# ---- verify ----------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    folder, plan_path = _what_to_verify(args)
    from interp_ablate.edits.plan import Plan
    from interp_ablate.export.auditing import audit
    from interp_ablate.export.certification import certify, coarsest_dtype
    from interp_ablate.export.model_card import write_certificate
    from interp_ablate.storage.safetensors_reader import Checkpoint

    plan = Plan.load(plan_path)
    origin, model = _origin(args)
    found = audit(origin, plan, folder, tied=args.tied)
    result: dict[str, Any] = {
        "source": args.model, "plan": str(plan_path), "tensors": found.to_dict(),
        "passed": found.passed,
    }  # fmt: skip
    if model is not None:
        certificate = certify(
            model,
            found.weights.plan,
            folder,
            stored_dtype=coarsest_dtype(Checkpoint.open(folder), found.weights),
            unembed_map=found.weights.unembed_map,
        )
        result = {**certificate, **result, "passed": found.passed and certificate["passed"]}
        if args.write and result["passed"]:
            write_certificate(folder, certificate)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def _origin(args: argparse.Namespace) -> tuple[Any, Any]:
    """What the folder is compared with, and the loaded model unless only tensors are compared."""
    from interp_ablate.export.auditing import AuditSource

    is_folder = (Path(args.model) / "config.json").is_file()
    if args.tensors_only:
        if not is_folder:
            raise RunError(f"--tensors-only compares two folders; {args.model} is none")
        return AuditSource.of_folder(args.model), None
    model = load(args, args.model)
    if is_folder:
        return AuditSource.of_folder(args.model), model
    if model.source.kind == "hub":
        from huggingface_hub import snapshot_download

        return AuditSource.of_folder(snapshot_download(args.model, local_files_only=True)), model
    return AuditSource.of_model(model), model


def _what_to_verify(args: argparse.Namespace) -> tuple[Path, Path]:
    """The folder and its plan; sets args.model to what it is compared with."""
    if len(args.paths) > 2:
        raise RunError("verify takes A B, or one exported folder, or one run folder")
    folder = Path(args.paths[-1])
    plan = Path(args.plan) if args.plan else None
    if len(args.paths) == 2:
        if args.model:
            raise RunError("--model says what B came from: give it, or A, not both")
        args.model = args.paths[0]
    elif (folder / "run.json").exists():
        plan = plan or from_run(args, str(folder))
        folder = folder / "export"
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} is not an exported checkpoint (no config.json)")
    manifest = folder / "interp_ablate.json"
    if args.model is None:
        if not manifest.exists():
            raise RunError(
                f"{folder} has no interp_ablate.json that says what it came from: give A B"
            )
        args.model = _said_source(manifest)
        if Path(args.model).resolve() == folder.resolve():
            raise RunError(f"{manifest} names {folder} itself as its source: give A B")
    if plan is None and not manifest.exists():
        raise RunError(f"{folder} has no manifest with a plan: give --plan FILE")
    return folder, plan or manifest


def _said_source(manifest: Path) -> str:
    """What an export's manifest says it came from, as a name that loads."""
    from interp_ablate.models.sources import BUNDLED

    try:
        source = json.loads(manifest.read_text(encoding="utf-8"))["source"]
        name, path = source["name"], source["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{manifest} is not an export's manifest ({error!r}): give A B") from error
    return str(name if name in BUNDLED or not path else path)
