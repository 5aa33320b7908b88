"""Checkpoint: a plan written into a Hugging Face folder that plain transformers loads, certified.

Knows: where the source's tensors and side files are, sharding, tied embeddings, whole-or-nothing
writing. Does not know: which tensors a plan changes (`weights` does), or how good the plan is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from interp_ablate.edits import Plan
from interp_ablate.errors import ExportError
from interp_ablate.export.card import model_card, versions
from interp_ablate.export.verify import PROBES, certify
from interp_ablate.model import Model, PromptLike
from interp_ablate.weights import architecture_of, edited_state_dict

MANIFEST = "interp_ablate.json"
CERTIFICATE = "certificate.json"
INDEX = "model.safetensors.index.json"
MAX_SHARD = "5GB"
# Files of a source folder that are weights, or that are written anew.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".onnx", ".h5")
_WRITTEN = ("config.json", "README.md", MANIFEST, CERTIFICATE)


@contextmanager
def whole_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, or disappears.

    Raises:
        ExportError: `out` exists (and overwrite is off), or the place cannot be written.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists: choose another --out, or pass overwrite (--force)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
        )
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_suffix(".old")
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"cannot write {out}: {reason}; nothing is left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def source_state_dict(model: Model) -> dict[str, Tensor]:
    """The unedited tensors: a folder's own, in their own dtype; else those of the loaded model."""
    if model.source.kind == "folder":
        files = _weight_files(Path(model.source.path or ""))
        if files:
            return _read_folder(files)
    state = model.hf_state_dict()
    if _is_tied(model, state):
        state = {k: v for k, v in state.items() if k != f"{_entry(model).unembed}.weight"}
    return state


def _entry(model: Model) -> Any:
    return architecture_of(model.hf_config)


def _is_tied(model: Model, state: dict[str, Tensor]) -> bool:
    entry = _entry(model)
    embed, unembed = f"{entry.embed}.weight", f"{entry.unembed}.weight"
    tied = bool(getattr(model.hf_config, "tie_word_embeddings", False))
    return tied and (unembed not in state or torch.equal(state[embed], state[unembed]))


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers reads: others (consolidated.safetensors, adapters) are not the model."""
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def _read_folder(files: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ExportError(f"cannot read the source's {file}: {error}") from error
    return state


def export_checkpoint(
    model: Model,
    plan: Plan | None,
    out: str | Path,
    *,
    prompts: Sequence[PromptLike] = PROBES,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model under the plan as a Hugging Face folder, reload it, and certify it.

    Edited tensors keep the source's dtype (computed in float64, rounded once); all others are the
    same bytes. If the plan edits a tied embedding, `lm_head.weight` is written with the old values and
    the config says untied. Tokenizer, chat template and generation config come along; README.md is
    the model card, interp_ablate.json the manifest, certificate.json the comparison.

    Args:
        plan: None writes the model's weights as they are (of an edited HookedTransformer, say).
        report: the test-split numbers for the card (`selected.json`'s `test`).

    Returns the certificate.

    Raises:
        ExportError: no exact weight form, unknown architecture, a place that cannot be written, a
            certificate that fails. Nothing is left at `out` then.
    """
    if model.hf_config is None:
        raise ExportError(
            "the model was wrapped without its Hugging Face config: Model.wrap(..., hf_config=...)"
        )
    plan = plan or Plan()
    state = source_state_dict(model)
    changed: list[str] = []
    if len(plan):
        state, changed = edited_state_dict(state, plan, model.hf_config)
    with whole_folder(out, overwrite=overwrite) as folder:
        _write_weights(state, folder)
        untied = _write_config(model, state, folder)
        _write_side_files(model, folder)
        stored = str(_float_dtype(state)).removeprefix("torch.")
        certificate = certify(model, plan, folder, prompts=prompts, stored_dtype=stored)
        if not certificate["passed"]:
            raise ExportError(
                "the export is not the hooked model: "
                + "; ".join(
                    f"{name} {certificate[name]:.3g} (limit {certificate['limits'][name]:.3g})"
                    for name in certificate["failed"]
                )
                + ". Nothing was left on disk"
            )
        manifest = {
            "format": "interp_ablate.export/1",
            "source": model.source.to_dict(),
            "backend": model.backend,
            "dtype": stored,
            "untied": untied,
            "edited": changed,
            "unchanged": sorted(set(state) - set(changed)),
            "versions": versions(),
            "plan": plan.to_dict(),
            "test": report,
        }
        _write_json(folder / CERTIFICATE, certificate)
        (folder / "README.md").write_text(model_card(manifest, certificate))
        _write_json(folder / MANIFEST, manifest)
    return certificate


def _float_dtype(state: dict[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if len({tensor.data_ptr() for tensor in plain.values() if tensor.numel()}) < len(plain):
        plain = {
            name: tensor.clone() for name, tensor in plain.items()
        }  # an untied pair shares memory
    split = split_torch_state_dict_into_shards(
        plain, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        save_file({n: plain[n] for n in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX, index)


def _write_config(model: Model, state: dict[str, Tensor], folder: Path) -> bool:
    """config.json: the source's, with the tie undone where lm_head now has values of its own."""
    untied = not _is_tied(model, state)
    was_tied = bool(getattr(model.hf_config, "tie_word_embeddings", False))
    source = Path(model.source.path or "") / "config.json"
    if model.source.kind == "folder" and source.is_file():
        config = json.loads(source.read_text())
    else:
        config = model.hf_config.to_diff_dict()
        config["dtype"] = str(_float_dtype(state)).removeprefix("torch.")
        config["architectures"] = _architectures(model)
        config["model_type"] = model.hf_config.model_type
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
    if was_tied and untied:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    return was_tied and untied


def _architectures(model: Model) -> list[str]:
    from transformers import AutoModelForCausalLM

    if model.hf_config.architectures:
        return list(model.hf_config.architectures)
    with torch.device("meta"):
        return [type(AutoModelForCausalLM.from_config(model.hf_config)).__name__]


def _write_side_files(model: Model, folder: Path) -> None:
    """Tokenizer, chat template, generation config: copied from a source folder, else saved anew."""
    if model.source.kind == "folder":
        for file in Path(model.source.path or "").iterdir():
            if file.is_file() and file.name not in _WRITTEN and not file.name.endswith(_NOT_COPIED):
                shutil.copy2(file, folder / file.name)
        return
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
