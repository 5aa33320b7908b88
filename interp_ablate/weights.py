"""Weights: a plan as exact changes of the tensors that write to the residual stream.

Knows: which plans have an exact weight form and the nearest that has one, what a plan does to each
tensor, how a tensor is changed block by block. Does not know: files, formats or hooks; checkpoint
writers, adapters and certificates read what is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.architectures import (
    Architecture,
    Biases,
    Layout,
    architecture_of,
    is_tied,
)
from interp_ablate.edits import Ablate, Add, Affine, Clamp, Edit, Erase, Plan, kept_norm
from interp_ablate.errors import ExportError
from interp_ablate.sites import (
    EMBEDDING_POINTS,
    PROJECTION_POINTS,
    RESIDUAL_POINTS,
    WRITER_POINTS,
    Site,
)

Tied = Literal["untie", "skip-embedding", "accept"]
Read = Callable[[str], Tensor]
Describe = Callable[[str], tuple[torch.dtype, tuple[int, ...]]]
# Stored dtypes whose values are the weights themselves; quantized ones are not.
EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Elements of a tensor that are changed at a time: some megabytes, so that they stay near the processor.
BLOCK = 1 << 19


# ---- which plans are exact -----------------------------------------------------------------------


def as_writers(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """The plan written at the architecture's writers only, where that is exactly the same function.

    An ablation with strength 1 of one subspace at every place of the residual stream equals its
    ablation at every writer, where no norm follows a writer; so do erasures and clamps of one direction,
    whose value is written once, by the embedding. An addition to the stream equals the same addition to
    the writer before it. Anything else on the residual stream has no exact form.

    Raises:
        ExportError: the reason, and the nearest plan that is exact.
    """
    limited = sorted({edit.positions for edit in plan if edit.positions != "all"})
    if limited:
        raise ExportError(
            f"the plan edits {', '.join(limited)} positions only; weights act at every position. The "
            "nearest exact plan is the same with positions='all'"
        )
    residual = [s for s in plan.sites if s.point in RESIDUAL_POINTS]
    if not residual:
        return _written(plan, entry)
    on_stream = [e for e in plan if any(s.point in RESIDUAL_POINTS for s in e.sites)]
    if all(isinstance(edit, Add) for edit in on_stream):
        return _written(_additions_at_writers(plan, entry, hf_config), entry)
    return _everywhere_at_writers(plan, entry, hf_config)


def _nearest(entry: Architecture, plan: Plan) -> str:
    points = ", ".join(entry.points())
    if any(isinstance(edit, Erase) for edit in plan):
        return (
            "The nearest exact plan erases with one write and read, strength 1 and value 0, at "
            f"{points} of every layer: Erase(write, read, model.writers)"
        )
    return (
        f"The nearest exact plan ablates the same direction, with strength 1, at {points} of every "
        "layer: Ablate(direction, model.writers)"
    )


def _written(plan: Plan, entry: Architecture) -> Plan:
    """The plan itself, with attn_out for attn_proj where they are one; raises for writers of no weight form."""
    if entry.post_norm:
        normed = [str(s) for s in plan.sites if s.point in ("attn_out", "mlp_out")]
        if normed:
            raise ExportError(
                f"the plan edits {normed[0]}, which this architecture's norm has already rescaled: an "
                "edit there has no exact weight form. The nearest exact plan edits the projections "
                "before the norm, attn_proj and mlp_proj at the same layers: nothing is left along the "
                "direction either, but the norm's scale changes with it (another function). "
                f"{_nearest(entry, plan)}"
            )
        return plan
    first: list[Edit] = []
    then: list[Edit] = []
    # a projection is reached before what it writes, whatever the order in the plan
    for edit in plan:
        before, after = _split(edit, lambda site: site.point in PROJECTION_POINTS)
        if before is not None:
            first.append(before.moved([(site, site.output) for site in before.sites]))
        if after is not None:
            then.append(after)
    return Plan((*first, *then)) if first else plan


def _split(edit: Edit, inside: Callable[[Site], bool]) -> tuple[Edit | None, Edit | None]:
    """The edit at the sites for which `inside` holds, and at the others; None where there are none."""
    pairs = [[(s, s) for s in edit.sites if inside(s) == wanted] for wanted in (True, False)]
    within, without = (edit.moved(part) if part else None for part in pairs)
    return within, without


def _additions_at_writers(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """Additions to the stream as additions to the writer just before, after the writers' own edits."""
    if entry.post_norm:
        raise ExportError(
            "the plan adds to the residual stream of post-norm blocks: what their projections write is "
            "rescaled by a norm, and there is no bias after it. Keep the addition as a hook, or export "
            "a control vector for llama.cpp"
        )
    parallel = entry.is_parallel(hf_config)
    own: list[Edit] = []
    moved: list[Edit] = []
    for edit in plan:
        stay, go = _split(edit, lambda site: site.point in WRITER_POINTS)
        if stay is not None:
            own.append(stay)
        for site in go.sites if go is not None else ():
            moved.append(edit.moved([(site, _writer_before(site, parallel))]))
    return Plan((*own, *moved))


