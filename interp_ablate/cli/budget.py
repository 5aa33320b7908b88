"""`budget`: memory and time of a run before it starts.

Knows: flags and what is printed. Does not know: the arithmetic.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

from interp_ablate.budget.costs import Machine, Workload, config_at
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Budget:
    """Which model is reckoned with."""

    config: str = setting(
        help="HF folder, config.json, .gguf file, alias or hub name", positional=True
    )
    dtype: str = setting("bfloat16", "of the weights")
    json: bool = setting(False, "the table as JSON")


add = adding(Budget, Workload, Machine)


def run(args: Namespace) -> int:
    """Print the table of stages."""
    from interp_ablate.budget.stages import as_text, budget
    from interp_ablate.models.sources import torch_dtype

    settings = settings_from(args, Budget)
    work = replace(settings_from(args, Workload), dtype_bytes=torch_dtype(settings.dtype).itemsize)
    machine = settings_from(args, Machine)
    table = budget(config_at(settings.config), work, machine)
    if settings.json:
        print(table.to_json(orient="records"))
        return 0
    print(
        f"weights in {settings.dtype} (--dtype; a run's default is float32), {machine.devices:g} devices of "
        f"{machine.memory / 1e9:g} GB (--devices, --memory)"
    )
    print(as_text(table))
    return 0
