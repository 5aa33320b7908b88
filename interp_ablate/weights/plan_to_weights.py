"""A plan as exact changes of the tensors that write to the residual stream, changed whole or block by block.

Knows: what a plan does to each tensor of one checkpoint. Does not know: files, formats or hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine, rescale_rows
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.models.architectures import (
    Architecture,
    Biases,
    Layout,
    architecture_of,
    is_tied,
    text_config,
)
from interp_ablate.models.measured_architecture import MeasuredArchitecture
from interp_ablate.models.written_parameters import gain_of
from interp_ablate.precision import all_finite, one_thread
from interp_ablate.sites import EMBEDDING_POINTS, Site
from interp_ablate.storage.dequantized_checkpoint import EXPORT_INSTEAD
from interp_ablate.weights.weight_form import split_edit, writers_only_form

Tied = Literal["untie", "skip-embedding", "accept"]
Read = Callable[[str], Tensor]
Describe = Callable[[str], tuple[torch.dtype, tuple[int, ...]]]
# Stored dtypes whose values are the weights themselves; quantized ones are not.
EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorEdit:
    """The change of one tensor."""

    layout: Layout
    affine: Affine
    """The map that the writer's output goes through."""
    keeps_norm: bool = False
    """True if the projected columns get their norms back."""
    point: str = "embed"

    @property
    def changes(self) -> bool:
        """False where the tensor stays as it is: an addition alone goes to the bias beside a weight."""
        takes_shift = self.layout in ("bias", "embedding") and not self.affine.is_linear
        return self.affine.left.shape[1] > 0 or self.keeps_norm or takes_shift


@dataclass(frozen=True)
class AddedTensor:
    """A tensor that the source does not have: another one's copy, or a new bias."""

    beside: str
    """The tensor near which it is stored, and whose dtype it has."""
    copy_of: str | None = None
    value: Tensor | None = None
    """The values of a bias; None for zeros."""

    def bias(self, size: int, dtype: torch.dtype) -> Float[Tensor, " size"]:
        """The values of a new bias for a weight with `size` rows."""
        values = (torch.zeros(size) if self.value is None else self.value).to(dtype)
        if not values.isfinite().all():
            raise ExportError(f"a new bias beside {self.beside} holds values too large for {dtype}")
        return values


@dataclass(frozen=True)
class WeightPlan:
    """A plan for one checkpoint."""

    plan: Plan
    """The plan that computes the same as hooks."""
    edits: dict[str, TensorEdit] = field(default_factory=dict)
    """The tensors that the plan reaches, by name."""
    added: dict[str, AddedTensor] = field(default_factory=dict)
    """The tensors that the source does not have, by name."""
    config: dict[str, Any] = field(default_factory=dict)
    """Config fields to set."""
    tied: Tied | None = None
    """The choice for a tied embedding; None where it did not matter."""
    unembed_map: Affine | None = None
    """With tied="accept": the map through which the unembedding reads as well."""
    asked: Plan | None = None
    """With tied="skip-embedding": the plan with the embedding in it; None where nothing was left out."""

    @property
    def changed(self) -> list[str]:
        """Names of the tensors whose values change: `edits` without those that an addition leaves alone."""
        return [name for name, edit in self.edits.items() if edit.changes]


