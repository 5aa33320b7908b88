"""Labelled mixtures: samples with a behaviour among samples without it, to check a filter or a screening.

Knows: the bundled mixtures, and labels in a file's rows. Does not know: what finds the behaviour.
"""

from __future__ import annotations

from pathlib import Path

from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.errors import RunError
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.row_files import RowFile

PREFIX = "planted:"  # of a bundled mixture, where a command takes a file
LABEL = "planted"  # the field of a bundled mixture's rows that is true where the behaviour is there


def mixture_names() -> tuple[str, ...]:
    """The bundled mixtures: `declines`, and one for each of some traits."""
    files = (path for path in bundled("planted").iterdir() if path.suffix in (".jsonl", ".ndjson"))
    return tuple(sorted(path.stem for path in files))


def labelled_mixture(name: str) -> Path:
    """The file of a bundled mixture.

    Raises:
        RunError: no such mixture.
    """
    if name not in mixture_names():
        raise RunError(f"no bundled mixture {name!r}: there are {', '.join(mixture_names())}")
    [path] = bundled("planted").glob(f"{name}.*json*")
    return path


def data_and_label(data: str, label: str | None = None) -> tuple[str | Path, str | None]:
    """The file of `planted:NAME`, or `data` itself, and the field of its labels.

    Raises:
        RunError: no such mixture.
    """
    if not data.startswith(PREFIX):
        return data, label
    return labelled_mixture(data.removeprefix(PREFIX)), label or LABEL


def read_labels(data: str | Path, field: str, *, layout: str | None = None) -> list[bool]:
    """The labels that a field of the rows holds, true (or 1) or false (or 0), sample by sample.

    Raises:
        RunError: a row without the field, or with another value, by its number; only one kind.
    """
    file, labels = RowFile.at(data), []
    for sample in read_samples(data, layout=layout):
        value = sample.raw.get(field)
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise RunError(
                f"{file.place(sample.number)}: {field} is {value!r}; labels are true or false in every row"
            )
        labels.append(bool(value))
    if len(set(labels)) < 2:
        raise RunError(
            f"{data}: {field} says the same of all {len(labels)} samples: both are needed"
        )
    return labels
