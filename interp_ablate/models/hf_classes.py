"""Classes of transformers: which one loads a config's decoder, and the model that it makes of a folder.

Of GPTQ, AWQ and compressed-tensors transformers is handed tensors in place of the folder; each is read and dequantized
when it asks for it. So what is measured is what an export of the same folder writes, and no format's library is needed.

Knows: classes, dtypes, and how transformers takes tensors. Does not know: what a folder must hold, the formats, or plans.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.models.quantized_modules import packed_parameters, quantization_of
from interp_ablate.storage.dequantized_checkpoint import (
    METHODS,
    PACKED,
    DequantizedCheckpoint,
    dequantized,
)
from interp_ablate.storage.safetensors_reader import Checkpoint


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a config's decoder, wrapped with other towers or not.

    An automatic one where there is one for the config; else the class that the config names, or the only class that
    writes text from such a config (the text part of some wrapped models has no automatic one).
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind, named = type(config), config.architectures or ()
    wrapping: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    takes = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None), "config_class", None)
    inner = {name for name, each in getattr(kind, "sub_configs", {}).items() if each is takes}
    # MusicGen's class for text takes the config of its inner decoder alone
    decodes = kind in MODEL_FOR_CAUSAL_LM_MAPPING and inner <= {"text_config"}
    # of a type with both classes, the one that the folder names: the other would leave the towers behind
    if kind in wrapping and (wrapping[kind].__name__ in named or not decodes):
        return transformers.AutoModelForImageTextToText
    if decodes or not kind.__module__.startswith("transformers."):
        return transformers.AutoModelForCausalLM
    own: Any = getattr(transformers, named[0], None) if named else _only_writer(kind)
    of_kind = own is not None and isinstance(config, getattr(own, "config_class", None) or ())
    return own if of_kind else transformers.AutoModelForCausalLM


def _only_writer(kind: type) -> Any:
    """The only class of transformers that writes text from a kind of config; None where there are several, or none."""
    try:
        code = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    writing = [
        each
        for each in vars(code).values()
        if getattr(each, "config_class", None) is kind
        and each.__module__ == code.__name__
        and getattr(each, "can_generate", bool)()
    ]
    return writing[0] if len(writing) == 1 else None


def without_data(hf_config: Any) -> Any:
    """The model of a config with parameters of no memory."""
    own_code = type(hf_config).__module__.startswith("transformers_modules")  # which was asked for
    with torch.device("meta"):
        return of_config(hf_config, trust_remote_code=own_code)


def of_config(hf_config: Any, **options: Any) -> Any:
    """A new model of a config, by the class that loads it; the config is left as it is."""
    kind, config = auto_class(hf_config), copy.deepcopy(hf_config)
    if hasattr(kind, "from_config"):
        return kind.from_config(config, **options)
    return kind._from_config(config, **{n: v for n, v in options.items() if n == "dtype"})


def dequantizing(config: Any) -> Any:
    """A config of transformers under which FP8 and MXFP4 weights are loaded dequantized, on every device."""
    about = getattr(config, "quantization_config", None)
    if isinstance(about, dict) and about.get("quant_method") in METHODS:
        config.quantization_config = {**about, "dequantize": True}
    return config


def widened(model: Any, dtype: Any) -> Any:
    """The model, with parameters that transformers left in a narrower dtype than it was asked for in that one.

    Some of what it dequantizes comes in bfloat16, whatever the dtype of the rest.
    """
    codes = packed_parameters(model)
    for parameter in model.parameters():
        if (
            id(parameter) not in codes
            and parameter.is_floating_point()
            and parameter.dtype.itemsize < dtype.itemsize
        ):
            parameter.data = parameter.data.to(dtype)
    return model


@dataclass(frozen=True)
class _Unread:
    """A tensor of a checkpoint that is read where it is sliced, as transformers does it; or its shape alone."""

    checkpoint: Checkpoint
    name: str
    data: bool

    def __getitem__(self, place: Any) -> Tensor:
        if self.data:
            return self.checkpoint.read(self.name)[place]
        dtype, shape = self.checkpoint.describe(self.name)
        return torch.empty(shape, dtype=dtype, device="meta")


def from_folder(name: str | Path, config: Any, *, data: bool = True, **options: Any) -> Any:
    """What `from_pretrained` of a config's class gives of a folder, or of a hub name whose codes transformers reads.

    Args:
        data: False for the shapes of packed codes alone, under `device_map="meta"`.

    Raises:
        ModelError: packed codes of a variant that is not read, or of linear maps that are stored the other way round.
    """
    if quantization_of(config) not in PACKED:
        config = dequantizing(config)
        return auto_class(config).from_pretrained(str(name), config=config, **options)
    try:
        return _handed_over(Path(name), config, data=data, **options)
    except ExportError as error:
        raise ModelError(str(error)) from error


def weights_in(folder: Path, config: Any) -> DequantizedCheckpoint:
    """The tensors of a folder of packed codes as weights, by its config of transformers.

    Older makers of GPTQ give every linear map a bias: those of zeros that the model does not have are left out.

    Raises:
        ExportError: packed codes of a variant that is not read.
    """
    about = config.quantization_config
    about = about if isinstance(about, dict) else about.to_dict()
    checkpoint = dequantized(Checkpoint.open(folder), about)
    packed = checkpoint.dequantized.keys()
    biases = {n for n in checkpoint.tensors if n.endswith(".bias") and _weight_of(n) in packed}
    if not biases:
        return checkpoint
    options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
    unknown = _taking(checkpoint, without_data(_plain(config)), data=False, **options)[1]
    surplus = sorted(biases & {*unknown["unexpected_keys"]})
    return checkpoint.with_parts(
        {_weight_of(name): name for name in surplus if not checkpoint.read(name).any()}
    )


def _weight_of(bias: str) -> str:
    return f"{bias.removesuffix('bias')}weight"


def _plain(config: Any) -> Any:
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def _taking(checkpoint: Checkpoint, empty: Any, *, data: bool, **options: Any) -> Any:
    """What `from_pretrained` of an empty model's class makes of tensors."""
    options.setdefault("dtype", empty.config.dtype or torch.float32)
    state = {name: _Unread(checkpoint, name, data) for name in checkpoint.tensors}
    return type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options)


def _handed_over(folder: Path, config: Any, *, data: bool, **options: Any) -> Any:
    from transformers import GenerationConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.utils import GENERATION_CONFIG_NAME

    checkpoint, empty = weights_in(folder, config), without_data(_plain(config))
    if any(isinstance(module, Conv1D) for module in empty.modules()):
        raise ModelError(
            f"{folder} is quantized ({checkpoint.method}), and its {config.model_type} has linear maps of [in, out], "
            "which are not read from codes: give the weights before quantization"
        )
    if data and (folder / GENERATION_CONFIG_NAME).exists():
        options["generation_config"] = GenerationConfig.from_pretrained(str(folder))
    loaded = _taking(checkpoint, empty, data=data, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(folder)
    return loaded
