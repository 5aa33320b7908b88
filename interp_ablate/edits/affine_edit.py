"""AffineEdit: an affine map of low rank as an edit, for maps that no projection along one direction is.

Knows: the map, its JSON, when it is a projection. Does not know: where its factors come from, or how it is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine, NormGain
from interp_ablate.edits.edit import MAX_AMOUNT, EditBase, Positions, range_text, written_sites
from interp_ablate.errors import PlanError
from interp_ablate.sites import SiteLike

PROJECTION_TOLERANCE = 1e-9  # of the factors' size: rounding of inverses and square roots


class TransportLike(Protocol):
    """A fitted affine map x -> x + write^T (read x) + shift that can be made an edit."""

    @property
    def write(self) -> Float[Tensor, "k d_model"]: ...
    @property
    def read(self) -> Float[Tensor, "k d_model"]: ...
    @property
    def shift(self) -> Float[Tensor, " d_model"]: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, eq=False, init=False, repr=False)
class AffineEdit(EditBase):
    """Any affine map of rank k: x -> x + strength * (write^T (read x) + shift).

    `write` and `read` have the shape [k, d_model], `shift` the shape [d_model]; they are kept as given. `Ablate`,
    `Clamp` and `Erase` are special cases of rank 1. It holds what they cannot: Gaussian optimal transport
    (`gaussian_transport`), and several erasures that are exact together (`jointly`).

    At writers the linear part is exact in weights, and the shift in a bias, where the architecture has one. On the
    residual stream itself it has a weight form only where the map is a projection, and written everywhere.
    Before the norm of post-norm blocks it has no meaning of its own, and is refused.
    """

    op: ClassVar[str] = "affine"
    amount: ClassVar[str] = "strength"
    write: Float[Tensor, "k d_model"]
    read: Float[Tensor, "k d_model"]
    shift: Float[Tensor, " d_model"]

    def __init__(
        self,
        write: Float[Tensor, "k d_model"],
        read: Float[Tensor, "k d_model"],
        sites: SiteLike | Iterable[SiteLike],
        *,
        shift: Float[Tensor, " d_model"] | None = None,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        places = written_sites(sites)
        rows = [_rows(write, "write"), _rows(read, "read")]
        moved = torch.zeros_like(rows[0][0]) if shift is None else _wide(shift, "shift")
        if rows[0].shape != rows[1].shape or moved.shape != rows[0].shape[1:]:
            shapes = [tuple(part.shape) for part in (*rows, moved)]
            raise PlanError(
                "an affine edit has write and read of one shape [k, d_model], and a shift [d_model]; got "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
            )
        every = torch.cat([*rows, moved[None]])
        vectors = every[every.any(dim=1)]
        if not len(vectors):
            raise PlanError("the affine edit is zero: it changes nothing")
        self._set(
            write=rows[0], read=rows[1], shift=moved, positions=positions, label=label or "given"
        )
        self._place(
            vectors, places, strength, positions=positions, label=self.label, vectors=vectors
        )

    @classmethod
    def of(
        cls,
        transport: TransportLike,
        sites: SiteLike | Iterable[SiteLike],
        *,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> AffineEdit:
        """The edit of a fitted map; strength 0.5 goes half of the way.

        Raises:
            PlanError: parts of shapes that do not fit, or that are not finite.
        """
        options: dict[str, Any] = {"strength": strength, "positions": positions}
        name = label or transport.name
        return cls(
            transport.write, transport.read, sites, shift=transport.shift, label=name, **options
        )

    @property
    def rank(self) -> int:
        """The number of vectors that are read."""
        return len(self.read)

    @property
    def reads(self) -> Float[Tensor, "k d_model"]:
        return self.read

    @property
    def is_projection(self) -> bool:
        """True if applying the edit twice is the same as applying it once, at every site."""
        if set(self.amounts) != {1.0}:
            return False
        size = max(1.0, float(self.write.norm() * self.read.norm()))
        again = self.read @ self.write.T + torch.eye(self.rank, dtype=self.write.dtype)
        kept = self.shift + (self.read @ self.shift) @ self.write
        near = PROJECTION_TOLERANCE * size
        length = max(1.0, float(self.shift.norm()))
        return float((self.write.T @ again @ self.read).norm()) <= near * size and (
            float(kept.norm()) <= near * length
        )

    def without_shift(self) -> AffineEdit:
        """The linear part of the edit, at the same sites."""
        options: dict[str, Any] = {"strength": self.amounts, "positions": self.positions}
        return AffineEdit(self.write, self.read, self.sites, label=self.label, **options)

    def _numbers(self) -> str:
        added = ", with a shift" if self.shift.any() else ""
        return f"rank {self.rank}{added}, {self.amount} {range_text(self.amounts)}"

    def _map(self, i: int) -> Affine:
        amount = self.amounts[i]
        return Affine(amount * self.write.T, self.read.T, amount * self.shift)

    def _map_before_norm(self, i: int, gain: NormGain) -> Affine:
        raise PlanError(
            f"{self!r} at {self.sites[i]}, before a norm that rescales what it gives: it has no fixed effect on the "
            "stream. Write it after the norm, at attn_out or mlp_out (as hooks only), or ablate the directions as "
            "one subspace: Ablate([v1, v2], sites)"
        )

    def to_dict(self) -> dict[str, Any]:
        entry = super().to_dict()
        del entry["vectors"]
        parts = {name: getattr(self, name).tolist() for name in ("write", "read", "shift")}
        return {**entry, **parts}

    @classmethod
    def _from_entry(cls, entry: dict[str, Any]) -> AffineEdit:
        parts = {
            name: torch.tensor(entry[name], dtype=torch.float64)
            for name in ("write", "read", "shift")
        }
        options = {name: entry[name] for name in ("strength", "positions", "label")}
        write, read, shift = parts.values()
        return cls(write, read, entry["sites"], shift=shift, **options)


def _wide(values: Any, what: str) -> Tensor:
    """A part of the edit in float64 on the CPU.

    Raises:
        PlanError: no tensor, NaN, infinity, or numbers beyond every activation.
    """
    try:
        tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"{what} of an affine edit is a tensor; got {values!r:.80}") from error
    if not bool((tensor.abs() <= MAX_AMOUNT).all()):  # NaN is not
        raise PlanError(
            f"{what} of an affine edit must be finite, and at most {MAX_AMOUNT:g} in size"
        )
    return tensor


def _rows(values: Any, what: str) -> Float[Tensor, "k d_model"]:
    tensor = _wide(values, what)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise PlanError(
            f"{what} of an affine edit has the shape [k, d_model]; got {tuple(tensor.shape)}"
        )
    return tensor
