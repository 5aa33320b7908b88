"""Shapes of JSON: whether a file has the parts and types that its readers take for granted.

Knows: shapes, those of the files that a run or an export leaves, and where a value does not have its own. Does not know: what a
part means.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

# A shape is a type (`object` is any), a tuple of shapes of which one fits, an object's shapes by key ("*" is any
# other key), or a list: with one shape all values have it, with several there are as many values.
ABSENT, NONE, NUMBER = type(...), type(None), (int, float)
OBJECT = {"*": object}


def optional(shape: Any) -> tuple[Any, ...]:
    """The shape, null, or nothing under that key."""
    return (shape, NONE, ABSENT)


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value does not have a shape; None where it has. Numbers are finite, whole ones of 64 bits."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, place) for one in shape]
        return (
            None if None in found else found[shape.index(max(shape, key=partial(_likeness, value)))]
        )
    if isinstance(shape, type):
        fits = type(value) is shape or (shape is object and value is not ...)
        return None if fits and (shape is object or _sane(value)) else place or "its content"
    if type(value) is not type(shape):
        return place or "its content"
    if isinstance(shape, list):
        if len(shape) not in (1, len(value)):
            return place
        kinds = shape[0] if isinstance(shape[0], tuple) else shape
        if len(shape) == 1 and all(type(v) in kinds and _sane(v) for v in value):
            return None  # of the lists that are long
        shapes = shape * len(value) if len(shape) == 1 else shape
        parts = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(value, shapes))]
    else:
        keys = [*shape, *(value.keys() - shape if "*" in shape else ())]
        parts = [
            (f"{place}.{k}".lstrip("."), value.get(k, ...), shape.get(k, shape.get("*")))
            for k in keys
            if k != "*" or k in value
        ]
    return next((at for name, v, s in parts if (at := misfit(v, s, name)) is not None), None)


def _likeness(value: Any, shape: Any) -> int:
    """How much a shape looks like what a value was meant to be."""
    if isinstance(value, dict) and isinstance(shape, dict):
        return 1 + len(value.keys() & shape)
    return type(value) in (shape, type(shape))


def _sane(value: Any) -> bool:
    """Whether a number is finite and, if it is whole, one of 64 bits; True of what is no number."""
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is not float or math.isfinite(value)


_VERSIONS = optional({"*": (str, NONE)})
_PLAN = optional({"edits": [{"sites": [str]}]})
_ENDS = optional([(NONE, *NUMBER), (NONE, *NUMBER)])
_NAMED = optional(
    {
        "name": optional(str),
        **dict.fromkeys(("n_layers", "d_model", "n_positive", "n_negative"), optional(int)),
    }
)
_TEST = optional(
    {
        "*": object,
        "controls": optional(
            [
                {
                    "*": object,
                    "name": str,
                    "behaviour_after": (NONE, *NUMBER),
                    "kl_first_token": optional(NUMBER),
                    "interval": _ENDS,
                }
            ]
        ),
        "intervals": optional({"*": _ENDS}),
        "n": optional({"*": int}),
        "how": optional({"*": str}),
        **dict.fromkeys(
            ("kl_first_token", "behaviour_before", "behaviour_after", "kl_floor"), optional(NUMBER)
        ),
    }
)
_SETTINGS = optional({"*": (NONE, str, bool, *NUMBER, [str])})
_RUN = {
    "configuration": (_SETTINGS[0], ABSENT),
    "made_of": optional(OBJECT),
}
# A line of answers, or of verdicts on some of them.
ROLLOUTS = (
    {
        **dict.fromkeys(("question", "text"), str),
        **{"answer": int, "key": OBJECT, "system": (str, NONE), "tokens": [int], "finished": bool},
        **{"thought": (str, ABSENT), "lead": ([int], ABSENT)},
    },
    {"by": str, "scored": [int], "values": [(NONE, *NUMBER)]},
)
# Of what a run or an export leaves, by the file's name: the parts that its readers look into.
LEFT_BEHIND: dict[str, Any] = {
    "run.json": {
        **_RUN,
        "search_settings": _SETTINGS,
        **dict.fromkeys(("directions", "stages"), optional(OBJECT)),
        **dict.fromkeys(("model", "contrast"), _NAMED),
        "search": optional(
            {
                "*": object,
                "fit_rounds": optional({"*": int}),
                **dict.fromkeys(("seconds", "trial_seconds", "round_size"), (ABSENT, *NUMBER)),
            }
        ),
        "notes": optional([str]),
        "versions": _VERSIONS,
        "target_tokens": optional([{"*": object, "text": str, "p_positive": NUMBER, "p_negative": NUMBER}]),
        "search_end": optional({"met_by": optional([object])}),
        "trials_made_by": optional([{"trials": int, "versions": _VERSIONS}]),
    },
    "selected.json": {
        "plan": _PLAN,
        "addition_plan": _PLAN,
        "objectives": optional([str]),
        **dict.fromkeys(("trial", "optimism", "validation_baseline"), optional(OBJECT)),
        "limits": optional({"removed": optional(OBJECT)}),
        "test": _TEST,
    },
    "certificate.json": {
        "passed": optional(bool),
        "limits": optional({"*": NUMBER}),
        "compared": optional((str, {"*": (str, NONE)})),
        "files": optional({"*": str}),
        **dict.fromkeys(("prompts", "positions"), optional(int)),
    },
    "interp_ablate.json": {
        "source": optional({"*": (str, bool, NONE, [str]), "name": str}),
        "versions": _VERSIONS,
        "test": _TEST,
        "run": optional({**_RUN, "machine": optional(OBJECT), "search": _SETTINGS, "fit_rounds": optional({"*": int})}),
        **dict.fromkeys(("edited", "unchanged", "added", "left_out"), optional([str])),
        **dict.fromkeys(("kind", "dtype", "tied"), optional(str)),
    },
    "persona.json": {
        **dict.fromkeys(("format", "model", "trait", "trait_fingerprint", "site", "position"), optional(str)),
        "coefficient": optional(NUMBER),
        "readout": optional({"site": optional(str), "layers": optional([OBJECT])}),
        "layers": optional([OBJECT]),
        "counts": optional(OBJECT),
        "made_of": optional({"*": object, "settings": optional({"*": object, "min_coherence": optional(NUMBER)})}),
        "unsteered": optional({"*": object, "score": optional(NUMBER)}),
        "questions": optional({"*": [str]}),
    },
    "tokens.json": {
        **dict.fromkeys(("format", "request"), str),
        "sites": [str],
        "prompts": [str],
        "labels": (NONE, [bool]),
        "indices": [[int]],
        "tokens": [{"id": [int], "text": [str], "part": [str]}],
    },
    "generations.jsonl": {
        **dict.fromkeys(("prompt", "text", "condition", "label", "split"), optional(str)),
        "expressed": optional(bool),
    },
}  # fmt: skip
