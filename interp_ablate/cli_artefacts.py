"""Command line, artefacts: export, verify, import, models, push.

Knows: the flags of these commands and what they print. Does not know: formats, or how anything is
proven. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError

FORMATS = ("checkpoint", "lora", "gguf", "control-vector")
REPLIES = "replies.jsonl"  # what a judge answered
TIED = ("untie", "skip-embedding", "accept")


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is loaded."""
    parser.add_argument(
        "--model", help="bundled alias (smollm2), HF folder, .gguf file or hub name"
    )
    loading_flags(parser)


def loading_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument("--backend", choices=("bridge", "hooked"), help="TransformerLens class")
    parser.add_argument("--dtype", help="float32 (default), bfloat16, float16, float64")
    parser.add_argument("--device", help="cpu (default), cuda, mps, auto (all GPUs)")
    parser.add_argument("--template", help="Jinja chat template text, or 'none' for raw text")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that a model folder brings",
    )


def flags_given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags that were given, under their own names."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def trait_scorer(spec: str | None, trait: Any, folder: Path) -> Any:
    """The scorer of --scorer, or the trait's own; a judge keeps its replies in the folder.

    Raises:
        RunError: neither is there.
    """
    from interp_ablate.judges import scorer_of

    if not (spec or trait.scorer):
        raise RunError(
            f"the trait {trait.name!r} names no offline scorer: give --scorer, such as "
            "judge:MODEL@http://HOST/v1 (its rubric is the trait's) or classifier:FOLDER"
        )
    return scorer_of(spec or trait.scorer, rubric=trait.rubric, cache=folder / REPLIES)


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
    export.add_argument("--format", choices=FORMATS, default="checkpoint")
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