def _writer_before(site: Site, parallel: bool) -> Site:
    if site.point == "resid_mid":
        if parallel:
            raise ExportError(
                f"the plan adds at {site}, which blocks that run attention and MLP in parallel do not "
                "have. Add at resid_pre or resid_post"
            )
        return Site(site.layer, "attn_out")
    if site.point == "resid_post":
        return Site(site.layer, "mlp_out")
    return Site(site.layer - 1, "mlp_out") if site.layer else Site(0, "embed")


def _everywhere_at_writers(plan: Plan, entry: Architecture, hf_config: Any) -> Plan:
    """A projection that covers the residual stream, as the projection of every writer.

    Its map x -> P x + c is idempotent (P P = P, P c = 0): applied to every sum, it is P of every summand,
    and c once.
    """
    nearest, edits = _nearest(entry, plan), list(plan)
    if any(isinstance(edit, Ablate) and edit.norm_preserving for edit in edits):
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
    if entry.post_norm:
        raise ExportError(
            "the plan edits the residual stream of post-norm blocks: their projections are rescaled "
            f"by a norm before they reach it, so the plan has no exact weight form. {nearest} (nothing "
            "is left along the direction either, but it is another function: the norm's scale changes)"
        )
    if shift.any():
        _check_counted_once(plan, entry)
    return Plan((_at_all_writers(edits[0], entry.writer_sites(hf_config.num_hidden_layers)),))


def _is_projection(edit: Edit) -> bool:
    """Whether applying an edit twice is applying it once."""
    return isinstance(edit, Clamp) or (
        isinstance(edit, (Ablate, Erase)) and set(edit.amounts) == {1.0}
    )


def _same_linear(one: Edit, other: Edit) -> bool:
    """Whether two edits are one map but for what they add; at any of their sites."""
    first, second = (edit.map_at(edit.sites[0]) for edit in (one, other))
    size = max(1.0, float(first.left.norm() * first.right.norm()))
    products = first.left @ first.right.T, second.left @ second.right.T
    return torch.allclose(*products, rtol=0, atol=1e-10 * size)


def _check_counted_once(plan: Plan, entry: Architecture) -> None:
    """Refuse a value at writers beside one on the stream: it would be there twice."""
    also = [s for s in plan.sites if s.point not in RESIDUAL_POINTS]
    if entry.pos_embed is None:
        also = [site for site in also if site.point != "embed"]
    if also:
        raise ExportError(
            f"the plan sets a value on the residual stream and at {also[0]}, which writes to it: it is "
            "there twice until the stream is edited again, which has no exact weight form. The nearest "
            "exact plan has the same value at resid_pre, resid_mid and resid_post of every layer only"
        )


def _at_all_writers(edit: Edit, writers: tuple[Site, ...]) -> Edit:
    """The projection of one edit, of every writer; what it sets a direction to, by the embedding."""
    if isinstance(edit, Ablate):
        return Ablate(edit.vectors, writers, label=edit.label)
    assert isinstance(edit, (Clamp, Erase))
    value = edit.values[0] if isinstance(edit, Erase) else edit.amounts[0]
    values = [value if site == Site(0, "embed") else 0.0 for site in writers]
    return Erase(edit.vectors[0], edit.vectors[-1], writers, value=values, label=edit.label)


