"""Exchanges: a prompt and an answer to it, and what scores them.

Knows: the one form in which text is handed to judges, classifiers, lexicons and filters, and their scale.
Does not know: models, where exchanges come from (`persona`, `chat_data`), any scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from interp_ablate.prompts.prompt import Prompt


@dataclass(frozen=True)
class PromptResponse:
    """A prompt (with its system prompt, if any) and the answer that was given to it."""

    prompt: Prompt
    answer: str


class TextScorer(Protocol):
    """Scores exchanges from 0 (the trait is absent) to 100 (it is strong); None where there is no verdict.

    `identity` is everything that the score depends on, as JSON: it keys caches and goes into manifests.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]: ...
