"""Who may play in a league: behaviours whose prompts suffice and fit the model, and whose answers can be scored.

Knows: what is checked before any work. Does not know: methods, or how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.league.behaviours import LeagueBehaviour, behaviour_named
from interp_ablate.league.settings import LeagueSettings
from interp_ablate.prompts.contrast_set import Split
from interp_ablate.scoring.behaviour import ScoredBehaviour
from interp_ablate.scoring.exchange import PromptResponse

if TYPE_CHECKING:
    from interp_ablate.models.model import Model


def split_of(behaviour: LeagueBehaviour, settings: LeagueSettings, seed: int) -> Split:
    """The prompts of the three parts under one seed."""
    return behaviour.split(
        seed,
        n_train=settings.n_train,
        n_validation=settings.n_validation,
        n_test=settings.n_test,
    )


def named_behaviours(settings: LeagueSettings) -> list[LeagueBehaviour]:
    """The behaviours that the settings name.

    Raises:
        RunError: one message with every name that is none, and why.
    """
    found: list[LeagueBehaviour] = []
    wrong: dict[str, str] = {}
    for name in settings.behaviours:
        try:
            found.append(behaviour_named(name))
        except InterpAblateError as error:
            wrong[name] = str(error)
    _refuse(wrong)
    return found


def check_behaviours(
    behaviours: Sequence[LeagueBehaviour], settings: LeagueSettings, model: Model | None = None
) -> None:
    """Refuse behaviours that cannot be played, before any work.

    Each needs prompts for its three parts and a scorer that reads an answer; with a model, prompts that its chat
    template renders and that leave room for an answer.

    Raises:
        RunError: one message with every behaviour that cannot be played, and why.
    """
    wrong: dict[str, str] = {}
    for behaviour in behaviours:
        try:
            split_of(behaviour, settings, settings.seed_numbers[0])
            _check_scorer(behaviour)
            if model is not None:
                _check_prompts(behaviour, settings, model)
        except InterpAblateError as error:
            wrong[behaviour.name] = str(error)
    _refuse(wrong)


def _check_scorer(behaviour: LeagueBehaviour) -> None:
    """Let the scorer read one answer."""
    scorer = behaviour.scorer
    if isinstance(scorer, ScoredBehaviour):
        scorer.verdicts(_Answers([PromptResponse(behaviour.contrast.positive[0], "Yes, it is.")]))


def _check_prompts(behaviour: LeagueBehaviour, settings: LeagueSettings, model: Model) -> None:
    from interp_ablate.models.rendering import require_room

    contrast = behaviour.contrast
    tokens = settings.max_new_tokens if behaviour.scorer is not None else 1
    require_room(model, [*contrast.positive, *contrast.negative], tokens)


class _Answers:
    """Answers that no model gave."""

    def __init__(self, exchanges: Sequence[PromptResponse]) -> None:
        self.exchanges = exchanges
        self.texts = [each.answer for each in exchanges]


def _refuse(wrong: dict[str, str]) -> None:
    if len(wrong) == 1:
        raise RunError("{}: {}".format(*next(iter(wrong.items()))))
    if wrong:
        lines = [f"{len(wrong)} behaviours cannot be played:"]
        raise RunError("\n".join(lines + [f"- {name}: {why}" for name, why in wrong.items()]))
