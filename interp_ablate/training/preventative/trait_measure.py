"""A trait measured in a model's answers: its score, its projection, and the KL to the model before.

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
from interp_ablate.evaluation.metrics import answer_metrics
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import TextScorer
from interp_ablate.training.rows import TrainingRow

_POSITIONS = (RESPONSE_MEAN, "-1")


@dataclass(frozen=True, eq=False)
class MeasuredTrait:
    """A model's greedy answers to evaluation questions, and how much of the trait is in them.

    A number is None where an answer is empty, or there is no verdict on it.
    """

    name: str
    answers: tuple[str, ...]
    score: tuple[float | None, ...]
    """The scorer's, 0 to 100."""
    projection: tuple[float | None, ...]
    """The projection of the mean over the answer's tokens on the direction, in units of the direction's norm:
    1 is the distance between the two means that made it."""
    prompt_projection: tuple[float | None, ...]
    """The projection of the prompt's last token, in the same units."""
    kl: tuple[float | None, ...] = ()
    """Mean KL a token to the model before, over that model's answers, in nats."""


@dataclass(frozen=True, eq=False)
class TraitMeasure:
    """The direction, questions and scorer that every model of a comparison is measured with."""

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
    outputs = ModelOutputs(model, prompts, max_new_tokens=by.max_new_tokens)
    values = answer_metrics(outputs, before, {"score": lambda own, _: by.scorer(own.exchanges)})
    if len(values["score"]) != len(prompts):
        raise RunError(
            f"the scorer {by.scorer.name!r} gave {len(values['score'])} scores for {len(prompts)}"
        )
    verdicts = [v if v is not None and math.isfinite(v) else None for v in values["score"]]
    mean, last = _projections(model, by.direction, outputs)
    kl = tuple(values["kl_continuation"]) if before is not None else ()
    measured = MeasuredTrait(name, tuple(outputs.texts), tuple(verdicts), mean, last, kl)
    return measured, outputs


def _projections(
    model: Model, direction: Direction, outputs: ModelOutputs
) -> list[tuple[float | None, ...]]:
    """Projections of the answers' means, and of the prompts' last tokens, over the direction's norm."""
    answered = [i for i, text in enumerate(outputs.texts) if text.strip()]
    prompts = [outputs.prompts[i] for i in answered]
    responses = [outputs.texts[i] for i in answered]
    along: list[list[float | None]] = [[None] * len(outputs.texts) for _ in _POSITIONS]
    if answered:
        unit = direction.vector / direction.norm
        values = collect(model, prompts, [direction.site], _POSITIONS, responses=responses)
        for position, projections in zip(_POSITIONS, along, strict=True):
            answers = values.at(direction.site, position).cpu().double() @ unit
            for i, value in zip(answered, answers.tolist(), strict=True):
                projections[i] = value
    return [tuple(projections) for projections in along]


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
