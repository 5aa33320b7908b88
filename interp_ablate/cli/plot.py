"""`plot`: every figure of a run folder, and its report.

Knows: what is printed. Does not know: how a figure is drawn.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.figures import DPI
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Plot:
    """What `plot` draws."""

    folder: str = setting(help="run folder", positional=True)
    format: tuple[str, ...] = setting(
        ("png",), "png, svg or pdf; several between commas", metavar="FORMATS"
    )
    dpi: int | None = setting(None, DPI)


add = adding(Plot)


def run(args: Namespace) -> int:
    """Draw, and print the paths."""
    from interp_ablate.plots.run_figures import save_figures
    from interp_ablate.runs.report import write_report
    from interp_ablate.runs.run_folder import read_run

    settings = settings_from(args, Plot)
    folder = settings.folder
    if read_run(folder) is None:
        raise RunError(f"{folder} holds no run: make one with `interp-ablate run --out {folder}`")
    # the report shows the PNGs
    formats = tuple(dict.fromkeys(("png", *settings.format)))
    written = save_figures(folder, formats=formats, dpi=settings.dpi)
    for path in [*written, write_report(folder)]:
        print(path)
    return 0