def _budget_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="HF folder, config.json, .gguf file, alias or hub name")
    for name, text in (
        ("prompts", "a side, collected"),
        ("scored", "a side, in a trial"),
        ("fitted", "rows of each kind in a gradient step"),
        ("tokens", "of a prompt"),
        ("prefix", "of them shared by all prompts"),
        ("new-tokens", "of an answer"),
        ("rows", "a forward batch"),
        ("decoded-rows", "a decoding batch"),
        ("devices", "GPUs"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    for name, text in (
        ("flops", "a second and device"),
        ("bandwidth", "bytes of memory a second and device"),
        ("memory", "bytes a device"),
        ("disk", "bytes a second"),
    ):
        parser.add_argument(f"--{name}", type=float, help=text)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(work=_budget)


def _budget(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from interp_ablate.budget import Machine, Workload, as_text, budget, config_at
    from interp_ablate.sources import torch_dtype

    def given(kind: type) -> dict[str, Any]:
        names = [field.name for field in fields(kind)]
        values = {name: getattr(args, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    work = Workload(**{**given(Workload), "dtype_bytes": torch_dtype(args.dtype).itemsize})
    table = budget(config_at(args.config), work, Machine(**given(Machine)))
    print(table.to_json(orient="records") if args.json else as_text(table))
    return 0


def load(args: argparse.Namespace, name: str | None) -> Any:
    """The model that the flags describe."""
    from interp_ablate.model import load_model

    if not name:
        raise RunError(
            "no model: give --model (a bundled alias such as smollm2, a folder, a hub name)"
        )
    return load_model(
        name,
        backend=args.backend or "bridge",
        dtype=args.dtype or "float32",
        device=args.device or "cpu",
        template=args.template,
        trust_remote_code=args.trust_remote_code,
    )


def rubric_of(given: str | None) -> str | None:
    """The text that a --rubric gives: itself where it has several words, else what is in that file (@FILE).

    Raises:
        RunError: a file that cannot be read.
    """
    if given is None:
        return None
    name = given.removeprefix("@")
    if name == given and len(given.split()) > 1 and not os.path.isfile(given):
        return given
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot read the rubric {name}: {why}. Give a file, or a text of several words"
        ) from error


def from_run(args: argparse.Namespace, folder: str) -> Any:
    """Fill model flags that were not given from a run folder; returns its path to the chosen plan."""
    from interp_ablate.pipeline import read_run

    saved = read_run(folder)
    if saved is None:
        raise RunError(f"{folder} holds no run.json: it is not a run folder")
    for key in ("model", "backend", "dtype", "device", "template"):
        if getattr(args, key) is None:
            setattr(args, key, saved["configuration"].get(key))
    selected = Path(folder) / "selected.json"
    if not selected.exists():
        raise RunError(
            f"{folder} has no chosen plan yet: run `interp-ablate run --out {folder}` to the end"
        )
    if json.loads(selected.read_text())["plan"] is None:
        raise RunError(f"no candidate passed the limits in {folder}: see its report.html")
    return selected


# ---- export ----------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    report, plan = None, None
    if args.run_folder:
        selected_path = from_run(args, args.run_folder)
        report = json.loads(selected_path.read_text())["test"]
        args.out = args.out or _default_out(args)
        args.plan = args.plan or str(selected_path)
    if not args.out or not (args.plan or args.format == "gguf"):
        raise RunError("give a run folder; or --plan, --out and one of --model and --source")
    if args.model and args.source:
        raise RunError("--model is loaded, --source is streamed: give one of them")
    if not (args.model or args.source):
        raise RunError("no model: give --model (loaded and certified) or --source DIR (streamed)")
    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    if args.plan:
        plan = _plan(args)
    work = {
        "checkpoint": _export_checkpoint,
        "lora": _export_lora,
        "gguf": _export_gguf,
        "control-vector": _export_control_vector,
    }
    result = work[args.format](args, plan, report)
    print(json.dumps({"out": str(args.out), "format": args.format, **result}))
    return 0


def _default_out(args: argparse.Namespace) -> str:
    names = {"checkpoint": "export", "lora": "lora", "gguf": "edited.gguf"}
    return str(Path(args.run_folder) / names.get(args.format, "control_vector.gguf"))


def _plan(args: argparse.Namespace) -> Any:
    """The plan of --plan; for a control vector, a run's addition instead of its ablation."""
    from interp_ablate.edits import Plan

    if args.format == "control-vector":
        try:
            data = json.loads(Path(args.plan).read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read a plan from {args.plan}: {error}") from error
        if isinstance(data, dict) and data.get("addition_plan"):
            return Plan.from_dict(data["addition_plan"])
    return Plan.load(args.plan)


def _export_checkpoint(args: argparse.Namespace, plan: Any, report: Any) -> dict[str, Any]:
    from interp_ablate.export.checkpoint import export_checkpoint, export_folder

    options = {"tied": args.tied, "report": report, "overwrite": args.force}
    if args.source:
        manifest = export_folder(args.source, plan, args.out, **options)
        counts = {key: len(manifest[key]) for key in ("edited", "added", "unchanged")}
        return {
            **counts, "tied": manifest["tied"],
            "compared": f"no logits: interp-ablate verify {args.source} {args.out}",
        }  # fmt: skip
    return export_checkpoint(load(args, args.model), plan, args.out, **options)


def _export_lora(args: argparse.Namespace, plan: Any, report: Any) -> dict[str, Any]:
    from interp_ablate.export.lora import export_lora

    model = load(args, args.model or args.source)
    return export_lora(model, plan, args.out, tied=args.tied, report=report, overwrite=args.force)


def _export_gguf(args: argparse.Namespace, plan: Any, report: Any) -> dict[str, Any]:
    from interp_ablate.export.gguf_model import export_gguf

    if args.source and plan is None:
        written = export_gguf(args.source, args.out, dtype=args.gguf_dtype, overwrite=args.force)
        return {**written, "tensors": len(written["tensors"])}
    if plan is None:
        raise RunError("--format gguf of a --model needs --plan (a folder as it is: --source)")
    Path(args.out).resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(args.out).resolve().parent) as place:
        out, args.out = args.out, str(Path(place) / "checkpoint")
        args.force, force = False, args.force
        certificate = _export_checkpoint(args, plan, report)
        edited, args.out, args.force = args.out, out, force
        written = export_gguf(edited, out, dtype=args.gguf_dtype, overwrite=force)
        return {"checkpoint": certificate, **written, "tensors": len(written["tensors"])}


def _export_control_vector(args: argparse.Namespace, plan: Any, report: Any) -> dict[str, Any]:
    from interp_ablate.export.control_vector import write_control_vector
    from interp_ablate.sources import read_hf_config

    config = read_hf_config(args.source) if args.source else load(args, args.model).hf_config
    return write_control_vector(
        plan,
        args.out,
        model_hint=args.model_hint or config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
    )


# ---- verify ----------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    folder, plan_path = _what_to_verify(args)
    from interp_ablate.edits import Plan
    from interp_ablate.export.audit import audit
    from interp_ablate.export.checkpoint import write_certificate
    from interp_ablate.export.tensor_files import Checkpoint
    from interp_ablate.export.verify import certify, coarsest_dtype

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
    from interp_ablate.export.audit import Origin

    is_folder = (Path(args.model) / "config.json").is_file()
    if args.tensors_only:
        if not is_folder:
            raise RunError(f"--tensors-only compares two folders; {args.model} is none")
        return Origin.of_folder(args.model), None
    model = load(args, args.model)
    if is_folder:
        return Origin.of_folder(args.model), model
    if model.source.kind == "hub":
        from huggingface_hub import snapshot_download

        return Origin.of_folder(snapshot_download(args.model, local_files_only=True)), model
    return Origin.of_model(model), model


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
    from interp_ablate.sources import BUNDLED

    try:
        source = json.loads(manifest.read_text())["source"]
        name, path = source["name"], source["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{manifest} is not an export's manifest ({error!r}): give A B") from error
    return str(name if name in BUNDLED or not path else path)


# ---- the others -------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> int:
    from interp_ablate.sites import Site
    from interp_ablate.vectors import read_directions, write_directions

    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    site = Site.parse(args.site) if args.site else None
    directions = read_directions(args.file, site=site, point=args.point, position=args.position)
    write_directions(directions, args.out)
    for direction in directions:
        print(json.dumps({"site": str(direction.site), "norm": direction.norm}))
    return 0


def _models(args: argparse.Namespace) -> int:
    from interp_ablate.architectures import table

    for row in table():
        if args.json:
            print(json.dumps(row))
            continue
        print(f"{row['model_type']}  ({row['families']}; {row['block']})")
        for key in ("embeddings", "attention", "mlp", "norm_after", "biases", "tied"):
            print(f"    {key:<11} {row[key]}")
    return 0


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
