"""LoRA: a plan as a PEFT adapter that computes the hooked model, unmerged and merged, certified.

Knows: exact low-rank factors of what a plan does to each tensor, how PEFT names and stores them, what
PEFT cannot hold. Does not know: which tensors a plan changes (`weights` does), or how good the plan is.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.edits import Affine, Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.card import (
    CERTIFICATE,
    MANIFEST,
    model_card,
    source_front_matter,
    versions,
)
from interp_ablate.export.checkpoint import whole_folder, write_json
from interp_ablate.export.verify import LIMITS, PROBES, require_passed
from interp_ablate.model import Model, PromptLike
from interp_ablate.scores import kl_divergence
from interp_ablate.sources import ModelSource
from interp_ablate.weights import BLOCK, Read, TensorEdit, Tied, WeightPlan, weight_plan

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# What the card says of merging, by `WeightPlan.tied`.
_MERGING = {
    "untie": """The base model's unembedding is its embedding, which this adapter edits. Unmerged, the
unembedding stays as it is. PEFT merges into both, which is another function: give the base an
unembedding of its own first.

```
from interp_ablate.export.lora import untied  # or the four lines that it is:

def untied(base):
    head = base.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    return base

merged = PeftModel.from_pretrained(untied(base), 'THIS').merge_and_unload()
```""",
    "accept": """The base model's unembedding is its embedding, which this adapter edits. Unmerged, the
unembedding stays as it is; `merge_and_unload()` edits both, which is another function: how far it is
from the plan is said above.""",
}
# What becomes of biases: none moves, PEFT adds a bias of its own, or the base's are replaced.
Biases = Literal["none", "added", "replaced"]
# A singular value of an edit's map below this share of its factors' size is rounding, not rank.
NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: tensors under its file's names, its LoraConfig's fields, the rank of each target.

    `ranks` is that of each weight, under its own name; 0 where only the bias beside it changes.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    ranks: dict[str, int]


# ---- factors --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Bias:
    """A bias beside an edited weight, before and after; float64."""

    old: Float[Tensor, " d_model"]
    new: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class _Target:
    """What the plan does to one weight: W + the product of `a` and `b`, and to the bias beside it."""

    name: str  # the tensor's
    edit: TensorEdit
    a: Float[Tensor, "... k in"]  # of fused experts [expert, k, in]
    b: Float[Tensor, "d_model k"]
    bias: _Bias | None = None

    @property
    def module(self) -> str:
        """The module that holds the weight."""
        return self.name.rpartition(".")[0]

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    @property
    def fused(self) -> bool:
        return self.edit.layout == "experts"

    @property
    def moves_bias(self) -> bool:
        return self.bias is not None and not torch.equal(self.bias.old, self.bias.new)


def minimal(affine: Affine) -> tuple[Float[Tensor, "d_model k"], Float[Tensor, "d_model k"]]:
    """Left and right of a map with as many columns as their product has rank; float64."""
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
    left, right = minimal(edit.affine)
    if edit.layout == "experts":
        return torch.stack([_read_through(w, right, d_model_first=True) for w in weight]), left
    along = _read_through(weight, right, d_model_first=edit.layout == "linear")
    if edit.layout == "embedding" and not edit.affine.is_linear:
        # the same vector for every entry of the embedding: one more rank
        along = torch.cat([along, along.new_ones(1, along.shape[1])])
        left = torch.cat([left, edit.affine.shift[:, None]], 1)
    return along, left


def _targets(plan: WeightPlan, read: Read) -> list[_Target]:
    """Every weight that the plan changes, or whose bias it changes."""
    found = []
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
            found.append(target)
    return found


# ---- the adapter ----------------------------------------------------------------------------------


def lora_adapter(
    plan: WeightPlan, names: Collection[str], read: Read, *, dtype: torch.dtype = torch.float32
) -> Adapter:
    """The adapter of a weight plan, for a base model that holds these tensors.

    For a weight W and its map x -> x + left (right^T x), A is right^T W and B is left: the rank is the
    map's, the scaling 1 everywhere. Computed in float64, rounded once to `dtype`.

    Biases: where every target is a projection that has one, PEFT's `lora_bias` (a bias on B, which a
    disabled adapter takes back). Elsewhere (an embedding among the targets, projections without bias)
    PEFT has only `bias="lora_only"`: the new biases replace the base's when the adapter is loaded.

    Args:
        names: of all tensors of the base model, as its `state_dict` has them.
        read: gives a tensor by name.

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
    tensors: dict[str, Tensor] = {}
    for target in targets:
        tensors.update(_named(target, ranks[target.name], biases))
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
        "fan_in_fan_out": any(t.edit.layout == "conv1d" for t in targets),
        "lora_bias": biases == "added",
        "bias": "lora_only" if biases == "replaced" else "none",
    }
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return Adapter(stored, fields, {t.name: t.rank for t in targets})


