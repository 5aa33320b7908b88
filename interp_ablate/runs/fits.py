"""Edits fitted by gradient, kept in a folder.

Knows: the rounds of a fit, where it is kept. Does not know: the gradient, run folders.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.runs.validation_bench import FIT_PROMPTS
from interp_ablate.scoring.behaviour import Behaviour
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.edit_space import DirectionKey, fit_name
from interp_ablate.search.gradient_fit import N_KEPT, FitData, NothingToFitError, fit_data, fit_edit

# Rounds of a fit: gradient steps, and how much a nat of KL weighs. First far enough, then ever cheaper.
FIT_ROUNDS = ((14, 120.0), (10, 160.0), (8, 160.0), (8, 160.0), (8, 160.0))

Step: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Opens a part of the work with a name and a number of steps; gives what advances it."""


def load_fitted_edits(folder: Path) -> dict[str, Ablate | Erase]:
    """The edits fitted so far, by name."""
    edits = {}
    for path in sorted(folder.glob("*.json")):
        (edit,) = Plan.load(path)
        assert isinstance(edit, (Ablate, Erase))
        edits[path.stem] = edit
    return edits


@dataclass(eq=False)
class EditFitter:
    """Fits edits on training prompts and keeps them; what the fits share is measured once."""

    model: Model
    train: Any
    """The training prompts, a `ContrastSet`."""
    scorer: Behaviour
    folder: Path
    max_new_tokens: int
    step: Step

    def fit(self, source: DirectionKey, start: Direction) -> str:
        """The name of the edit fitted from a direction on; fitted unless it is there already.

        Raises:
            NothingToFitError: no answer expresses the behaviour, or the fit ends where it changes nothing.
        """
        self._expressions  # noqa: B018  (without any, nothing is fitted)
        name = fit_name(source, start)
        path = self.folder / f"{name}.json"
        if not path.exists():
            edit = self._fitted(start)
            if not any(edit.amounts):
                raise NothingToFitError(
                    f"the fit from {start.name} ended where it changes nothing: whatever makes the "
                    "behaviour less likely costs more elsewhere"
                )
            Plan((edit,)).save(path)
        return name

    @property
    def _expressions(self) -> ExpressionScorer:
        if not isinstance(self.scorer, ExpressionScorer):
            raise NothingToFitError(
                f"no edit was fitted: a fit makes expressions unlikely, and {self.scorer.name} has none"
            )
        return self.scorer

    def _outputs(self, plan: Plan | None, negative_tokens: int) -> list[ModelOutputs]:
        sides = (
            (self.train.positive, self.max_new_tokens),
            (self.train.negative, negative_tokens),
        )
        return [
            ModelOutputs(self.model, side[:FIT_PROMPTS], plan, max_new_tokens=tokens)
            for side, tokens in sides
        ]

    @cached_property
    def _data(self) -> FitData:
        with self.step("answers to training prompts", None):
            positive, negative = self._outputs(None, N_KEPT)
            return fit_data(positive, negative, self._expressions)

    def _fitted(self, direction: Direction) -> Ablate | Erase:
        """The edit after all rounds.

        Each round after the first adds what the model says under the edit so far: other words for the
        same behaviour, and loops.
        """
        layer, data = f"layer {direction.site.layer}", self._data
        edit: Ablate | Erase | None = None
        for number, (steps, weight) in enumerate(FIT_ROUNDS, 1):
            if edit is not None:
                with self.step(f"answers under it, {layer}", None):
                    both = self._outputs(Plan((edit,)), self.max_new_tokens)
                    generate_outputs_together(both)
                    data = data.with_answers(both[0], self._expressions).with_loops(both)
            with self.step(f"fit, round {number}, {layer}", steps) as advance:
                edit = fit_edit(
                    self.model,
                    direction,
                    data,
                    kl_weight=weight,
                    steps=steps,
                    start=edit,
                    on_step=lambda: advance(1),
                )
        assert edit is not None
        return edit
