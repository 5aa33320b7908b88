"""`import`: vector files of other tools, written as plain safetensors.

Knows: flags and what is printed. Does not know: file formats.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.options import REPLACE, check_new
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting
from interp_ablate.sites import Point, Site
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Import:
    """Which vectors are read, and where they live."""

    file: str = setting(
        help="direction.pt, .npy, .safetensors, control vector .gguf", positional=True
    )
    site: str | None = setting(None, "where the vector lives, such as blocks.12.hook_resid_pre")
    point: Point | None = setting(None, "for files that name layers only, such as resid_post")
    position: str | None = setting(None, "token position, such as -1, where the file has several")
    out: str = setting(help=".safetensors file to write")
    force: bool = setting(False, REPLACE)


add = adding(Import)


def run(args: Namespace) -> int:
    """Write the file, and print each vector's site and norm."""
    from interp_ablate.directions.direction_set import write_directions
    from interp_ablate.directions.foreign_files import read_directions

    settings = settings_from(args, Import)
    check_new(settings.out, settings.force, ours=lambda begins: begins[8:9] == b"{")  # safetensors
    site = Site.parse(settings.site) if settings.site else None
    directions = read_directions(
        settings.file, site=site, point=settings.point, position=settings.position
    )
    write_directions(directions, settings.out)
    for direction in directions:
        print(json_text({"site": str(direction.site), "norm": direction.norm}))
    return 0
