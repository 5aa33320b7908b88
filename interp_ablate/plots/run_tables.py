"""What figures and charts of a run folder are made of: its projections and its plain directions.

Knows: the files and their columns. Does not know: how anything is drawn.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import Directions
from interp_ablate.plots.directions import PROJECTION_COLUMNS
from interp_ablate.storage.tables import read_table


def read_projections(folder: Path) -> pd.DataFrame | None:
    """projections.csv of a run folder; None where there is none, or no row in it."""
    path = folder / "projections.csv"
    if not path.exists():
        return None
    frame = read_table(path, PROJECTION_COLUMNS, numbers=("layer", "projection"), complete=True)
    return frame if len(frame) else None


def read_directions(folder: Path) -> list[Direction]:
    """The plain estimates of a run folder's directions; all where there are none of that method.

    Beside each plain one stands its variant orthogonalized to the negative mean.
    """
    path = folder / "directions.safetensors"
    if not path.exists():
        return []
    directions = Directions.load(path)
    return list(directions.of("difference_in_means") or directions)
