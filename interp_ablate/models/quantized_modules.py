"""Modules of bitsandbytes, whose weights are packed codes: which they are, and the weights that the codes stand for.

A model with such modules runs as it is. What is measured of its weights is measured on the numbers that
bitsandbytes itself makes of the codes, in float32, one block at a time.

Knows: bitsandbytes' two kinds of linear modules, configs of quantization. Does not know: sites, plans, or how a
folder of codes is read as a checkpoint.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.errors import ExportError, ModelError
from interp_ablate.storage.dequantized_checkpoint import (
    BITSANDBYTES,
    EXPORT_INSTEAD,
    METHODS,
    PACKED,
    method_of,
)


def quantization_of(config: Any) -> str | None:
    """The method by which a config of transformers says that its weights are quantized; None if it does not."""
    about = getattr(config, "quantization_config", None)
    if not about:
        return None
    return method_of(about if isinstance(about, dict) else about.to_dict())


def check_quantization(config: Any, name: str) -> None:
    """Refuse weights that are held as codes of which nothing here can be measured, and a missing library.

    Raises:
        ModelError: a method that is neither dequantized on loading (FP8, MXFP4) nor bitsandbytes'.
    """
    method = quantization_of(config)
    if method is None or method in METHODS:
        return
    if method != BITSANDBYTES:
        raise ModelError(
            f"{name} is quantized ({method}): what its packed codes write to the residual stream cannot be measured "
            "here. Load the weights before quantization; where they do not fit, quantize them with bitsandbytes (its 4 "
            "and 8 bit are measured, pip install 'interp-ablate[quantized]'). Folders of FP8 in blocks, MXFP4, "
            f"{', '.join(PACKED)} are read from their name or path"
        )
    if importlib.util.find_spec(BITSANDBYTES) is None:
        raise ModelError(
            f"{name} is quantized by {BITSANDBYTES}, which is not installed: pip install 'interp-ablate[quantized]'"
        )


def is_packed(module: nn.Module) -> bool:
    """True for a module whose weight is codes of bitsandbytes."""
    kinds = type(module).__mro__
    return isinstance(module, nn.Linear) and any(
        kind.__module__.startswith(f"{BITSANDBYTES}.") for kind in kinds
    )


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a model whose weights are codes, by name."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def packed_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that are codes: of whatever dtype, their numbers are no weights."""
    return {id(module.weight) for module in packed_modules(model).values()}


def prepare(model: nn.Module, name: str) -> None:
    """Have modules of 4 bits keep their layout, and those of 8 bits say once that they round to float16.

    On processors that multiply bfloat16, bitsandbytes packs weights anew in the first pass, rounds their scales
    and computes in bfloat16 whatever was asked for. The results would differ from machine to machine.

    Raises:
        ModelError: a model whose weights a pass has packed anew already.
    """
    packed = packed_modules(model)
    if packed:
        # one line a call of a module, else
        logging.getLogger(f"{BITSANDBYTES}.autograd._functions").addFilter(_not_of_casts)
    for path, module in packed.items():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: a pass of bitsandbytes on this processor has packed {path}.weight anew, with rounded scales: "
                "hand the model over before its first pass, or give its folder to load_model"
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _not_of_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def plain_weight(module: Any) -> Float[Tensor, "out in"]:
    """A linear module's weight: its own, or the float32 numbers that its codes stand for."""
    weight: Any = module.weight
    if not is_packed(module):
        return weight.detach()
    import bitsandbytes.functional as functional

    if hasattr(weight, "SCB"):  # 8 bits; the first pass moves the scales
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales).float()
    state = weight.quant_state
    return functional.dequantize_4bit(weight.data, state).float().reshape(state.shape)


def scales(module: Any) -> Iterator[tuple[str, Tensor]]:
    """What the codes of a module are multiplied by: tensors that are neither parameters nor buffers of it."""
    weight: Any = module.weight
    if hasattr(weight, "SCB"):
        yield "SCB", weight.SCB if weight.SCB is not None else module.state.SCB
        return
    state = weight.quant_state
    yield "absmax", state.absmax
    yield "code", state.code
    if state.nested:
        yield "nested_absmax", state.state2.absmax
        yield "offset", state.offset


def with_plain_weights(block: nn.Module) -> nn.Module:
    """A copy of a module in which those with codes have plain float32 weights."""
    replaced: dict[int, Any] = {}
    for module in packed_modules(block).values():
        weight = plain_weight(module)
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = copy.deepcopy(module.bias)  # type: ignore[assignment]
        replaced[id(module)] = plain.train(module.training)
    return copy.deepcopy(block, replaced)


def refuse_export(model: nn.Module) -> None:
    """Refuse to write a model of codes.

    Raises:
        ExportError: with the command that exports from the unquantized folder.
    """
    if name := next(iter(packed_modules(model)), None):
        raise ExportError(
            f"the model is quantized ({name}.weight holds codes of bitsandbytes), and an edit of its codes would be "
            f"rounded away. {EXPORT_INSTEAD}"
        )
