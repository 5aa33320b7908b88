"""Whether an adapter computes what the hooked model computed.

Knows: PEFT and logits. Does not know: how it was made.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.export.certification import LIMITS, PROBES
from interp_ablate.export.lora_adapter import Adapter
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.weights.plan_to_weights import WeightPlan

# What the card says of merging, by `WeightPlan.tied`.
_MERGING = {
    "untie": """The base model's unembedding is its embedding, which this adapter edits. Unmerged, the
unembedding stays as it is. PEFT merges into both, which is another function: give the base an
unembedding of its own first.

```
from interp_ablate.export.lora_certificate import untied_base  # or the four lines that it is:

def untied_base(base):
    head = base.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    return base

merged = PeftModel.from_pretrained(untied_base(base), 'THIS').merge_and_unload()
```""",
    "accept": """The base model's unembedding is its embedding, which this adapter edits. Unmerged, the
unembedding stays as it is; `merge_and_unload()` edits both, which is another function: how far it is
from the plan is said above.""",
}


def merge_instructions(plan: WeightPlan, adapter: Adapter) -> str:
    """What a user of the adapter must know before merging or disabling it, as Markdown."""
    lines = [_MERGING.get(plan.tied or "", "`merge_and_unload()` computes what the adapter does.")]
    if adapter.fields["bias"] == "lora_only":
        lines.append(
            "Loading the adapter replaces biases of the base model (PEFT's `bias='lora_only'`): "
            "`disable_adapter()` and `unload()` do not bring them back. Load the base anew for that."
        )
    return "\n\n".join(lines)


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ExportError(
            "a LoRA adapter is written and certified with PEFT, which is not installed: pip install peft"
        ) from error
    return peft


# ---- the certificate ------------------------------------------------------------------------------


def untied_base(hf_model: Any) -> Any:
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
    into `untied_base(base)`; with "accept" into the tied base, and is held against the hooks with an edited
    unembedding, whose distance from the plan is `cost_of_accept`.

    Raises:
        ExportError: PEFT cannot load or merge the adapter.
    """
    peft = import_peft()
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
            adapted = peft.PeftModel.from_pretrained(untied_base(adapted.unload()), folder)
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
