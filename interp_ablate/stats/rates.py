"""Rates with intervals.

Knows: a share of a count. Does not know: what was counted.
"""

from __future__ import annotations

from typing import Any


def rate(part: int, whole: int) -> dict[str, Any]:
    """A share with its 95% interval (Wilson 1927); None where there is nothing to take a share of."""
    if not whole:
        return {"value": None, "low": None, "high": None, "of": 0}
    from scipy.stats import binomtest

    interval = binomtest(part, whole).proportion_ci(method="wilson")
    return {
        "value": part / whole,
        "low": float(interval.low),
        "high": float(interval.high),
        "of": whole,
    }
