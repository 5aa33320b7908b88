"""LoRA: a plan as a PEFT adapter that computes the hooked model, unmerged and merged, certified.

Knows: exact low-rank factors of what a plan does to each tensor, how PEFT names and stores them, what
PEFT cannot hold. Does not know: which tensors a plan changes (`weights` does), or how good the plan is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from interp_ablate.edits.plan import Plan
from interp_ablate.export.certification import PROBES, require_passed
from interp_ablate.export.checkpoint import atomic_folder
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.lora_adapter import Adapter, lora_adapter
from interp_ablate.export.lora_certificate import certify_lora, import_peft, merge_instructions
from interp_ablate.export.model_card import CERTIFICATE, model_card, source_front_matter
from interp_ablate.models.model import Model
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.prompt import PromptLike
from interp_ablate.storage.provenance import MANIFEST, versions
from interp_ablate.weights.plan_to_weights import Tied, WeightPlan, weight_plan

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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
    found = weight_plan(
        plan, model.hf_config, list(state), state.__getitem__, tied=tied, entry=entry
    )
    adapter = lora_adapter(found, list(state), state.__getitem__, dtype=dtype)
    with atomic_folder(out, overwrite=overwrite, source=model.source) as folder:
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
        "merging": merge_instructions(plan, adapter),
        "versions": versions(),
        "plan": plan.plan.to_dict(),
        "test": report,
    }


def _card(manifest: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """The model card, and how to merge: what it says of a tied checkpoint does not hold here."""
    tied = manifest["tied"] if manifest["tied"] == "skip-embedding" else None
    card = model_card({**manifest, "tied": tied}, certificate)
    return f"{card}\n## Merging\n\n{manifest['merging']}\n"


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
