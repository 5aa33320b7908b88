"""Flags and loaders that several commands share.

Knows: model, plan and scorer flags. Does not know: what a command does with them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError

REPLIES = "replies.jsonl"  # what a judge answered


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
    from interp_ablate.scoring.registry import make_scorer

    if not (spec or trait.scorer):
        raise RunError(
            f"the trait {trait.name!r} names no offline scorer: give --scorer, such as "
            "judge:MODEL@http://HOST/v1 (its rubric is the trait's) or classifier:FOLDER"
        )
    return make_scorer(spec or trait.scorer, rubric=trait.rubric, cache=folder / REPLIES)


def load(args: argparse.Namespace, name: str | None) -> Any:
    """The model that the flags describe."""
    from interp_ablate.models.load import load_model

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
    from interp_ablate.runs.run_folder import read_run

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
    if json.loads(selected.read_text(encoding="utf-8"))["plan"] is None:
        raise RunError(f"no candidate passed the limits in {folder}: see its report.html")
    return selected
