"""Short summaries of repeated measurements.

Knows: means with intervals, paired differences. Does not know: what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interp_ablate.stats.intervals import bootstrap_interval

# ---- what is reported -------------------------------------------------------------------------------


def mean_with_interval(
    values: Sequence[float | None], *, proportion: bool = False
) -> dict[str, Any]:
    """Mean and interval over the prompts (or questions) with a value, how many these are and how many have none."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "interval": list(bootstrap_interval(known, proportion=proportion)) if known else None,
        "n": len(known),
        "no_value": len(values) - len(known),
    }


def paired_difference(
    some: Sequence[float | None], others: Sequence[float | None]
) -> dict[str, Any]:
    """`some` minus `others` over the prompts at which both have a value: `mean_with_interval`."""
    pairs = zip(some, others, strict=True)
    return mean_with_interval([None if a is None or b is None else a - b for a, b in pairs])
