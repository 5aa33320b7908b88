"""The kinds of edit: Ablate, Add, Clamp, Erase, and the table of these and of the kinds with files of their own.

Knows: the affine map of each. Does not know: how edits combine or are applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import (
    Affine,
    NormGain,
    as_vectors,
    oblique_rows,
    one_row,
    orthonormal_rows,
    projection_map,
    through_gain,
)
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.conditional import Conditional
from interp_ablate.edits.edit import (
    EditBase,
    Positions,
    joined_label,
    one_or_many,
    range_text,
    strength_per_site,
    written_sites,
)
from interp_ablate.edits.rotation import Rotate
from interp_ablate.errors import PlanError
from interp_ablate.sites import WRITER_POINTS, Site, SiteLike


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Ablate(EditBase):
    """Directional ablation: x -> x - strength * (projection of x on the direction or subspace).

    Strength 1 removes everything along the direction, 0.5 half of it, 2 reflects. One number, or one
    a site. A tensor [k, d_model], a `Subspace`, or a list of directions is a rank-k subspace; it is made
    orthonormal, so that directions at any angle are ablated together. (For a strength each, see `jointly`.)
    Source: Arditi et al. 2024, https://arxiv.org/abs/2406.11717.

    At `attn_proj` and `mlp_proj` of post-norm blocks the direction is pulled back through the norm's
    gain: nothing is left along it in the stream, and the edit is exact in weights. At `attn_out` and
    `mlp_out` of such blocks it is another function, which has no weight form.

    `norm_preserving`: the norm of every input column of the writer's weight (every row of an embedding)
    is restored after the projection, so that the output keeps its size and has still nothing along the
    direction (rows renormalized the other way put 15 to 23% of it back). At writer sites only.
    """

    op: ClassVar[str] = "ablate"
    amount: ClassVar[str] = "strength"
    norm_preserving: bool  # type: ignore[misc]

    def __init__(
        self,
        direction: Direction | Float[Tensor, "*k d_model"] | Sequence[Direction | Tensor],
        sites: SiteLike | Iterable[SiteLike],
        *,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
        norm_preserving: bool = False,
    ) -> None:
        places = written_sites(sites)
        if norm_preserving:
            _check_norm_preserving(places, positions)
        vectors = orthonormal_rows(as_vectors(direction))
        self._place(
            direction, places, strength, positions=positions, label=label, vectors=vectors,
            norm_preserving=bool(norm_preserving),
        )  # fmt: skip

    def _map(self, i: int) -> Affine:
        return projection_map(self.vectors, self.amounts[i])

    def _map_before_norm(self, i: int, gain: NormGain) -> Affine:
        return projection_map(through_gain(self.vectors, gain), self.amounts[i])

    def to_dict(self) -> dict[str, Any]:
        more = {"norm_preserving": True} if self.norm_preserving else {}
        return {**super().to_dict(), **more}


def _check_norm_preserving(sites: tuple[Site, ...], positions: Positions) -> None:
    wrong = [str(site) for site in sites if site.point not in WRITER_POINTS]
    if wrong or positions != "all":
        raise PlanError(
            "a norm-preserving ablation changes the weights of writers, at every position: sites are "
            f"{', '.join(WRITER_POINTS)} with positions='all'; got "
            + (f"{wrong[0]}" if wrong else f"positions={positions!r}")
        )


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Add(EditBase):
    """Activation addition: x -> x + coefficient * vector.

    A `Direction` adds its raw vector (coefficient 1 = the whole difference in means); a tensor is
    added as it is.
    """

    op: ClassVar[str] = "add"
    amount: ClassVar[str] = "coefficient"

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d_model"],
        sites: SiteLike | Iterable[SiteLike],
        *,
        coefficient: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        raw = direction.raw if isinstance(direction, Direction) else direction
        vectors = one_row(as_vectors(raw), "add")
        self._place(
            direction, sites, coefficient, positions=positions, label=label, vectors=vectors
        )

    @property
    def reads(self) -> Float[Tensor, "0 d_model"]:
        return self.vectors[:0]

    def _map(self, i: int) -> Affine:
        empty = Affine.identity(self.d_model)
        return Affine(empty.left, empty.right, self.amounts[i] * self.vectors[0])


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Clamp(EditBase):
    """Clamping: the projection on the unit direction is set to `value` (in units of the stream)."""

    op: ClassVar[str] = "clamp"
    amount: ClassVar[str] = "value"

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d_model"],
        sites: SiteLike | Iterable[SiteLike],
        *,
        value: float | Sequence[float],
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        vectors = orthonormal_rows(one_row(as_vectors(direction), "clamp"))
        self._place(direction, sites, value, positions=positions, label=label, vectors=vectors)

    def times(self, factor: float) -> Clamp:
        raise PlanError(
            f"{self!r} has no strength: it sets the projection to a value, and half of that value is another "
            "edit. Make a Clamp with the value that you want"
        )

    def _map(self, i: int) -> Affine:
        basis = self.vectors.T
        return Affine(-basis, basis, self.amounts[i] * self.vectors[0])


class EraserLike(Protocol):
    """An eraser that can be made an edit: x -> x - write * (read . (x - centre))."""

    @property
    def write(self) -> Float[Tensor, " d_model"]: ...
    @property
    def read(self) -> Float[Tensor, " d_model"]: ...
    @property
    def centre(self) -> Float[Tensor, " d_model"]: ...


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Erase(EditBase):
    """Oblique erasure: x -> x - strength * write * (read . x - value).

    With strength 1 `read . x` becomes `value`, and nothing is changed but along `write`: what LEACE
    (Belrose et al. 2023, https://arxiv.org/abs/2306.03819) and affine concept editing (Marshall et al.
    2024, https://arxiv.org/abs/2411.09003) do. With write == read, value 0 is `Ablate`, another `Clamp`.

    `write` is kept as a unit vector and `read` scaled so that read . write = 1; the map is the same for
    all lengths and signs of the two. `value` is in units of `read` as it is given, `values` in those of
    the scaled one. Strength and value are one number, or one a site.

    The parts of the stream sum: where an edit is at writers, give the value at `embed` only (0 at all
    others), and `read . x` is `value` at every place of the stream. An edit with strength 1 at all of the
    residual stream does the same, and is written into weights so.

    At `attn_proj` and `mlp_proj` of post-norm blocks the edit is the ablation of `read` there, whatever
    `write` is: nothing is left along `read` in the stream, with the smallest change before the norm. To
    write along `write` behind the norm would take write / gain before it; real gains come near 0, and
    what is written there grows until the norm shrinks all the rest (up to 120 times on Gemma 3 270M).
    """

    op: ClassVar[str] = "erase"
    amount: ClassVar[str] = "strength"
    misscaled: ClassVar[str] = "write is not unit, or read . write is not 1"
    values: tuple[float, ...]

    def __init__(
        self,
        write: Direction | Float[Tensor, " d_model"],
        read: Direction | Float[Tensor, " d_model"],
        sites: SiteLike | Iterable[SiteLike],
        *,
        strength: float | Sequence[float] = 1.0,
        value: float | Sequence[float] = 0.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        places = written_sites(sites)
        vectors, scale = oblique_rows(write, read)
        values = [scale * number for number in strength_per_site(value, places, "value")]
        self._set(
            sites=places,
            vectors=vectors,
            amounts=strength_per_site(strength, places, self.amount),
            values=strength_per_site(values, places, "value, in units of the scaled read,"),
            positions=positions,
            label=label or joined_label(write, read),
        )

    @classmethod
    def of(
        cls,
        eraser: EraserLike,
        sites: SiteLike | Iterable[SiteLike],
        *,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> Erase:
        """The edit of a fitted eraser: `read . x` becomes what it is at the eraser's centre.

        Raises:
            PlanError: vectors of different shapes, or with nothing finite in them.
        """
        read, centre = map(_as_tensor, (eraser.read, eraser.centre))
        if read.shape != centre.shape:
            raise PlanError(
                f"an eraser has read and centre of one shape [d_model]; got {tuple(read.shape)} and "
                f"{tuple(centre.shape)}"
            )
        options: dict[str, Any] = {"strength": strength, "positions": positions, "label": label}
        value = float((read * centre).sum())
        return cls(eraser.write, eraser.read, sites, value=value, **options)

    @property
    def write(self) -> Float[Tensor, " d_model"]:
        """The unit vector that the edit writes along."""
        return self.vectors[0]

    @property
    def read(self) -> Float[Tensor, " d_model"]:
        """The vector whose dot product with x is set; read . write = 1."""
        return self.vectors[1]

    @property
    def reads(self) -> Float[Tensor, "1 d_model"]:
        return self.vectors[1:]

    def _numbers(self) -> str:
        value = f", value {range_text(self.values)}" if any(self.values) else ""
        return super()._numbers() + value

    def _map(self, i: int) -> Affine:
        amount = self.amounts[i]
        shift = amount * self.values[i] * self.write
        return Affine(-amount * self.write[:, None], self.read[:, None], shift)

    def _map_before_norm(self, i: int, gain: NormGain) -> Affine:
        if self.amounts[i] * self.values[i]:
            return super()._map_before_norm(i, gain)
        return projection_map(through_gain(self.read[None], gain), self.amounts[i])

    def at_sites(self, pairs: Sequence[tuple[Site, Site]]) -> Erase:
        edit = super().at_sites(pairs)
        edit._set(values=tuple(self.values[self.sites.index(old)] for old, _ in pairs))
        return edit

    def to_dict(self) -> dict[str, Any]:
        entry = super().to_dict()
        del entry["vectors"]
        vectors = {"write": self.write.tolist(), "read": self.read.tolist()}
        return {**entry, "value": one_or_many(self.values), **vectors}

    @classmethod
    def _from_entry(cls, entry: dict[str, Any]) -> Erase:
        if "norm_preserving" in entry:
            raise PlanError("only an ablation preserves norms")
        rows = [torch.tensor(entry[name], dtype=torch.float64) for name in ("write", "read")]
        if any(row.ndim != 1 for row in rows):
            shapes = " and ".join(str(tuple(row.shape)) for row in rows)
            raise PlanError(
                f'"write" and "read" of an edit are lists of numbers; got shapes {shapes}'
            )
        sites = written_sites(entry["sites"])
        options = {name: entry[name] for name in ("strength", "value", "positions", "label")}
        edit = cls(rows[0], rows[1], sites, **options)
        edit._take_stored(torch.stack(rows))
        edit._set(values=strength_per_site(entry["value"], sites, "value"))
        return edit


def _as_tensor(vector: Any) -> Tensor:
    tensor = vector.vector if isinstance(vector, Direction) else torch.as_tensor(vector)
    return tensor.detach().to("cpu", torch.float64)


Edit = Ablate | Add | Clamp | Erase | AffineEdit | Rotate | Conditional
_EDITS: dict[str, type[Edit]] = {
    kind.op: kind for kind in (Ablate, Add, Clamp, Erase, AffineEdit, Rotate, Conditional)
}


def edit_from_dict(entry: dict[str, Any]) -> Edit:
    """Read what an edit's `to_dict` wrote.

    Raises:
        PlanError: an unknown operation, a field that is missing or cannot be read.
    """
    try:
        kind = _EDITS[entry["op"]]
        if kind is Conditional:
            return Conditional.read(entry, edit_from_dict)
        return kind._from_entry(entry)
    except KeyError as error:
        raise PlanError(
            f"an edit of the plan lacks or misnames {error}: operations are {', '.join(_EDITS)}"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"an edit of the plan cannot be read: {error}") from error
