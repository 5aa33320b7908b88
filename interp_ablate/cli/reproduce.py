"""`reproduce`: an export made again from its manifest, to the same bytes, or what differs.

Knows: flags and what is printed. Does not know: how tensors are rebuilt or compared.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import check_new, rubric_of
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text


@dataclass(frozen=True)
class Reproduce:
    """Which export is made again, how far back it begins, and where things are now."""

    export: str = setting(help="exported checkpoint, or its interp_ablate.json", positional=True)
    from_prompts: bool = setting(
        False, "make the run again too, from its prompts on; default: from the plan in the manifest"
    )
    out: str | None = setting(None, "keep what is made, in this folder")
    model: str | None = setting(None, "where the model is now")
    contrast: str | None = setting(None, "where the run's two sets of prompts are now")
    positive: str | None = setting(None, "where its positive prompts are now")
    negative: str | None = setting(None, "where its negative prompts are now")
    expressions: str | None = setting(None, "where its expressions are now")
    scorer: str | None = setting(
        None, "where its scorer is now; a file of Python runs only if named here"
    )
    rubric: str | None = setting(
        None, "where its judge's rubric is now: its text, or a file (@FILE)"
    )
    device: str | None = setting(
        None, "where the run's model is put: cpu, cuda, mps or auto; default: as in the run"
    )

    def places(self) -> dict[str, Any]:
        """Where a run's model, prompts, scorer and device are now, by the run's settings."""
        return {
            "model": self.model, "contrast": self.contrast, "positive": self.positive, "negative": self.negative,
            "expressions": self.expressions, "scorer": self.scorer, "rubric": rubric_of(self.rubric), "device": self.device,
        }  # fmt: skip


add = adding(Reproduce)


def run(args: Namespace) -> int:
    """Print what came of it; status 1 where a tensor differs."""
    from interp_ablate.export.reproducing import compare, read_manifest, rebuild, source_of
    from interp_ablate.storage.atomic_files import temporary_folder

    settings = settings_from(args, Reproduce)
    manifest = read_manifest(settings.export)
    given = [name for name, value in settings.places().items() if value is not None]
    of_run = [name for name in given if name != "model"]
    if of_run and not settings.from_prompts:
        raise RunError(f"--{of_run[0]} is of a run that is made again: give --from-prompts with it")
    if settings.from_prompts and not manifest.get("run"):
        raise RunError(
            f"{settings.export} does not say which run it comes from, as exports of a run folder do: without "
            "--from-prompts it is made again from its plan"
        )
    source = source_of(manifest, settings.model)
    if settings.out:
        check_new(settings.out, False, source=source)
        if Path(settings.export).is_dir():
            check_new(settings.out, False, source=settings.export)
    with ExitStack() as stack:
        place = Path(settings.out or stack.enter_context(temporary_folder("reproduced")))
        plan = None
        if settings.from_prompts:
            from interp_ablate.runs.repeating import repeat_run

            plan = repeat_run(
                manifest["run"], place / "run", {**settings.places(), "model": source}
            )
        rebuild(manifest, plan, source, place / "export")
        result = compare(manifest, settings.export, place / "export", plan).to_dict()
    begun = "the prompts" if settings.from_prompts else "the plan"
    print(json_text({"export": settings.export, "source": source, "from": begun, **result}))
    return 0 if result["same"] else 1
