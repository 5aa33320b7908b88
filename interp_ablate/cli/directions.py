"""`directions`: one stage of a run, and its directions without what protected concepts explain of them.

Knows: flags and what is printed. Does not know: how a direction is estimated or cleaned.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.options import tell
from interp_ablate.cli.run import RunFolder, open_run
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import Configuration
from interp_ablate.settings import RIDGE, setting


@dataclass(frozen=True)
class ProtectSettings:
    """Concepts whose directions are taken out of the run's own.

    Raises:
        RunError: a ridge that is no finite number from 0, or one without anything to protect.
    """

    protect: tuple[str, ...] = setting(
        (),
        "comma-separated contrast sets, as for --contrast: their directions are taken out (SRA), and what is "
        "left goes into protected/",
        metavar="SET[,SET]",
    )
    ridge: float | None = setting(
        None, f"of --protect: 0 leaves nothing along any of them (default {RIDGE:g})", least=0
    )

    def __post_init__(self) -> None:
        if self.ridge is not None and not self.protect:
            raise RunError(
                "--ridge is of --protect: name contrast sets to protect, or leave it out"
            )
        if self.ridge is not None and not self.ridge < float("inf"):
            raise RunError(f"--ridge is a finite number from 0; got {self.ridge}")


add = adding(Configuration, RunFolder, ProtectSettings)


def run(args: Namespace) -> int:
    """Do the stage with those it needs; then, with --protect, clean its directions."""
    from interp_ablate.runs.protecting import FOLDER, protected_sets, write_residualized
    from interp_ablate.runs.stages import do_stage

    settings = settings_from(args, ProtectSettings)
    opened = open_run(args)
    protected = protected_sets(opened, settings.protect)  # read before any work
    if not do_stage(opened, "directions") and not protected:
        tell(args, f"{opened.out}: directions was done already")
    if protected:
        ridge = RIDGE if settings.ridge is None else settings.ridge
        found = write_residualized(opened, protected, ridge=ridge)
        print(
            f"{opened.out / FOLDER / 'directions.safetensors'}: {len(found)} directions without "
            f"{', '.join(protected)} (ridge {ridge:g})"
        )
    return 0
