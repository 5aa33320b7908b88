"""A plan in writers-only form, as weights can hold it.

Knows: which plans have an exact weight form, and the nearest one that has. Does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from interp_ablate.edits.affine_edit import AffineEdit
from interp_ablate.edits.kinds import Ablate, Add, Clamp, Edit, Erase
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.models.architectures import Architecture, text_config
from interp_ablate.sites import (
    EMBEDDING_POINTS,
    PROJECTION_POINTS,
    RESIDUAL_POINTS,
    WRITER_POINTS,
    Site,
)


def require_weight_form(plan: Plan) -> None:
    """Refuse a plan with an edit that only hooks can do, or one at some positions only.

    Raises:
        ExportError: says which edit or positions, and why.
    """
    if plan.hooks_only:
        raise ExportError(
            f"{plan.hooks_only}, and no checkpoint, adapter, GGUF or control vector can hold it. Keep the plan's "
            "file, and apply it with model.applied(plan) or --plan. Of the other edits there is an exact weight form"
        )
    limited = sorted({edit.positions for edit in plan if edit.positions != "all"})
    if limited:
        raise ExportError(
            f"the plan edits {', '.join(limited)} positions only; weights act at every position. The "
            "nearest exact plan is the same with positions='all'"
        )


def writers_only_form(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """The plan written at the architecture's writers only, where that is exactly the same function.

    An ablation with strength 1 of one subspace at every place of the residual stream equals its
    ablation at every writer, where no norm follows a writer; so do erasures and clamps of one direction,
    whose value is written once, by the embedding. An addition to the stream equals the same addition to
    the writer before it. Anything else on the residual stream has no exact form.

    Raises:
        ExportError: the reason, and the nearest plan that is exact.
    """
    require_weight_form(plan)
    residual = [s for s in plan.sites if s.point in RESIDUAL_POINTS]
    if not residual:
        return _written(plan, entry, hf_config)
    on_stream = [e for e in plan if any(s.point in RESIDUAL_POINTS for s in e.sites)]
    if all(isinstance(edit, Add) for edit in on_stream):
        return _written(_additions_at_writers(plan, entry, hf_config), entry, hf_config)
    return _everywhere_at_writers(plan, entry, hf_config)


def _nearest(entry: Architecture, plan: Plan, hf_config: Any) -> str:
    points = ", ".join(dict.fromkeys(site.point for site in _writers(entry, hf_config)))
    if any(isinstance(edit, AffineEdit) for edit in plan):
        return (
            "An affine edit is exact at writers, fitted to what they write: AffineEdit.of(gaussian_transport(positive, "
            f"negative, site, rank=k), site) at {points} of a layer (what it adds needs a bias there)"
        )
    if any(isinstance(edit, Erase) for edit in plan):
        return (
            "The nearest exact plan erases with one write and read, strength 1 and value 0, at "
            f"{points} of every layer: Erase(write, read, model.writers)"
        )
    return (
        f"The nearest exact plan ablates the same direction, with strength 1, at {points} of every "
        "layer: Ablate(direction, model.writers)"
    )


def _writers(entry: Architecture, hf_config: Any) -> tuple[Site, ...]:
    return entry.writer_sites(text_config(hf_config).num_hidden_layers)


def _written(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """The plan itself, with attn_out for attn_proj where they are one; raises for writers of no weight form."""
    normed = [
        str(s) for s in plan.sites if s.point in ("attn_out", "mlp_out") and entry.is_normed(s)
    ]
    if normed:
        raise ExportError(
            f"the plan edits {normed[0]}, which this architecture's norm has already rescaled: an "
            "edit there has no exact weight form. The nearest exact plan edits the projections "
            "before the norm, attn_proj and mlp_proj at the same layers: nothing is left along the "
            "direction either, but the norm's scale changes with it (another function). "
            f"{_nearest(entry, plan, hf_config)}"
        )
    first: list[Edit] = []
    then: list[Edit] = []
    # a projection is reached before what it writes, whatever the order in the plan
    for edit in plan:
        before, after = split_edit(
            edit, lambda s: s.point in PROJECTION_POINTS and not entry.is_normed(s)
        )
        if before is not None:
            first.append(before.at_sites([(site, site.output) for site in before.sites]))
        if after is not None:
            then.append(after)
    return Plan((*first, *then)) if first else plan


def split_edit(edit: Edit, inside: Callable[[Site], bool]) -> tuple[Edit | None, Edit | None]:
    """The edit at the sites for which `inside` holds, and at the others; None where there are none."""
    pairs = [[(s, s) for s in edit.sites if inside(s) == wanted] for wanted in (True, False)]
    within, without = (edit.at_sites(part) if part else None for part in pairs)
    return within, without


def _additions_at_writers(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """Additions to the stream as additions to the writer just before, after the writers' own edits."""
    if entry.attn_norm is not None:
        raise ExportError(
            "the plan adds to the residual stream of post-norm blocks: what their projections write is "
            "rescaled by a norm, and there is no bias after it. Keep the addition as a hook, or export "
            "a control vector for llama.cpp"
        )
    if entry.scales_stream:
        raise ExportError(
            "the plan adds to the residual stream, which blocks of this architecture multiply by a factor "
            "of their own after what their writers add. Add at model.writers, or keep it as a hook"
        )
    parallel = entry.is_parallel(hf_config)
    own: list[Edit] = []
    moved: list[Edit] = []
    for edit in plan:
        stay, go = split_edit(edit, lambda site: site.point in WRITER_POINTS)
        if stay is not None:
            own.append(stay)
        for site in go.sites if go is not None else ():
            moved.append(edit.at_sites([(site, _writer_before(site, parallel, entry))]))
    return Plan((*own, *moved))