def _uncovered(sites: set[Site], entry: Architecture, hf_config: Any) -> list[str]:
    """Residual places that a set of sites leaves out; resid_pre of a layer is resid_post of the one before."""
    missing = []
    embeddings = {Site(0, point) for point in entry.points() if point in EMBEDDING_POINTS}
    if Site(0, "resid_pre") not in sites and not embeddings <= sites:
        missing.append(str(Site(0, "resid_pre")))
    parallel = entry.is_parallel(hf_config)
    for layer in range(hf_config.num_hidden_layers):
        after = {Site(layer, "resid_post"), Site(layer + 1, "resid_pre")}
        middle = Site(layer, "resid_mid") in sites or Site(layer, "attn_out") in sites
        if not parallel and not middle:
            missing.append(str(Site(layer, "resid_mid")))
        written = {Site(layer, "mlp_out")} | ({Site(layer, "attn_out")} if parallel else set())
        if not sites & after and not written <= sites:
            missing.append(str(Site(layer, "resid_post")))
    return missing


# ---- what a plan does to each tensor --------------------------------------------------------------


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor: the map that its writer's output goes through."""

    layout: Layout
    affine: Affine
    keeps_norm: bool = False
    point: str = "embed"

    @property
    def changes(self) -> bool:
        """False where the tensor stays as it is: an addition alone goes to the bias beside a weight."""
        takes_shift = self.layout in ("bias", "embedding") and not self.affine.is_linear
        return self.affine.left.shape[1] > 0 or self.keeps_norm or takes_shift


@dataclass(frozen=True)
class Added:
    """A tensor that the source does not have: another one's copy, or given values; stored near `beside`."""

    beside: str
    copy_of: str | None = None
    value: Tensor | None = None

    def bias(self, size: int, dtype: torch.dtype) -> Float[Tensor, " size"]:
        """The values of a new bias, zeros where none are given, for a weight with `size` rows."""
        given = torch.zeros(size) if self.value is None else self.value
        return given.to(dtype)


@dataclass(frozen=True)
class WeightPlan:
    """A plan for one checkpoint: tensors that change, tensors that are added, config fields to set.

    `plan` is what the hooks must do to compute the same; with `tied="accept"` the unembedding reads
    through `unembed_map` as well. `tied` is None where the choice did not matter.
    """

    plan: Plan
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    added: dict[str, Added] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tied: Tied | None = None
    unembed_map: Affine | None = None

    @property
    def changed(self) -> list[str]:
        """Names of the tensors whose values change: `edits` without those that an addition leaves alone."""
        return [name for name, edit in self.edits.items() if edit.changes]


def weight_plan(
    plan: Plan,
    hf_config: Any,
    names: Collection[str],
    read: Read,
    *,
    tied: Tied = "untie",
    entry: Architecture | None = None,
    describe: Describe | None = None,
) -> WeightPlan:
    """What a plan does to the tensors of one checkpoint.

    Args:
        names: of all its tensors, as files or `state_dict` have them.
        read: gives a tensor by name; only norms after writers are read.
        tied: what to do where an embedding is edited that is the unembedding too. "untie" writes the
            old values as `lm_head.weight`; "skip-embedding" leaves the embedding as it is (another
            plan); "accept" edits both (another function, whose cost the certificate shows).
        entry: default: the table's.
        describe: dtype and shape of a tensor by name, where `read` would be slow.

    Raises:
        ExportError: an unknown architecture, a layer beyond the last, no exact form, tensors that are
            not there, an addition that no bias can hold.
    """
    entry = entry or architecture_of(hf_config)
    if tied not in get_args(Tied):
        raise ExportError(f"tied={tied!r}: accepted are {', '.join(get_args(Tied))}")
    if not len(plan):
        return WeightPlan(plan)
    _check_fits(plan, hf_config)
    _check_source(hf_config)
    exact = as_writers(plan, entry, hf_config)
    tie_matters = is_tied(hf_config) and Site(0, "embed") in exact.sites
    if tie_matters and tied == "skip-embedding":
        exact = _without_embedding(exact)
        if not len(exact):
            raise ExportError(
                "the plan edits the tied embedding only, and tied='skip-embedding' leaves nothing of it: "
                "choose 'untie' or 'accept'"
            )
    found = WeightPlan(exact, tied=tied if tie_matters else None)
    for site in exact.sites:
        _edit_site(found, site, entry, hf_config, names, read)
    for name, edit in found.edits.items():
        _check_tensor(name, edit, plan.d_model, *(describe or _description(read))(name))
    if not tie_matters or tied == "skip-embedding":
        return found
    embed = next(name for name, edit in found.edits.items() if edit.point == "embed")
    head = entry.unembed if entry.unembed in names else None
    if head is not None and not torch.equal(read(embed), read(head)):
        raise ExportError(
            f"the config says that the embeddings are tied, but there is a {head} of its own that "
            "differs: which of the two a model uses depends on the transformers version. Set "
            "tie_word_embeddings in its config.json, or remove the tensor"
        )
    if tied == "untie":
        found.config["tie_word_embeddings"] = False
        if head is None:
            found.added[entry.unembed] = Added(beside=embed, copy_of=embed)
        return found
    if head is not None:
        found.edits[head] = found.edits[embed]
    return replace(found, unembed_map=_unembed_map(found.edits[embed]))


