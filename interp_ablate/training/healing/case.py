"""The inputs of a healing: the edited checkpoint with its original and its plan, and the run's settings.

Knows: how a checkpoint's plan is read. Does not know: training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.models.model import Model
from interp_ablate.storage.provenance import MANIFEST
from interp_ablate.training.healing.held_out import HeldOut
from interp_ablate.training.healing.preferences import PreferencePair
from interp_ablate.training.healing.settings import DEFAULTS, HealingConfig
from interp_ablate.training.recipe import RECIPE, LoraRecipe
from interp_ablate.training.trainable_model import TrainableModel
from interp_ablate.weights.plan_to_weights import WeightPlan, weight_plan


@dataclass(frozen=True, eq=False)
class EditedCheckpoint:
    """An edited checkpoint and its origin."""

    edited: TrainableModel
    original: TrainableModel | None = None
    """The model before the edit, where it is known."""
    plan: Plan | None = None
    """The edit, where the checkpoint's manifest holds it."""

    @cached_property
    def edited_model(self) -> Model:
        """The edited model to ask and measure; the one that is trained stays as it is."""
        return self.edited.copy().model

    @cached_property
    def original_model(self) -> Model:
        """The original to ask and measure.

        Raises:
            RunError: it was not given.
        """
        if self.original is None:
            raise RunError("the original model is needed here: give --original MODEL")
        return self.original.copy().model

    @cached_property
    def weights(self) -> WeightPlan:
        """The edit, tensor by tensor.

        Raises:
            RunError: the checkpoint's manifest holds no plan.
            ExportError: see `weight_plan`.
        """
        if self.plan is None or not len(self.plan):
            raise RunError(
                "the checkpoint has no manifest with a plan, so what the edit is cannot be known: "
                "--preserve-edit freeze-writers or none"
            )
        state = self.edited.hf.state_dict()
        return weight_plan(
            self.plan, self.edited.hf.config, list(state), state.__getitem__, tied="untie"
        )


def read_plan(folder: str | Path) -> tuple[Plan | None, dict[str, Any]]:
    """Read the plan and the source in an exported checkpoint's manifest; (None, {}) without a manifest.

    Raises:
        RunError: a manifest that cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None, {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("kind") != "checkpoint":
            raise RunError(
                f"{path} is of a {manifest.get('kind')}; an exported checkpoint is healed"
            )
        plan = Plan.from_dict(manifest["plan"])
        source = dict(manifest["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}. Export the checkpoint again") from error
    return (plan if len(plan) else None), source


@dataclass(frozen=True, eq=False)
class HealingRun:
    """The preferences that are learned, the settings, and the prompts that are measured before and after."""

    pairs: Sequence[PreferencePair]
    healing: HealingConfig = DEFAULTS
    recipe: LoraRecipe = RECIPE
    held_out: HeldOut | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """More about the preferences, for the report."""
    qlora: bool = False
    """The configuration for axolotl loads the checkpoint in 4 bits; the training here never does."""
