"""Shapes of JSON: whether a file has the parts and types that its readers take for granted.

Knows: shapes, those of the files that a run leaves, and where a value does not have its own. Does not know: what a
part means.
"""

from __future__ import annotations

import math
from typing import Any

# A shape is a type (`object` is any), a tuple of shapes of which one fits, an object's shapes by key ("*" is any
# key), or a list: with one shape all values have it, with several there are as many values.
ABSENT, NONE, NUMBER = type(...), type(None), (int, float)
OBJECT = {"*": object}


def optional(shape: Any) -> tuple[Any, ...]:
    """The shape, null, or nothing under that key."""
    return (shape, NONE, ABSENT)


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value does not have a shape; None where it has. Numbers are finite."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, place) for one in shape]
        return None if None in found else max(map(str, found), key=len)
    if isinstance(shape, type):
        fits = type(value) is shape or (shape is object and value is not ...)
        return None if fits and not (shape is float and not math.isfinite(value)) else place
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
    return next((at for name, v, s in parts if (at := misfit(v, s, name)) is not None), None)


_VERSIONS = {"*": (str, NONE)}
_PLAN = optional({"edits": [{"sites": [str]}]})
# Of what a run leaves in its folder, by the file's name: the parts that its readers look into.
LEFT_BY_A_RUN: dict[str, Any] = {
    "run.json": {
        **dict.fromkeys(("model", "contrast", "directions", "search_settings"), optional(OBJECT)),
        "search": optional({"fit_rounds": optional({"*": int})}),
        **dict.fromkeys(("configuration", "made_of", "stages"), optional(OBJECT)),
        "notes": optional([str]),
        "versions": optional(_VERSIONS),
        "target_tokens": optional([OBJECT]),
        "search_end": optional({"met_by": optional([object])}),
        "trials_made_by": optional([{"trials": int, "versions": _VERSIONS}]),
    },
    "selected.json": {
        "plan": _PLAN,
        "addition_plan": _PLAN,
        "objectives": optional([str]),
        **dict.fromkeys(("limits", "trial", "optimism", "validation_baseline"), optional(OBJECT)),
        "test": optional({"controls": optional([OBJECT]), "intervals": optional(OBJECT)}),
    },
    "certificate.json": {"passed": optional(bool), "limits": optional(OBJECT)},
}  # fmt: skip