def _unembed_map(edit: TensorEdit) -> Affine:
    """What an edited tied embedding does as the unembedding: logits = (A w) . h = w . (A^T h)."""
    if edit.keeps_norm or not edit.affine.is_linear:
        raise ExportError(
            "only an ablation without norm preservation can be accepted for a tied unembedding; choose "
            "tied='untie'"
        )
    return Affine(edit.affine.right, edit.affine.left, edit.affine.shift)


def _check_fits(plan: Plan, hf_config: Any) -> None:
    if plan.d_model != hf_config.hidden_size:
        raise ExportError(
            f"the plan's directions have d_model {plan.d_model}, the checkpoint {hf_config.hidden_size}"
        )
    n_layers = hf_config.num_hidden_layers
    beyond = [str(site) for site in plan.sites if site.layer >= n_layers]
    if beyond:
        raise ExportError(f"the plan edits {beyond[0]}, but there are {n_layers} layers (from 0)")


def _check_source(hf_config: Any) -> None:
    """Refuse configs under which the tensors that are named are not the weights that are used."""
    for key, why in (
        (
            "quantization_config",
            "its tensors are quantized, and an edit of them would be rounded away",
        ),
        ("transformers_weights", "transformers loads another weight file than the usual one"),
    ):
        if getattr(hf_config, key, None):
            raise ExportError(
                f"the checkpoint's config has a {key}: {why}. Edit the unquantized checkpoint"
            )


