"""The model that is trained, its adapter merged, certified and written.

Knows: how it is loaded onto one device and copied, the comparison of the merged model with the unmerged
adapter. Does not know: data, what an adapter is put on, or how it is trained.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import ExportError, RunError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.export.certification import PROBES, limits_for, load_in_blocks
from interp_ablate.export.checkpoint import export_into
from interp_ablate.export.checkpoint_files import write_json
from interp_ablate.export.model_card import CERTIFICATE
from interp_ablate.models.fingerprint import ModelFingerprint, rendered
from interp_ablate.models.load import from_hf, hf_from_name
from interp_ablate.models.loading import DEFAULTS as LOADING
from interp_ablate.models.model import Model
from interp_ablate.models.quantized_modules import packed_modules
from interp_ablate.models.sources import ModelSource
from interp_ablate.prompts.chat_format import TemplateLike, as_chat_format
from interp_ablate.prompts.chat_template import check_format, encode
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.provenance import MANIFEST, versions, weight_digests

Result = TypeVar("Result")
INSTALL = "pip install 'interp-ablate[train]'"


class TrainableModel:
    """A Hugging Face model that can be trained, its tokenizer and its source.

    Whoever changes the weights takes them (`take`): they are read again where they are needed next, so that one
    whole copy is in memory at a time.

    Args:
        read_again: reads the weights from the source; None where they are in memory only, and are copied.
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        source: ModelSource,
        template: TemplateLike = None,
        *,
        read_again: Callable[[], Any] | None = None,
    ) -> None:
        self._hf, self._read_again = hf, read_again
        self.tokenizer, self.source, self.chat_format = tokenizer, source, as_chat_format(template)
        check_format(tokenizer, template)
        if packed_modules(hf):
            raise RunError(
                f"{source.name} is quantized: training changes weights, and there are codes of them only. Train the "
                "model before quantization"
            )
        self.config = copy.deepcopy(hf.config)
        """The config before any training: trainers write their own settings into the model's."""
        weights = list(hf.parameters())
        self.dtype, self.device = weights[0].dtype, weights[0].device
        self.nbytes = sum(weight.nbytes for weight in weights)
        """The bytes of its weights, a tied one once."""

    @property
    def hf(self) -> Any:
        """The model, read again if it was given away."""
        if self._hf is None and self._read_again is not None:
            self._hf = self._read_again()
        return self._hf

    def release(self) -> None:
        """Give the memory back, where the weights can be read again."""
        if self._read_again is not None:
            self._hf = None
            self.__dict__.pop("_fingerprint", None)  # it holds the model too
            gc.collect()

    def take(self) -> TrainableModel:
        """The same weights, for somebody who changes them."""
        copied = copy.deepcopy(self.hf) if self._read_again is None else self.hf
        self.release()
        return TrainableModel(copied, self.tokenizer, self.source, self.chat_format)

    @cached_property
    def _fingerprint(self) -> ModelFingerprint:
        return ModelFingerprint(self.hf)

    @property
    def fingerprint(self) -> str:
        """sha256 of weights, config, attention, tokenizer and template; weights are hashed again when changed."""
        tokens = rendered(partial(encode, tokenizer=self.tokenizer, template=self.chat_format))
        return self._fingerprint.of((self.hf.config,), self.tokenizer, self.chat_format, tokens)

    @cached_property
    def model(self) -> Model:
        """The same weights with hook points, in place: what has been measured so is not trained any more."""
        return from_hf(self.hf, self.tokenizer, source=self.source, template=self.chat_format)

    def measured(self, measure: Callable[[Model], Result]) -> Result:
        """What a function finds on the model with hook points, which is gone from memory afterwards."""
        try:
            return measure(self.take().model)
        finally:
            gc.collect()  # hook points hold each other


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = LOADING.dtype,
    device: str = LOADING.device,
    template: TemplateLike = LOADING.template,
    trust_remote_code: bool = LOADING.trust_remote_code,
    revision: str | None = LOADING.revision,
) -> TrainableModel:
    """Load a model to train, on one device.

    Raises:
        ModelError: as `load_model`.
        RunError: device "auto": layers over several GPUs are not trained here.
    """
    if device == "auto":
        raise RunError(
            "training runs on one device: give --device cpu or cuda. For several GPUs run the "
            "axolotl.yaml that `interp-ablate heal` writes"
        )
    options: Any = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    options["revision"] = revision
    hf, tokenizer, source = hf_from_name(name, **options)
    return TrainableModel(
        hf, tokenizer, source, template, read_again=lambda: hf_from_name(name, **options)[0]
    )


def require_extra() -> tuple[Any, Any]:
    """Import the packages `peft` and `trl`.

    Raises:
        RunError: one of them is missing; how to install it.
    """
    # their version checks and first imports ask the hub for nothing, their trainers would
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import peft
        import trl
    except ImportError as error:
        raise RunError(f"training needs TRL and PEFT ({error}): {INSTALL}") from error
    return peft, trl


ADAPTER = "adapter"  # the folder of a training's adapter, in its output
PACKAGES = ("trl", "peft", "datasets", "accelerate")


