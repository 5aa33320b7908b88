"""What an export's manifest keeps of the run that it comes from.

Knows: which facts of a run folder it takes to make the run again. Does not know: how that is done (`repeating`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interp_ablate.runs.run_folder import read_run, read_selected
from interp_ablate.storage.provenance import machine


def recipe_of(folder: str | Path) -> dict[str, Any] | None:
    """Settings, fingerprints and machine of a run, as JSON; None where a run and a search share the folder.

    Such a folder's choice is among the trials of both, and no single command makes it again.
    """
    state, selected = read_run(folder), read_selected(folder)
    assert state is not None
    by, end = selected.get("chosen_by"), state.get("search_end")
    if by not in ("run", "search") or (by == "run") != (end is None):
        return None
    search = None if end is None else {**state["search_settings"], "trials": end["trials"]}
    return {
        "configuration": state["configuration"],
        "made_of": state["made_of"],
        "search": search,
        "machine": machine(),
    }
