"""Plans: edits in order, as plain data that hooks, weights and exports read; plans placed by rule.

Knows: composition, the maps at each site, JSON, which sites a rule means. Does not know: hooks, weights or models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from interp_ablate.directions.direction import Direction, as_direction
from interp_ablate.display import html_table, shortened
from interp_ablate.edits.affine import Affine, NormGain
from interp_ablate.edits.conditional import Conditional, Gate
from interp_ablate.edits.edit import EditBase, Positions, is_number
from interp_ablate.edits.kinds import Ablate, Add, Clamp, Edit, Erase, edit_from_dict
from interp_ablate.edits.rotation import Rotation
from interp_ablate.errors import PlanError
from interp_ablate.sites import EMBEDDING_POINTS, WRITER_POINTS, Point, Site, SiteLike, sites_of
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import incoming_json
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)
FORMAT = "interp_ablate.plan/1"


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
            if not isinstance(edit, EditBase):
                raise PlanError(
                    f"a plan is made of Ablate, Add, Clamp and Erase, AffineEdit, Rotate or Conditional; got {edit!r} ({type(edit).__name__})"
                )
        object.__setattr__(self, "edits", edits)
        widths = {edit.d_model for edit in edits}
        if len(widths) > 1:
            raise PlanError(f"edits of different d_model in one plan: {sorted(widths)}")
        for message in (*_summed_values(edits), *_undone_ablations(edits)):
            logger.warning(message)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.edits[:3])) + (", …" if len(self.edits) > 3 else "")
        return f"Plan({len(self.edits)} edits: {shown})" if self.edits else "Plan(no edits)"

    def _repr_html_(self) -> str:
        rows = [
            (edit.op, edit.label, ", ".join(map(str, edit.sites[:4])) + ("…" if len(edit.sites) > 4 else ""),
             len(edit.sites), edit._numbers(), edit.positions)
            for edit in self.edits
        ]  # fmt: skip
        columns = ("edit", "direction", "sites", "number", "amount", "positions")
        return html_table(columns, rows, caption=f"{len(self.edits)} edits, applied in this order")

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

    def times(self, factor: float) -> Plan:
        """The plan with every strength and coefficient times a factor; 0 edits nothing.

        Raises:
            PlanError: an edit that has no strength (a clamp).
        """
        return Plan(tuple(edit.times(factor) for edit in self.edits))

    def norm_preserving_at(self, site: SiteLike) -> Ablate | None:
        """The norm-preserving edit of a site, if there is one; additions may stand beside it.

        Raises:
            PlanError: another edit than an addition shares its site.
        """
        site = Site.parse(site)
        edits = [e for e in self.edits if site in e.sites and not isinstance(e, Add)]
        norm_preserving = [e for e in edits if isinstance(e, Ablate) and e.norm_preserving]
        if norm_preserving and len(edits) > 1:
            raise PlanError(
                f"{len(edits)} edits at {site}, one of them norm-preserving: norms are restored after "
                "one edit only. Ablate both directions as one subspace [k, d_model]"
            )
        return norm_preserving[0] if norm_preserving else None

    def maps_at(
        self, site: SiteLike, gain: NormGain | None = None
    ) -> list[tuple[Positions | Gate, Affine | Rotation]]:
        """The maps at one site in order, affine neighbours of equal positions (and condition) composed into one.

        `gain`: of the norm that follows the site, as for `map_at`.
        """
        site = Site.parse(site)
        maps: list[tuple[Positions | Gate, Affine | Rotation]] = []
        for edit in self.edits:
            if site not in edit.sites:
                continue
            found, last = edit.map_at(site, gain), maps[-1] if maps else (None, None)
            if last[0] == edit.where and isinstance(last[1], Affine) and isinstance(found, Affine):
                maps[-1] = (edit.where, last[1].then(found))
            else:
                maps.append((edit.where, found))
        return maps

    @property
    def hooks_only(self) -> str:
        """Why no weights can hold the plan, in words; empty where its kinds of edits have a weight form."""
        found = next((edit for edit in self.edits if edit.hooks_only), None)
        return f"{found!r} is {found.hooks_only}: it works on a running model only" if found else ""

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
        return cls(tuple(edit_from_dict(entry) for entry in entries))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            PlanError: the place cannot be written.
        """
        write_atomic(Path(path), json_text(self.to_dict()), error=PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from JSON: a plan file, or any JSON object with a `plan` (`selected.json`).

        Raises:
            PlanError: no such file, not JSON, not a plan.
        """
        data = incoming_json(path, error=PlanError, advice="save the plan again")
        if isinstance(data, dict) and "plan" in data:
            data = data["plan"]
        return cls.from_dict(data)


def _summed_values(edits: Iterable[Edit]) -> Iterator[str]:
    """Warnings of clamps and erasures that give several writers one value: what they write to the stream sums."""
    for edit in edits:
        inner = edit.edit if isinstance(edit, Conditional) else edit
        if not isinstance(inner, (Clamp, Erase)):
            continue
        given = inner.values if isinstance(inner, Erase) else inner.amounts
        values = [v for site, v in zip(edit.sites, given) if site.point in WRITER_POINTS]
        if len(values) > 1 and values[0] and len(set(values)) == 1:
            n, value = len(values), values[0]
            yield (
                f"{edit!r} sets each of {n} writers to {value:g}: their outputs sum, so the stream is set "
                f"to {n * value:g}. For {value:g}, give the first writer the value v and the others 0: "
                f"value=[v] + [0] * {len(edit.sites) - 1}"
            )


def _undone_ablations(edits: Iterable[Edit]) -> Iterator[str]:
    """Warnings of an ablation of which a later one at the same site puts a part back."""
    ablations = [edit for edit in edits if isinstance(edit, Ablate)]
    for first, second in itertools.combinations(ablations, 2):
        whole = [
            {site for site, amount in zip(edit.sites, edit.amounts) if amount == 1}
            for edit in (first, second)
        ]
        if not whole[0] & whole[1] or first.positions != second.positions:
            continue
        overlap = first.vectors @ second.vectors.T
        if (overlap @ (second.vectors - overlap.T @ first.vectors)).norm() > 1e-2:
            yield (
                f"{first!r} and then {second!r}: their directions are not orthogonal (cosine up to "
                f"{overlap.abs().max():.2f}), and the second puts back a part of the first. To ablate both, "
                "give them to one edit: Ablate([v1, v2], sites), or jointly(plan)"
            )


def everywhere(n_layers: int) -> tuple[Site, ...]:
    """The writers of a Llama-style stream: embed, and attn_out and mlp_out of every layer.

    Ablating a direction at all of them with strength 1 leaves nothing along it anywhere, and is what
    ablation at resid_pre, resid_mid and resid_post of every layer computes; it is exact in weights.
    `model.writers` gives them for any architecture (learned positions, norms after the projections).
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
    finite = all(is_number(n) and math.isfinite(n) for n in (*attention, *mlp, width))
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
        reached = {Site(layer, point): value for layer, value in strengths.items() if value > 0}
        if reached:
            plan += Ablate(direction, reached, strength=tuple(reached.values()))
    if not plan.edits:
        raise PlanError(
            f"the band reaches none of {n_layers} layers: attention {attention} and mlp {mlp} (strength, "
            f"centre) with width {width:g}; move a centre to a layer, or widen it"
        )
    return plan


class HasWriters(Protocol):
    """A model as a layer choice sees it: the number of layers, and the sites that write to the stream."""

    @property
    def n_layers(self) -> int: ...
    @property
    def writers(self) -> tuple[Site, ...]: ...


def n_layers_of(model: HasWriters) -> int:
    """How many layers a model has.

    Raises:
        PlanError: it is no model of this package.
    """
    count = getattr(model, "n_layers", None)
    if type(count) is not int:
        raise PlanError(
            f"a Model is needed, as load_model(name) gives one; got {shortened(repr(model))} ({type(model).__name__})"
        )
    return count


Layers = int | str | Iterable[int] | None


def layers_of(n_layers: int, layers: Layers = None) -> tuple[int, ...]:
    """Layer numbers of a model: None for all, one number, a range or list, "10-20", or "20%-80%".

    Negative numbers count from the end; both ends of a text are included, and a share of the depth is
    rounded to the layer that it falls into.

    Raises:
        PlanError: a layer that the model lacks, one twice, none at all, something else.
    """
    if layers is None:
        return tuple(range(n_layers))
    if isinstance(layers, str):
        return _between(n_layers, layers)
    numbers = [layers] if isinstance(layers, int) else list(layers)
    wrong = [each for each in numbers if isinstance(each, bool) or not isinstance(each, int)]
    outside = [each for each in numbers if each not in wrong and not -n_layers <= each < n_layers]
    if wrong or outside or not numbers:
        raise PlanError(
            f"no layers {(wrong or outside or numbers)!r}: the model has 0 to {n_layers - 1}; give numbers, a "
            'range, "10-20" or "20%-80%"'
        )
    chosen = sorted(each % n_layers for each in numbers)
    if len(set(chosen)) != len(chosen):
        raise PlanError(f"a layer is named twice in {numbers}")
    return tuple(chosen)


def _between(n_layers: int, text: str) -> tuple[int, ...]:
    ends = re.fullmatch(r"\s*(\d+)(%?)\s*(?:-\s*(\d+)(%?))?\s*", text)
    if ends is None:
        raise PlanError(f'cannot read layers from {text!r}: write "12", "10-20" or "20%-80%"')
    first, last = ends[1], ends[3] or ends[1]
    numbers = [
        min(int(number) * n_layers // 100, n_layers - 1) if percent else int(number)
        for number, percent in ((first, ends[2]), (last, ends[4] if ends[3] else ends[2]))
    ]
    return layers_of(n_layers, range(numbers[0], numbers[1] + 1))


def written_by(model: HasWriters, layers: Collection[int]) -> list[Site]:
    """The sites that attention and MLPs of some layers write."""
    return [s for s in model.writers if s.layer in layers and s.point not in EMBEDDING_POINTS]


def ablate_layers(
    model: HasWriters,
    direction: Direction,
    layers: Layers = None,
    *,
    strength: float = 1.0,
    inputs: bool = False,
    positions: Positions = "all",
) -> Plan:
    """Directional ablation at chosen layers.

    What the layers write (attention and MLP outputs) loses the direction: exact in weights, so that what
    is measured can be exported. With `inputs` the stream that each layer reads loses it instead, as a
    layer wrapped with a hook on its input does it; that has no weight form unless it is every layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    chosen = set(layers_of(n_layers_of(model), layers))
    sites = sites_of(("resid_pre",), sorted(chosen)) if inputs else written_by(model, chosen)
    return Plan((Ablate(direction, sites, strength=strength, positions=positions),))


def add_to_layers(
    model: HasWriters,
    direction: Direction,
    layers: Layers = None,
    *,
    coefficient: float = 1.0,
    point: Point = "resid_pre",
    positions: Positions = "all",
) -> Plan:
    """Activation addition of coefficient x the raw direction at chosen layers; None is its own layer.

    Raises:
        PlanError: layers that the model lacks.
    """
    count = n_layers_of(model)
    own = as_direction(direction).site.layer if layers is None else layers
    sites = sites_of((point,), list(layers_of(count, own)))
    return Plan((Add(direction, sites, coefficient=coefficient, positions=positions),))
