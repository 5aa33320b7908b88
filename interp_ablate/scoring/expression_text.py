"""A list of expressions as a scorer of answers, from 0 to 100.

Knows: how matches become a verdict. Does not know: how expressions are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.expressions import ExpressionScorer, expression_scorer
from interp_ablate.scoring.scorer_kind import ScorerKind, as_flag, as_number
from interp_ablate.scoring.verdicts import ExplainingScorer, Verdict


@dataclass(frozen=True)
class ExpressionTextScorer(ExplainingScorer):
    """100 where the weights of the matches reach the threshold, in proportion below it, 0 for none.

    `detail` says what matched where (`ExpressionScorer.report`).
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
        return [self._verdict(exchange.answer) for exchange in exchanges]

    def _verdict(self, answer: str) -> Verdict:
        share = self.expressions.strength(answer) / self.expressions.threshold
        matches = self.expressions.report([answer])
        return Verdict(100 * min(1.0, max(0.0, share)), detail={"matches": matches})


def _make(name: str, options: dict[str, Any]) -> ExpressionTextScorer:
    languages = options.get("languages", ())
    scorer = expression_scorer(
        name,
        languages=languages.split(",") if isinstance(languages, str) else languages,
        scope=options.get("scope", "whole"),
        negation=as_flag(options.get("negation", False)),
        own_speech=as_flag(options.get("own_speech", False)),
        threshold=as_number("threshold", options.get("threshold", 1.0)),
    )
    return ExpressionTextScorer(scorer, Path(name).stem)


KIND = ScorerKind(
    _make,
    "expressions:NAME_OR_FILE",
    options=("languages", "scope", "negation", "own_speech", "threshold"),
    cost=1,
)
