"""`models`: the table of architectures.

Knows: what is printed. Does not know: architectures.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Models:
    """How the table is printed."""

    json: bool = setting(False, "one JSON object a line")


add = adding(Models)


def run(args: Namespace) -> int:
    """Print the table."""
    from interp_ablate.models.architectures import table

    as_json = settings_from(args, Models).json
    for row in table():
        if as_json:
            print(json_text(row))
            continue
        print(f"{row['model_type']}  ({row['families']}; {row['block']})")
        for key in ("embeddings", "attention", "mlp", "norm_after", "biases", "tied"):
            print(f"    {key:<11} {row[key]}")
    return 0
