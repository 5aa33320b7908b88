"""Bundled mixtures whose labels are known.

Knows: their files and labels. Does not know: screening.
"""

from __future__ import annotations

from pathlib import Path

from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.errors import RunError
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.row_files import RowFile

PLANTED = bundled("planted")


# ---- the check on known labels ------------------------------------------------------------------------


def planted_file(name: str) -> Path:
    """A bundled mixture: samples with a trait beside samples without it, which is which under `planted`.

    Raises:
        RunError: no such mixture.
    """
    there = sorted(path.stem for path in PLANTED.glob("*.jsonl"))
    if name not in there:
        raise RunError(f"no bundled mixture {name!r}: there are {', '.join(there)}")
    return PLANTED / f"{name}.jsonl"


def labels_of(data: str | Path, field: str, *, layout: str | None = None) -> list[bool]:
    """What a field of the rows says of every sample: true (or 1) or false (or 0).

    Raises:
        RunError: a row without the field, or with another value, by its number; only one kind.
    """
    file, found = RowFile.at(data), []
    for sample in read_samples(data, layout=layout):
        value = sample.raw.get(field)
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise RunError(
                f"{file.place(sample.number)}: {field} is {value!r}; labels are true or false in every row"
            )
        found.append(bool(value))
    if len(set(found)) < 2:
        raise RunError(
            f"{data}: {field} says the same of all {len(found)} samples: both are needed"
        )
    return found
