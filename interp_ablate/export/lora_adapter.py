"""Exact low-rank factors of a plan, as the tensors and the config of a PEFT adapter.

Knows: how PEFT names and stores factors, and which plans it cannot hold. Does not know: files, or how good the plan is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.edits.affine import Affine
from interp_ablate.errors import ExportError
from interp_ablate.weights.plan_to_weights import BLOCK, Read, TensorEdit, WeightPlan

PREFIX = "base_model.model."
# Biases: none moves, PEFT adds a bias of its own, or the base's are replaced.
Biases = Literal["none", "added", "replaced"]
# A singular value of an edit's map below this share of its factors' size is rounding, not rank.
NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in memory."""

    tensors: dict[str, Tensor]
    """Factors under the names of the adapter's file."""
    fields: dict[str, Any]
    """Fields of PEFT's LoraConfig."""
    ranks: dict[str, int]
    """Rank of each edited weight, by the weight's name; 0 where only the bias beside it changes."""


@dataclass(frozen=True, eq=False)
class _Bias:
    """A bias beside an edited weight, before and after; float64."""

    old: Float[Tensor, " d_model"]
    new: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class _Target:
    """The change of one weight, W + B A (stored as b and a), and of the bias beside it."""

    name: str
    """Name of the weight."""
    edit: TensorEdit
    a: Float[Tensor, "... k in"]
    """The factor that reads; of fused experts [expert, k, in]."""
    b: Float[Tensor, "d_model k"]
    """The factor that writes to the stream."""
    bias: _Bias | None = None

    @property
    def module(self) -> str:
        """The module that holds the weight."""
        return self.name.rpartition(".")[0]

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return self.b.shape[1]

    @property
    def fused(self) -> bool:
        """True for a parameter of all experts of a mixture: their weights, or their biases."""
        return self.edit.layout.startswith("experts") or not self.name.endswith(".weight")

    @property
    def moves_bias(self) -> bool:
        """True where the bias beside the weight changes."""
        return self.bias is not None and not torch.equal(self.bias.old, self.bias.new)


def minimal_adapter(
    affine: Affine,
) -> tuple[Float[Tensor, "d_model k"], Float[Tensor, "d_model k"]]:
    """The map's left and right factors with as many columns as their product has rank; float64."""
    left, right = affine.left, affine.right
    if not left.shape[1]:
        return left, right
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    rank = int((s > NEGLIGIBLE * float(left.norm() * right.norm())).sum())
    if rank == left.shape[1]:
        return left, right
    return q_left @ (u[:, :rank] * s[:rank]), q_right @ vh[:rank].T


def _read_through(
    weight: Tensor, right: Float[Tensor, "d_model k"], *, d_model_first: bool
) -> Float[Tensor, "k in"]:
    """right^T W for a weight [d_model, in], or for one stored [in, d_model], in float64, a block at a time."""
    rows, columns = weight.shape
    width = max(1, BLOCK // max(1, columns))
    spans = [slice(start, start + width) for start in range(0, rows, width)]
    wide = (weight[span].detach().cpu().double() for span in spans)
    if d_model_first:
        total = right.new_zeros(right.shape[1], columns)
        for span, block in zip(spans, wide):
            total += right[span].T @ block
        return total
    return torch.cat([right.T @ block.T for block in wide], 1)


def _factors(weight: Tensor, edit: TensorEdit) -> tuple[Tensor, Tensor]:
    """The two factors of what an edit adds to a weight."""
    left, right = minimal_adapter(edit.affine)
    if edit.layout in ("experts", "experts_conv1d"):
        first = edit.layout == "experts"
        return torch.stack([_read_through(w, right, d_model_first=first) for w in weight]), left
    along = _read_through(weight, right, d_model_first=edit.layout == "linear")
    if edit.layout == "embedding" and not edit.affine.is_linear:
        # the same vector for every entry of the embedding: one more rank
        along = torch.cat([along, along.new_ones(1, along.shape[1])])
        left = torch.cat([left, edit.affine.shift[:, None]], 1)
    return along, left


def _targets(plan: WeightPlan, read: Read) -> list[_Target]:
    """Every weight that the plan changes, or whose bias it changes."""
    targets = []
    for name, edit in plan.edits.items():
        if edit.layout == "bias":
            continue
        a, b = _factors(read(name), edit)
        beside = name.removesuffix(".weight") + ".bias"
        bias = None
        if beside in plan.edits:
            old = read(beside).detach().cpu().double()
            bias = _Bias(old, plan.edits[beside].affine(old))
        target = _Target(name, edit, a, b, bias)
        if target.rank or target.moves_bias:
            targets.append(target)
    return targets


def lora_adapter(
    plan: WeightPlan,
    names: Collection[str],
    read: Read,
    *,
    dtype: torch.dtype = torch.float32,
    transposed: Collection[str] = (),
) -> Adapter:
    """The adapter of a weight plan, for a base model that holds these tensors.

    For a weight W and its map x -> x + left (right^T x), A is right^T W and B is left: the rank is the
    map's, the scaling 1 everywhere. Computed in float64, rounded once to `dtype`.

    Biases: where every target is a projection that has one, PEFT's `lora_bias` (a bias on B, which a
    disabled adapter takes back). Elsewhere (an embedding among the targets, projections without bias)
    PEFT has only `bias="lora_only"`: the new biases replace the base's when the adapter is loaded.

    Args:
        names: of all tensors of the base model, in the order of its `state_dict`.
        read: gives a tensor by name.
        transposed: modules whose weights [expert, in, out] PEFT's A reads along `in`; else along the last axis.

    Raises:
        ExportError: norm-preserving edits (not of low rank), biases that the base does not have, or a
            plan that changes nothing.
    """
    _check_has_form(plan)
    targets = _targets(plan, read)
    if not targets:
        raise ExportError("the plan changes no weight: there is nothing to export")
    # In a model with fused experts PEFT takes a target module `...mlp.down_proj` for the experts.
    mixture = any(".experts." in name for name in names)
    parameters = {t.name for t in targets if t.fused or (mixture and t.edit.point[:3] == "mlp")}
    moved = any(t.moves_bias for t in targets)
    every = all(t.bias is not None and t.edit.layout in ("linear", "conv1d") for t in targets)
    biases: Biases = ("added" if every else "replaced") if moved else "none"
    ranks = {t.name: max(1, t.rank) for t in targets}
    # One rank for all parameters: a rank_pattern for a parameter makes PEFT warn that it is ignored.
    common = max(rank for name, rank in ranks.items() if name in parameters or not parameters)
    ranks |= dict.fromkeys(parameters, common)
    tensors = _tensors(targets, ranks, biases, [n for n in names if n in parameters], transposed)
    patterns = {
        f"^{re.escape(t.module)}": ranks[t.name] for t in targets if ranks[t.name] != common
    }
    fields = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(t.module for t in targets if t.name not in parameters),
        "target_parameters": sorted(parameters) or None,
        "fan_in_fan_out": any(t.edit.layout == "conv1d" and not t.fused for t in targets),
        "lora_bias": biases == "added",
        "bias": "lora_only" if biases == "replaced" else "none",
    }
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if large := [name for name, tensor in stored.items() if not tensor.isfinite().all()]:
        raise ExportError(f"{large[0]} of the adapter holds values too large for {dtype}")
    return Adapter(stored, fields, {t.name: t.rank for t in targets})


