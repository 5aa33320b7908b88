"""Answers token by token: what a generation is.

Knows: texts and tokens. Does not know: hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

Choose = Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt: tokens without the end-of-sequence token, and text.

    `finished` is True where it ended by itself, False where the limit of new tokens cut it.
    """

    tokens: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class MonitoredToken:
    """One generated token and the text it adds: "" until a character of several tokens is whole."""

    id: int
    text: str

    def __str__(self) -> str:
        return self.text
