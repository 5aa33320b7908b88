"""The common part of all edits: sites, positions, one number a site, vectors, a label.

Knows: validation and JSON fields. Does not know: which map an edit is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.directions.subspaces import Subspace
from interp_ablate.edits.affine import NormGain
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.sites import Site, SiteLike, as_sites

MAX_AMOUNT = 1e9  # beyond every activation; products of two such numbers still fit into float32
Positions = Literal["all", "prompt", "generated"]


def written_sites(sites: SiteLike | Iterable[SiteLike]) -> tuple[Site, ...]:
    """The sites of an edit, in the order given.

    Raises:
        PlanError: no site, something else, or a site twice.
    """
    try:
        checked = as_sites(sites)
    except InterpAblateError as error:
        raise PlanError(str(error)) from error
    if not checked:
        raise PlanError("an edit needs one or more sites; got none")
    if len(set(checked)) != len(checked):
        raise PlanError(f"the same site is named twice in one edit: {[str(s) for s in checked]}")
    return checked


def is_number(value: object) -> bool:
    """True for one real number of Python, numpy or torch; a bool is none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def strength_per_site(
    value: float | Sequence[float], sites: tuple[Site, ...], what: str
) -> tuple[float, ...]:
    """One number for each site, from one number or a sequence; `what` names it in messages.

    Raises:
        PlanError: something else, another length, or numbers that are not finite.
    """
    values: Any = value
    try:
        many = (values,) * len(sites) if is_number(values) else tuple(values)
    except TypeError:
        many = (values,)
    if not all(is_number(number) for number in many):
        raise PlanError(f"{what} is a number, or a sequence with one a site; got {value!r}")
    if len(many) != len(sites):
        raise PlanError(
            f"{len(many)} values of {what} for {len(sites)} sites: give one, or one a site"
        )
    amounts = tuple(float(number) for number in many)
    if not all(abs(number) <= MAX_AMOUNT for number in amounts):  # NaN is not
        raise PlanError(f"{what} must be finite, and at most {MAX_AMOUNT:g} in size; got {amounts}")
    return amounts


def one_or_many(amounts: tuple[float, ...]) -> float | list[float]:
    """One number where all are equal, else the list: the form that JSON holds."""
    return amounts[0] if len(set(amounts)) == 1 else list(amounts)


def range_text(amounts: tuple[float, ...]) -> str:
    """The smallest and the largest number, or the one that all are, for `repr`."""
    low, high = min(amounts), max(amounts)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def joined_label(*directions: Any) -> str:
    """The name of the first Direction or Subspace; all of them of a list; "given" for tensors."""
    for one in directions:
        if isinstance(one, (list, tuple)):
            names = [each.name for each in one if isinstance(each, (Direction, Subspace))]
            return " and ".join(dict.fromkeys(names)) or "given"
        if isinstance(one, (Direction, Subspace)):
            return one.name
    return "given"


_E = TypeVar("_E", bound="EditBase")