def _writer_before(site: Site, parallel: bool, entry: Architecture) -> Site:
    if site.point == "resid_mid":
        if parallel:
            raise ExportError(
                f"the plan adds at {site}, which blocks that run attention and MLP in parallel do not "
                "have. Add at resid_pre or resid_post"
            )
        return Site(site.layer, "attn_out")
    if site.point == "resid_post":
        return Site(site.layer, "mlp_out")
    if site.layer:
        return Site(site.layer - 1, "mlp_out")
    return Site(0, "embed_bias" if entry.is_normed(Site(0, "embed")) else "embed")


def _everywhere_at_writers(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """A projection that covers the residual stream, as the projection of every writer.

    Its map x -> P x + c is idempotent (P P = P, P c = 0): applied to every sum, it is P of every summand,
    and c once.
    """
    nearest, edits = _nearest(entry, plan, hf_config), list(plan)
    if any(edit.norm_preserving for edit in edits):
        raise ExportError(
            "the plan ablates the residual stream and preserves norms at some writers: what the stream "
            "loses again has no exact weight form. Preserve norms at all of model.writers, or at none"
        )
    if not all(_is_projection(edit) for edit in edits):
        raise ExportError(
            "the plan edits the residual stream itself with an addition beside other edits or a strength "
            f"other than 1, which accumulates over the layers and has no exact weight form. {nearest}"
        )
    shift = edits[0].map_at(edits[0].sites[0]).shift
    shifts = torch.stack([edit.map_at(site).shift for edit in edits for site in edit.sites])
    one_value = torch.allclose(shifts, shift.expand_as(shifts), rtol=1e-10, atol=1e-10)
    if not (one_value and all(_same_linear(edits[0], other) for other in edits[1:])):
        raise ExportError(
            "the plan edits different directions on the residual stream, or sets them to different "
            f"values. {nearest}"
        )
    missing = _uncovered(set(plan.sites), entry, hf_config)
    if missing:
        raise ExportError(
            f"the plan edits the residual stream at some places only ({missing[0]} and "
            f"{len(missing) - 1} more are left out): what is written there would come back. {nearest}"
        )
    where = "post-norm blocks: their projections" if entry.attn_norm is not None else None
    if entry.is_normed(Site(0, "embed")):
        where = "a model with a norm after its embeddings, which"
    if where is not None:
        raise ExportError(
            f"the plan edits the residual stream of {where} are rescaled by a norm before they reach it, so "
            f"the plan has no exact weight form. {nearest} (nothing is left along the direction either, but "
            "it is another function: the norm's scale changes)"
        )
    if shift.any():
        _check_counted_once(plan, entry)
    return Plan(_at_all_writers(edits[0], _writers(entry, hf_config)))


def _is_projection(edit: Edit) -> bool:
    """True if applying an edit twice is the same as applying it once."""
    if isinstance(edit, AffineEdit):
        return edit.is_projection
    return isinstance(edit, Clamp) or (
        isinstance(edit, (Ablate, Erase)) and set(edit.amounts) == {1.0}
    )


def _same_linear(one: Edit, other: Edit) -> bool:
    """True if two edits are one map but for what they add, at any of their sites."""
    first, second = (edit.map_at(edit.sites[0]) for edit in (one, other))
    size = max(1.0, float(first.left.norm() * first.right.norm()))
    products = first.left @ first.right.T, second.left @ second.right.T
    return torch.allclose(*products, rtol=0, atol=1e-10 * size)


def _check_counted_once(plan: Plan, entry: Architecture) -> None:
    """Refuse a value at writers beside one on the stream, and one that blocks scale: it is not there once."""
    if entry.scales_stream:
        raise ExportError(
            "the plan sets a value on the residual stream, and blocks of this architecture multiply the "
            "stream by a factor of their own: a value that is written once does not stay. Use value 0"
        )
    also = [s for s in plan.sites if s.point not in RESIDUAL_POINTS]
    if entry.pos_embed is None:
        also = [site for site in also if site.point != "embed"]
    if also:
        raise ExportError(
            f"the plan sets a value on the residual stream and at {also[0]}, which writes to it: it is "
            "there twice until the stream is edited again, which has no exact weight form. The nearest "
            "exact plan has the same value at resid_pre, resid_mid and resid_post of every layer only"
        )


def _at_all_writers(edit: Edit, writers: tuple[Site, ...]) -> tuple[Edit, ...]:
    """The projection of one edit, of every writer; what it sets a direction to, by the embedding."""
    if isinstance(edit, Ablate):
        return (Ablate(edit.vectors, writers, label=edit.label),)
    if isinstance(edit, AffineEdit):
        embed = Site(0, "embed")
        rest = [(edit.sites[0], site) for site in writers if site != embed]
        return edit.at_sites([(edit.sites[0], embed)]), edit.without_shift().at_sites(rest)
    if not isinstance(edit, (Clamp, Erase)):  # of a kind that `_is_projection` does not know
        raise ExportError(f"{edit!r} on the residual stream has no form at every writer")
    value = edit.values[0] if isinstance(edit, Erase) else edit.amounts[0]
    values = [value if site == Site(0, "embed") else 0.0 for site in writers]
    return (Erase(edit.vectors[0], edit.vectors[-1], writers, value=values, label=edit.label),)


def _uncovered(sites: set[Site], entry: Architecture, hf_config: Any) -> list[str]:
    """Residual places that a set of sites leaves out; resid_pre of a layer is resid_post of the one before."""
    missing = []
    embeddings = {site for site in _writers(entry, hf_config) if site.point in EMBEDDING_POINTS}
    if Site(0, "resid_pre") not in sites and not embeddings <= sites:
        missing.append(str(Site(0, "resid_pre")))
    parallel = entry.is_parallel(hf_config)
    for layer in range(text_config(hf_config).num_hidden_layers):
        after = {Site(layer, "resid_post"), Site(layer + 1, "resid_pre")}
        middle = Site(layer, "resid_mid") in sites or Site(layer, "attn_out") in sites
        if not parallel and not middle:
            missing.append(str(Site(layer, "resid_mid")))
        written = {Site(layer, "mlp_out")} | ({Site(layer, "attn_out")} if parallel else set())
        if not sites & after and not written <= sites:
            missing.append(str(Site(layer, "resid_post")))
    return missing
