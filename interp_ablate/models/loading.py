"""How a model is loaded: the options that `load_model`, every command and every run share.

Knows: the options, their defaults and help. Does not know: how a model is loaded. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from interp_ablate.settings import setting

BackendName = Literal["bridge", "hooked", "hf"]
BackendChoice = Literal["auto", "bridge", "hooked", "hf"]


@dataclass(frozen=True)
class HFLoadingOptions:
    """How a Hugging Face model is loaded, beside its name."""

    dtype: str = setting("float32", "of the weights: float32, bfloat16, float16, float64")
    device: str = setting("cpu", "cpu, cuda, mps, or auto (layers spread over all GPUs)")
    template: str | None = setting(
        None, "Jinja chat template, the name of one of the model's, or 'none' (raw text)"
    )
    trust_remote_code: bool = setting(False, "run Python code that a model folder brings")

    @property
    def loading(self) -> dict[str, Any]:
        """The options alone, as keyword arguments of the loader."""
        names = [f.name for f in fields(LoadingOptions)]
        return {name: getattr(self, name) for name in names if name in vars(self)}


@dataclass(frozen=True)
class LoadingOptions(HFLoadingOptions):
    """How a model with hook points is loaded, beside its name."""

    backend: BackendChoice = setting(
        "auto",
        "what runs the model: TransformerLens' bridge or hooked, plain transformers (hf), or auto",
        choices=get_args(BackendChoice),
    )


DEFAULTS = LoadingOptions()