class EditBase:
    """The fields and the JSON that all edits have in common."""

    op: ClassVar[str]
    """The name of the operation in JSON."""
    amount: ClassVar[str]
    """The name of the edit's number: strength, coefficient or value."""
    misscaled: ClassVar[str] = "are not unit, or not orthonormal"
    norm_preserving: ClassVar[bool] = False
    hooks_only: ClassVar[str] = ""
    """Why no weights can hold an edit of this kind, in words; empty where they can."""
    sites: tuple[Site, ...]
    vectors: Float[Tensor, "k d_model"]
    amounts: tuple[float, ...]
    """One number for each site."""
    positions: Positions
    label: str

    def _place(
        self,
        direction: Any,
        sites: SiteLike | Iterable[SiteLike],
        amounts: float | Sequence[float],
        **values: Any,
    ) -> None:
        """Set the fields that every edit has: the sites, a number for each, positions, label, vectors."""
        places = written_sites(sites)
        values["label"] = values["label"] or joined_label(direction)
        amounts = strength_per_site(amounts, places, self.amount)
        self._set(sites=places, amounts=amounts, **values)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.positions not in get_args(Positions):
            raise PlanError(
                f"unknown positions {self.positions!r}: accepted are {', '.join(get_args(Positions))}"
            )
        if not isinstance(self.label, str):
            raise PlanError(f"the label of an edit is a text; got {self.label!r}")

    def __repr__(self) -> str:
        return (
            f"<{self.op} {self.label} at {len(self.sites)} "
            f"{'site' if len(self.sites) == 1 else 'sites'}, {self._numbers()}>"
        )

    def _numbers(self) -> str:
        """The numbers, for `repr` and tables."""
        return f"{self.amount} {range_text(self.amounts)}"

    @property
    def where(self) -> Any:
        """Where the edit works within a pass: its positions, and for a conditional edit its condition too."""
        return self.positions

    @property
    def reads(self) -> Float[Tensor, "k d_model"]:
        """The rows whose dot products with an activation decide what the edit changes of it; none of an addition."""
        return self.vectors

    @property
    def d_model(self) -> int:
        return self.vectors.shape[1]

    def map_at(self, site: SiteLike, gain: NormGain | None = None) -> Any:
        """The affine map (of a rotation, the `Rotation`) of this edit at one of its sites.

        Args:
            gain: of the norm between this site and the residual stream, in post-norm blocks. The edit's
                direction r is one of the stream; what the map projects against is normalize(gain * r),
                after which the normed output has nothing along r (see `before_norm`).

        Raises:
            PlanError: a site that this edit does not write; an addition or a clamp before a norm.
        """
        site = Site.parse(site)
        if site not in self.sites:
            raise PlanError(
                f"{self!r} has no map at {site}: it writes {', '.join(map(str, self.sites[:4]))}"
                + (" and more" if len(self.sites) > 4 else "")
            )
        i = self.sites.index(site)
        return self._map(i) if gain is None else self._map_before_norm(i, gain)

    def _map(self, i: int) -> Any:
        """The map at the i-th site."""
        raise NotImplementedError

    def _map_before_norm(self, i: int, gain: NormGain) -> Any:
        raise PlanError(
            f"{self!r} at {self.sites[i]}, before a norm: what is added there is rescaled with the rest, "
            "so it has no fixed effect on the stream. Write it after the norm, at attn_out or mlp_out (behind an "
            "embedding's norm, at blocks.0.hook_resid_pre)"
        )

    def at_sites(self: _E, pairs: Sequence[tuple[Site, Site]]) -> _E:
        """The same edit at other sites: its map at the first site of each pair, written at the second."""
        edit = copy.copy(self)
        edit._set(
            sites=written_sites(new for _, new in pairs),
            amounts=tuple(self.amounts[self.sites.index(old)] for old, _ in pairs),
        )
        return edit

    def times(self: _E, factor: float) -> _E:
        """The same edit with every strength or coefficient times a factor.

        Raises:
            PlanError: a clamp, whose value is no strength; an amount beyond what an edit takes.
        """
        edit = copy.copy(self)
        edit._set(
            amounts=strength_per_site([factor * n for n in self.amounts], self.sites, self.amount)
        )
        return edit

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            self.amount: one_or_many(self.amounts),
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
            entry["sites"],
            positions=entry["positions"],
            label=entry["label"],
            **{cls.amount: entry[cls.amount]},
            **({"norm_preserving": _flag(entry)} if "norm_preserving" in entry else {}),
        )
        edit._take_stored(vectors)
        return edit

    def _take_stored(self, vectors: Float[Tensor, "k d_model"]) -> None:
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


def _flag(entry: dict[str, Any]) -> bool:
    value = entry["norm_preserving"]
    if not isinstance(value, bool):
        raise PlanError(f'"norm_preserving" of an edit is true or false; got {value!r}')
    return value
