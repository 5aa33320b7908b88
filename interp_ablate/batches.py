"""Batches: token lists of different lengths as left-padded tensors, sorted by length, and back.

Knows: padding, attention masks, positions counted from each row's own first token, shared prefixes.
Does not know: models or text; rows are lists of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Left-padded rows. `index[i]` is the place of row i in the caller's list.

    `row_lengths` counts the tokens of each whole row, `prompt_lengths` those that are prompt (what
    follows was generated); both include a shared prefix that the batch itself does not hold.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    row_lengths: Int[Tensor, " batch"]
    prompt_lengths: Int[Tensor, " batch"]
    index: tuple[int, ...]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Position of every token in its own row; 0 on padding."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)


def pad_left(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows aligned at their last token, and the mask of what is real. Padding is token 0, masked."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return tokens, mask


def batches(
    rows: Sequence[Sequence[int]],
    *,
    size: int,
    prompt_lengths: Sequence[int] | None = None,
    prefix: int = 0,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Rows without their first `prefix` tokens, in batches of at most `size`, the longest first."""
    lengths = list(prompt_lengths or [len(row) for row in rows])
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    found = []
    for start in range(0, len(order), size):
        index = tuple(order[start : start + size])
        tokens, mask = pad_left([rows[i][prefix:] for i in index])
        found.append(
            Batch(
                tokens.to(device),
                mask.to(device),
                torch.tensor([len(rows[i]) for i in index], device=device),
                torch.tensor([lengths[i] for i in index], device=device),
                index,
            )
        )
    return found


def common_prefix(rows: Sequence[Sequence[int]], *, keep: int) -> int:
    """How many leading tokens all rows share, leaving at least `keep` tokens of each row."""
    limit = min(len(row) for row in rows) - keep
    first = rows[0]
    for i in range(max(limit, 0)):
        if any(row[i] != first[i] for row in rows):
            return i
    return max(limit, 0)
