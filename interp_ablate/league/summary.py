"""A league's results, computed from its journal and saved.

Knows: what stands in the file beside the numbers. Does not know: how a number is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_ablate.league.behaviours import LeagueBehaviour
from interp_ablate.league.journal import Key, Record
from interp_ablate.league.method import LeagueMethod
from interp_ablate.league.results import Records, results_of
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.league.task import N_SITES
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.provenance import versions
from interp_ablate.storage.strict_json import json_text


def save_results(
    path: Path,
    done: Mapping[Key, Record],
    behaviours: Sequence[LeagueBehaviour],
    methods: Sequence[LeagueMethod],
    settings: LeagueSettings,
) -> dict[str, Any]:
    """Compute the results of what the journal has, and write them, whole or not at all.

    Raises:
        RunError: the place cannot be written.
    """
    records = Records(
        done,
        {each.name: each.fingerprint[:16] for each in behaviours},
        settings.seed_numbers,
        {"removal": settings.max_kl, "induction": settings.max_kl_induction},
    )
    about = {
        "model": Path(settings.model).name,
        "command": _command(settings),
        "n_sites": N_SITES,
        "versions": versions(),
    }
    results = results_of(records, methods, settings, about)
    write_atomic(path, json_text(results, indent=1))
    return results


def _command(settings: LeagueSettings) -> str:
    """The command that plays the same league; names of files are cut to their last part."""
    names = ",".join(name if "/" not in name else Path(name).name for name in settings.behaviours)
    parts = [f"interp-ablate league --model {Path(settings.model).name} --behaviours {names}"]
    parts += [f"--methods {','.join(settings.methods)}"] if settings.methods else []
    parts += [f"--budget {settings.budget} --seeds {','.join(settings.seeds)}"]
    for name in (
        "n_train",
        "n_validation",
        "n_test",
        "max_kl",
        "max_kl_induction",
        "max_new_tokens",
    ):
        value, default = getattr(settings, name), LeagueSettings.__dataclass_fields__[name].default
        parts += [f"--{name.replace('_', '-')} {value:g}"] if value != default else []
    return " ".join([*parts, "--out runs/league"])
