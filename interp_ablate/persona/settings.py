"""The settings of sampling, extraction, steering and baking, with their defaults and help.

Knows: the numbers and their checks. Does not know: models or files. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from interp_ablate.errors import InterpAblateError
from interp_ablate.settings import setting

POOLINGS = ("response_mean", "prompt_last", "prompt_mean")
THRESHOLD, MIN_COHERENCE = 50.0, 50.0  # of the trait's score and of coherence, as published
MIN_ANSWERS = 8  # a side; a difference of means of fewer says little


@dataclass(frozen=True)
class SamplingConfig:
    """The settings of sampled answers; what is sampled depends on every one of them.

    At temperature 0 answers are greedy and the seed means nothing. The published rollouts have temperature 1, at
    which a small model rambles.

    Raises:
        InterpAblateError: no tokens, no rows, a negative temperature.
    """

    max_new_tokens: int = setting(48, "tokens of an answer, at most")
    temperature: float = setting(0.7, "of the rollouts")
    seed: int = setting(0, "of the sampling")
    batch_size: int = setting(64, "answers, under one system prompt, that are written together")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2 or self.batch_size < 1 or not 0 <= self.temperature < math.inf:
            raise InterpAblateError(
                "answers need at least 2 new tokens, a batch of at least 1 and a temperature from 0; got "
                f"{self.max_new_tokens}, {self.batch_size} and {self.temperature}"
            )


@dataclass(frozen=True)
class ExtractionConfig:
    """The settings of an extraction. Evaluation questions are left alone."""

    extraction_questions: int = setting(
        10, "that make the vector, under every pair of system prompts"
    )
    selection_questions: int = setting(6, "other questions, which choose the layer")
    samples: int = setting(3, "answers to each question and system prompt")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    layers: tuple[int, int] | None = setting(
        None, "A-B, both included: candidates (default: ten at most, at 20 to 90% of the depth)"
    )
    coefficients: tuple[float, ...] = setting((1.0, 2.0), "comma-separated candidates")
    pooling: str = setting("response_mean", "which activations of an answer", choices=POOLINGS)
    threshold: float = setting(THRESHOLD, "trait score that divides the sides")
    min_coherence: float = setting(MIN_COHERENCE, "coherence below which an answer does not count")
    min_answers: int = setting(MIN_ANSWERS, "answers that must be left on a side")


DEFAULTS = ExtractionConfig()
GREEDY = SamplingConfig(temperature=0.0)
COEFFICIENTS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


@dataclass(frozen=True)
class SteeringConfig:
    """The settings of a curve of trait and coherence against the coefficient.

    Raises:
        InterpAblateError: no coefficients, twice the same one, or fewer than 0 controls.
    """

    coefficients: tuple[float, ...] = setting(
        COEFFICIENTS, "comma-separated; write --coefficients=-1,0,1 for negative ones"
    )
    questions: int | None = setting(None, "evaluation questions (default: all)")
    controls: int = setting(1, "random directions of the same norm at the same site")
    samples: int = setting(1, "answers to each question, where the sampling has a temperature")
    sampling: SamplingConfig = GREEDY

    def __post_init__(self) -> None:
        if (
            not self.coefficients
            or len(set(self.coefficients)) < len(self.coefficients)
            or self.controls < 0
        ):
            raise InterpAblateError(
                f"coefficients {', '.join(f'{c:g}' for c in self.coefficients) or 'none'}, {self.controls} "
                "controls: give different coefficients, and 0 controls or more"
            )


@dataclass(frozen=True)
class BakingConfig:
    """The settings of a baked persona."""

    coefficient: float | None = setting(None, "default: the persona's own")
    questions: int | None = setting(None, "evaluation questions (default: all)")
    sampling: SamplingConfig = GREEDY
    overwrite: bool = False
    """Replace an export that is there already."""


STEERING, BAKING = SteeringConfig(), BakingConfig()
