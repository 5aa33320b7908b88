"""ACE, affine concept editing: the component along a direction is set to what it is without the concept.

Knows: the values that make an erasure an affine concept edit. Does not know: how activations are collected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.edit import Positions, is_number, written_sites
from interp_ablate.edits.kinds import Erase
from interp_ablate.errors import PlanError
from interp_ablate.sites import EMBEDDING_POINTS, WRITER_POINTS, Site, SiteLike

logger = logging.getLogger(__name__)
Negatives = Float[Tensor, "prompt d_model"] | Float[Tensor, " d_model"]


def affine_concept_edit(
    direction: Direction,
    negatives: Negatives | Mapping[SiteLike, Negatives],
    sites: SiteLike | Iterable[SiteLike] | None = None,
    *,
    alpha: float = 0.0,
    strength: float | Sequence[float] = 1.0,
    positions: Positions = "all",
    label: str | None = None,
) -> Erase:
    """ACE: x -> x - proj(x) + proj(mean of the negatives) + alpha * r, with r the raw direction.

    Directional ablation sets the component along r to 0, which no prompt has. ACE sets it to what prompts without
    the concept have (alpha 0), to what those with it have (alpha 1, where r is a difference in means), or beyond.
    Source: Marshall, Scherlis, Belrose 2024, https://arxiv.org/abs/2411.09003.

    Args:
        negatives: activations of prompts without the concept, or their mean. By site, each for its own value; or one
            tensor, of the residual stream, for all of `sites`.
        sites: default: those of the mapping.

    At writers what they write sums. By site, each gets the mean of its own negatives, and the first one alpha * r:
    along r the stream then has the mean of the stream. One tensor for all writers goes to `embed`, and the others
    get 0: exact in weights without any bias. Elsewhere a value needs a bias.

    Raises:
        PlanError: a tensor of another shape or with NaN; a site without negatives; one tensor for writers without
            the embedding; alpha that is not finite.
    """
    if not isinstance(direction, Direction):
        raise PlanError(
            f"affine_concept_edit takes a Direction, whose norm is that of r; got {type(direction).__name__}"
        )
    if not is_number(alpha) or not abs(float(alpha)) < float("inf"):
        raise PlanError(f"alpha is a finite number; got {alpha!r}")
    by_site = isinstance(negatives, Mapping)
    if sites is None and not by_site:
        raise PlanError(
            "affine_concept_edit needs sites, or negatives by site: {site: activations}"
        )
    places = written_sites(list(negatives) if sites is None else sites)  # type: ignore[arg-type]
    at_writers = [site for site in places if site.point in WRITER_POINTS]
    if at_writers and not by_site:
        _check_all_writers(at_writers)
    means = {site: _mean(negatives, site, direction) for site in places}
    values, added = [], float(alpha) * direction.norm
    for site in places:
        first = site == (Site(0, "embed") if not by_site else min(at_writers, default=site))
        in_stream = site not in at_writers
        own = means[site] if by_site or in_stream or first else 0.0
        values.append(own + (added if in_stream or first else 0.0))
    return Erase(
        direction, direction.vector, places,
        strength=strength, value=values, positions=positions, label=label or f"ace {direction.name}",
    )  # fmt: skip


def _check_all_writers(writers: Sequence[Site]) -> None:
    """Refuse one mean of the stream for writers that leave some of the stream as it is, as far as sites tell.

    A layer without any of them writes as before; so does the embedding. A layer that lacks one of the two is warned
    of: some models have such layers.
    """
    layers = {site.layer for site in writers if site.point not in EMBEDDING_POINTS}
    missing = [f"those of layer {i}" for i in range(max(layers, default=-1) + 1) if i not in layers]
    if Site(0, "embed") not in writers:
        missing.insert(0, "the embedding")
    if missing:
        raise PlanError(
            f"one mean of the stream for {writers[0]} and other writers without {missing[0]}: each writes a part of "
            "the stream. Give negatives by site, or all of model.writers"
        )
    outputs = {site.output for site in writers}
    each = [Site(layer, point) for layer in sorted(layers) for point in ("attn_out", "mlp_out")]  # type: ignore[arg-type]
    if lacking := [str(site) for site in each if site not in outputs]:
        logger.warning(
            "affine_concept_edit has one mean of the stream, and %s is not among its sites (%d of %d are missing): where "
            "the model writes there, the stream does not get that mean. Give all of model.writers",
            lacking[0], len(lacking), len(each),
        )  # fmt: skip


def _mean(
    negatives: Negatives | Mapping[SiteLike, Negatives], site: Site, direction: Direction
) -> float:
    """The mean of the negatives at a site, along the unit direction."""
    given = negatives
    if isinstance(negatives, Mapping):
        found = {Site.parse(key): value for key, value in negatives.items()}
        if site not in found:
            raise PlanError(
                f"there are no negatives at {site}: those given are at {', '.join(map(str, list(found)[:4]))}"
            )
        given = found[site]
    try:
        rows = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"negatives at {site} are a tensor [prompt, d_model] or [d_model]; got {given!r:.80}"
        ) from error
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != len(direction.vector):
        raise PlanError(
            f"negatives at {site} have the shape [prompt, d_model] or [d_model] with d_model "
            f"{len(direction.vector)}; got {tuple(rows.shape)}"
        )
    value = float((rows @ direction.vector.to(rows)).mean())
    if value != value or abs(value) == float("inf"):
        raise PlanError(f"the negatives at {site} hold NaN or infinity: collect them in float32")
    return value
