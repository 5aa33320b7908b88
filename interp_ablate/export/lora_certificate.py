"""The certificate of an adapter: loaded with PEFT, unmerged and merged, against the hooked model.

Knows: PEFT, and what a user must know before merging. Does not know: how the adapter was made.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.certification import (
    PROBES,
    beyond_limits,
    compare,
    hooked_logits,
    limits_for,
    logit_distance,
    plain_logits,
)
from interp_ablate.export.lora_adapter import Adapter
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.weights.plan_to_weights import WeightPlan

# The card's section on merging, by `WeightPlan.tied`.
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
    """Markdown for the card: the cautions before merging or disabling the adapter."""
    lines = [_MERGING.get(plan.tied or "", "`merge_and_unload()` computes what the adapter does.")]
    if adapter.fields["bias"] == "lora_only":
        lines.append(
            "Loading the adapter replaces biases of the base model (PEFT's `bias='lora_only'`): "
            "`disable_adapter()` and `unload()` do not bring them back. Load the base anew for that."
        )
    return "\n\n".join(lines)


def import_peft() -> Any:
    """The module peft.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ExportError(
            "a LoRA adapter is written and certified with PEFT, which is not installed: pip install peft"
        ) from error
    return peft


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

    Returns the largest logit difference and KL at any position, unmerged and merged, the share of the edit
    that the merged model lacks (as for an exported checkpoint), the plan's effect,
    the limits (they follow the model's dtype) and whether all hold. With `plan.tied` "untie" the merge is
    into `untied_base(base)`; with "accept" into the tied base, and is held against the hooks with an edited
    unembedding, whose distance from the plan is `cost_of_accept`.

    Raises:
        ExportError: PEFT cannot load or merge the adapter.
    """
    peft = import_peft()
    rows = model.encode_all(prompts)
    plain, want = hooked_logits(model, Plan(), rows), hooked_logits(model, plan.plan, rows)
    meant = want  # what the merged model shall compute
    if plan.unembed_map is not None:
        with model.plans.unembedding_through(plan.unembed_map):
            meant = hooked_logits(model, plan.plan, rows)
    base = _plain(model, own=plan.edits)
    with _loading(folder):
        adapted = peft.PeftModel.from_pretrained(base, folder)
        unmerged = plain_logits(adapted, rows)
        if plan.tied == "untie":
            adapted = peft.PeftModel.from_pretrained(untied_base(adapted.unload()), folder)
        whole = adapted.merge_and_unload()
        merged = plain_logits(whole, rows)
    numbers = {**logit_distance(want, unmerged), **logit_distance(meant, merged, "merged_")}
    dtype = str(model.dtype).removeprefix("torch.")
    inside = compare(
        model, plan.plan, from_hf(whole, model.tokenizer), rows, unembed_map=plan.unembed_map
    )
    logit_limit, kl_limit, _, edit_limit = limits_for(dtype, inside["max_abs_logit"]).values()
    limits = dict(zip(numbers, (logit_limit, kl_limit) * 2)) | {"share_of_edit_missed": edit_limit}
    numbers |= {name: inside[name] for name in inside if "edit" in name}
    failed = beyond_limits(numbers, limits)
    cost = {"cost_of_accept": logit_distance(want, meant)} if plan.unembed_map is not None else {}
    return {
        **numbers,
        **cost,
        "max_abs_logit_effect_of_plan": logit_distance(want, plain)["max_abs_logit_difference"],
        "prompts": len(rows),
        "positions": sum(map(len, rows)),
        "limits": limits,
        "dtype": dtype,
        "compared": {"stored": dtype, "hooked": dtype, "reloaded": dtype},
        "failed": failed,
        "passed": not failed,
    }


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
