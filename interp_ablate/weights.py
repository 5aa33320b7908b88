"""Weights: a plan as exact changes of the tensors that write to the residual stream.

Knows: which tensors of which architecture write where, and which plans have an exact weight form.
Does not know: files, formats or hooks; the checkpoint writer and the hooked model are checked against
each other elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits import Ablate, Affine, Plan, everywhere
from interp_ablate.errors import ExportError
from interp_ablate.sites import WRITER_POINTS, Site


@dataclass(frozen=True)
class Architecture:
    """Where an architecture writes to the residual stream: names without ".weight"; {layer} from 0.

    Every writer is a linear map whose output is added to the stream as it is (no norm after it).
    """

    embed: str
    attn_out: str
    mlp_out: str
    unembed: str

    def writer(self, site: Site) -> str:
        """The module that writes at a writer site."""
        return getattr(self, site.point).format(layer=site.layer)


_LLAMA_STYLE = Architecture(
    embed="model.embed_tokens",
    attn_out="model.layers.{layer}.self_attn.o_proj",
    mlp_out="model.layers.{layer}.mlp.down_proj",
    unembed="lm_head",
)
# model_type of the Hugging Face config -> entry; a missing entry raises.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA_STYLE,
    "mistral": _LLAMA_STYLE,
    "qwen2": _LLAMA_STYLE,
    "qwen3": _LLAMA_STYLE,
}


def architecture_of(hf_config: Any) -> Architecture:
    """The table's entry for a config.

    Raises:
        ExportError: no entry; the message says what came and which there are.
    """
    found = ARCHITECTURES.get(hf_config.model_type)
    if found is None:
        raise ExportError(
            f"no architecture entry for model type {hf_config.model_type!r} "
            f"({', '.join(hf_config.architectures or ['unknown class'])}): which tensors write to its "
            f"residual stream is not declared. There are entries for {', '.join(ARCHITECTURES)}"
        )
    return found


def as_writers(plan: Plan, n_layers: int) -> Plan:
    """The plan written at embed, attn_out and mlp_out only, where that is exactly the same function.

    An ablation with strength 1 of one subspace at resid_pre, resid_mid and resid_post of every layer
    equals its ablation at every writer. Anything else on the residual stream itself has no exact form.

    Raises:
        ExportError: the reason, and the nearest plan that is exact.
    """
    limited = sorted({edit.positions for edit in plan if edit.positions != "all"})
    if limited:
        raise ExportError(
            f"the plan edits {', '.join(limited)} positions only; weights act at every position. The "
            "nearest exact plan is the same with positions='all'"
        )
    if all(site.point in WRITER_POINTS for site in plan.sites):
        return plan
    nearest = (
        "The nearest exact plan ablates the same direction, with strength 1, at embed, attn_out and "
        "mlp_out of every layer: Ablate(direction, everywhere(n_layers))"
    )
    edits = list(plan)
    if not all(isinstance(edit, Ablate) and set(edit.amounts) == {1.0} for edit in edits):
        raise ExportError(
            "the plan edits the residual stream itself with an addition, a clamp or a strength other "
            f"than 1, which accumulates over the layers and has no exact weight form. {nearest}"
        )
    first = edits[0].vectors
    projector = first.T @ first
    if not all(torch.allclose(e.vectors.T @ e.vectors, projector, atol=1e-10) for e in edits):
        raise ExportError(
            f"the plan ablates different directions on the residual stream. {nearest}"
        )
    missing = _uncovered(set(plan.sites), n_layers)
    if missing:
        raise ExportError(
            f"the plan ablates the residual stream at some places only ({missing[0]} and "
            f"{len(missing) - 1} more are left out): what is written there would come back. {nearest}"
        )
    return Plan((Ablate(first, everywhere(n_layers), label=edits[0].label),))


def _uncovered(sites: set[Site], n_layers: int) -> list[str]:
    """Residual places that a set of sites leaves out; resid_pre of a layer is resid_post of the one before."""
    missing = []
    if not sites & {Site(0, "resid_pre"), Site(0, "embed")}:
        missing.append(str(Site(0, "resid_pre")))
    for layer in range(n_layers):
        after = {Site(layer, "resid_post"), Site(layer + 1, "resid_pre")}
        if Site(layer, "resid_mid") not in sites and Site(layer, "attn_out") not in sites:
            missing.append(str(Site(layer, "resid_mid")))
        if not sites & (after | {Site(layer, "mlp_out")}):
            missing.append(str(Site(layer, "resid_post")))
    return missing


def writer_maps(plan: Plan, hf_config: Any) -> dict[str, Affine]:
    """Module name -> the map its output goes through, for every writer the plan changes.

    A map with a shift is exact only where the module has a bias; `edited_state_dict` sees to that.

    Raises:
        ExportError: an unknown architecture, a layer beyond the last, no exact form.
    """
    entry = architecture_of(hf_config)
    n_layers = hf_config.num_hidden_layers
    if plan.d_model != hf_config.hidden_size:
        raise ExportError(
            f"the plan's directions have d_model {plan.d_model}, the checkpoint {hf_config.hidden_size}"
        )
    beyond = [str(site) for site in plan.sites if site.layer >= n_layers]
    if beyond:
        raise ExportError(f"the plan edits {beyond[0]}, but there are {n_layers} layers (from 0)")
    found = {}
    for site in (exact := as_writers(plan, n_layers)).sites:
        affine = Affine.identity(plan.d_model)
        for _, part in exact.maps_at(site):
            affine = affine.then(part)
        found[entry.writer(site)] = affine
    return found


def edited_weight(
    weight: Float[Tensor, "out in"], affine: Affine, *, is_embedding: bool = False
) -> Float[Tensor, "out in"]:
    """The weight whose output is the old output mapped; computed in float64 and rounded once.

    A linear layer's weight is [d_model, in]; an embedding's rows are outputs: [d_vocab, d_model].
    """
    wide = weight.detach().double()
    left, right = affine.left.to(wide), affine.right.to(wide)
    delta = (wide @ right) @ left.T if is_embedding else left @ (right.T @ wide)
    return (wide + delta).to(weight.dtype)


def edited_state_dict(
    state: dict[str, Tensor], plan: Plan, hf_config: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict under the plan, and the names of what changed; other tensors are the same objects.

    With tied embeddings and an edited embedding, `lm_head.weight` keeps the old values: the two are no
    longer tied, which the config must say. A writer's bias goes through the same map.

    Raises:
        ExportError: as `writer_maps`; a writer that the state dict lacks; an addition or a clamp where
            there is no bias to hold it.
    """
    entry = architecture_of(hf_config)
    result, changed = dict(state), []
    for module, affine in writer_maps(plan, hf_config).items():
        name = f"{module}.weight"
        if name not in state:
            raise ExportError(f"the checkpoint has no {name}, which the plan edits")
        is_embedding = module == entry.embed
        if is_embedding:
            result.setdefault(f"{entry.unembed}.weight", state[name])
        result[name] = edited_weight(state[name], affine, is_embedding=is_embedding)
        changed.append(name)
        bias = f"{module}.bias"
        if bias in state:
            result[bias] = affine(state[bias].detach().to(affine.shift)).to(state[bias])
            changed.append(bias)
        elif not affine.is_linear:
            raise ExportError(
                f"an addition or clamp at the output of {module} needs {bias}, which this "
                f"{hf_config.model_type} checkpoint does not have. Keep it as a hook, or export the "
                "ablation alone"
            )
    return result, changed
