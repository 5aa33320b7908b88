"""Sums of recorded outputs: which modules' outputs add up to a tensor, and with which factors, by least squares.

Knows: recorded calls. Does not know: blocks, embeddings or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from interp_ablate.models.module_calls import Recorded

# A term of a sum that is smaller than this share of the whole is not there, in float32.
TOLERANCE = 2e-5


def solved(
    delta: Tensor, calls: Mapping[str, list[Recorded]], names: Sequence[str]
) -> tuple[dict[str, float], float]:
    """The modules whose outputs sum to `delta`, with their coefficients, and the share left unexplained."""
    columns: dict[str, Tensor] = {}
    for name in names:
        x = calls[name][-1].output
        if x.numel() != delta.numel() or x.shape[-1] != delta.shape[-1]:
            continue
        column = wide_of(x).flatten()
        norm = column.norm()
        # what a dropout or a wrapper hands on is no second summand
        same = any((column - other).norm() <= 1e-6 * norm for other in columns.values())
        if norm > 0 and len(calls[name]) == 1 and not same:
            columns[name] = column
    if not columns:
        return {}, 1.0
    target = wide_of(delta).flatten()
    terms, error = _least_squares(target, columns)
    if not terms:
        return {}, 1.0
    # The smallest set that does: outer modules go first, whose output may hold the stream itself.
    for name in sorted(columns, key=lambda each: each.count(".")):
        small = abs(terms[name]) * columns[name].norm() <= 1e-3 * target.norm()
        without = {each: columns[each] for each in terms if each != name}
        fewer, worse = _least_squares(target, without)
        if worse <= TOLERANCE or (small and worse <= 2 * error):
            terms, error = fewer, worse
    return terms, error


def wide_of(x: Tensor) -> Tensor:
    """In float64, on the CPU: not every device has it, and a model may lie on several."""
    return x.cpu().double()


def _least_squares(target: Tensor, columns: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
    size = float(target.norm())
    if not columns or not size:
        return {}, 1.0
    matrix = torch.stack(list(columns.values()), 1)
    values = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    error = float((matrix @ values - target).norm()) / size
    return dict(zip(columns, map(rounded, values.tolist()))), error


def rounded(factor: float) -> float:
    """A factor of one is one: rounding must not scale what is edited."""
    return 1.0 if abs(factor - 1) < 1e-5 else factor
