"""Flags that the training commands share.

Knows: LoRA recipe flags and the base model's loader. Does not know: the trainer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import flags_given
from interp_ablate.errors import RunError


def _recipe_flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (
        ("steps", "optimizer steps"),
        ("batch-size", "rows a step"),
        ("rank", "of the LoRA"),
        ("alpha", "of the LoRA"),
        ("max-length", "tokens of a row"),
        ("seed", "of the order of rows, of the adapter, of sampling"),
        ("save-every", "steps between checkpoints, from which a killed run goes on"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--no-rslora", action="store_true", help="scale by alpha / rank")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, slower")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda")
    parser.add_argument("--template", help="Jinja chat template text, or 'none' for raw text")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS)


def _recipe(args: argparse.Namespace) -> Any:
    from interp_ablate.training.recipe import LoraRecipe

    names = [
        "steps",
        "batch_size",
        "rank",
        "alpha",
        "max_length",
        "seed",
        "save_every",
        "learning_rate",
    ]
    return LoraRecipe(
        **flags_given(args, *names),
        rslora=not args.no_rslora,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def _base(args: argparse.Namespace, name: str) -> Any:
    from interp_ablate.training.trainable_model import load_base

    return load_base(
        name,
        dtype=args.dtype,
        device=args.device,
        template=args.template,
        trust_remote_code=args.trust_remote_code,
    )


def _prepare(args: argparse.Namespace) -> None:
    """Fail before anything is loaded; keep the trainers below off the network."""
    from interp_ablate.training.trainable_model import require_extra

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    require_extra()


def _quietly(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "quiet", False))


def _note(args: argparse.Namespace, text: str) -> None:
    if not _quietly(args):
        print(text, file=sys.stderr, flush=True)
