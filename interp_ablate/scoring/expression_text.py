"""Expression lists as a scorer of texts, 0 or 100.

Knows: matches as verdicts. Does not know: lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.verdicts import ExplainingScorer, Verdict

# ---- expressions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpressionTextScorer(ExplainingScorer):
    """100 where the weights of what is found reach the threshold, in proportion below it, 0 for nothing.

    `detail` has what matched where (`ExpressionScorer.report`).
    """

    expressions: ExpressionScorer
    label: str = ""

    @property
    def name(self) -> str:
        return f"expressions:{self.label or self.expressions.label}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "expressions", **self.expressions.identity}

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        found = []
        for exchange in exchanges:
            share = self.expressions.strength(exchange.answer) / self.expressions.threshold
            score = 100 * min(1.0, max(0.0, share))
            found.append(
                Verdict(score, detail={"matches": self.expressions.report([exchange.answer])})
            )
        return found
