"""What a league concludes of controls: those with a number are named, and without one nothing is claimed."""

from __future__ import annotations

from typing import Any

import pytest

from interp_ablate.league.conclusions import conclusions
from interp_ablate.league.page import _sentences


def results(**controls: list[float] | None) -> dict[str, Any]:
    rows = {"lda": [0.9, 0.8, 1.0], **controls}
    return {
        "methods": {
            name: {
                "control": name != "lda",
                "overall": {"detection": row, "removal": None, "induction": None},
            }
            for name, row in rows.items()
        }
    }


LOW, WIDE = [0.5, 0.4, 0.6], [0.5, 0.1, 0.9]


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ({}, "No control has a number here"),
        ({"random_direction": None}, "No control has a number here"),
        (
            {"random_direction": LOW, "shuffled_labels": None},
            "above the controls that have a number: `random_direction`.",
        ),
        (
            {"random_direction": LOW, "shuffled_labels": LOW},
            "have a number: `random_direction`, `shuffled_labels`.",
        ),
        (
            {"random_direction": WIDE},
            "Not told from at least one control (`random_direction`): `lda`.",
        ),
    ],
)
def test_only_controls_with_a_number_are_spoken_of(
    controls: dict[str, list[float] | None], said: str
) -> None:
    (found,) = conclusions(results(**controls))
    sentences = _sentences(found)
    assert said in sentences and "both controls" not in sentences
    assert found.controls == tuple(name for name, row in controls.items() if row)