def _description(read: Read) -> Describe:
    def describe(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = read(name)
        return tensor.dtype, tuple(tensor.shape)

    return describe


def _check_tensor(
    name: str, edit: TensorEdit, d_model: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Refuse what is no plain weight of the declared layout."""
    axis = {"linear": 0, "experts": 1}.get(edit.layout, -1)
    dims = {"bias": 1, "experts": 3}.get(edit.layout, 2)
    if dtype not in EDITABLE:
        raise ExportError(
            f"{name} is stored as {dtype}: only float64, float32, bfloat16 and float16 can be edited. "
            "Edit the unquantized checkpoint"
        )
    if len(shape) != dims or shape[axis] != d_model:
        raise ExportError(
            f"{name} has shape {tuple(shape)}; a {edit.layout} writer has {dims} axes, of which "
            f"number {axis} is d_model = {d_model}"
        )


def _without_embedding(plan: Plan) -> Plan:
    parts = (_split(edit, lambda site: site == Site(0, "embed"))[1] for edit in plan)
    return Plan(tuple(part for part in parts if part is not None))


def _edit_site(
    found: WeightPlan,
    site: Site,
    entry: Architecture,
    hf_config: Any,
    names: Collection[str],
    read: Read,
) -> None:
    """Add to `found` what the plan does to the tensors that write at one site."""
    gain = None
    if (norm := entry.norm_after(site)) is not None:
        name = entry.present(norm, names)
        if name is None:
            raise ExportError(f"the checkpoint has no {norm}, the norm that follows {site}")
        gain = read(name).double() + entry.gain_offset
    affine = Affine.identity(found.plan.d_model)
    for _, part in found.plan.maps_at(site, gain):
        affine = affine.then(part)
    tensors = entry.writers(site, names, hf_config)
    keeps_norm = found.plan.keeps_norm_at(site)
    for name, layout in tensors.items():
        edit = TensorEdit(layout, affine, keeps_norm and layout != "bias", site.point)
        found.edits[name] = edit
    if affine.is_linear or "bias" in tensors.values():
        return
    if site.point in EMBEDDING_POINTS:
        if entry.scaled_embed:
            raise ExportError(
                f"an addition or clamp (or an erasure to a value) at {site}: this architecture scales its "
                "embedding on the way to the stream, by a factor that its config does not hold. Keep it "
                "as a hook"
            )
        return
    biases = entry.new_biases(site)
    if biases is None or list(tensors.values()) != ["linear"]:
        raise ExportError(
            f"an addition or clamp (or an erasure to a value) at {site} needs a bias at "
            f"{next(iter(tensors))}, which a {hf_config.model_type} checkpoint cannot have. Keep it as a "
            "hook, export the ablation alone (an erasure with value 0), or export a control vector for "
            "llama.cpp"
        )
    _add_biases(found, next(iter(tensors)), biases, hf_config.num_hidden_layers)


def _add_biases(found: WeightPlan, weight: str, biases: Biases, n_layers: int) -> None:
    """Turn on the config's biases: zeros everywhere, the map's shift in the writer's own."""
    found.config[biases.config_field] = True
    for layer in range(n_layers):
        for module in biases.modules:
            name = module.format(layer=layer)
            found.added.setdefault(f"{name}.bias", Added(beside=f"{name}.weight"))
    bias = weight.removesuffix("weight") + "bias"
    found.added[bias] = Added(beside=weight, value=found.edits[weight].affine.shift)


# ---- how a tensor is changed ------------------------------------------------------------------------


def edited_tensor(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """The whole tensor changed; the same bits as its blocks."""
    if edit.layout == "bias":
        return edit.affine(tensor.detach().double().cpu()).to(tensor)
    blocks = edited_blocks(lambda start, stop: tensor[start:stop].detach(), tensor.shape, edit)
    return torch.cat(list(blocks)).to(tensor.device)


def edited_blocks(
    rows: Callable[[int, int], Tensor], shape: Collection[int], edit: TensorEdit
) -> Iterator[Tensor]:
    """A changed weight in blocks along its first axis, from a function that reads rows start to stop.

    Computed in float64, or in float32 for 16-bit sources, and rounded once to the source's dtype. A
    [d_model, in] weight is read twice, everything else once; memory is some blocks, and with
    `keeps_norm` one weight.
    """
    first, *rest = shape
    if edit.layout == "experts":
        inner = TensorEdit("linear", edit.affine, edit.keeps_norm, edit.point)
        for i in range(first):
            yield edited_tensor(rows(i, i + 1)[0], inner)[None]
        return
    width = max(1, BLOCK // max(1, rest[0] if rest else 1))
    spans = [(start, min(start + width, first)) for start in range(0, first, width)]
    if edit.layout != "linear":
        for span in spans:
            yield _edited_rows(rows(*span), edit)
        return
    if edit.keeps_norm:
        whole = rows(0, first)
        eps = torch.finfo(whole.dtype).eps
        yield kept_norm(_wide(whole).T, edit.affine, eps=eps)[0].T.contiguous().to(whole.dtype)
        return
    left = right = along = None
    for start, stop in spans:
        block = _wide(rows(start, stop))
        if left is None or right is None:
            left, right = edit.affine.left.to(block), edit.affine.right.to(block)
        part = right[start:stop].T @ block
        along = part if along is None else along + part
    assert left is not None and along is not None
    for start, stop in spans:
        block = rows(start, stop)
        yield _own(block).addmm_(left[start:stop], along).to(block.dtype)


def _edited_rows(block: Tensor, edit: TensorEdit) -> Tensor:
    """Rows that are outputs themselves: embeddings, and weights stored [in, d_model]."""
    wide, affine = _own(block), edit.affine
    if edit.keeps_norm:
        wide = kept_norm(wide, affine, eps=torch.finfo(block.dtype).eps)[0]
    else:
        wide.addmm_(wide @ affine.right.to(wide), affine.left.to(wide).T)
    if edit.layout == "embedding" and not affine.is_linear:
        wide += affine.shift.to(wide)
    return wide.to(block.dtype)


def _own(block: Tensor) -> Tensor:
    """A wide copy that may be changed in place."""
    wide = _wide(block)
    return wide.clone() if wide.dtype == block.dtype else wide


def _wide(tensor: Tensor) -> Tensor:
    """The dtype a change is computed in: float64, or float32 where the stored one has 16 bits or fewer."""
    return tensor.detach().cpu().to(torch.float32 if tensor.element_size() < 4 else torch.float64)


def edited_state_dict(
    state: dict[str, Tensor], plan: WeightPlan
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under a weight plan, and the names of what changed; other tensors are the same objects."""
    result = dict(state)
    for name, edit in plan.edits.items():
        result[name] = edited_tensor(state[name], edit)
    for name, added in plan.added.items():
        like = state[added.beside]
        if added.copy_of is not None:
            result[name] = state[added.copy_of]
        else:
            result[name] = added.bias(like.shape[0], like.dtype).to(like.device)
    return result, [*plan.edits]
