"""Edits and plans: what is done to the residual stream, as plain data and pure tensor maths.

Knows: the affine map each edit is (x -> x + left right^T x + shift), where and at which positions it
applies, composition, JSON. Does not know: hooks, weights or models; they interpret what is said here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions import Direction
from interp_ablate.errors import PlanError
from interp_ablate.files import write_whole
from interp_ablate.sites import WRITER_POINTS, Point, Site, sites_of

Positions = Literal["all", "prompt", "generated"]
FORMAT = "interp_ablate.plan/1"
# Below this cosine of write and read an erasure scales rounding (and everything else) up a millionfold.
SMALLEST_COSINE = 1e-6


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> x + left (right^T x) + shift, with left and right of shape [d_model, k]; float64."""

    left: Float[Tensor, "d_model k"]
    right: Float[Tensor, "d_model k"]
    shift: Float[Tensor, " d_model"]

    @classmethod
    def identity(cls, d_model: int) -> Affine:
        """The map that changes nothing (k = 0)."""
        empty = torch.zeros(d_model, 0, dtype=torch.float64)
        return cls(empty, empty, torch.zeros(d_model, dtype=torch.float64))

    def then(self, after: Affine) -> Affine:
        """The map that applies this one first and `after` to its result."""
        # right columns of `after` read x through this map: (I + left right^T)^T after.right
        through = after.right + self.right @ (self.left.T @ after.right)
        return Affine(
            torch.cat([self.left, after.left], 1),
            torch.cat([self.right, through], 1),
            after(self.shift),
        )

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map without its shift."""
        return x + (x @ self.right) @ self.left.T

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.linear(x) + self.shift

    @property
    def is_linear(self) -> bool:
        """True where nothing is added whatever the input."""
        return not bool(self.shift.any())

    def to(self, like: Tensor) -> Affine:
        """The same map in the dtype and on the device of `like`, for use inside a forward pass."""
        return Affine(*(part.to(like) for part in (self.left, self.right, self.shift)))


def _as_sites(sites: Site | Iterable[Site]) -> tuple[Site, ...]:
    given: Any = sites
    several = isinstance(given, Iterable) and not isinstance(given, str)
    found: tuple[Site, ...] = tuple(given) if several else (given,)
    if not found or not all(isinstance(site, Site) for site in found):
        raise PlanError(f"an edit needs one or more Site values; got {found!r}")
    if len(set(found)) != len(found):
        raise PlanError(f"the same site is named twice in one edit: {[str(s) for s in found]}")
    return found


def _as_vectors(direction: Direction | Tensor) -> Float[Tensor, "k d_model"]:
    given = direction.vector if isinstance(direction, Direction) else direction
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            "an edit needs a Direction, or a tensor [d_model] ([k, d_model] for a subspace); got "
            f"{direction!r} ({type(direction).__name__})"
        ) from error
    tensor = tensor.detach().to("cpu", torch.float64)
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise PlanError(
            f"a direction has shape [d_model], a subspace [k, d_model]; got {tuple(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise PlanError(
            "the direction holds NaN or infinity: estimate it again in float32 or better"
        )
    if not tensor.any(dim=1).all():
        raise PlanError("the direction is zero: nothing can be edited along it")
    return tensor


def _orthonormal(vectors: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    units = vectors / vectors.norm(dim=1, keepdim=True)
    if len(units) == 1:
        return units
    if float(torch.linalg.svdvals(units)[-1]) < 1e-6 or len(units) > units.shape[1]:
        raise PlanError(
            f"the {len(units)} directions of the subspace are not linearly independent: drop some"
        )
    basis, triangle = torch.linalg.qr(units.T)
    return (basis * triangle.diagonal().sign()).T.contiguous()


def _is_number(value: object) -> bool:
    """One real number of Python, numpy or torch; a bool is none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _numbers(
    value: float | Sequence[float], sites: tuple[Site, ...], what: str
) -> tuple[float, ...]:
    given: Any = value
    try:
        many = (given,) * len(sites) if _is_number(given) else tuple(given)
    except TypeError:
        many = (given,)
    if not all(_is_number(number) for number in many):
        raise PlanError(f"{what} is a number, or a sequence with one a site; got {value!r}")
    if len(many) != len(sites):
        raise PlanError(
            f"{len(many)} values of {what} for {len(sites)} sites: give one, or one a site"
        )
    amounts = tuple(float(number) for number in many)
    if not all(math.isfinite(number) for number in amounts):
        raise PlanError(f"{what} must be finite; got {amounts}")
    return amounts


