"""Several edits made exact together: what each would do alone, all at once.

Knows: edits that share a site and whose directions are not orthogonal, sets of directions by site and by layer. Does not know: models or hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.display import shortened
from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.kinds import Ablate, Clamp, Edit, Erase
from interp_ablate.edits.plan import HasWriters, Plan, layers_of, n_layers_of, written_by
from interp_ablate.errors import PlanError
from interp_ablate.sites import Site, SiteLike

Directions = Direction | Tensor | Sequence[Direction | Tensor]
# The smallest singular value of what is read against what is written, scaled to unit rows.
SMALLEST_SINGULAR_VALUE = 1e-6


def jointly(plan: Plan | Edit | Sequence[Edit]) -> Plan:
    """The plan whose ablations, clamps and erasures are exact together, where they share a site.

    Applied in turn, edits along directions that are not orthogonal undo each other in part. Here each dot product
    that an edit sets is after all of them what that edit alone makes it: (1 - strength) of what it was under an
    ablation, the value under a clamp or an erasure; one of strength 0 has no part. The map at a site is x -> x - W^T (R W^T)^-1 S (R x - v), with
    the rows R that are read and W that are written, the strengths S and the values v; it writes along W only, and
    the order of the edits has no part in it. Whole ablations become the ablation of their common subspace. At
    writers it is exact in weights, as each of the edits is.

    Raises:
        PlanError: an edit of another kind, or one that preserves norms; edits at one site with different
            positions; rows that are not linearly independent.
    """
    edits = tuple(plan) if isinstance(plan, Iterable) else (plan,)
    for edit in edits:
        if not isinstance(edit, (Ablate, Clamp, Erase)) or edit.norm_preserving:
            raise PlanError(
                f"{edit!r:.120} has no part in a joint edit, which takes Ablate (without norm_preserving), Clamp and "
                "Erase: put it beside, as in jointly(plan) + Add(...)"
            )
    sites = dict.fromkeys(site for edit in edits for site in edit.sites)
    alike: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        key = tuple(
            (k, edit.amounts[edit.sites.index(site)], _value(edit, site))
            for k, edit in enumerate(edits)
            if site in edit.sites and _strength(edit, site)
        )
        alike.setdefault(key, []).append(site)
    joint = [_joint([edits[k] for k, *_ in key], places) for key, places in alike.items() if key]
    return Plan(tuple(joint))


def ablate_by_site(directions: Mapping[SiteLike, Directions], *, strength: float = 1.0) -> Plan:
    """Directional ablation with directions of its own at every site: one, or several as one subspace.

    Raises:
        PlanError: directions of a site that are not linearly independent, or no site.
    """
    _check_mapping("ablate_by_site", "sites", directions)
    return Plan(tuple(Ablate(each, site, strength=strength) for site, each in directions.items()))  # type: ignore[arg-type]


def ablate_sets(
    model: HasWriters, directions: Mapping[int, Directions], *, strength: float = 1.0
) -> Plan:
    """Directional ablation of what attention and MLP of each layer write, with directions of its own a layer.

    Exact in weights. Several directions of one layer are ablated as one subspace.

    Raises:
        PlanError: a layer that the model lacks, directions that are not linearly independent.
    """
    count = n_layers_of(model)
    _check_mapping("ablate_sets", "layers", directions)
    edits = []
    for layer in layers_of(count, tuple(directions)):
        given = next(each for key, each in directions.items() if key % count == layer)
        edits.append(Ablate(given, written_by(model, (layer,)), strength=strength))
    return Plan(tuple(edits))


def _check_mapping(what: str, keys: str, directions: object) -> None:
    """Refuse what is no dict, or one with nothing in it."""
    if not isinstance(directions, Mapping) or not directions:
        raise PlanError(
            f"{what} takes a dict from {keys} to their directions, one or more; got {shortened(repr(directions))}"
        )


def _value(edit: Edit, site: Site) -> float:
    if isinstance(edit, Erase):
        return edit.values[edit.sites.index(site)]
    return edit.amounts[edit.sites.index(site)] if isinstance(edit, Clamp) else 0.0


def _joint(edits: Sequence[Edit], places: Sequence[Site]) -> Edit:
    """One edit for sites at which the same edits have the same numbers."""
    if len(edits) == 1:
        return edits[0].at_sites([(site, site) for site in places])
    positions = {edit.positions for edit in edits}
    if len(positions) > 1:
        raise PlanError(
            f"edits of different positions ({', '.join(sorted(positions))}) at {places[0]} cannot be joint: each "
            "position has either. Give them the same positions"
        )
    label = " and ".join(dict.fromkeys(edit.label for edit in edits))
    strengths = [_strength(edit, places[0]) for edit in edits]
    options: dict[str, Any] = {"positions": positions.pop(), "label": label}
    if all(isinstance(edit, Ablate) for edit in edits) and len(set(strengths)) == 1:
        return Ablate(_together(edits), places, strength=strengths[0], **options)
    write = torch.cat(
        [edit.vectors[:1] if isinstance(edit, Erase) else edit.vectors for edit in edits]
    )
    read = torch.cat([edit.reads for edit in edits])
    sizes = [1 if isinstance(edit, Erase) else len(edit.vectors) for edit in edits]
    per_edit = torch.tensor(
        [strengths, [_value(edit, places[0]) for edit in edits]], dtype=torch.float64
    )
    amounts, values = per_edit.repeat_interleave(torch.tensor(sizes), 1)
    meeting = read @ write.T
    scaled = meeting / read.norm(dim=1, keepdim=True) / write.norm(dim=1)
    if (
        len(read) > read.shape[1]
        or float(torch.linalg.svdvals(scaled)[-1]) < SMALLEST_SINGULAR_VALUE
    ):
        raise PlanError(
            f"the {len(read)} directions that {', '.join(map(repr, edits[:3]))} read and write are not linearly "
            "independent: no edit does what each of them does. Drop one"
        )
    dual = torch.linalg.solve(meeting.T, write)  # rows: read . dual^T is the identity
    shift = (amounts * values) @ dual
    return AffineEdit(-amounts[:, None] * dual, read, places, shift=shift, **options)


def _strength(edit: Edit, site: Site) -> float:
    return 1.0 if isinstance(edit, Clamp) else edit.amounts[edit.sites.index(site)]


def _together(edits: Sequence[Edit]) -> Tensor:
    """The vectors of ablations, those left out that lie in the span of the ones before."""
    basis = edits[0].vectors
    for edit in edits[1:]:
        for row in edit.vectors:
            rest = row - (row @ basis.T) @ basis
            rest = rest - (rest @ basis.T) @ basis
            if float(rest.norm()) > SMALLEST_SINGULAR_VALUE:
                basis = torch.cat([basis, rest[None] / rest.norm()])
    return basis
