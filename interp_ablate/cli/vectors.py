"""`import` and `models`: vector files of other tools, and the table of architectures.

Knows: flags and what is printed. Does not know: file formats.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from interp_ablate.errors import RunError

# ---- the others -------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> int:
    from interp_ablate.directions.direction_set import write_directions
    from interp_ablate.directions.foreign_files import read_directions
    from interp_ablate.sites import Site

    if Path(args.out).exists() and not args.force:
        raise RunError(f"{args.out} exists: choose another --out, or pass --force to replace it")
    site = Site.parse(args.site) if args.site else None
    directions = read_directions(args.file, site=site, point=args.point, position=args.position)
    write_directions(directions, args.out)
    for direction in directions:
        print(json.dumps({"site": str(direction.site), "norm": direction.norm}))
    return 0


def _models(args: argparse.Namespace) -> int:
    from interp_ablate.models.architectures import table

    for row in table():
        if args.json:
            print(json.dumps(row))
            continue
        print(f"{row['model_type']}  ({row['families']}; {row['block']})")
        for key in ("embeddings", "attention", "mlp", "norm_after", "biases", "tied"):
            print(f"    {key:<11} {row[key]}")
    return 0