def _check_has_form(plan: WeightPlan) -> None:
    kept = [name for name, edit in plan.edits.items() if edit.keeps_norm]
    if kept:
        raise ExportError(
            f"a norm-preserving ablation rescales every column of {kept[0]}: that is no change of low "
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


def _named(target: _Target, rank: int, biases: Biases) -> dict[str, Tensor]:
    """A target's tensors as PEFT names and lays them out, filled with zeros up to a rank."""
    a = _filled(target.a, target.a.ndim - 2, rank)
    b = _filled(target.b, 1, rank)
    base = PREFIX + target.module
    if target.edit.layout == "embedding":
        return {f"{base}.lora_embedding_A": a, f"{base}.lora_embedding_B": b}
    if target.fused:
        # lora_A: expert by expert, its ranks inside; lora_B: rank by rank, the experts inside.
        b = b[:, :, None].expand(*b.shape, len(a)).flatten(1)
        a = a.flatten(0, 1)
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


# ---- the folder -----------------------------------------------------------------------------------


def export_lora(
    model: Model,
    plan: Plan,
    out: str | Path,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype = torch.float32,
    prompts: Sequence[PromptLike] = PROBES,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a plan as a PEFT adapter, load it as a user would, and certify it unmerged and merged.

    Args:
        tied: where the plan edits an embedding that is the unembedding too, the unmerged adapter leaves
            the unembedding alone, and PEFT's merge edits both. "untie": merge into `untied(base)`.
            "skip-embedding": the embedding is left out, and merging needs no care (another plan).
            "accept": merge as it is; the certificate shows what that costs.
        dtype: of the stored factors.
        report: the test-split numbers for the card.

    Returns the certificate.

    Raises:
        ExportError: PEFT is not installed, no exact form, a place that cannot be written, a certificate
            that fails. Nothing is left at `out` then.
    """
    peft = _peft()
    state = model.hf_state_dict()
    entry = model.architecture
    found = weight_plan(
        plan, model.hf_config, list(state), state.__getitem__, tied=tied, entry=entry
    )
    adapter = lora_adapter(found, list(state), state.__getitem__, dtype=dtype)
    with whole_folder(out, overwrite=overwrite, source=model.source) as folder:
        _write(peft, adapter, folder, base=_base_name(model.source))
        certificate = certify_lora(model, found, folder, prompts=prompts)
        require_passed(certificate, "adapter")
        manifest = _manifest(model, found, adapter, report)
        manifest["versions"]["peft"] = peft.__version__
        manifest["unchanged"] = sorted(set(state) - set(found.changed))
        write_json(folder / CERTIFICATE, certificate)
        (folder / "README.md").write_text(_card(manifest, certificate))
        write_json(folder / MANIFEST, manifest)
    return certificate


def _base_name(source: ModelSource) -> str | None:
    """What PEFT loads the base by; a folder's path is nobody else's."""
    return source.name if source.kind == "hub" else source.base_model


def _manifest(
    model: Model, plan: WeightPlan, adapter: Adapter, report: dict[str, Any] | None
) -> dict[str, Any]:
    source = model.source
    dtype = next(iter(adapter.tensors.values())).dtype
    return {
        "format": "interp_ablate.export/2",
        "kind": "lora",
        "source": source.to_dict(),
        "source_card": source_front_matter(source.path) if source.kind == "folder" else {},
        "backend": model.backend,
        "dtype": str(dtype).removeprefix("torch."),
        "tied": plan.tied,
        "edited": plan.changed,
        "ranks": adapter.ranks,
        "adapter": adapter.fields,
        "merging": merging(plan, adapter),
        "versions": versions(),
        "plan": plan.plan.to_dict(),
        "test": report,
    }


def _card(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """The model card, and how to merge: what it says of a tied checkpoint does not hold here."""
    tied = manifest["tied"] if manifest["tied"] == "skip-embedding" else None
    card = model_card({**manifest, "tied": tied}, certificate)
    return f"{card}\n## Merging\n\n{manifest['merging']}\n"


def merging(plan: WeightPlan, adapter: Adapter) -> str:
    """What a user of the adapter must know before merging or disabling it, as Markdown."""
    lines = [_MERGING.get(plan.tied or "", "`merge_and_unload()` computes what the adapter does.")]
    if adapter.fields["bias"] == "lora_only":
        lines.append(
            "Loading the adapter replaces biases of the base model (PEFT's `bias='lora_only'`): "
            "`disable_adapter()` and `unload()` do not bring them back. Load the base anew for that."
        )
    return "\n\n".join(lines)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ExportError(
            "a LoRA adapter is written and certified with PEFT, which is not installed: pip install peft"
        ) from error
    return peft


def _write(peft: Any, adapter: Adapter, folder: Path, *, base: str | None) -> None:
    from safetensors.torch import save_file

    fields = {name: value for name, value in adapter.fields.items() if value is not None}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base, **fields
    )
    config.save_pretrained(folder)
    # PEFT keeps lists of modules as sets, and writes them in another order each time.
    written = json.loads((folder / CONFIG).read_text())
    write_json(folder / CONFIG, {**written, **fields})
    save_file(adapter.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


# ---- the certificate ------------------------------------------------------------------------------


def untied(hf_model: Any) -> Any:
    """The same model with an unembedding of its own, equal to the embedding: its logits do not change.

    PEFT merges into tensors in place: what it merges into a tied embedding, it merges into the
    unembedding as well. Call this before `PeftModel.from_pretrained`. The model is changed in place.
    """
    head = hf_model.get_output_embeddings()
    head.weight = nn.Parameter(
        head.weight.detach().clone(), requires_grad=head.weight.requires_grad
    )
    hf_model.config.tie_word_embeddings = False
    return hf_model


def certify_lora(
    model: Model, plan: WeightPlan, folder: str | Path, *, prompts: Sequence[PromptLike] = PROBES
) -> dict[str, Any]:
    """Load an adapter with PEFT over the model's weights, and compare it with the hooks, then merge it.

    Returns the largest logit difference and KL at any position, unmerged and merged, the plan's effect,
    the limits (they follow the model's dtype) and whether all hold. With `plan.tied` "untie" the merge is
    into `untied(base)`; with "accept" into the tied base, and is held against the hooks with an edited
    unembedding, whose distance from the plan is `cost_of_accept`.

    Raises:
        ExportError: PEFT cannot load or merge the adapter.
    """
    peft = _peft()
    rows = model.encode_all(prompts)
    plain, want = _hooked(model, Plan(), rows), _hooked(model, plan.plan, rows)
    meant = want  # by the merged model
    if plan.unembed_map is not None:
        with model.unembedding_through(plan.unembed_map):
            meant = _hooked(model, plan.plan, rows)
    base = _plain(model, own=plan.edits)
    with _loading(folder):
        adapted = peft.PeftModel.from_pretrained(base, folder)
        unmerged = _logits(adapted, rows)
        if plan.tied == "untie":
            adapted = peft.PeftModel.from_pretrained(untied(adapted.unload()), folder)
        merged = _logits(adapted.merge_and_unload(), rows)
    numbers = {**_apart(want, unmerged), **_apart(meant, merged, "merged_")}
    dtype = str(model.dtype).removeprefix("torch.")
    limits = dict(zip(numbers, LIMITS[dtype][:2] * 2))
    failed = [name for name in limits if not numbers[name] <= limits[name]]
    cost = {"cost_of_accept": _apart(want, meant)} if plan.unembed_map is not None else {}
    return {
        **numbers,
        **cost,
        "max_abs_logit_effect_of_plan": _apart(want, plain)["max_abs_logit_difference"],
        "prompts": len(rows),
        "positions": sum(map(len, rows)),
        "limits": limits,
        "dtype": dtype,
        "failed": failed,
        "passed": not failed,
    }


def _hooked(model: Model, plan: Plan, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each row under a plan as hooks, at every position."""
    with model.applied(plan):
        return [model.logits([row], keep=len(row))[0].float() for row in rows]


@contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    """PEFT's failures as this package's; its warnings about tied embeddings are the certificate's work."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"PEFT cannot load or merge the adapter {folder}: {error}") from error


def _plain(model: Model, *, own: Collection[str]) -> Any:
    """The model in plain transformers, over the same tensors but for copies of its `own`.

    PEFT loads and merges in place: what it will change must not be the live model's.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        hf = AutoModelForCausalLM.from_config(copy.deepcopy(model.hf_config))
    tensors = {n: tensor.detach() for n, tensor in model.hf_state_dict().items()}
    hf.load_state_dict({n: t.clone() if n in own else t for n, t in tensors.items()}, assign=True)
    hf.tie_weights()
    return hf.to(model.device).eval().requires_grad_(False)


@torch.no_grad()
def _logits(hf: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    device = next(hf.parameters()).device
    return [hf(input_ids=torch.tensor([row], device=device)).logits[0].float() for row in rows]


def _apart(some: Sequence[Tensor], others: Sequence[Tensor], prefix: str = "") -> dict[str, float]:
    """The largest difference of two sets of logits, and the largest KL; NaN if there is one."""
    gaps, kls = [], []
    for one, other in zip(some, others, strict=True):
        gaps.append((one - other).abs().double().max())
        pair = (one.double().log_softmax(-1), other.double().log_softmax(-1))
        kls.append(kl_divergence(*pair).max())
    gap, kl = float(torch.stack(gaps).max()), float(torch.stack(kls).max())
    return {f"{prefix}max_abs_logit_difference": gap, f"{prefix}kl": kl}
