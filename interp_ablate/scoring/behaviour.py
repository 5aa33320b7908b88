"""A behaviour as a rate: what any scorer of answers says of a model's outputs, from 0 to 1.

Knows: how verdicts become shares, and what an answer without a verdict counts as. Does not know: models, trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from interp_ablate.errors import RunError
from interp_ablate.scoring.exchange import (
    EMPTY,
    UNANSWERED,
    ExplainingScorer,
    PromptResponse,
    TextScorer,
    Verdict,
    verdicts_of,
)
from interp_ablate.scoring.expressions import ExpressionScorer, ExpressionTextScorer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EXPRESSED = 0.5  # the share from which an answer expresses the behaviour
# characters at the end of a text that its next tokens may change: half characters, accents, joined contractions
_UNSURE = 8


class HasExchanges(Protocol):
    """Outputs of a model, as far as scorers of exchanges need them."""

    @property
    def exchanges(self) -> Sequence[PromptResponse]: ...

    @property
    def texts(self) -> Sequence[str]: ...


@dataclass(frozen=True, eq=False)
class ScoredBehaviour:
    """A text scorer as the rate of a behaviour: its score over 100, for each answer; every answer is scored once.

    An answer without a verdict (an empty one, or one that the scorer cannot judge) counts as one without the
    behaviour. Scores that a server owes are an error: what was answered is kept, and the next call goes on.

    Raises:
        RunError: a server that gave no answer.
    """

    scorer: TextScorer
    _known: dict[PromptResponse, Verdict] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self.scorer.name

    @property
    def identity(self) -> dict[str, Any]:
        """Everything a rate depends on, as JSON."""
        return {"scorer": self.scorer.identity}

    @property
    def spent(self) -> str:
        """What the scores cost so far, for a person; "" where that is nothing."""
        return self.scorer.spent if isinstance(self.scorer, ExplainingScorer) else ""

    def verdicts(self, outputs: HasExchanges) -> list[Verdict]:
        """The scorer's verdict on each answer."""
        exchanges = list(outputs.exchanges)
        new = list(dict.fromkeys(each for each in exchanges if each not in self._known))
        for number, verdict in verdicts_of(self.scorer, new):
            if verdict.why == UNANSWERED:
                raise RunError(
                    f"{self.name} gave no verdict: {verdict.detail.get('reply', UNANSWERED)}. What it answered is "
                    "kept; run the same command again when the server is there"
                )
            self._known[new[number]] = verdict
        return [self._known[each] for each in exchanges]

    def __call__(self, outputs: HasExchanges, baseline: HasExchanges) -> Float[Tensor, " prompt"]:
        import torch

        return torch.tensor([(v.score or 0.0) / 100 for v in self.verdicts(outputs)])


Behaviour = ExpressionScorer | ScoredBehaviour


def behaviour_of(scorer: TextScorer) -> Behaviour:
    """A scorer of texts as what finds a behaviour; a list of expressions as itself."""
    return (
        scorer.expressions if isinstance(scorer, ExpressionTextScorer) else ScoredBehaviour(scorer)
    )


def settles(behaviour: Behaviour) -> Callable[[str], bool] | None:
    """A function that is true of a text which expresses the behaviour whatever is written after it.

    The last characters are waited for, which the next ones may change. None where no beginning of a text is enough:
    what follows may end the match of a regular expression, lower a sum of weights, or make all of it a quotation.
    Other scorers read whole answers. One exception is not waited for: a model that does not think, and yet writes the
    tag that closes a thought after the behaviour, has an answer that begins there.
    """
    if isinstance(behaviour, ScoredBehaviour) or behaviour.own_speech:
        return None
    if any(each.regex or each.weight < 0 for each, _ in behaviour._compiled):
        return None

    def settled(text: str) -> bool:
        if not behaviour.reached(behaviour.strength(text)):
            return False
        found = (m.weight for m in behaviour.matches(text) if m.place[1] <= len(text) - _UNSURE)
        return behaviour.reached(math.fsum(found))

    return settled


def told(behaviour: Behaviour, outputs: HasExchanges) -> list[dict[str, Any]]:
    """For each answer: expressed, matches (of expressions), and of other scorers score and why there is none."""
    if isinstance(behaviour, ScoredBehaviour):
        return [
            {
                "expressed": (v.score or 0.0) / 100 >= EXPRESSED,
                "matches": [],
                "score": v.score,
                "no_verdict": v.why if v.score is None else "",
            }
            for v in behaviour.verdicts(outputs)
        ]
    return [
        {
            "expressed": behaviour.outcome(text) == "expressed",
            "matches": [match.expression for match in behaviour.matches(text)],
        }
        for text in outputs.texts
    ]


def lacking(rows: Sequence[dict[str, Any]]) -> int:
    """How many answers of `told` have no verdict, empty ones left out."""
    return sum(row.get("no_verdict", "") not in ("", EMPTY) for row in rows)
