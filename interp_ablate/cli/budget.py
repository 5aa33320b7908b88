"""`budget`: memory and time of a run before it starts.

Knows: flags and what is printed. Does not know: the arithmetic.
"""

from __future__ import annotations

import argparse
from typing import Any


def _budget_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="HF folder, config.json, .gguf file, alias or hub name")
    for name, text in (
        ("prompts", "a side, collected"),
        ("scored", "a side, in a trial"),
        ("fitted", "rows of each kind in a gradient step"),
        ("tokens", "of a prompt"),
        ("prefix", "of them shared by all prompts"),
        ("max-new-tokens", "of an answer"),
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

    from interp_ablate.budget.costs import Machine, Workload
    from interp_ablate.budget.sizes import config_at
    from interp_ablate.budget.stages import as_text, budget
    from interp_ablate.models.sources import torch_dtype

    def given(kind: type) -> dict[str, Any]:
        names = [field.name for field in fields(kind)]
        values = {name: getattr(args, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    work = Workload(**{**given(Workload), "dtype_bytes": torch_dtype(args.dtype).itemsize})
    table = budget(config_at(args.config), work, Machine(**given(Machine)))
    print(table.to_json(orient="records") if args.json else as_text(table))
    return 0
