"""Scores of a search's own objectives: other scorers' verdicts on answers, and false hits.

Knows: how verdicts become numbers to minimize or maximize. Does not know: trials, Optuna, or how scorers are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from interp_ablate.evaluation.metrics import behaviour_left
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.scoring.behaviour import EXPRESSED, Behaviour, ScoredBehaviour
from interp_ablate.search.objectives import Objective, parse_objectives


class PromptScores(dict[str, float]):
    """A plan's scores by name, means over prompts; `by_prompt` holds the numbers behind some of them."""

    by_prompt: dict[str, list[float]]

    def __init__(
        self, means: Mapping[str, float], by_prompt: Mapping[str, Sequence[float]]
    ) -> None:
        super().__init__(means)
        # six digits are more than a log of trials needs
        self.by_prompt = {
            name: [float(f"{value:.6g}") for value in values] for name, values in by_prompt.items()
        }


# An answer's part in them is whether the behaviour is found.
_FOUND = ("expressions", "false_hits", "kl")


@dataclass(frozen=True, eq=False)
class ObjectiveScores:
    """A search's objectives with the scorers that they need beside the behaviour's own."""

    objectives: tuple[Objective, ...] = field(default_factory=lambda: parse_objectives(()))
    scorers: Mapping[str, Behaviour] = field(default_factory=dict)
    """By the objective's name."""

    @classmethod
    def of(
        cls,
        objectives: Sequence[Objective],
        scorers: Mapping[str, Behaviour],
        behaviour: Behaviour,
    ) -> ObjectiveScores:
        """The objectives; one whose scorer is the behaviour's own becomes that measure, which is scored anyway."""
        kept = dict(scorers)
        taken = []
        for each in objectives:
            same = each.name in kept and each.side == "positive"
            if same and kept[each.name].identity == behaviour.identity:
                del kept[each.name]
                each = replace(each, measure="expressions")
            taken.append(each)
        return cls(tuple(taken), kept)

    @property
    def own(self) -> tuple[Objective, ...]:
        """Those that a bench does not measure anyway."""
        return tuple(
            each for each in self.objectives if each.name in self.scorers or _is_hits(each)
        )

    @property
    def reads_negative(self) -> bool:
        """Whether a trial has to answer the negative prompts too."""
        return any(each.prompts == "negative" for each in self.own)

    @property
    def reads_whole(self) -> bool:
        """Whether one of them depends on all of an answer, even where the behaviour has been found in it."""
        return any(each.measure not in _FOUND for each in self.objectives)

    def values(
        self,
        behaviour: Behaviour,
        outputs: tuple[ModelOutputs, ModelOutputs],
        unedited: tuple[ModelOutputs, ModelOutputs],
    ) -> dict[str, list[float]]:
        """From the column of each of `own` to a number a prompt, of answers to positive and negative prompts."""
        values = {}
        for each in self.own:
            place = int(each.prompts == "negative")
            on, base = outputs[place], unedited[place]
            if _is_hits(each):
                values[each.column] = false_hits(behaviour, on, base)
            else:
                values[each.column] = self._scored(each, on, base)
        return values

    def _scored(self, objective: Objective, on: ModelOutputs, base: ModelOutputs) -> list[float]:
        """Shares from 0 to 1. An answer without a verdict counts as the worst, so that silence gains nothing."""
        scorer = self.scorers[objective.name]
        if isinstance(scorer, ScoredBehaviour):
            worst = 0.0 if objective.maximize else 1.0
            return [worst if v.score is None else v.score / 100 for v in scorer.verdicts(on)]
        shares = scorer(on, base) if objective.maximize else behaviour_left(scorer, on, base)
        return [float(share) for share in shares]


def false_hits(behaviour: Behaviour, on: ModelOutputs, unedited: ModelOutputs) -> list[float]:
    """1 for every answer that shows the behaviour where the unedited model's answer showed none."""
    now, before = behaviour(on, unedited) >= EXPRESSED, behaviour(unedited, unedited) >= EXPRESSED
    return [float(hit) for hit in now & ~before]


def _is_hits(objective: Objective) -> bool:
    return objective.measure == "false_hits"
