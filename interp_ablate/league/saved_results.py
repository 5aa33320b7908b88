"""The file of a league's results, read back: of this format, with every part that page and figure need.

Knows: the shape of the results. Does not know: how a number is made, or what is said of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.league.measures import SIDES
from interp_ablate.league.results import COLUMNS, FORMAT, GRID
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.json_shapes import NONE, NUMBER, misfit

_ESTIMATE = (NONE, [NUMBER, NONE, NONE], [NUMBER, NUMBER, NUMBER])
_COLUMNS = dict.fromkeys(COLUMNS, _ESTIMATE)
_CURVES = {"*": (NONE, [[NUMBER, NUMBER]])}
_METHOD = {
    "exactness": str,
    "source": str,
    "control": bool,
    "failed": {"*": str},
    "plans": [int, int],
    "failed_plans": {"*": [str]},
    "seconds": (NONE, *NUMBER),
    "by_behaviour": {"*": _COLUMNS},
    "overall": _COLUMNS,
    "curves": dict.fromkeys(SIDES, _CURVES),
    "ranks": {"*": [int, int]},
}
_SETTINGS = (
    "seconds", "n_train", "n_validation", "n_test", "max_kl", "max_kl_induction", "max_new_tokens",
)  # fmt: skip
_RESULTS = {
    "model": str,
    "command": str,
    "n_sites": int,
    "settings": dict.fromkeys(_SETTINGS, NUMBER),
    "seeds": [int],
    "behaviours": {"*": {"rates": (NONE, [NUMBER, NUMBER]), "failed": str}},
    "shared_seconds": (NONE, *NUMBER),
    "methods": {"*": _METHOD},
}


def read_results(path: str | Path) -> dict[str, Any]:
    """The results of a league from their file.

    Raises:
        RunError: no such file, no JSON, or something else than whole results of a league.
    """
    advice = "give the league.json of a league's folder"
    results = incoming_object(Path(path), advice=advice)
    if results.get("format") != FORMAT:
        raise RunError(f"{path} holds no results of a league (format {FORMAT!r}): {advice}")
    place = misfit(results, _RESULTS) or _uneven(results)
    if place is not None:
        raise RunError(
            f"{path} is cut or was changed: {place} is not there, or not what a league writes; {advice}"
        )
    return results


def _uneven(results: dict[str, Any]) -> str | None:
    """Where something has no entry of a behaviour or a column; None where everything has."""
    behaviours = results["behaviours"]
    if not results["methods"] or not behaviours:
        return "methods" if behaviours else "behaviours"
    judged = [name for name, row in behaviours.items() if row["rates"] or row["failed"]]
    for name, row in results["methods"].items():
        curves = [
            curve for side in SIDES for curve in row["curves"][side].values() if curve is not None
        ]
        ranked = [c for c in COLUMNS if row["overall"][c] is not None and not row["control"]]
        whole = {
            "by_behaviour": list(row["by_behaviour"]) == list(behaviours),
            "curves": all(list(row["curves"][side]) == judged for side in SIDES)
            and {len(curve) for curve in curves} <= {GRID},
            "ranks": set(row["ranks"]) == set(ranked),
        }
        for part, there in whole.items():
            if not there:
                return f"methods.{name}.{part}"
    return None
