"""How much of a trait a model shows.

Knows: scores and projections on held-out questions. Does not know: training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp_ablate.activations.activations import RESPONSE_MEAN
from interp_ablate.activations.collection import collect
from interp_ablate.directions.direction import Direction
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import continuation_scores
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse, TextScorer
from interp_ablate.training.rows import TrainingRow

_POSITIONS = (RESPONSE_MEAN, "-1")


# ---- what a model's trait is -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MeasuredTrait:
    """A model's greedy answers to evaluation questions, and how much of the trait is in them.

    `projection` is that of the mean over the answer's tokens on the direction, `prompt_projection` that of
    the prompt's last token, both over the direction's own norm: 1 is the distance between the two means
    that made the vector. `score` is the scorer's, 0 to 100. None where an answer is empty, or there is no
    verdict. `kl` is the KL a token to the model before, over its answers, in nats; None where such an
    answer is empty.
    """

    name: str
    answers: tuple[str, ...]
    score: tuple[float | None, ...]
    projection: tuple[float | None, ...]
    prompt_projection: tuple[float | None, ...]
    kl: tuple[float | None, ...] = ()


@dataclass(frozen=True, eq=False)
class TraitMeasure:
    """What every model of a comparison is measured with."""

    direction: Direction
    questions: tuple[str, ...]
    scorer: TextScorer
    max_new_tokens: int = 48


def measure_trait(
    name: str, model: Model, by: TraitMeasure, *, before: ModelOutputs | None = None
) -> tuple[MeasuredTrait, ModelOutputs]:
    """Answer the questions and measure the trait in the answers; nothing is added to the stream.

    Raises:
        InterpAblateError: a scorer that does not give one number an answer.
    """
    prompts = [Prompt(question) for question in by.questions]
    evidence = ModelOutputs(model, prompts, max_new_tokens=by.max_new_tokens)
    texts = evidence.texts
    scores = by.scorer([PromptResponse(p, text) for p, text in zip(prompts, texts, strict=True)])
    if len(scores) != len(texts):
        raise RunError(f"the scorer {by.scorer.name!r} gave {len(scores)} scores for {len(texts)}")
    answered = [i for i, text in enumerate(texts) if text.strip()]
    site, unit = by.direction.site, by.direction.vector / by.direction.norm
    along: dict[str, list[float | None]] = {p: [None] * len(texts) for p in _POSITIONS}
    if answered:
        responses = [texts[i] for i in answered]
        asked = [prompts[i] for i in answered]
        values = collect(model, asked, [site], _POSITIONS, responses=responses)
        for position in _POSITIONS:
            found = values.at(site, position).double().cpu() @ unit
            for i, value in zip(answered, found.tolist(), strict=True):
                along[position][i] = value
    kl: tuple[float | None, ...] = ()
    if before is not None:
        kls = continuation_scores(evidence, before)["kl_continuation"].tolist()
        # an empty answer has no token at which the two could differ
        kl = tuple(v if g.tokens else None for v, g in zip(kls, before.generations, strict=True))
    verdicts = tuple(v if v is not None and math.isfinite(v) else None for v in scores)
    measured = MeasuredTrait(
        name, tuple(texts), verdicts, tuple(along[RESPONSE_MEAN]), tuple(along["-1"]), kl
    )  # fmt: skip
    return measured, evidence


@torch.no_grad()
def answer_loss(hf: Any, rows: Sequence[TrainingRow]) -> float | None:
    """Mean negative log-likelihood of the answers' tokens in nats, all rows' tokens alike; None for no rows."""
    device, total, count = next(hf.parameters()).device, 0.0, 0
    hf.eval()
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]], device=device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=device) < len(row.prompt), -100)
        total += float(hf(input_ids=ids, labels=labels).loss) * len(row.answer)
        count += len(row.answer)
    return total / count if count else None
