"""From a name or a folder to a Model.

Knows: sources and backends. Does not know: what the model is wanted for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from interp_ablate.errors import ModelError
from interp_ablate.jobs.bars import waiting
from interp_ablate.models.backends.backend import Backend
from interp_ablate.models.backends.choice import chosen_backend
from interp_ablate.models.backends.registry import BACKENDS
from interp_ablate.models.loading import DEFAULTS, BackendChoice
from interp_ablate.models.model import Model
from interp_ablate.models.quantized_modules import (
    check_quantization,
    packed_modules,
    prepare,
)
from interp_ablate.models.sources import (
    ModelSource,
    at_commit,
    check_device,
    load_hf,
    resolve,
    torch_dtype,
)
from interp_ablate.prompts.chat_format import TemplateLike, as_chat_format
from interp_ablate.prompts.chat_template import has_template

logger = logging.getLogger(__name__)
_LARGE = 8e9  # bytes


@waiting("loading the model")
def load_model(
    name_or_path: str | Path,
    *,
    backend: BackendChoice = DEFAULTS.backend,
    dtype: str | torch.dtype = DEFAULTS.dtype,
    device: str = DEFAULTS.device,
    template: TemplateLike = DEFAULTS.template,
    trust_remote_code: bool = DEFAULTS.trust_remote_code,
    revision: str | None = DEFAULTS.revision,
) -> Model:
    """Load a decoder by hub name, local Hugging Face folder, GGUF file, or bundled alias (`smollm2`).

    Weights are loaded raw: nothing is folded, centred or refactored. Folders of bitsandbytes' 4 and 8 bit run
    quantized, on backend "hf"; what they write with is measured on the numbers that their codes stand for. FP8 in
    blocks, MXFP4, GPTQ, AWQ and compressed-tensors are loaded dequantized.

    Args:
        backend: "auto" (the default) takes a Bridge where its logits and its writers are the checkpoint's, and plain
            transformers otherwise. "bridge" is TransformerLens' TransformerBridge (Hugging Face's own forward
            pass), "hooked" a HookedTransformer built from the checkpoint and checked against its logits, "hf" the
            Hugging Face model itself with hooks on its own modules.
        device: "cpu", "cuda", "mps", or "auto" to spread the layers over all GPUs (bridge only).
        template: a Jinja chat template to use instead of the tokenizer's, or the name of one of several that
            the tokenizer has; "none" for raw text. A `ChatFormat` also sets variables of the template, and what
            answers start with.
        trust_remote_code: run Python code that the model's folder or repository brings; off unless asked.
        revision: a branch, tag or commit of a hub name; the manifest of an export names it, and the commit it stood for.

    Raises:
        ModelError: the model cannot be found, loaded or reproduced; the message says what to do.
    """
    if backend not in get_args(BackendChoice):
        raise ModelError(
            f"unknown backend {backend!r}: accepted are {', '.join(get_args(BackendChoice))}"
        )
    if device == "auto" and backend == "hooked":
        raise ModelError("a HookedTransformer lives on one device: use backend='bridge' for 'auto'")
    hf, tokenizer, source = hf_from_name(
        name_or_path,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    model = from_hf(hf, tokenizer, source=source, backend=backend, template=template)
    for note in _notes(model, template):
        logger.warning("%s %s", source.name, note)
    return model


def _notes(model: Model, template: TemplateLike) -> Iterator[str]:
    """What a reader of results must know of the numbers that weights are in, and of how prompts reach the model."""
    size = sum({p.data_ptr(): p.nbytes for p in model.tl.parameters()}.values())
    dtypes = {p.dtype for p in model.tl.parameters() if p.is_floating_point()}
    if half := dtypes & {torch.float16, torch.bfloat16}:
        names = " and ".join(sorted(str(each).removeprefix("torch.") for each in half))
        yield f"runs in {names}: first-token KLs of some thousandths of a nat are its rounding (float32 measures less)"
    elif dtypes == {torch.float32} and size > _LARGE:
        yield f"takes {size / 1e9:.0f} GB in float32 (dtype bfloat16 takes half, and rounds)"
    asked = as_chat_format(template).template
    if model.tokenizer is not None and not asked and not has_template(model.tokenizer, template):
        yield "has no chat template: prompts reach it as raw text (template gives one; 'none' says that raw text is meant)"


def hf_from_name(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str,
    trust_remote_code: bool,
    revision: str | None = None,
) -> tuple[Any, Any, ModelSource]:
    """The Hugging Face model and tokenizer behind a name (see `load_model`), and what it resolves to.

    Raises:
        ModelError: the model cannot be found or loaded; the message says what to do.
    """
    source = resolve(name_or_path, revision)
    place = None if device == "auto" else check_device(device)
    hf, tokenizer = load_hf(
        source, dtype=torch_dtype(dtype), device=place, trust_remote_code=trust_remote_code
    )
    return hf, tokenizer, at_commit(source)


def from_hf(
    hf: Any,
    tokenizer: Any,
    *,
    source: ModelSource | None = None,
    backend: BackendChoice = DEFAULTS.backend,
    template: TemplateLike = None,
) -> Model:
    """A `Model` over a Hugging Face causal language model in memory.

    With the Bridge, the Hugging Face model is used in place (its modules get hook points); hooked copies it.

    Raises:
        ModelError: parameters that are offloaded, and so have no values in memory; weights that are quantized
            otherwise than by bitsandbytes, or not as its folders are loaded.
    """
    absent = next((name for name, p in hf.named_parameters() if p.device.type == "meta"), None)
    if absent:
        raise ModelError(
            f"{absent} is offloaded (to disk, or from a GPU to the CPU): it has no values in memory that could be "
            "hooked, edited or exported. Load the model on one device, or over GPUs that hold all of it"
        )
    check_quantization(hf.config, type(hf).__name__)
    prepare(hf, type(hf).__name__)
    if backend in ("bridge", "hooked") and packed_modules(hf):
        raise ModelError(
            f"{type(hf).__name__} is quantized: TransformerLens' own parts read weights, not codes. Use backend='hf' "
            "(which 'auto' takes)"
        )
    hf.eval().requires_grad_(False)
    built: Backend = (
        chosen_backend(hf, tokenizer)
        if backend == "auto"
        else BACKENDS[backend].from_hf(hf, tokenizer)
    )
    built.tl.requires_grad_(False)  # the Bridge splits joint weights into parameters of its own
    source = source or ModelSource(type(hf).__name__, "object")
    return Model(built, tokenizer, source, template=template)
