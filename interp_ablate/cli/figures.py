"""How a command's figures are written.

Knows: the format and the resolution. Does not know: any figure.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from interp_ablate.cli.settings import settings_from
from interp_ablate.settings import setting

DPI = "pixels an inch, of a PNG (default 150)"


@dataclass(frozen=True)
class FigureSettings:
    """The format of a command's figures.

    Raises:
        RunError: a dpi that no figure can have.
    """

    format: str = setting("png", "of the figures", choices=("png", "svg", "pdf"))
    dpi: int | None = setting(None, DPI)

    def __post_init__(self) -> None:
        if self.dpi is not None:
            from interp_ablate.plots.style import check_format

            check_format(self.format, self.dpi)

    def named(self, name: str) -> str:
        """A PNG's name with the end of the format."""
        return str(Path(name).with_suffix(f".{self.format}"))


def figure_settings(args: Namespace) -> FigureSettings:
    """What the flags say of figures; read before any work, so that a wrong dpi costs nothing."""
    return settings_from(args, FigureSettings)
