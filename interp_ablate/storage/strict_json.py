"""JSON that every reader takes: numbers that are not finite, for which it has no word, are null.

Knows: which numbers JSON can write. Does not know: what is written, or where.
"""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """A value as JSON text, as `json.dumps` with these options writes it; NaN and infinity become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_read_back(value: Any, **options: Any) -> Any:
    """A value as its JSON gives it back: lists of tuples, keys as text, null for NaN and infinity."""
    return json.loads(json_text(value, **options))
