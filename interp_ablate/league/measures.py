"""What a plan does to test prompts, one number a prompt, several plans answered in one batch.

Knows: rates, KLs, repetition under plans. Does not know: methods, journals or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from interp_ablate.edits.plan import Plan
from interp_ablate.evaluation.float32_kl import float32_first_token_kl
from interp_ablate.evaluation.metrics import (
    answer_metrics,
    behaviour_left,
    continuation_scores,
)
from interp_ablate.evaluation.outputs import ModelOutputs, generate_outputs_together
from interp_ablate.models.model import Model
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.scoring.behaviour import Behaviour

Side = Literal["removal", "induction"]
SIDES: tuple[Side, ...] = ("removal", "induction")
DIGITS = 6  # of what a journal keeps of one prompt


class TestBench:
    """The test prompts of one behaviour and seed, with the unedited model's answers."""

    __test__ = False  # no test of pytest's

    def __init__(
        self, model: Model, test: ContrastSet, scorer: Behaviour, *, max_new_tokens: int
    ) -> None:
        self.scorer = scorer
        self.positive, self.negative = (
            ModelOutputs(model, side, max_new_tokens=max_new_tokens)
            for side in (test.positive, test.negative)
        )
        generate_outputs_together([self.positive, self.negative])

    def unedited(self) -> dict[str, Any]:
        """The unedited model's own numbers: the rate on both sides, repetition of all its answers."""
        return {
            "removal": _numbers(self.scorer(self.positive, self.positive)),
            "induction": _numbers(self.scorer(self.negative, self.negative)),
            "repetition": _numbers(
                [
                    *answer_metrics(self.positive)["repetition"],
                    *answer_metrics(self.negative)["repetition"],
                ]
            ),
        }

    def under(self, plans: Sequence[tuple[Plan, Side]]) -> list[dict[str, Any]]:
        """The numbers of each plan; the answers under all of them are written in one batch.

        A removal is answered on the positive prompts, an induction on the negative ones. KLs are of the negative
        prompts: at the first token, and along the unedited model's own answers.
        """
        asked = [
            (self.positive if side == "removal" else self.negative).with_plan(plan)
            for plan, side in plans
        ]
        alone = [i for i, (plan, _) in enumerate(plans) if any(e.norm_preserving for e in plan)]
        generate_outputs_together([each for i, each in enumerate(asked) if i not in alone])
        kls = float32_first_token_kl(self.negative, [plan for plan, _ in plans])
        return [
            self._numbers(plan, side, outputs, kl)
            for (plan, side), outputs, kl in zip(plans, asked, kls, strict=True)
        ]

    def _numbers(self, plan: Plan, side: Side, outputs: ModelOutputs, kl: Any) -> dict[str, Any]:
        baseline = self.positive if side == "removal" else self.negative
        rate = (
            behaviour_left(self.scorer, outputs, baseline)
            if side == "removal"
            else self.scorer(outputs, baseline)
        )
        along = continuation_scores(self.negative.with_plan(plan), self.negative)
        return {
            "rate": _numbers(rate),
            "kl": _numbers(kl),
            "kl_answers": _numbers(along["kl_continuation"]),
            "repetition": _numbers(answer_metrics(outputs)["repetition"]),
        }


def _numbers(values: Any) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