@torch.no_grad()
def logits_of(hf: Any, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, "pos d_vocab"]]:
    """Logits of each row at every position, a row at a time, in plain transformers."""
    device = next(hf.parameters()).device
    hf.eval()
    return [
        hf(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows
    ]


@dataclass(frozen=True, eq=False)
class Trained:
    """A merged model, and what its certificate needs."""

    base: TrainableModel
    """The merged model in plain transformers."""
    adapter: dict[str, Tensor] = field(repr=False)
    config: Any = field(repr=False)
    """The adapter's configuration."""
    probes: list[list[int]] = field(repr=False)
    """Token rows on which logits are compared."""
    unmerged: list[Tensor] = field(repr=False)
    """The unmerged adapter's logits on the probes."""
    before: list[Tensor] = field(repr=False)
    """Logits on the probes without the adapter."""


def merge(base: TrainableModel, peft_model: Any, *, probes: Sequence[str] = PROBES) -> Trained:
    """Add the adapter to the weights, in place.

    Raises:
        RunError: the merged weights are not finite.
    """
    from peft import get_peft_model_state_dict

    rows = [encode(Prompt(text), base.tokenizer, template=base.chat_format) for text in probes]
    unmerged = logits_of(peft_model, rows)
    with peft_model.disable_adapter():
        before = logits_of(peft_model, rows)
    adapter = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    config = peft_model.peft_config["default"]
    try:
        hf = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT found NaN
        raise RunError(
            f"the adapter cannot be merged: {error}. Train with a smaller rate"
        ) from error
    vars(hf).pop("forward", None)  # TRL's own forward, over the class's
    hf.config = copy.deepcopy(base.config)
    hf.eval().requires_grad_(False)
    return Trained(
        TrainableModel(hf, base.tokenizer, base.source, base.chat_format),
        stored,
        config,
        rows,
        unmerged,
        before,
    )


def certify_merged(trained: Trained, folder: str | Path) -> dict[str, Any]:
    """Reload a folder in plain transformers, with no option, and compare it with the unmerged adapter.

    Returns the largest logit difference and KL at any position of the probes, the limits, which follow
    the dtype and the logits' size, and whether both hold; `tells_from_the_base` is false where the adapter
    moves logits so little that the base would pass as well.

    Raises:
        ExportError: transformers cannot load the folder.
    """
    got = logits_of(load_in_blocks(folder, trained.base.device), trained.probes)
    gap = kl = 0.0
    for want, found in zip(trained.unmerged, got, strict=True):
        gap = max(gap, float((want - found).abs().max()))
        pair = (want.cpu().double().log_softmax(-1), found.cpu().double().log_softmax(-1))
        kl = max(kl, float(kl_divergence(*pair).max()))
    dtype = str(trained.base.dtype).removeprefix("torch.")
    largest = max(float(logits.abs().max()) for logits in trained.unmerged)
    effect = max(float((a - b).abs().max()) for a, b in zip(trained.unmerged, trained.before))
    numbers = {"max_abs_logit_difference": gap, "kl": kl}
    limits = {name: limits_for(dtype, largest)[name] for name in numbers}
    failed = [name for name in limits if not numbers[name] <= limits[name]]
    return {
        "compared": "merged checkpoint, reloaded, with the unmerged adapter",
        **numbers,
        "max_abs_logit_effect_of_adapter": effect,
        "tells_from_the_base": effect > 2 * limits["max_abs_logit_difference"],
        "limits": limits,
        "dtype": dtype,
        "prompts": len(got),
        "failed": failed,
        "passed": not failed,
    }


def write_adapter(trained: Trained, folder: Path) -> None:
    """The adapter as PEFT loads it; a base that only this machine has is not named."""
    from safetensors.torch import save_file

    folder.mkdir()
    source = trained.base.source
    trained.config.base_model_name_or_path = (
        source.name if source.kind == "hub" else source.base_model
    )
    trained.config.inference_mode = True
    trained.config.save_pretrained(folder)
    save_file(trained.adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)


def write_trained(trained: Trained, place: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """The merged checkpoint and `adapter/` into an empty folder, certified twice; returns the certificate.

    The checkpoint is held against the model in memory (as every export) and, under "adapter", against
    the unmerged adapter. `what` goes into the manifest as "trained".

    Raises:
        ExportError: one of the two comparisons failed, or the place cannot be written.
    """
    certificate = export_into(trained.base.model, None, place)
    certificate["adapter"] = certify_merged(trained, place)
    if not certificate["adapter"]["passed"]:
        raise ExportError(
            f"the merged checkpoint is not the trained adapter: {certificate['adapter']}. Nothing was "
            "left on disk; merge in --dtype float32"
        )
    write_adapter(trained, place / ADAPTER)
    manifest = incoming_object(place / MANIFEST)
    manifest["trained"] = dict(what)
    manifest["versions"] = versions(*PACKAGES)
    certificate["files"] = weight_digests(place)
    write_json(place / MANIFEST, manifest)
    write_json(place / CERTIFICATE, certificate)
    return certificate
