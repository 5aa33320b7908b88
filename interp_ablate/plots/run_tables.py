"""What figures and charts of a run folder are made of: its projections and its plain directions.

Knows: the files and their columns. Does not know: how anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.directions.estimators import CONTROL_COLUMNS
from interp_ablate.plots import style
from interp_ablate.plots.attribution import ATTRIBUTION_COLUMNS
from interp_ablate.plots.directions import BESIDE_COLUMNS, PROJECTION_COLUMNS
from interp_ablate.plots.tokens import TOKEN_COLUMNS
from interp_ablate.plots.trials import is_comparable
from interp_ablate.search.by_layer import COLUMNS
from interp_ablate.search.objectives import DEFAULT_OBJECTIVES, Objective, parse_objective
from interp_ablate.search.trial_table import read_trials
from interp_ablate.storage.tables import read_json, read_table


@dataclass(frozen=True)
class Choice:
    """What a run chose, by which limit, on how many prompts."""

    selected: Mapping[str, Any]
    """selected.json; empty where there is none."""
    max_kl: float | None
    """The limit of the KL in nats."""
    n: int | None
    """Validation prompts a side."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What its search made small or large beside the KL; the repetition only where it is no default.

        Raises:
            RunError: objectives that are none.
        """
        named = [parse_objective(str(text)) for text in self.selected.get("objectives") or ()]
        usual = [each.measure for each in named] == list(DEFAULT_OBJECTIVES)
        left_out = ("kl", "repetition") if usual else ("kl",)
        return tuple(each for each in named if each.measure not in left_out)

    @property
    def trial(self) -> Mapping[str, Any]:
        """The chosen trial's row; empty where none was chosen."""
        trial = self.selected.get("trial") if self.selected.get("plan") else None
        return trial if isinstance(trial, Mapping) else {}


def read_choice(folder: Path) -> Choice:
    """What a run folder chose; what its files do not say, or not as a number, is None."""
    selected = read_json(folder / "selected.json") or {}
    settings = (read_json(folder / "run.json") or {}).get("configuration")
    limit = settings.get("max_kl") if isinstance(settings, Mapping) else None
    n = selected.get("validation_prompts")
    return Choice(
        selected,
        float(limit) if isinstance(limit, (int, float)) else None,
        n if isinstance(n, int) else None,
    )


def read_projections(folder: Path) -> pd.DataFrame | None:
    """projections.csv of a run folder; None where there is none, or no row in it."""
    path = folder / "projections.csv"
    if not lexists(path):
        return None
    frame = read_table(path, PROJECTION_COLUMNS, numbers=("layer", "projection"), complete=True)
    return frame if len(frame) else None


def read_directions(folder: Path) -> list[Direction]:
    """The plain estimates of a run folder's directions; all where there are none of that method.

    Beside each plain one stands its variant orthogonalized to the negative mean.
    """
    path = folder / "directions.safetensors"
    if not lexists(path):
        return []
    directions = Directions.load(path)
    return list(directions.of("difference_in_means") or directions)


def read_controls(folder: Path) -> pd.DataFrame | None:
    """separation_controls.csv of a run folder; None where there is none."""
    path = folder / "separation_controls.csv"
    if not lexists(path):
        return None
    numbers = [name for name in CONTROL_COLUMNS if name not in ("point", "position")]
    return read_table(path, CONTROL_COLUMNS, numbers=numbers)


def read_attribution(folder: Path) -> pd.DataFrame | None:
    """attribution.csv of a run folder; None where there is none, or no term of a layer in it."""
    path = folder / "attribution.csv"
    if not lexists(path):
        return None
    numbers = ("index", "difference", "low", "high", "n")
    frame = read_table(path, ATTRIBUTION_COLUMNS, numbers=numbers)
    of_layer = frame["layer"].fillna("").str.strip() != ""  # embeddings have none
    style.require_whole(frame[of_layer], ("layer",), f"rows of {path}")
    frame["layer"] = pd.to_numeric(frame["layer"].where(of_layer))
    return _rows_with(frame, "difference") if frame["layer"].notna().any() else None


def read_layer_effects(folder: Path) -> pd.DataFrame | None:
    """layer_effects.csv of a run folder; None where there is none."""
    path = folder / "layer_effects.csv"
    if not lexists(path):
        return None
    return _rows_with(read_table(path, COLUMNS, numbers=("layer", *COLUMNS[6:])), "change")


def read_tokens(folder: Path) -> pd.DataFrame | None:
    """tokens.csv of a run folder; None where there is none."""
    path, numbers = folder / "tokens.csv", ("index", "layer", "projection")
    return (
        read_table(path, TOKEN_COLUMNS, numbers=numbers, complete=True) if lexists(path) else None
    )


def read_comparable_trials(folder: Path) -> pd.DataFrame | None:
    """trials.csv of a run folder; None where there is none, or none that says what the unedited model scored."""
    path = folder / "trials.csv"
    trials = read_trials(path) if lexists(path) else None
    return trials if trials is not None and is_comparable(trials) else None


def read_beside(folder: Path) -> pd.DataFrame | None:
    """circuit/beside.csv of a run folder, the cosines with other directions; None where there is none."""
    path, numbers = folder / "circuit" / "beside.csv", BESIDE_COLUMNS[2:]
    if not lexists(path):
        return None
    return _rows_with(read_table(path, BESIDE_COLUMNS, numbers=numbers), "cosine")


def _rows_with(frame: pd.DataFrame, column: str) -> pd.DataFrame | None:
    """The rows that have a finite number in this column; None where none has. All rows without the column."""
    kept = frame[np.isfinite(frame[column])] if column in frame else frame
    return kept if len(kept) else None