def _check_has_form(plan: WeightPlan) -> None:
    rescaled = [name for name, edit in plan.edits.items() if edit.keeps_norm]
    if rescaled:
        raise ExportError(
            f"a norm-preserving ablation rescales every column of {rescaled[0]}: that is no change of low "
            "rank, and no adapter holds it. The nearest plan that one holds is the same without "
            "norm_preserving; a checkpoint holds this one"
        )
    new = [name for name, added in plan.added.items() if added.copy_of is None]
    if new:
        raise ExportError(
            f"the plan adds a vector through {new[0]}, which the base model does not have: PEFT can run "
            "a bias there, but cannot merge it. Export a checkpoint, which turns the biases on, or a "
            "control vector; or leave what is added (an addition, the value of a clamp or an erasure) out "
            "of the adapter's plan"
        )
    beside = {name.removesuffix(".weight") + ".bias" for name in plan.edits}
    alone = [n for n, edit in plan.edits.items() if edit.layout == "bias" and n not in beside]
    if alone:
        raise ExportError(
            f"{alone[0]} writes to the stream, and is the bias of no linear layer: no adapter of PEFT's holds "
            "it. Export a checkpoint"
        )


def _tensors(
    targets: Collection[_Target],
    ranks: Mapping[str, int],
    biases: Biases,
    parameters: list[str],
    transposed: Collection[str],
) -> dict[str, Tensor]:
    """The adapter's tensors; `parameters` are those that are targets, in the model's order."""
    tensors: dict[str, Tensor] = {}
    bases = _bases(targets, parameters)
    for target in targets:
        turned = target.edit.layout == "experts_conv1d" and target.module not in transposed
        turned |= target.fused and target.edit.layout == "conv1d"
        named = _named(target, ranks[target.name], biases, bases[target.name], turned=turned)
        tensors.update(named)
    return tensors


def _bases(targets: Collection[_Target], parameters: list[str]) -> dict[str, str]:
    """What PEFT calls the place of each target: of several parameters of one module, the last is the outermost."""
    bases = {}
    for target in targets:
        module, later = PREFIX + target.module, 0
        if target.name in parameters:
            after = parameters[parameters.index(target.name) + 1 :]
            later = sum(name.rpartition(".")[0] == target.module for name in after)
        bases[target.name] = module + ".base_layer" * later
    return bases


def _named(
    target: _Target, rank: int, biases: Biases, base: str, *, turned: bool
) -> dict[str, Tensor]:
    """A target's tensors as PEFT names and lays them out, filled with zeros up to a rank.

    `turned`: PEFT's A reads the axis that is d_model, and its B makes the other one.
    """
    a = _filled(target.a, target.a.ndim - 2, rank)
    b = _filled(target.b, 1, rank)
    if target.edit.layout == "embedding":
        return {f"{base}.lora_embedding_A": a, f"{base}.lora_embedding_B": b}
    if a.ndim == 3:
        # lora_A: expert by expert, its ranks inside; lora_B: rank by rank, the experts inside.
        experts = len(a)
        if turned:
            a, b = b.T.repeat(experts, 1), a.permute(2, 1, 0).flatten(1)
        else:
            a, b = a.flatten(0, 1), b[:, :, None].expand(*b.shape, experts).flatten(1)
    elif turned:
        a, b = b.T, a.T
    named = {f"{base}.lora_A.weight": a, f"{base}.lora_B.weight": b}
    if target.bias is not None and biases == "added":
        named[f"{base}.lora_B.bias"] = target.bias.new - target.bias.old
    if target.bias is not None and biases == "replaced":
        named[f"{base}.base_layer.bias"] = target.bias.new
    return named


def _filled(factor: Tensor, dim: int, rank: int) -> Tensor:
    more = list(factor.shape)
    more[dim] = rank - more[dim]
    return torch.cat([factor, factor.new_zeros(more)], dim)
