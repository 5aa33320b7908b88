"""How answers are sampled and how a persona is extracted: the settings, their defaults and help.

Knows: the numbers and their checks. Does not know: models or files. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from interp_ablate.errors import InterpAblateError
from interp_ablate.settings import setting

POOLINGS = ("response_mean", "prompt_last", "prompt_mean")
THRESHOLD, COHERENT = 50.0, 50.0  # of the trait's score and of coherence, as published
FEWEST = 8  # answers a side below which a difference of means says little


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are written; what is sampled depends on every one of these.

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
    """How a persona is extracted. Evaluation questions are left alone."""

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
    min_coherence: float = setting(COHERENT, "coherence below which an answer does not count")
    min_answers: int = setting(FEWEST, "answers that must be left on a side")


DEFAULTS = ExtractionConfig()
