"""The settings of a screening: their defaults, their checks and their help.

Knows: the settings and their checks. Does not know: models or files. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from interp_ablate.errors import RunError
from interp_ablate.settings import setting

MEASURES = ("projection", "difference", "adjusted")


@dataclass(frozen=True)
class ScreeningSettings:
    """Settings of the measurement of samples.

    Raises:
        RunError: a number below 1.
    """

    own: bool = setting(
        True, "projection alone: do not answer the prompts (greedily) with the model itself"
    )
    max_new_tokens: int = setting(64, "tokens of the model's own answer, at most")
    response_tokens: int | None = setting(
        None, "of a sample's answer, the first so many (default: all that fit the context)"
    )
    rows: int = 64
    """Samples that are in memory, and on disk, at a time."""
    batch_size: int | None = None
    """Rows of a forward pass; by default as many as fit."""

    def __post_init__(self) -> None:
        sizes = {"max_new_tokens": self.max_new_tokens, "rows": self.rows}
        if self.response_tokens is not None:
            sizes["response_tokens"] = self.response_tokens
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        if wrong:
            raise RunError(f"{', '.join(wrong)}: accepted are whole numbers from 1")

    @property
    def measure(self) -> str:
        """The column that samples are ranked and flagged by, unless another is asked for."""
        return "adjusted" if self.own else "projection"

    def check_measure(self, name: str) -> None:
        """Refuse a column by which samples cannot be ranked.

        Raises:
            RunError: an unknown one, or one that needs the model's own answers.
        """
        accepted = MEASURES if self.own else MEASURES[:1]
        if name not in accepted:
            raise RunError(
                f"cannot rank by {name!r}: accepted are {', '.join(accepted)}"
                + ("" if self.own else " (the others need the model's own answers)")
            )
