"""Weights: a plan as exact changes of the tensors that write to the residual stream.

Knows: which plans have an exact weight form and the nearest that has one, what a plan does to each
tensor, how a tensor is changed block by block. Does not know: files, formats or hooks; checkpoint
writers, adapters and certificates read what is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.models.architectures import (
    Architecture,
    Biases,
    Layout,
    architecture_of,
    is_tied,
)
from interp_ablate.sites import EMBEDDING_POINTS, Site
from interp_ablate.weights.weight_form import split_edit, writers_only_form

Tied = Literal["untie", "skip-embedding", "accept"]
Read = Callable[[str], Tensor]
Describe = Callable[[str], tuple[torch.dtype, tuple[int, ...]]]
# Stored dtypes whose values are the weights themselves; quantized ones are not.
EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
class AddedTensor:
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
    added: dict[str, AddedTensor] = field(default_factory=dict)
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
    exact = writers_only_form(plan, entry, hf_config)
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
            found.added[entry.unembed] = AddedTensor(beside=embed, copy_of=embed)
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
    parts = (split_edit(edit, lambda site: site == Site(0, "embed"))[1] for edit in plan)
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
            found.added.setdefault(f"{name}.bias", AddedTensor(beside=f"{name}.weight"))
    bias = weight.removesuffix("weight") + "bias"
    found.added[bias] = AddedTensor(beside=weight, value=found.edits[weight].affine.shift)
