"""SRA in a run folder: its directions without what protected contrast sets' directions explain of them.

Knows: which prompts make the protected directions, and the files that are left. Does not know: flags, or the ridge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.mean_difference import (
    estimate_directions,
    labels_of,
    with_separation,
)
from interp_ablate.directions.residualizing import residualized_directions
from interp_ablate.errors import RunError
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.runs.configuration import MAIN_METHOD
from interp_ablate.runs.run_folder import Run

FOLDER = "protected"
COLUMNS = ("layer", "point", "position", "concept", "cosine_before", "cosine_after")


def protected_sets(run: Run, specs: Sequence[str]) -> dict[str, ContrastSet]:
    """The contrast sets to protect, by what they were asked for as; as many prompts of a side as train the run.

    Raises:
        RunError: one that is named twice, or that is the run's own.
        PromptError: one that cannot be read.
    """
    n = len(run.split.train.positive)
    found: dict[str, ContrastSet] = {}
    for spec in specs:
        contrast = ContrastSet.load(spec, system=run.configuration.system)
        prints = [each.fingerprint for each in found.values()]
        some = contrast.first(n)
        if contrast.fingerprint == run.contrast_set.fingerprint:
            raise RunError(
                f"--protect {spec} is this run's own contrast set: nothing would be left of its directions"
            )
        if spec in found or some.fingerprint in prints:
            raise RunError(f"--protect names {spec} twice")
        found[spec] = some
    return found


def write_residualized(
    run: Run, protected: Mapping[str, ContrastSet], *, ridge: float
) -> Directions:
    """`protected/directions.safetensors` and `protected/cosines.csv`, from a run whose directions are there.

    The difference in means of every site and position is cleaned by the protected ones of the same place. The
    separation is measured anew on the run's validation prompts.

    Raises:
        DirectionError: nothing is left; a bad ridge.
    """
    plain = run.directions.of(MAIN_METHOD)
    theirs = {}
    for name, contrast in protected.items():
        total = len(contrast.positive) + len(contrast.negative)
        with run.step(f"collect {name}", total) as advance:
            activations = collect(
                run.model, contrast, run.sites, run.configuration.positions, on_batch=advance
            )
        theirs[name] = estimate_directions(activations, source=contrast.source)
    clean = residualized_directions(plain, theirs, ridge=ridge)
    validation = run.activations("validation")
    labels = labels_of(validation)
    items = tuple(
        with_separation(item, validation.at(item.site, item.position), labels) for item in clean
    )
    found = Directions(items, clean.left_out, clean.source)
    rows: list[dict[str, Any]] = []
    for item in found:
        before = plain[item.site, item.position]
        for name, directions in theirs.items():
            alike = [d for d in directions if (d.site, d.position) == (item.site, item.position)]
            for other in alike[:1]:
                place = (item.site.layer, item.site.point, item.position, name)
                rows.append(dict(zip(COLUMNS, (*place, before.cosine(other), item.cosine(other)))))
    found.save(run.out / FOLDER / "directions.safetensors")
    run.write(f"{FOLDER}/cosines.csv", pd.DataFrame(rows, columns=list(COLUMNS)))
    return found
