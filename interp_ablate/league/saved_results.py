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

# A shape is a type, a tuple of shapes of which one fits, an object's shapes by key ("*" is any key), or a list:
# with one shape all values have it, with several there are as many values.
_NONE, _NUMBER = type(None), (int, float)
_ESTIMATE = (_NONE, [_NUMBER, (_NONE, *_NUMBER), (_NONE, *_NUMBER)])
_COLUMNS = dict.fromkeys(COLUMNS, _ESTIMATE)
_CURVES = {"*": (_NONE, [[_NUMBER, _NUMBER]])}
_METHOD = {
    "exactness": str,
    "source": str,
    "control": bool,
    "failed": {"*": str},
    "plans": [int, int],
    "failed_plans": {"*": [str]},
    "seconds": (_NONE, *_NUMBER),
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
    "settings": dict.fromkeys(_SETTINGS, _NUMBER),
    "seeds": [int],
    "behaviours": {"*": {"rates": (_NONE, [_NUMBER, _NUMBER]), "failed": str}},
    "shared_seconds": (_NONE, *_NUMBER),
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
    place = _misfit(results, _RESULTS) or _uneven(results)
    if place is not None:
        raise RunError(
            f"{path} is cut or was changed: {place} is not there, or not what a league writes; {advice}"
        )
    return results


def _misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value does not have a shape; None where it has."""
    if isinstance(shape, tuple):
        found = [_misfit(value, one, place) for one in shape]
        return None if None in found else max(map(str, found), key=len)
    if isinstance(shape, type):
        return None if type(value) is shape else place
    if type(value) is not type(shape):
        return place or "its content"
    if isinstance(shape, list):
        if len(shape) not in (1, len(value)):
            return place
        shapes = shape * len(value) if len(shape) == 1 else shape
        parts = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(value, shapes))]
    else:
        keys = value if "*" in shape else shape
        parts = [
            (f"{place}.{k}".lstrip("."), value.get(k, ...), shape.get(k, shape.get("*")))
            for k in keys
        ]
    return next((at for name, v, s in parts if (at := _misfit(v, s, name)) is not None), None)


def _uneven(results: dict[str, Any]) -> str | None:
    """Where something has no entry of a behaviour or a column; None where everything has."""
    behaviours = results["behaviours"]
    if not results["methods"] or not behaviours:
        return "methods" if behaviours else "behaviours"
    judged = [name for name, row in behaviours.items() if row["rates"] or row["failed"]]
    for name, row in results["methods"].items():
        curves = [curve for side in SIDES for curve in row["curves"][side].values() if curve]
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
