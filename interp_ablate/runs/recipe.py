"""What an export's manifest keeps of the run that it comes from.

Knows: which facts of a run folder it takes to make the run again. Does not know: how that is done (`repeating`).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from interp_ablate.runs.run_folder import read_run, read_selected
from interp_ablate.storage.provenance import machine
from interp_ablate.storage.strict_json import json_text


def recipe_of(folder: str | Path) -> dict[str, Any] | None:
    """Settings, fingerprints and machine of a run, as JSON; None where a run and a search share the folder.

    What a scorer holds, such as phrases, a rubric and a server's address, is there as a digest. Such a folder's choice is among the trials of both, and no single command makes it again.
    """
    state, selected = read_run(folder), read_selected(folder)
    assert state is not None
    by, end = selected.get("chosen_by"), state.get("search_end")
    if by not in ("run", "search") or (by == "run") != (end is None):
        return None
    search = None if end is None else {**state["search_settings"], "trials": end["trials"]}
    kept = state.get("search") or {} if search else {}
    return {
        "configuration": state["configuration"],
        "made_of": digests(state["made_of"]),
        "search": search,
        # the draws depend on how many there are in a round
        "round_size": kept.get("round_size"),
        # as what is searched depends on what there was time to fit
        "fit_rounds": kept.get("fit_rounds"),
        "objectives": digest(kept["objectives"]) if "objectives" in kept else None,
        "machine": machine(),
    }


def digests(made_of: Mapping[str, Any]) -> dict[str, str]:
    """The identities of a run's parts by name; those that are no text as their digest."""
    return {name: digest(value) for name, value in made_of.items()}


def digest(value: Any) -> str:
    """The SHA-256 of a value as JSON; a text, which is a fingerprint already, as it is."""
    if isinstance(value, str):
        return value
    return sha256(json_text(value, sort_keys=True).encode()).hexdigest()
