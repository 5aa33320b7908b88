"""Command line, artefacts: export, verify, import, models, push.

Knows: the flags of these commands and what they print. Does not know: formats, or how anything is
proven. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from interp_ablate.cli.budget import _budget_flags
from interp_ablate.cli.options import from_run, load, model_flags
from interp_ablate.cli.vectors import _import, _models
from interp_ablate.cli.verify import _verify
from interp_ablate.errors import RunError
from interp_ablate.export.formats import FORMATS, ExportFormat, ExportRequest, format_named

TIED = ("untie", "skip-embedding", "accept")


def add_commands(commands: Any) -> None:
    """export, verify, import, models, budget and push, with their flags."""
    _budget_flags(
        commands.add_parser("budget", help="memory and time of every stage, from a config alone")
    )
    _export_flags(commands.add_parser("export", help="write a plan as an artefact others load"))
    verify = commands.add_parser(
        "verify",
        help="is B really A with this plan and nothing else? Tensor by tensor, and by logits",
    )
    verify.add_argument(
        "paths", nargs="+", metavar="PATH", help="A B; or an exported folder; or a run folder"
    )
    model_flags(verify)
    verify.add_argument("--plan", help="plan JSON; default: the one in B's manifest")
    verify.add_argument("--tied", choices=TIED, help="default: what B's manifest or tensors say")
    verify.add_argument(
        "--tensors-only",
        action="store_true",
        help="compare files; load no model, compare no logits",
    )
    verify.add_argument(
        "--write",
        action="store_true",
        help="keep a passed certificate in B, and say so on its card",
    )
    verify.set_defaults(work=_verify)
    reading = commands.add_parser(
        "import", help="read someone else's vectors, write them as plain safetensors"
    )
    reading.add_argument("file", help="direction.pt, .npy, .safetensors, control vector .gguf")
    reading.add_argument("--site", help="where the vector lives, such as blocks.12.hook_resid_pre")
    reading.add_argument("--point", help="for files that name layers only, such as resid_post")
    reading.add_argument(
        "--position", help="token position, such as -1, where the file has several"
    )
    reading.add_argument("--out", required=True, help=".safetensors file to write")
    reading.add_argument("--force", action="store_true", help="replace an existing --out")
    reading.set_defaults(work=_import)
    models = commands.add_parser("models", help="which tensors write where, by architecture")
    models.add_argument("--json", action="store_true", help="one JSON object a line")
    models.set_defaults(work=_models)
    push = commands.add_parser("push", help="upload an exported folder to the Hugging Face hub")
    push.add_argument("folder", help="exported folder, with its certificate")
    push.add_argument("repo", help="owner/name")
    push.add_argument("--public", action="store_true", help="default: private")
    push.add_argument("--revision", help="branch to push to")
    push.add_argument("--message", help="commit message")
    push.add_argument("--force", action="store_true", help="even without a passed certificate")
    push.set_defaults(work=_push)


def _export_flags(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_folder", nargs="?", help="run folder: exports its chosen plan")
    model_flags(export)
    export.add_argument(
        "--source", metavar="DIR", help="HF folder to edit as a stream of tensors, never loaded"
    )
    export.add_argument("--plan", help="plan JSON (or selected.json)")
    export.add_argument(
        "--format", default="checkpoint",
        help=f"{', '.join(FORMATS)} (default checkpoint), or one that another package registers",
    )  # fmt: skip
    export.add_argument(
        "--tied", choices=TIED, default="untie",
        help="an edited embedding that is the unembedding too: write the old values as lm_head "
        "(untie), leave the embedding out of the plan, or accept that both change",
    )  # fmt: skip
    export.add_argument("--gguf-dtype", choices=("f16", "f32"), default="f16")
    export.add_argument(
        "--model-hint", help="control vector: llama, qwen2, ... (default: the model's)"
    )
    export.add_argument("--out", help="folder, or .gguf file")
    export.add_argument("--force", action="store_true", help="replace an existing --out")
    export.set_defaults(work=_export)


# ---- export ----------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    chosen, report = format_named(args.format), None
    if args.run_folder:
        selected_path = from_run(args, args.run_folder)
        report = json.loads(selected_path.read_text(encoding="utf-8"))["test"]
        args.out = args.out or str(Path(args.run_folder) / chosen.default_out)
        args.plan = args.plan or str(selected_path)
    if not args.out or (chosen.needs_plan and not args.plan):
        raise RunError("give a run folder; or --plan, --out and one of --model and --source")
    if args.model and args.source:
        raise RunError("--model is loaded, --source is streamed: give one of them")
    if not (args.model or args.source):
        raise RunError("no model: give --model (loaded and certified) or --source DIR (streamed)")
    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    request = ExportRequest(
        _plan(args.plan, chosen) if args.plan else None,
        Path(args.out),
        lambda: load(args, args.model or args.source),
        source=Path(args.source) if args.source else None,
        tied=args.tied,
        report=report,
        overwrite=args.force,
        gguf_dtype=args.gguf_dtype,
        model_hint=args.model_hint,
    )
    result = chosen.export(request)
    print(json.dumps({"out": str(args.out), "format": args.format, **result}))
    return 0


def _plan(path: str, chosen: ExportFormat) -> Any:
    """The plan of a file; for a format that adds, a run's addition in place of its ablation."""
    from interp_ablate.edits.plan import Plan

    if chosen.adds:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read a plan from {path}: {error}") from error
        if isinstance(data, dict) and data.get("addition_plan"):
            return Plan.from_dict(data["addition_plan"])
    return Plan.load(path)


def _push(args: argparse.Namespace) -> int:
    from interp_ablate.export.hub import push_to_hub

    url = push_to_hub(
        args.folder,
        args.repo,
        private=not args.public,
        revision=args.revision,
        commit_message=args.message,
        force=args.force,
    )
    print(url)
    return 0
