"""Verdicts on exchanges: a score, or the reason why there is none.

Knows: verdicts, reversed scorers. Does not know: any one scorer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp_ablate.scoring.exchange import PromptResponse, TextScorer

EMPTY = "empty answer"


@dataclass(frozen=True)
class Verdict:
    """A scorer's verdict on one exchange."""

    score: float | None
    """From 0 to 100, or None."""
    why: str = ""
    """The reason why there is no score, in a few words that can be counted."""
    detail: Mapping[str, Any] = field(default_factory=dict)


class ExplainingScorer(ABC):
    """A `TextScorer` that says why it has no verdict. An empty answer never has one."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]: ...

    @abstractmethod
    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """Verdicts on exchanges with answers that are not empty."""

    def explain(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        """A verdict an exchange, in order.

        Raises:
            InterpAblateError: the scorer itself fails; one exchange without a verdict is no failure.
        """
        asked = [exchange for exchange in exchanges if exchange.answer.strip()]
        verdicts = iter(self.judged(asked)) if asked else iter(())
        return [next(verdicts) if e.answer.strip() else Verdict(None, EMPTY) for e in exchanges]

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        return [verdict.score for verdict in self.explain(exchanges)]


@dataclass(frozen=True)
class ReversedScorer(ExplainingScorer):
    """100 minus another's score; no verdict stays none."""

    scorer: TextScorer

    @property
    def name(self) -> str:
        return f"-{self.scorer.name}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"reversed": self.scorer.identity}

    def judged(self, exchanges: Sequence[PromptResponse]) -> list[Verdict]:
        if isinstance(self.scorer, ExplainingScorer):
            verdicts = self.scorer.explain(exchanges)
        else:
            verdicts = [
                Verdict(score, "" if score is not None else "no verdict")
                for score in self.scorer(exchanges)
            ]
        return [
            Verdict(None if v.score is None else 100 - v.score, v.why, v.detail) for v in verdicts
        ]
