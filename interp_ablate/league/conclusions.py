"""What a league's intervals say: who cannot be told from the best, who from a control, who loses everywhere.

Knows: when two intervals part. Does not know: how the numbers were measured, or a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JUDGED = ("detection", "removal", "induction")
"""The columns that conclusions are drawn of; in each of them more is better."""


@dataclass(frozen=True)
class Conclusion:
    """What one column says of the methods that have a number in it."""

    column: str
    best: str
    """The method of the highest value."""
    like_the_best: tuple[str, ...]
    """Those whose intervals overlap that of the best."""
    below_the_best: tuple[str, ...]
    """Those whose intervals lie wholly below that of the best."""
    like_a_control: tuple[str, ...]
    """Those whose intervals do not lie wholly above those of all controls; nothing where no control has a number."""
    controls: tuple[str, ...]
    """The controls that have a number in the column."""


def parted(low: list[float | None], high: list[float | None]) -> bool:
    """Whether the interval of the first estimate lies wholly below that of the second; one without an interval does not."""
    return low[2] is not None and high[1] is not None and low[2] < high[1]


def conclusions(results: Mapping[str, Any]) -> list[Conclusion]:
    """A conclusion for each column that a method has a number in."""
    return [found for column in JUDGED if (found := _of_column(results, column)) is not None]


def _of_column(results: Mapping[str, Any], column: str) -> Conclusion | None:
    rows = {
        name: row["overall"][column]
        for name, row in results["methods"].items()
        if row["overall"][column] is not None
    }
    methods = {n: e for n, e in rows.items() if not results["methods"][n]["control"]}
    controls = {n: e for n, e in rows.items() if results["methods"][n]["control"]}
    if not methods:
        return None
    best = max(methods, key=lambda name: methods[name][0])
    below = tuple(name for name, e in methods.items() if parted(e, methods[best]))
    return Conclusion(
        column,
        best,
        tuple(name for name in methods if name != best and name not in below),
        below,
        tuple(
            name
            for name, e in methods.items()
            if not all(parted(control, e) for control in controls.values())
        ),
        tuple(controls),
    )


def losing_everywhere(results: Mapping[str, Any]) -> list[str]:
    """Methods that lie wholly below the best in removal, and in induction where they have one."""
    found = {each.column: set(each.below_the_best) for each in conclusions(results)}
    lost = []
    for name, row in results["methods"].items():
        columns = [c for c in ("removal", "induction") if row["overall"][c] is not None]
        if not row["control"] and columns and all(name in found.get(c, ()) for c in columns):
            lost.append(name)
    return lost
