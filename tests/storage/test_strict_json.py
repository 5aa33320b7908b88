"""JSON that `jq` and every other reader takes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import interp_ablate
from interp_ablate.storage.strict_json import as_read_back, json_text

PACKAGE = Path(interp_ablate.__file__).parent


def test_numbers_that_json_has_no_word_for_are_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": float("nan")}, "d": "NaN"}
    want = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN"}
    assert json.loads(json_text(value, indent=1)) == want
    assert as_read_back(value) == want and as_read_back({1: (2, 3)}) == {"1": [2, 3]}
    assert json_text({"é": 1.0}) == json.dumps({"é": 1.0})


def test_what_is_printed_or_written_is_made_so() -> None:
    """Elsewhere `json.dumps` makes hashes and copies."""
    written = re.compile(r"(print|write|write_text|write_atomic|writelines)\([^\n]*json\.dumps\(")
    wrong = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if written.search(line)
    ]
    assert not wrong, wrong
