"""Settings and loaders that the training commands share.

Knows: how the model that is trained is loaded. Does not know: the trainer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from interp_ablate.cli.options import REPLACE, check_new
from interp_ablate.models.loading import HFLoadingOptions
from interp_ablate.settings import setting


@dataclass(frozen=True)
class TrainingSettings(HFLoadingOptions):
    """Where the result of a training goes, and how its model is loaded."""

    out: str = setting(help="folder of the result")
    force: bool = setting(False, REPLACE)


def load_trainable(settings: TrainingSettings, name: str) -> Any:
    """The model to train.

    Raises:
        ModelError: see `load_model`.
    """
    from interp_ablate.training.trainable_model import load_base

    return load_base(name, **settings.loading)


def prepare(settings: TrainingSettings) -> None:
    """Fail before anything is loaded; keep the trainers below off the network."""
    from interp_ablate.training.trainable_model import require_extra

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    check_new(settings.out, settings.force)
    require_extra()


def estimate_text(value: dict[str, Any], digits: int) -> str:
    """A mean with its interval, such as 1.20 [1.10, 1.30]."""
    if value["mean"] is None:
        return "no value"
    low, high = value["interval"]
    lacking = f" ({value['no_value']} without)" if value.get("no_value") else ""
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{lacking}"
