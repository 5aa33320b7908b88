"""A plan as a PEFT adapter that computes the hooked model, unmerged and merged, certified.

Knows: the folder that PEFT loads. Does not know: the factors (`lora_adapter` does), how they are compared
(`lora_certificate` does), or how good the plan is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from interp_ablate.edits.plan import Plan
from interp_ablate.export.certification import PROBES, require_passed
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.lora_adapter import Adapter, lora_adapter
from interp_ablate.export.lora_certificate import certify_lora, import_peft, merge_instructions
from interp_ablate.export.model_card import export_manifest, write_documents
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.weights.plan_to_weights import Tied, weight_plan

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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
            "skip-embedding": the embedding is left out, and merging needs no care (another plan).
            "accept": merge as it is; the certificate shows what that costs.
        dtype: of the stored factors.
        report: the test-split numbers for the card.

    Returns the certificate.

    Raises:
        ExportError: PEFT is not installed, no exact form, a place that cannot be written, a certificate
            that fails. Nothing is left at `out` then.
    """
    peft = import_peft()
    state = model.hf_state_dict()
    entry = model.architecture
    weights = weight_plan(
        plan, model.hf_config, list(state), state.__getitem__, tied=tied, entry=entry
    )
    adapter = lora_adapter(weights, list(state), state.__getitem__, dtype=dtype)
    with atomic_folder(out, overwrite=overwrite, source=model.source) as folder:
        _write(peft, adapter, folder, base=_base_name(model.source))
        certificate = certify_lora(model, weights, folder, prompts=prompts)
        require_passed(certificate, "adapter")
        manifest = export_manifest(
            "lora", model.source, weights, state, str(dtype).removeprefix("torch."), report,
            backend=model.backend, ranks=adapter.ranks, adapter=adapter.fields,
            merging=merge_instructions(weights, adapter),
        )  # fmt: skip
        manifest["versions"]["peft"] = peft.__version__
        write_documents(folder, manifest, certificate)
    return certificate


def _base_name(source: ModelSource) -> str | None:
    """The name by which PEFT loads the base; None for a folder, whose path is nobody else's."""
    return source.name if source.kind == "hub" else source.base_model


def _write(peft: Any, adapter: Adapter, folder: Path, *, base: str | None) -> None:
    from safetensors.torch import save_file

    fields = {name: value for name, value in adapter.fields.items() if value is not None}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=base, **fields
    )
    config.save_pretrained(folder)
    # PEFT keeps lists of modules as sets, and writes them in another order each time.
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, {**written, **fields})
    save_file(adapter.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
