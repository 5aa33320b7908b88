"""Conditional edits: an edit that works where a condition is met by the prompt, read once.

Knows: the condition, its similarity, the edit's JSON. Does not know: how a threshold is chosen, or who reads the prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import NormGain, as_vectors, one_row, orthonormal_rows
from interp_ablate.edits.edit import EditBase, Positions, is_number
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.sites import Site, SiteLike

Similarity = Literal["projected", "cosine"]
Pooled = Literal["mean", "last"]
CONDITION_POINTS = ("resid_pre", "resid_post")


@dataclass(frozen=True, eq=False, init=False)
class Condition:
    """A condition of the prompt: the similarity of its activation and a direction, above or below a threshold.

    The activation h is the mean over the prompt's tokens at a site ("mean", as in the authors' code), or that of its
    last token ("last"). The similarity is the paper's cos(h, tanh(proj h)) ("projected", which does not tell the
    two signs of the direction apart), or cos(h, direction) ("cosine").
    Source: CAST, Lee et al. 2024, https://arxiv.org/abs/2409.05907.

    Where a text has no prompt and answer, all of it counts as the prompt. It is read before anything is written at its
    site, by plans or by hooks of your own: what they write there moves no condition, what is written below does.

    Raises:
        PlanError: a threshold that is no finite number; another similarity or pooling; a site that is not resid_pre or
            resid_post; a direction that is zero or not finite.
    """

    vector: Float[Tensor, " d_model"]
    """Unit vector, float64."""
    site: Site
    threshold: float
    above: bool
    """True where the condition is met above the threshold, False where it is met below."""
    similarity: Similarity
    pooled: Pooled

    def __init__(
        self,
        direction: Direction | Float[Tensor, " d_model"],
        site: SiteLike | None = None,
        *,
        threshold: float,
        above: bool = True,
        similarity: Similarity = "projected",
        pooled: Pooled = "mean",
    ) -> None:
        if site is None and not isinstance(direction, Direction):
            raise PlanError("a condition has a site: give one, or a Direction, which has its own")
        try:
            place = direction.site if site is None else Site.parse(site)  # type: ignore[union-attr]
        except InterpAblateError as error:
            raise PlanError(str(error)) from error
        if place.point not in CONDITION_POINTS:
            raise PlanError(
                f"a condition is read from the residual stream, at {' or '.join(CONDITION_POINTS)}; got {place}"
            )
        if not is_number(threshold) or not math.isfinite(threshold):
            raise PlanError(f"the threshold of a condition is a finite number; got {threshold!r}")
        for given, choices in ((similarity, get_args(Similarity)), (pooled, get_args(Pooled))):
            if given not in choices:
                raise PlanError(
                    f"unknown {given!r} in a condition: accepted are {', '.join(choices)}"
                )
        if not isinstance(above, bool):
            raise PlanError(f'"above" of a condition is true or false; got {above!r}')
        vector = orthonormal_rows(one_row(as_vectors(direction), "condition"))[0]
        values: dict[str, Any] = {
            "vector": vector, "site": place, "threshold": float(threshold), "above": above,
            "similarity": similarity, "pooled": pooled,
        }  # fmt: skip
        for name, part in values.items():
            object.__setattr__(self, name, part)

    def similarities(self, h: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        """The similarity of each pooled activation, from -1 to 1; 0 of an activation that is zero."""
        vector = self.vector.to(h)
        along = h @ vector
        tiny = torch.finfo(h.dtype).tiny
        if self.similarity == "cosine":
            return along / h.norm(dim=-1).clamp(min=tiny)
        image = torch.tanh(along[..., None] * vector)
        sizes = h.norm(dim=-1) * image.norm(dim=-1)
        return (h * image).sum(-1) / sizes.clamp(min=tiny)

    def pool(
        self, x: Float[Tensor, "batch pos d_model"], prompt: Tensor
    ) -> Float[Tensor, "batch d_model"]:
        """The activation that is judged, of each row; `prompt` [batch, pos] is True at the tokens of the prompt.

        Computed in float32 at least. Rows are padded on the left, so that the last token of the prompt is the last
        True one.
        """
        wide = x if x.element_size() >= 4 else x.float()
        if self.pooled == "mean":
            weights = prompt.to(wide)[..., None]
            return (wide * weights).sum(1) / weights.sum(1).clamp(min=1)
        places = torch.arange(prompt.shape[1], device=prompt.device)
        last = torch.where(prompt, places, places.new_full((), -1)).amax(1).clamp(min=0)
        return wide[torch.arange(len(wide), device=wide.device), last.to(wide.device)]

    def is_met(self, h: Float[Tensor, "prompt d_model"]) -> Tensor:
        """Whether the condition is met by each pooled activation: [prompt], bool."""
        found = self.similarities(h)
        return found > self.threshold if self.above else found < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain data; floats keep every bit."""
        names = ("threshold", "above", "similarity", "pooled")
        fields = {name: getattr(self, name) for name in names}
        return {"site": str(self.site), **fields, "vector": self.vector.tolist()}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Condition:
        """Read what `to_dict` wrote; KeyError, TypeError and ValueError are the caller's."""
        names = ("threshold", "above", "similarity", "pooled")
        stored = torch.tensor(entry["vector"], dtype=torch.float64)
        condition = cls(stored, entry["site"], **{name: entry[name] for name in names})
        if stored.ndim != 1 or float((stored - condition.vector).norm()) > 1e-12:
            raise PlanError(
                "the vector of a condition is one unit vector: make it with Condition(...)"
            )
        object.__setattr__(condition, "vector", stored)
        return condition

    @cached_property
    def key(self) -> str:
        """sha256 of the condition: equal conditions are read once."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        sign = ">" if self.above else "<"
        return f"{self.similarity} similarity at {self.site} {sign} {self.threshold:.3g}"


@dataclass(frozen=True)
class Gate:
    """Where a conditional edit works: at positions, in the rows whose prompt meets a condition."""

    positions: Positions
    condition: str
    """The key of the condition."""


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Conditional(EditBase):
    """CAST: an edit in the rows whose prompt meets a condition, and nothing in the others.

    The condition is read once, from the prompt, on its way through the model, before any plan writes at its site (what
    plans write at earlier sites is there). The edit then works in this pass and in
    all decoding steps, at the positions it names. The paper adds a behaviour vector:
    `Conditional(Add(behaviour, sites), Condition(direction, threshold=0.04))`. Every other edit can stand in its place,
    but a norm-preserving one, which is of weights. All sites come after the condition's, in the order of the pass.
    `best_condition` chooses direction, threshold and side on validation prompts. No weights hold it.
    Source: Lee et al. 2024, https://arxiv.org/abs/2409.05907.
    """

    op: ClassVar[str] = "conditional"
    hooks_only: ClassVar[str] = "an edit that depends on a condition of the prompt"
    edit: Any
    condition: Condition

    def __init__(self, edit: Any, condition: Condition) -> None:
        if not isinstance(edit, EditBase) or isinstance(edit, Conditional) or edit.norm_preserving:
            raise PlanError(
                f"a conditional edit is made of one edit, such as Add, without norm_preserving; got {edit!r:.120}"
            )
        if not isinstance(condition, Condition):
            raise PlanError(f"a conditional edit takes a Condition; got {condition!r:.120}")
        early = [str(site) for site in edit.sites if site < condition.site]
        if early:
            raise PlanError(
                f"{edit!r} works at {early[0]}, before {condition.site}, where its condition is read: choose later "
                "sites, or a condition of an earlier layer"
            )
        if edit.d_model != len(condition.vector):
            raise PlanError(
                f"the edit has d_model {edit.d_model}, its condition {len(condition.vector)}: both are of one model"
            )
        self._set(
            edit=edit, condition=condition, sites=edit.sites, vectors=edit.vectors,
            amounts=edit.amounts, amount=edit.amount, positions=edit.positions, label=edit.label,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<{self.edit!r} if {self.condition!r}>"

    def _numbers(self) -> str:
        return f"{self.edit.op}, {self.edit._numbers()}, if {self.condition!r}"

    @property
    def where(self) -> Gate:
        return Gate(self.positions, self.condition.key)

    @property
    def reads(self) -> Float[Tensor, "k d_model"]:
        """What the edit inside reads; the condition has a vector of its own."""
        return self.edit.reads  # type: ignore[no-any-return]

    def times(self, factor: float) -> Conditional:
        return Conditional(self.edit.times(factor), self.condition)

    def at_sites(self, pairs: Sequence[tuple[Site, Site]]) -> Conditional:
        return Conditional(self.edit.at_sites(pairs), self.condition)

    def _map(self, i: int) -> Any:
        return self.edit._map(i)

    def _map_before_norm(self, i: int, gain: NormGain) -> Any:
        return self.edit._map_before_norm(i, gain)

    def to_dict(self) -> dict[str, Any]:
        inner = self.edit.to_dict()
        shown = ("strength", "coefficient", "value", "angle", "sites", "positions", "label")
        same = {name: inner[name] for name in shown if name in inner}
        return {"op": self.op, **same, "condition": self.condition.to_dict(), "edit": inner}

    @classmethod
    def read(cls, entry: dict[str, Any], read_edit: Callable[[dict[str, Any]], Any]) -> Conditional:
        """Read what `to_dict` wrote; `read_edit` reads the edit inside.

        Raises:
            PlanError: fields beside the edit that say something else than the edit.
        """
        edit = cls(read_edit(entry["edit"]), Condition.from_dict(entry["condition"]))
        if edit.to_dict() != entry:
            raise PlanError(
                "a conditional edit of the plan says something else beside its edit than in it: make it with "
                "Conditional(edit, condition), and save the plan again"
            )
        return edit


def refuse_conditions(
    plan: Iterable[Any] | None, what: str, applied: Sequence[Condition] = ()
) -> None:
    """Refuse a plan with conditions where a text is read in windows, which have no prompt.

    `applied`: the conditions of the plans that are applied to the model already.

    Raises:
        PlanError: an edit of the plan is conditional, or one that is applied.
    """
    if applied or any(isinstance(edit, Conditional) for edit in plan or ()):
        raise PlanError(
            f"{what} is read in windows, and a condition is of a prompt: there is none. Measure answers to prompts, "
            "or the edit without its condition (evaluate: --text none)"
        )