def _one_or_many(amounts: tuple[float, ...]) -> float | list[float]:
    return amounts[0] if len(set(amounts)) == 1 else list(amounts)


def _range(amounts: tuple[float, ...]) -> str:
    low, high = min(amounts), max(amounts)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _label(*directions: Direction | Tensor) -> str:
    return next((one.name for one in directions if isinstance(one, Direction)), "given")


_E = TypeVar("_E", bound="_Edit")


class _Edit:
    """What the edits share: sites, positions, a number a site, vectors, a label, JSON."""

    op: ClassVar[str]
    amount: ClassVar[str]  # the name of the number that JSON holds
    misscaled: ClassVar[str] = "are not unit, or not orthonormal"
    sites: tuple[Site, ...]
    vectors: Float[Tensor, "k d_model"]
    amounts: tuple[float, ...]
    positions: Positions
    label: str

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.positions not in get_args(Positions):
            raise PlanError(
                f"unknown positions {self.positions!r}: accepted are {', '.join(get_args(Positions))}"
            )

    def __repr__(self) -> str:
        return (
            f"<{self.op} {self.label} at {len(self.sites)} "
            f"{'site' if len(self.sites) == 1 else 'sites'}, {self._said()}>"
        )

    def _said(self) -> str:
        """The numbers, for `repr`."""
        return f"{self.amount} {_range(self.amounts)}"

    @property
    def d_model(self) -> int:
        return self.vectors.shape[1]

    norm_preserving: ClassVar[bool] = False

    def map_at(self, site: Site, gain: Float[Tensor, " d_model"] | None = None) -> Affine:
        """The affine map of this edit at one of its sites.

        Args:
            gain: of the norm between this site and the residual stream, in post-norm blocks. The edit's
                direction r is one of the stream; what the map projects against is normalize(gain * r),
                after which the normed output has nothing along r.

        Raises:
            PlanError: a site that this edit does not write; an addition or a clamp before a norm.
        """
        if site not in self.sites:
            raise PlanError(
                f"{self!r} has no map at {site}: it writes {', '.join(map(str, self.sites[:4]))}"
                + (" and more" if len(self.sites) > 4 else "")
            )
        i = self.sites.index(site)
        return self._map(i) if gain is None else self._map_before_norm(i, gain)

    def _map(self, i: int) -> Affine:
        """The map at the i-th site."""
        raise NotImplementedError

    def _map_before_norm(self, i: int, gain: Tensor) -> Affine:
        raise PlanError(
            f"{self!r} at {self.sites[i]}, before a norm: what is added there is rescaled with the rest, "
            "so it has no fixed effect on the stream. Write it after the norm, at attn_out or mlp_out"
        )

    def moved(self: _E, pairs: Sequence[tuple[Site, Site]]) -> _E:
        """What the edit does at the first site of each pair, done at the second; every bit the same."""
        kept = [self.sites.index(old) for old, _ in pairs]
        edit = copy.copy(self)
        places, amounts = _as_sites(new for _, new in pairs), tuple(self.amounts[i] for i in kept)
        edit._set(sites=places, amounts=amounts)
        return edit

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            self.amount: _one_or_many(self.amounts),
            "sites": [str(site) for site in self.sites],
            "positions": self.positions,
            "label": self.label,
            "vectors": self.vectors.tolist(),
        }

    @classmethod
    def _from_entry(cls, entry: dict[str, Any]) -> Any:
        """Read what `to_dict` wrote; KeyError, TypeError and ValueError are the caller's."""
        vectors = torch.tensor(entry["vectors"], dtype=torch.float64)
        make: Any = cls
        edit = make(
            vectors,
            [Site.parse(name) for name in entry["sites"]],
            positions=entry["positions"],
            label=entry["label"],
            **{cls.amount: entry[cls.amount]},
            **({"norm_preserving": _flag(entry)} if "norm_preserving" in entry else {}),
        )
        edit._keep(vectors)
        return edit

    def _keep(self, vectors: Float[Tensor, "k d_model"]) -> None:
        """Take vectors as they are stored, bit for bit, if they are the edit's own but for rounding."""
        fits = vectors.shape == self.vectors.shape
        if fits:
            size = self.vectors.norm(dim=1)
            apart = (vectors - self.vectors).norm(dim=1)
            # the read of an erasure, longer than its write, is known to fewer digits
            fits = bool((apart <= 1e-12 * size + 1e-14 * size**2).all())
        if not fits:
            raise PlanError(
                f"the vectors of {self!r} are stored with shape {tuple(vectors.shape)} where a plan has "
                f"{tuple(self.vectors.shape)}, or {self.misscaled}: make the edit with "
                f"{type(self).__name__}(...), which scales them, and save the plan again"
            )
        object.__setattr__(self, "vectors", vectors)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Ablate(_Edit):
    """Directional ablation: x -> x - strength * (projection of x on the direction or subspace).

    Strength 1 removes everything along the direction, 0.5 half of it, 2 reflects. One number, or one
    a site. A tensor [k, d_model] is a rank-k subspace; it is made orthonormal.
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
        direction: Direction | Float[Tensor, "*k d_model"],
        sites: Site | Iterable[Site],
        *,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
        norm_preserving: bool = False,
    ) -> None:
        places = _as_sites(sites)
        if norm_preserving:
            _check_norm_preserving(places, positions)
        self._set(
            norm_preserving=bool(norm_preserving),
            sites=places,
            vectors=_orthonormal(_as_vectors(direction)),
            amounts=_numbers(strength, places, self.amount),
            positions=positions,
            label=label or _label(direction),
        )

    def _map(self, i: int) -> Affine:
        return _projection(self.vectors, self.amounts[i])

    def _map_before_norm(self, i: int, gain: Tensor) -> Affine:
        return _projection(pulled_back(self.vectors, gain), self.amounts[i])

    def to_dict(self) -> dict[str, Any]:
        more = {"norm_preserving": True} if self.norm_preserving else {}
        return {**super().to_dict(), **more}


def _projection(vectors: Float[Tensor, "k d_model"], amount: float) -> Affine:
    """x -> x - amount * (projection on the orthonormal rows)."""
    basis = vectors.T
    return Affine(-amount * basis, basis, torch.zeros(len(basis), dtype=torch.float64))


def pulled_back(
    vectors: Float[Tensor, "k d_model"], gain: Float[Tensor, " d_model"]
) -> Float[Tensor, "k d_model"]:
    """Orthonormal directions before an RMS norm whose removal leaves nothing along `vectors` after it.

    The normed output is gain * x / rms(x): along r it is x . (gain * r) / rms(x).
    """
    return _orthonormal(vectors * gain.detach().to("cpu", torch.float64))


def kept_norm(
    rows: Float[Tensor, "*row d_model"], affine: Affine, *, eps: float
) -> tuple[Float[Tensor, "*row d_model"], Float[Tensor, " *row"]]:
    """Rows through the map (without its shift), each given its norm back, and the factor that did it.

    A row of which nothing but rounding is left (`eps`: of the dtype it is stored in) is not scaled up.
    """
    mapped = affine.to(rows).linear(rows)
    before, after = rows.norm(dim=-1), mapped.norm(dim=-1)
    factor = before / after.clamp(min=torch.finfo(rows.dtype).tiny)
    factor = torch.where(after <= eps * before, torch.ones_like(before), factor)
    return mapped * factor[..., None], factor


def _check_norm_preserving(sites: tuple[Site, ...], positions: Positions) -> None:
    wrong = [str(site) for site in sites if site.point not in WRITER_POINTS]
    if wrong or positions != "all":
        raise PlanError(
            "a norm-preserving ablation changes the weights of writers, at every position: sites are "
            f"{', '.join(WRITER_POINTS)} with positions='all'; got "
            + (f"{wrong[0]}" if wrong else f"positions={positions!r}")
        )


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Add(_Edit):
    """Activation addition: x -> x + coefficient * vector.

    A `Direction` adds its raw vector (coefficient 1 = the whole difference in means); a tensor is
    added as it is.
    """

    op: ClassVar[str] = "add"
    amount: ClassVar[str] = "coefficient"

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d_model"],
        sites: Site | Iterable[Site],
        *,
        coefficient: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        places = _as_sites(sites)
        raw = direction.raw if isinstance(direction, Direction) else direction
        self._set(
            sites=places,
            vectors=_one(_as_vectors(raw), "add"),
            amounts=_numbers(coefficient, places, self.amount),
            positions=positions,
            label=label or _label(direction),
        )

    def _map(self, i: int) -> Affine:
        empty = Affine.identity(self.d_model)
        return Affine(empty.left, empty.right, self.amounts[i] * self.vectors[0])


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Clamp(_Edit):
    """Clamping: the projection on the unit direction is set to `value` (in units of the stream)."""

    op: ClassVar[str] = "clamp"
    amount: ClassVar[str] = "value"

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d_model"],
        sites: Site | Iterable[Site],
        *,
        value: float | Sequence[float],
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        places = _as_sites(sites)
        self._set(
            sites=places,
            vectors=_orthonormal(_one(_as_vectors(direction), "clamp")),
            amounts=_numbers(value, places, self.amount),
            positions=positions,
            label=label or _label(direction),
        )

    def _map(self, i: int) -> Affine:
        basis = self.vectors.T
        return Affine(-basis, basis, self.amounts[i] * self.vectors[0])


def _one(vectors: Float[Tensor, "k d_model"], op: str) -> Float[Tensor, "1 d_model"]:
    if len(vectors) != 1:
        raise PlanError(f"{op} takes one vector [d_model]; got {len(vectors)} rows")
    return vectors


class Erasing(Protocol):
    """What an eraser has to be made an edit: x -> x - write * (read . (x - centre))."""

    @property
    def write(self) -> Float[Tensor, " d_model"]: ...
    @property
    def read(self) -> Float[Tensor, " d_model"]: ...
    @property
    def centre(self) -> Float[Tensor, " d_model"]: ...


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Erase(_Edit):
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
        sites: Site | Iterable[Site],
        *,
        strength: float | Sequence[float] = 1.0,
        value: float | Sequence[float] = 0.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> None:
        places = _as_sites(sites)
        vectors, scale = _oblique(write, read)
        values = [scale * number for number in _numbers(value, places, "value")]
        self._set(
            sites=places,
            vectors=vectors,
            amounts=_numbers(strength, places, self.amount),
            values=_numbers(values, places, "value, in units of the scaled read,"),
            positions=positions,
            label=label or _label(write, read),
        )

    @classmethod
    def of(
        cls,
        eraser: Erasing,
        sites: Site | Iterable[Site],
        *,
        strength: float | Sequence[float] = 1.0,
        positions: Positions = "all",
        label: str | None = None,
    ) -> Erase:
        """The edit of a fitted eraser: `read . x` becomes what it is at the eraser's centre.

        Raises:
            PlanError: vectors of different shapes, or with nothing finite in them.
        """
        read, centre = (_as_tensor(given) for given in (eraser.read, eraser.centre))
        if read.shape != centre.shape:
            raise PlanError(
                f"an eraser has read and centre of one shape [d_model]; got {tuple(read.shape)} and "
                f"{tuple(centre.shape)}"
            )
        value = float((read * centre).sum())
        return cls(
            eraser.write,
            eraser.read,
            sites,
            strength=strength,
            value=value,
            positions=positions,
            label=label,
        )

    @property
    def write(self) -> Float[Tensor, " d_model"]:
        """What is changed along: a unit vector."""
        return self.vectors[0]

    @property
    def read(self) -> Float[Tensor, " d_model"]:
        """What is set: `read . x`; with read . write = 1."""
        return self.vectors[1]

    def _said(self) -> str:
        value = f", value {_range(self.values)}" if any(self.values) else ""
        return super()._said() + value

    def _map(self, i: int) -> Affine:
        amount = self.amounts[i]
        shift = amount * self.values[i] * self.write
        return Affine(-amount * self.write[:, None], self.read[:, None], shift)

    def _map_before_norm(self, i: int, gain: Tensor) -> Affine:
        if self.amounts[i] * self.values[i]:
            return super()._map_before_norm(i, gain)
        return _projection(pulled_back(self.read[None], gain), self.amounts[i])

    def moved(self, pairs: Sequence[tuple[Site, Site]]) -> Erase:
        edit = super().moved(pairs)
        edit._set(values=tuple(self.values[self.sites.index(old)] for old, _ in pairs))
        return edit

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        del found["vectors"]
        vectors = {"write": self.write.tolist(), "read": self.read.tolist()}
        return {**found, "value": _one_or_many(self.values), **vectors}

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
        sites = tuple(Site.parse(name) for name in entry["sites"])
        edit = cls(
            rows[0],
            rows[1],
            sites,
            strength=entry["strength"],
            value=entry["value"],
            positions=entry["positions"],
            label=entry["label"],
        )
        edit._keep(torch.stack(rows))
        edit._set(values=_numbers(entry["value"], sites, "value"))
        return edit


def _as_tensor(given: Any) -> Tensor:
    tensor = given.vector if isinstance(given, Direction) else torch.as_tensor(given)
    return tensor.detach().to("cpu", torch.float64)


def _oblique(
    write: Direction | Tensor, read: Direction | Tensor
) -> tuple[Float[Tensor, "2 d_model"], float]:
    """The two as rows, the first unit, the second scaled to read . write = 1; and that scale."""
    along, across = (_one(_as_vectors(given), "erase")[0] for given in (write, read))
    if along.shape != across.shape:
        raise PlanError(
            f"write has d_model {len(along)}, read {len(across)}: both are vectors of one stream"
        )
    unit = along / along.norm()
    length = across.norm()
    cosine = float(across / length @ unit)
    if abs(cosine) < SMALLEST_COSINE:
        raise PlanError(
            f"write and read are orthogonal (their cosine is {cosine:.2g}): moving along write does not "
            "change read . x, so nothing can be erased. LEACE's write is the covariance times its read"
        )
    scale = 1 / float(length * cosine)
    return torch.stack([unit, across * scale]), scale


Edit = Ablate | Add | Clamp | Erase
_EDITS: dict[str, type[Ablate] | type[Add] | type[Clamp] | type[Erase]] = {
    kind.op: kind for kind in (Ablate, Add, Clamp, Erase)
}


@dataclass(frozen=True, eq=False)
class Plan:
    """A sequence of edits, applied in the order written where two share a site.

    `plan + plan` and `plan + edit` append. Equal plans (same edits, same numbers) compare equal.

    Raises:
        PlanError: edits of different d_model, or something that is no edit.
    """

    edits: tuple[Edit, ...] = field(default=())

    def __post_init__(self) -> None:
        edits = tuple(self.edits) if isinstance(self.edits, Iterable) else (self.edits,)
        for edit in edits:
            if not isinstance(edit, _Edit):
                raise PlanError(
                    f"a plan is made of Ablate, Add, Clamp and Erase; got {edit!r} ({type(edit).__name__})"
                )
        object.__setattr__(self, "edits", edits)
        widths = {edit.d_model for edit in edits}
        if len(widths) > 1:
            raise PlanError(f"edits of different d_model in one plan: {sorted(widths)}")

    def __add__(self, other: Plan | Edit) -> Plan:
        return Plan(self.edits + (other.edits if isinstance(other, Plan) else (other,)))

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def d_model(self) -> int:
        if not self.edits:
            raise PlanError("the plan has no edits")
        return self.edits[0].d_model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that is written, in forward order, once."""
        return tuple(sorted({site for edit in self.edits for site in edit.sites}))

    def keeps_norm_at(self, site: Site) -> bool:
        """Whether the edit of a site is norm-preserving.

        Raises:
            PlanError: it is, and shares the site with another edit.
        """
        return self.norm_preserving_at(site) is not None

    def norm_preserving_at(self, site: Site) -> Ablate | None:
        """The norm-preserving edit of a site, if there is one; additions may stand beside it.

        Raises:
            PlanError: another edit than an addition shares its site.
        """
        edits = [e for e in self.edits if site in e.sites and not isinstance(e, Add)]
        kept = [e for e in edits if isinstance(e, Ablate) and e.norm_preserving]
        if kept and len(edits) > 1:
            raise PlanError(
                f"{len(edits)} edits at {site}, one of them norm-preserving: norms are restored after "
                "one edit only. Ablate both directions as one subspace [k, d_model]"
            )
        return kept[0] if kept else None

    def maps_at(
        self, site: Site, gain: Float[Tensor, " d_model"] | None = None
    ) -> list[tuple[Positions, Affine]]:
        """The maps at one site in order, neighbours of equal positions composed into one.

        `gain`: of the norm that follows the site, as for `map_at`.
        """
        found: list[tuple[Positions, Affine]] = []
        for edit in self.edits:
            if site not in edit.sites:
                continue
            if found and found[-1][0] == edit.positions:
                found[-1] = (edit.positions, found[-1][1].then(edit.map_at(site, gain)))
            else:
                found.append((edit.positions, edit.map_at(site, gain)))
        return found

    @property
    def fingerprint(self) -> str:
        """sha256 of the plan's JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; floats keep every bit."""
        return {"format": FORMAT, "edits": [edit.to_dict() for edit in self.edits]}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanError: another format, an unknown operation, a missing field, vectors that `to_dict` would
                not have written.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f'this is not a plan: expected a JSON object with "format": "{FORMAT}"')
        entries = data.get("edits")
        if not isinstance(entries, list):
            raise PlanError(f'"edits" of a plan is a list of objects; got {entries!r}')
        return cls(tuple(_edit_from_dict(entry) for entry in entries))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            PlanError: the place cannot be written.
        """
        write_whole(Path(path), json.dumps(self.to_dict()), error=PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from JSON: a plan file, or any JSON object with a `plan` (`selected.json`).

        Raises:
            PlanError: no such file, not JSON, not a plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read a plan from {path}: {error}") from error
        if isinstance(data, dict) and "plan" in data:
            data = data["plan"]
        return cls.from_dict(data)


def _edit_from_dict(entry: dict[str, Any]) -> Edit:
    try:
        return _EDITS[entry["op"]]._from_entry(entry)
    except KeyError as error:
        raise PlanError(
            f"an edit of the plan lacks or misnames {error}: operations are {', '.join(_EDITS)}"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"an edit of the plan cannot be read: {error}") from error


def _flag(entry: dict[str, Any]) -> bool:
    value = entry["norm_preserving"]
    if not isinstance(value, bool):
        raise PlanError(f'"norm_preserving" of an edit is true or false; got {value!r}')
    return value


def everywhere(n_layers: int) -> tuple[Site, ...]:
    """The writers of a Llama-style stream: embed, and attn_out and mlp_out of every layer.

    Ablating a direction at all of them with strength 1 leaves nothing along it anywhere, and is what
    ablation at resid_pre, resid_mid and resid_post of every layer computes; it is exact in weights.
    `model.writers` says it for any architecture (learned positions, norms after the projections).
    """
    points: tuple[Point, ...] = ("embed", "attn_out", "mlp_out")
    return sites_of(points, range(n_layers))


def band(
    direction: Direction,
    n_layers: int,
    *,
    attention: tuple[float, float],
    mlp: tuple[float, float],
    width: float,
    points: tuple[Point, Point] = ("attn_out", "mlp_out"),
) -> Plan:
    """Ablation of attention and MLP outputs with strengths that fall off linearly over the layers.

    Args:
        attention: (strength, centre layer) of the attention outputs.
        mlp: (strength, centre layer) of the MLP outputs.
        width: layers from a centre at which the strength reaches zero.
        points: attention's and MLP's; attn_proj and mlp_proj in post-norm blocks.

    The idea of one kernel of strengths a component is that of published abliteration searches; sites
    with strength 0 are left out.

    Raises:
        PlanError: a width that is not above 0, a strength below 0, something that is not finite, or a
            band that reaches no layer.
    """
    finite = all(_is_number(n) and math.isfinite(n) for n in (*attention, *mlp, width))
    if not finite or width <= 0 or attention[0] < 0 or mlp[0] < 0:
        raise PlanError(
            "a band has two pairs (strength from 0, centre layer) and a width above 0, all finite; got "
            f"attention {attention}, mlp {mlp}, width {width}"
        )
    plan = Plan()
    for point, (peak, centre) in zip(points, (attention, mlp)):
        strengths = {
            layer: peak * max(0.0, 1 - abs(layer - centre) / width) for layer in range(n_layers)
        }
        kept = {Site(layer, point): value for layer, value in strengths.items() if value > 0}
        if kept:
            plan += Ablate(direction, kept, strength=tuple(kept.values()))
    if not plan.edits:
        raise PlanError(
            f"the band reaches none of {n_layers} layers: attention {attention} and mlp {mlp} (strength, "
            f"centre) with width {width:g}; move a centre to a layer, or widen it"
        )
    return plan
