"""Exchanges: a prompt and the answer to it, in the form in which every scorer takes them.

Knows: the scale of scores. Does not know: models, where exchanges come from, any scorer.
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
    """Scores exchanges from 0 (the trait is absent) to 100 (it is strong); None where there is no verdict."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the score depends on, as JSON. It keys caches and goes into manifests."""
        ...

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]: ...
