"""Edits fitted by gradient, kept in a folder.

Knows: the rounds of a fit, where it is kept. Does not know: the gradient, run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, TypeAlias

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.kinds import Ablate, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.runs.validation_bench import FIT_PROMPTS
from interp_ablate.scoring.behaviour import Behaviour
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.edit_space import DirectionKey, fit_name
from interp_ablate.search.gradient_fit import N_KEPT, FitData, NothingToFitError, fit_data, fit_edit

# Rounds of a fit: gradient steps, and how much a nat of KL weighs. First far enough, then ever cheaper.
FIT_ROUNDS = ((14, 120.0), (10, 160.0), (8, 160.0), (8, 160.0), (8, 160.0))

Step: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Opens a part of the work with a name and a number of steps; gives what advances it."""


class Rounds(Protocol):
    """How many of its rounds a fit gets."""

    def more(self, name: str, done: int) -> bool:
        """Whether the fit of that name goes on, or begins, after so many rounds."""
        ...

    def keep(self, name: str, done: int) -> None:
        """Told how many rounds a fit had, before the edit is kept."""
        ...


class AllRounds:
    """Every fit gets all of FIT_ROUNDS."""

    def more(self, name: str, done: int) -> bool:
        return True

    def keep(self, name: str, done: int) -> None:
        pass


def load_fitted_edits(folder: Path) -> dict[str, Ablate | Erase]:
    """The edits fitted so far, by name.

    Raises:
        PlanError: a file that holds something else than one `Ablate` or `Erase`.
    """
    edits: dict[str, Ablate | Erase] = {}
    for path in sorted(folder.glob("*.json")):
        plan = Plan.load(path)
        edit = plan.edits[0] if len(plan) == 1 else None
        if not isinstance(edit, (Ablate, Erase)):
            raise PlanError(
                f"{path} is no fitted edit, which is one Ablate or Erase; it holds {plan!r:.120}: move it away"
            )
        edits[path.stem] = edit
    return edits


@dataclass(frozen=True, eq=False)
class FitPrompts:
    """The prompts that a fit is made on, and how long their answers are."""

    model: Model
    train: ContrastSet
    max_new_tokens: int

    def outputs(self, plan: Plan | None, negative_tokens: int) -> list[ModelOutputs]:
        """Outputs of the positive and of the negative prompts under a plan; nothing is run yet."""
        sides = (
            (self.train.positive, self.max_new_tokens),
            (self.train.negative, negative_tokens),
        )
        return [
            ModelOutputs(self.model, side[:FIT_PROMPTS], plan, max_new_tokens=tokens)
            for side, tokens in sides
        ]

    def data(self, expressions: ExpressionScorer) -> FitData:
        """What the fit needs of the unedited model.

        Raises:
            NothingToFitError: no answer expresses the behaviour.
        """
        positive, negative = self.outputs(None, N_KEPT)
        return fit_data(positive, negative, expressions)


def _untold(name: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


def fitted_in_rounds(
    prompts: FitPrompts,
    data: FitData,
    expressions: ExpressionScorer,
    direction: Direction,
    step: Step = _untold,
) -> Iterator[Ablate | Erase]:
    """The edit after each of FIT_ROUNDS, from a direction on; whoever has enough stops asking.

    Each round after the first adds what the model says under the edit so far: other words for the
    same behaviour, and loops.
    """
    layer = f"layer {direction.site.layer}"
    edit: Ablate | Erase | None = None
    for number, (steps, weight) in enumerate(FIT_ROUNDS, 1):
        if edit is not None:
            with step(f"answers under it, {layer}", None):
                both = prompts.outputs(Plan((edit,)), prompts.max_new_tokens)
                generate_outputs_together(both)
                data = data.with_answers(both[0], expressions).with_loops(both)
        with step(f"fit, round {number}, {layer}", steps) as advance:
            edit = fit_edit(
                prompts.model,
                direction,
                data,
                kl_weight=weight,
                steps=steps,
                start=edit,
                on_step=partial(advance, 1),
            )
        yield edit


@dataclass(eq=False)
class EditFitter:
    """Fits edits on training prompts and keeps them; what the fits share is measured once."""

    prompts: FitPrompts
    scorer: Behaviour
    folder: Path
    step: Step

    def fit(
        self, source: DirectionKey, start: Direction, rounds: Rounds | None = None
    ) -> str | None:
        """The name of the edit fitted from a direction on; fitted unless it is there already. None where it got no round.

        Args:
            rounds: decides how many the fit gets; all by default.

        Raises:
            NothingToFitError: no answer expresses the behaviour, or the fit ends where it changes nothing.
        """
        self._expressions  # noqa: B018  (without any, nothing is fitted)
        name = fit_name(source, start)
        path = self.folder / f"{name}.json"
        if path.exists():
            return name
        rounds, done, edit = rounds or AllRounds(), 0, None
        if rounds.more(name, done):
            for edit in fitted_in_rounds(  # noqa: B007
                self.prompts, self._data, self._expressions, start, self.step
            ):
                done += 1
                if not rounds.more(name, done):
                    break
        rounds.keep(name, done)
        if edit is None:
            return None
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

    @cached_property
    def _data(self) -> FitData:
        with self.step("answers to training prompts", None):
            return self.prompts.data(self._expressions)
