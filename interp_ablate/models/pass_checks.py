"""Checks of what a model's passes may share: padding, a prefix, a KV cache; on fixed tokens, once a length.

A model may measure distances by index (ALiBi, windows, chunks), scale its positions by the longest row (dynamic
and long RoPE), ignore the mask, or swallow the cache that it is given. Nothing of that is believed from names or
configs: rows of fixed tokens are run as they would be run together, and held against each of them alone.

Measured when it is first needed, for twice the length needed at most: a model that never pads, shares or
decodes is not measured, and no window is longer than what was measured.

Knows: rows of fixed tokens, the rounding of each dtype. Does not know: plans, prompts, or why a model differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.models.backends.backend import Backend, ForwardCall
from interp_ablate.models.backends.checks import fixed_tokens
from interp_ablate.models.batches import SharedPrefix, batches, call_of, prefix_call

logger = logging.getLogger(__name__)

# The share of their spread over the vocabulary by which rounding may move logits; in half precision also so many
# times what a few more tokens behind a row do to it, which change nothing but the shapes of matrix products.
LIMITS = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
NOISE = 3
SHORTEST = 16
"""The smallest length that is measured."""
COMPARED = 3
"""Logits at so many last positions are compared."""

NO_PREFIX = SharedPrefix()

Practice = Literal["padding", "sharing", "cache"]
Row = tuple[int, ...]
# What rows give together, and what each of them gives alone, at the same positions.
Pairs = list[tuple[Float[Tensor, "pos d_vocab"], Float[Tensor, "pos d_vocab"]]]
# What passes raise over an argument that they do not take.
REFUSALS = (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError)
WORDS = {
    "padding": "rows of one length go together, and no others",
    "sharing": "a prefix that rows share is run for each of them",
    "cache": "answers are decoded without a KV cache, the whole row for each token",
}


class PassChecks:
    """Answers, for one model and rows up to a length: may rows be padded, share a prefix, decode with a cache?

    Args:
        lock: held while hooks are out of the model.
    """

    def __init__(self, backend: Backend, lock: RLock) -> None:  # type: ignore[valid-type]
        self._backend, self._lock = backend, lock
        # by dtype: half-precision models are in float32 for a while where small differences are measured
        self._answers: dict[tuple[torch.dtype, Practice, int], bool] = {}
        self._logits_alone: dict[tuple[torch.dtype, Row], Tensor] = {}
        self._limits: dict[torch.dtype, float] = {}

    def padding_is_exact(self, width: int) -> bool:
        """True if a row in a padded batch gives what it gives alone."""
        return self._is_exact("padding", width, self._padded)

    def sharing_is_exact(self, width: int) -> bool:
        """True if rows of different length after a prefix that was run once give what each gives alone."""
        return self._is_exact("sharing", width, self._shared)

    def cache_is_exact(self, width: int) -> bool:
        """True if decoding steps with a cache, also of rows that are left, give what whole rows give.

        The rows are of different length where padding is exact. Where it is not, the first tokens are also
        run by themselves and the rest after them: positions that depend on how long the row is differ there.
        """
        mixed = self.padding_is_exact(width)
        return self._is_exact("cache", width, self._stepped if mixed else self._stepped_alike)

    def _is_exact(self, practice: Practice, width: int, measure: Callable[[int], Pairs]) -> bool:
        """The answer for a length, from a measurement at the next power of two."""
        n_ctx = getattr(self._backend.tl.cfg, "n_ctx", None) or 0
        length = max(SHORTEST, 1 << (width - 1).bit_length())
        length = min(length, max(n_ctx, width)) if n_ctx else length
        key = (self._dtype, practice, length)
        longer = (
            n for (*which, n), exact in self._answers.items() if which == [*key[:2]] and exact
        )
        if key not in self._answers and max(longer, default=0) < length:
            with self._lock, self._backend.unhooked(), torch.no_grad():
                self._answers[key] = self._measured(practice, length, measure)
        return self._answers.get(key, True)

    def _measured(self, practice: Practice, n: int, measure: Callable[[int], Pairs]) -> bool:
        if n < 4:
            return False  # too short to tell
        try:
            error = max(_distance(got, want) for got, want in measure(n))
            reason = f"logits move by {error:.2g} of their spread (limit {self._limit:.2g})"
            exact = error <= self._limit
            self._logits(
                [self._rows(n)[3]]
            )  # positions scaled by the longest row so far shrink again
        except REFUSALS as refusal:
            reason, exact = f"{type(refusal).__name__}: {refusal}".splitlines()[0], False
        if not exact:
            level = logging.WARNING if practice == "cache" else logging.INFO
            name = getattr(self._backend.tl.cfg, "model_name", None)
            logger.log(level, "%s, rows up to %d tokens: %s (%s)", name, n, WORDS[practice], reason)
        return exact

    @property
    def _limit(self) -> float:
        if self._dtype not in self._limits:
            rounding = NOISE * self._noise() if self._dtype.itemsize < 4 else 0.0
            self._limits[self._dtype] = max(LIMITS[self._dtype], rounding)
        return self._limits[self._dtype]

    def _noise(self) -> float:
        long, _, short, _ = self._rows(SHORTEST)
        noise = [
            _distance(
                self._logits([long[:end]], end)[0][: len(short)][-COMPARED:], self._alone(short)
            )
            for end in range(len(short) + 1, SHORTEST + 1)
        ]
        return max(noise)

    # ---- rows, and what is measured ------------------------------------------------------------------

    def _rows(self, n: int) -> tuple[Row, Row, Row, Row]:
        """Two rows of n tokens, the first few of the first one's tokens, and fewer still."""
        tokens = tuple(fixed_tokens(self._backend.tl.cfg.d_vocab, 2 * n)[0].tolist())
        n_short = min(11, n - 1)
        return tokens[:n], tokens[n:], tokens[:n_short], tokens[: n_short - 2]

    def _alone(self, row: Row) -> Float[Tensor, "pos d_vocab"]:
        """Last logits of a row alone, without a cache."""
        key = (self._dtype, row)
        if key not in self._logits_alone:
            self._logits_alone[key] = self._logits([row])[0].float().cpu()
        return self._logits_alone[key]

    def _logits(
        self, rows: Sequence[Row], keep: int = COMPARED, prefix: SharedPrefix = NO_PREFIX
    ) -> list[Float[Tensor, "pos d_vocab"]]:
        """Each row's last logits, from one call without a cache, or after a prefix; the longest row first."""
        (batch,) = batches(rows, size=len(rows), prefix=prefix.n_tokens, device=self._device)
        logits = self._run(call_of(self._backend, batch, prefix, None), keep)
        new = (batch.row_lengths - prefix.n_tokens).tolist()
        return [each[-real:] for each, real in zip(logits, new)]

    def _run(self, call: ForwardCall, keep: int) -> Float[Tensor, "batch pos d_vocab"]:
        logits = self._backend.forward(call, min(keep, call.tokens.shape[1]))
        assert logits is not None
        return logits

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._backend.tl.parameters()).dtype

    @property
    def _device(self) -> torch.device:
        return next(self._backend.tl.parameters()).device

    def _padded(self, n: int) -> Pairs:
        long, _, short, _ = self._rows(n)
        return [(x, self._alone(row)) for row, x in zip((long, short), self._logits([long, short]))]

    def _shared(self, n: int) -> Pairs:
        long, _, short, front = self._rows(n)
        return self._after(front, long, short)

    def _after(self, front: Row, *rows: Row) -> Pairs:
        """Rows (the longest first) after their first tokens, which are run once."""
        call = prefix_call(self._backend, front, len(front), None)
        self._backend.forward(call, 0)
        together = self._logits(rows, prefix=SharedPrefix(len(front), call.cache))
        return [(x, self._alone(row)) for row, x in zip(rows, together)]

    def _stepped(self, n: int) -> Pairs:
        long, _, short, _ = self._rows(n)
        return self._steps(long, short)

    def _stepped_alike(self, n: int) -> Pairs:
        long, other, _, front = self._rows(n)
        return self._steps(long, other) + self._after(front, long)

    def _steps(self, *rows: Row) -> Pairs:
        """Two rows but for two tokens, and these step by step; the rows change places, then one leaves."""
        (batch,) = batches([row[:-2] for row in rows], size=2, device=self._device)
        call = call_of(self._backend, batch, SharedPrefix(), None, cached=True)
        pairs: Pairs = []
        order = [0, 1]
        for place, going in ((-3, [1, 0]), (-2, [1]), (-1, [])):
            logits = self._run(call, 1)
            pairs += [(x, self._alone(rows[i])[place][None]) for i, x in zip(order, logits)]
            if going:
                order = [order[k] for k in going]
                chosen = torch.tensor(going, device=self._device)
                call = call.of_rows(chosen, self._backend.select_cache(call.cache, chosen))
                tokens = [rows[i][place + 1] for i in order]
                call = call.followed_by(torch.tensor(tokens, device=self._device))
        return pairs


def _distance(got: Float[Tensor, "pos d_vocab"], want: Float[Tensor, "pos d_vocab"]) -> float:
    """The largest difference at a position, as a share of how far the logits there are spread.

    At the last positions of `want`, where `got` has fewer.
    """
    a, b = got.float().cpu(), want[-len(got) :].float().cpu()
    spread = (b - b.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((a - b).norm(dim=-1) / spread).nan_to_num(torch.inf).max())
