"""A plan as a PEFT adapter that computes the hooked model, unmerged and merged, certified.

Knows: PEFT, its folder, what a user must know before merging. Does not know: the factors (`lora_adapter` does),
or how good the plan is.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.certification import (
    PROBES,
    SKIPPED,
    compare,
    hooked_logits,
    in_blocks,
    limits_for,
    logit_distance,
    plain_logits,
    require_passed,
    verdict,
)
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.lora_adapter import Adapter, lora_adapter
from interp_ablate.export.model_card import export_manifest, write_documents
from interp_ablate.jobs.bars import waiting
from interp_ablate.models.hf_classes import of_config
from interp_ablate.models.load import from_hf
from interp_ablate.models.model import Model, check_model
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.weights.plan_to_weights import Tied, WeightPlan, check_tie, weight_plan

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@waiting("export")
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
            the unembedding alone, and PEFT's merge edits both. "untie": merge into `untied_base(base)`.
            "skip-embedding": the embedding is left out, tied or not, for servers that take adapters of layers
            only, and merging needs no care. That is another plan, and the certificate shows what it costs.
            "accept": merge as it is; the certificate shows what that costs.
        dtype: of the stored factors.
        report: the test-split numbers for the card.

    Returns the certificate.

    Raises:
        ExportError: PEFT is not installed, no exact form, a place that cannot be written, a certificate
            that fails. Nothing is left at `out` then.
    """
    check_model(model)
    peft = import_peft()
    state = model.hf_state_dict()
    entry = model.architecture
    check_tie(entry, model.hf_config, state, state.__getitem__)
    weights = weight_plan(
        plan, model.hf_config, list(state), state.__getitem__, tied=tied, entry=entry
    )
    transposed = [n for n, m in _skeleton(model).named_modules() if getattr(m, "is_transposed", 0)]
    adapter = lora_adapter(
        weights, list(state), state.__getitem__, dtype=dtype, transposed=transposed
    )
    with atomic_folder(out, overwrite=overwrite, source=model.source) as folder:
        # a folder's path is nobody else's: PEFT loads the base by another name, or by none
        hub_name = model.source.name if model.source.kind == "hub" else model.source.base_model
        _write(peft, adapter, folder, base=hub_name)
        certificate = certify_lora(model, weights, folder, prompts=prompts)
        require_passed(certificate, "adapter")
        manifest = export_manifest(
            "lora", model.source, weights, state, str(dtype).removeprefix("torch."), report,
            backend=model.backend, ranks=adapter.ranks, adapter=adapter.fields,
            merging=merge_instructions(weights, adapter),
        )  # fmt: skip
        manifest["versions"]["peft"] = peft.__version__
        return write_documents(folder, manifest, certificate)


def _write(peft: Any, adapter: Adapter, folder: Path, *, base: str | None) -> None:
    from safetensors.torch import save_file

    fields = {name: value for name, value in adapter.fields.items() if value is not None}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base, **fields
    )
    config.save_pretrained(folder)
    # PEFT keeps lists of modules as sets, and writes them in another order each time.
    written = incoming_object(folder / CONFIG)
    write_json(folder / CONFIG, {**written, **fields})
    save_file(adapter.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


# The card's section on merging, by `WeightPlan.tied`.
_MERGING = {
    "untie": """The base model's unembedding is its embedding, which this adapter edits. Unmerged, the
unembedding stays as it is. PEFT merges into both, which is another function: give the base an
unembedding of its own first.

```

from interp_ablate.export.lora import untied_base  # or the four lines that it is:

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
    return "\n\n".join([*lines, _servers(adapter)])


def _servers(adapter: Adapter) -> str:
    """Which servers take the adapter; read in vLLM's vllm/lora and tried with llama.cpp's own converter."""
    fields = adapter.fields
    if fields["target_parameters"] or fields["bias"] != "none" or fields["lora_bias"]:
        return "Servers (vLLM, llama.cpp) take no adapter of fused experts or of biases: give them the merged model."
    text = f"llama.cpp takes it through its `convert_lora_to_gguf.py`; vLLM needs a `max_lora_rank` of at least {fields['r']}."
    if any("embedding" in name for name in adapter.tensors):
        text += (
            " It edits the embedding, which vLLM takes for some architectures only: `interp-ablate export "
            "--format lora --tied skip-embedding` leaves the embedding out, and its certificate says what that costs."
        )
    return text


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


@waiting("certificate")
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
    numbers: dict[str, Any] = {
        **logit_distance(want, unmerged),
        **logit_distance(meant, merged, "merged_"),
    }
    dtype = str(model.dtype).removeprefix("torch.")
    inside = compare(
        model, plan.plan, from_hf(whole, model.tokenizer), rows, unembed_map=plan.unembed_map
    )
    logit_limit, kl_limit, _, edit_limit = limits_for(dtype, inside["max_abs_logit"]).values()
    limits = dict(zip(numbers, (logit_limit, kl_limit) * 2)) | {"share_of_edit_missed": edit_limit}
    numbers |= {name: inside[name] for name in inside if "edit" in name}
    cost = {"cost_of_accept": logit_distance(want, meant)} if plan.unembed_map is not None else {}
    if plan.asked is not None:
        cost[SKIPPED] = logit_distance(hooked_logits(model, plan.asked, rows), want)
    numbers |= cost
    numbers |= {
        "max_abs_logit_effect_of_plan": logit_distance(want, plain)["max_abs_logit_difference"]
    }
    numbers |= {"prompts": len(rows), "positions": sum(map(len, rows))}
    return verdict(numbers, limits, dtype, stored=dtype, computed=dtype)


@contextmanager
def _loading(folder: str | Path) -> Iterator[None]:
    """PEFT's failures as this package's; its warnings about tied embeddings are the certificate's work."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            yield
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"PEFT cannot load or merge the adapter {folder}: {error}") from error


def _skeleton(model: Model) -> Any:
    """The model in plain transformers, without values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return of_config(model.hf_config)


def _plain(model: Model, *, own: Collection[str]) -> Any:
    """The model in plain transformers, over the same tensors (on another device: copies on the CPU) but for its `own`.

    PEFT loads and merges in place: what it will change must not be the live model's.
    """
    hf = _skeleton(model)
    tensors = {n: tensor.detach().cpu() for n, tensor in model.hf_state_dict().items()}
    hf.load_state_dict({n: t.clone() if n in own else t for n, t in tensors.items()}, assign=True)
    hf.tie_weights()
    return in_blocks(hf.eval().requires_grad_(False), model.device)