@one_thread()
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
    """The changes that a plan makes to the tensors of one checkpoint.

    Args:
        names: of all its tensors, as files or `state_dict` have them.
        read: gives a tensor by name; only norms after writers are read.
        tied: what to do where an embedding is edited that is the unembedding too. "untie" writes the
            old values as `lm_head.weight`; "skip-embedding" leaves the embedding as it is, tied or not
            (another plan, whose cost the certificate shows); "accept" edits both (another function, whose cost the certificate shows).
        entry: default: the declared one.
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
    exact = writers_only_form(plan, entry, hf_config)
    tie_matters = is_tied(hf_config) and Site(0, "embed") in exact.sites
    asked = exact if tied == "skip-embedding" and Site(0, "embed") in exact.sites else None
    if asked:
        exact = _without_embedding(asked)
    changes = WeightPlan(exact, tied=tied if tie_matters or asked else None, asked=asked)
    for site in exact.sites:
        _edit_site(changes, site, entry, hf_config, names, read)
    for name, edit in changes.edits.items():
        _check_tensor(name, edit, plan.d_model, *(describe or _description(read))(name))
    if not tie_matters or tied == "skip-embedding":
        return changes
    check_tie(entry, hf_config, names, read)
    return _with_tied_head(changes, entry, names)


def check_tie(entry: Architecture, hf_config: Any, names: Collection[str], read: Read) -> None:
    """Refuse a config that says the embeddings are tied beside two tensors that differ.

    Raises:
        ExportError: names the tensor, and says what to do.
    """
    head, embed = entry.unembed, entry.present(entry.embed, names)
    if not is_tied(hf_config) or head not in names or embed is None:
        return
    if not torch.equal(read(embed), read(head)):
        raise ExportError(
            f"the config says that the embeddings are tied, but there is a {head} of its own that "
            "differs: which of the two a model uses depends on the transformers version. Set "
            "tie_word_embeddings in its config.json, or remove the tensor"
        )


def _with_tied_head(changes: WeightPlan, entry: Architecture, names: Collection[str]) -> WeightPlan:
    """The changes with what becomes of an unembedding that is tied to an edited embedding.

    Transformers ties all or nothing: an untied checkpoint must hold what else was tied (Zamba 2's shared blocks).
    """
    head = entry.unembed
    embed = next(name for name, edit in changes.edits.items() if edit.point == "embed")
    if changes.tied == "untie":
        changes.config["tie_word_embeddings"] = False
        if head not in names:
            changes.added[head] = AddedTensor(beside=embed, copy_of=embed)
        shared = entry.shared if isinstance(entry, MeasuredArchitecture) else {}
        for name, original in shared.items():
            if name not in names:
                changes.added[name] = AddedTensor(beside=original, copy_of=original)
        return changes
    if head in names:
        changes.edits[head] = changes.edits[embed]
    return replace(changes, unembed_map=_unembed_map(changes.edits[embed]))


def _unembed_map(edit: TensorEdit) -> Affine:
    """The map of an edited tied embedding as the unembedding: logits = (A w) . h = w . (A^T h)."""
    if edit.keeps_norm or not edit.affine.is_linear:
        raise ExportError(
            "only an ablation without norm preservation can be accepted for a tied unembedding; choose "
            "tied='untie'"
        )
    return Affine(edit.affine.right, edit.affine.left, edit.affine.shift)


def _check_fits(plan: Plan, hf_config: Any) -> None:
    text = text_config(hf_config)
    if plan.d_model != text.hidden_size:
        raise ExportError(
            f"the plan's directions have d_model {plan.d_model}, the checkpoint {text.hidden_size}"
        )
    n_layers = text.num_hidden_layers
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
            raise ExportError(f"the checkpoint's config has a {key}: {why}. {EXPORT_INSTEAD}")


def _description(read: Read) -> Describe:
    def describe(name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = read(name)
        return tensor.dtype, tuple(tensor.shape)

    return describe


def _check_tensor(
    name: str, edit: TensorEdit, d_model: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Refuse a tensor that is no plain weight of the declared layout."""
    axis = {"linear": 0, "experts": 1}.get(edit.layout, -1)
    dims = {"bias": 1, "experts": 3, "experts_conv1d": 3}.get(edit.layout, 2)
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
    parts = (split_edit(edit, lambda site: site == Site(0, "embed"))[1] for edit in plan)
    rest = Plan(tuple(part for part in parts if part is not None))
    if not len(rest):
        raise ExportError(
            "the plan edits the embedding only, and tied='skip-embedding' leaves nothing of it: "
            "choose 'untie' or 'accept'"
        )
    return rest


def _edit_site(
    changes: WeightPlan,
    site: Site,
    entry: Architecture,
    hf_config: Any,
    names: Collection[str],
    read: Read,
) -> None:
    """Add to `changes` what the plan does to the tensors that write at one site."""
    parts = entry.parts(site, names, hf_config)
    scales = _scales(entry, site, len(parts))
    holder = next((i for i, (_, tensors) in enumerate(parts) if "bias" in tensors.values()), 0)
    for i, (gains, tensors) in enumerate(parts):
        gain = gain_of(gains, read, changes.plan.d_model)
        affine = Affine.identity(changes.plan.d_model)
        for _, part in changes.plan.maps_at(site, gain):
            assert isinstance(part, Affine)  # rotations were refused (`writers_only_form`)
            affine = affine.then(part)
        if not gains:  # the stream gets a sum of scaled parts: what is added is added once
            affine = replace(affine, shift=affine.shift / scales[i] * (i == holder))
        _edit_tensors(changes, site, affine, tensors, entry, hf_config)


def _scales(entry: Architecture, site: Site, n_parts: int) -> list[float]:
    """The factor of each part of a site on its way to the stream (Granite's `residual_multiplier`)."""
    branches = entry.branches.get(site, ()) if isinstance(entry, MeasuredArchitecture) else ()
    return [branch.scale for branch in branches for _ in branch.parts] or [1.0] * n_parts


def _edit_tensors(
    changes: WeightPlan,
    site: Site,
    affine: Affine,
    tensors: dict[str, Layout],
    entry: Architecture,
    hf_config: Any,
) -> None:
    """Add to `changes` one map of the tensors that write one summand at a site."""
    keeps_norm = changes.plan.norm_preserving_at(site) is not None
    for name, layout in tensors.items():
        edit = TensorEdit(layout, affine, keeps_norm and layout != "bias", site.point)
        changes.edits[name] = edit
    layouts = list(tensors.values())
    if affine.is_linear or (layouts.count("bias") == 1 and len(layouts) <= 2):
        return  # one bias beside one weight: others (of experts) may reach the stream by any factor
    if site.point in EMBEDDING_POINTS:
        if entry.scaled_embed:
            raise ExportError(
                f"an addition or clamp (or an erasure to a value) at {site}: this architecture scales its "
                "embedding on the way to the stream, by a factor that its config does not hold. Keep it "
                "as a hook"
            )
        return
    biases = {"attn_out": entry.attn_biases, "mlp_out": entry.mlp_biases}.get(site.point)
    if biases is None or list(tensors.values()) != ["linear"]:
        raise ExportError(
            f"an addition or clamp (or an erasure to a value) at {site} needs a bias at "
            f"{next(iter(tensors))}, which a {hf_config.model_type} checkpoint cannot have. Keep it as a "
            "hook, export the ablation alone (an erasure with value 0), or export a control vector for "
            "llama.cpp"
        )
    _add_biases(changes, next(iter(tensors)), biases, text_config(hf_config).num_hidden_layers)


def _add_biases(changes: WeightPlan, weight: str, biases: Biases, n_layers: int) -> None:
    """Turn on the config's biases: zeros everywhere, the map's shift in the writer's own."""
    changes.config[biases.config_field] = True
    for layer in range(n_layers):
        for module in biases.modules:
            name = module.format(layer=layer)
            changes.added.setdefault(f"{name}.bias", AddedTensor(beside=f"{name}.weight"))
    bias = weight.removesuffix("weight") + "bias"
    changes.added[bias] = AddedTensor(beside=weight, value=changes.edits[weight].affine.shift)


# Elements of a tensor that are changed at a time: some megabytes, so that they stay near the processor.
BLOCK = 1 << 19


def edited_tensor(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """The whole tensor changed; the same bits as its blocks."""
    if edit.layout == "bias":
        with one_thread():
            changed = edit.affine(tensor.detach().cpu().double())
        return _finite(changed.to(tensor), tensor, edit)
    blocks = edited_blocks(lambda start, stop: tensor[start:stop].detach(), tensor.shape, edit)
    return torch.cat(list(blocks)).to(tensor.device)


def edited_blocks(
    rows: Callable[[int, int], Tensor], shape: Collection[int], edit: TensorEdit
) -> Iterator[Tensor]:
    """A changed weight in blocks along its first axis, from a function that reads rows start to stop.

    Computed in float64, or in float32 for 16-bit sources, and rounded once to the source's dtype: the same bits in
    any number of threads. A
    [d_model, in] weight is read twice, everything else once; memory is some blocks, and with
    `keeps_norm` one weight.
    """
    first, *rest = shape
    if edit.layout in ("experts", "experts_conv1d"):
        inner_layout: Layout = "linear" if edit.layout == "experts" else "conv1d"
        inner = TensorEdit(inner_layout, edit.affine, edit.keeps_norm, edit.point)
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
        with one_thread():
            rescaled = rescale_rows(_wide(whole).T, edit.affine, eps=eps)[0].T.contiguous()
        yield _finite(rescaled.to(whole.dtype), whole, edit)
        return
    left = right = along = None
    for start, stop in spans:
        block = _wide(rows(start, stop))
        if left is None or right is None:
            left, right = edit.affine.left.to(block), edit.affine.right.to(block)
        with one_thread():
            part = right[start:stop].T @ block
        along = part if along is None else along + part
    assert left is not None and along is not None
    for start, stop in spans:
        wide = _own(block := rows(start, stop))
        with one_thread():
            wide.addmm_(left[start:stop], along)
        yield _finite(wide.to(block.dtype), block, edit)


def _edited_rows(block: Tensor, edit: TensorEdit) -> Tensor:
    """Rows that are outputs themselves: embeddings, and weights stored [in, d_model]."""
    wide, affine = _own(block), edit.affine
    with one_thread():
        if edit.keeps_norm:
            wide = rescale_rows(wide, affine, eps=torch.finfo(block.dtype).eps)[0]
        else:
            wide.addmm_(wide @ affine.right.to(wide), affine.left.to(wide).T)
    if edit.layout == "embedding" and not affine.is_linear:
        wide += affine.shift.to(wide)
    return _finite(wide.to(block.dtype), block, edit)


def _finite(new: Tensor, old: Tensor, edit: TensorEdit) -> Tensor:
    """The new values, which must be finite; a row that was not before, and that nothing reads, may stay so."""
    if all_finite(new):
        return new
    if bool((~new.isfinite() & old.isfinite().all(-1, keepdim=True)).any()):
        raise ExportError(
            f"the plan writes values that are not finite at {edit.point} in {old.dtype}: its numbers are too "
            "large for this dtype, or the weights hold NaN where they are read"
        )
    return new


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
