"""A model's sizes, measured: its class is built from a config without data, and its decoder is run on tokens of no value.

Three passes of different lengths tell what is for each token, and what for each pair.

Knows: which parameters are experts, towers, ends. Does not know: stages, time or files.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp_ablate.budget.counted_pass import ATTENTION, CountedPass, counted_attention
from interp_ablate.budget.experts import Experts, experts_of
from interp_ablate.errors import InterpAblateError
from interp_ablate.models.architectures import text_config
from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.models.hf_classes import without_data
from interp_ablate.training.lora_targets import linear_modules

# Tokens of the first pass; where recurrences are padded to chunks, a multiple of the second number.
_STEP, _CHUNK = 8, 64
_CHUNKS = ("chunk_size", "mamba_chunk_size", "mamba_chunk_scan_chunk_size")
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Layer:
    """What one layer keeps in a cache and does for each pair of tokens."""

    token: int = 0
    """Bytes of keys and values that it keeps of a token."""
    window: int | None = None
    """Tokens that it keeps at most, all together; None: every one."""
    state: int = 0
    """Bytes that it keeps of a row, however long: of convolutions and recurrences."""
    pairs: int = 0
    """Operations of attention for each query and key."""
    repeated: int = 0
    """Bytes of a token's keys and values, repeated to every query head."""

    def kept(self, tokens: int) -> int:
        """Tokens that are in its cache after so many."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a decoder that everything else follows from (`dimensions_of`)."""

    n_layers: int
    d_model: int
    d_vocab: int
    unembedding: int
    """Weights of the unembedding."""
    tied: bool
    dtype_bytes: int
    """Of a number of its weights."""
    parameters: int
    """Every parameter, as torch counts them: a tied unembedding is the embedding."""
    towers: int
    """Those of them that text does not pass: vision, audio, what projects them."""
    experts: int
    """Those of them in experts that a router chooses from."""
    idle: float
    """Those of the experts' that one token does not take."""
    skipped: bool
    """True where experts that no token takes are not run (Llama 4's are, in transformers)."""
    token_flops: int
    """Operations for a token in all blocks, attention's pairs and the unembedding left out."""
    logit_flops: int
    """Operations for the logits of a token: the unembedding, and what some models have before it."""
    layers: tuple[Layer, ...]
    saved: int
    """Bytes that a gradient keeps of a token in all blocks, without erasures."""
    saved_pairs: int
    """The same for each pair of tokens, where attention keeps its scores."""
    d_inner: int
    """The widest input of what writes to the stream, for one token."""
    largest: int
    """Parameters of the largest tensor that writes to the stream."""
    block: int
    """Parameters of the largest block."""
    linear: tuple[int, int]
    """All linear layers and experts: their inputs and outputs added up, and the inputs alone."""
    readers: tuple[int, int, int]
    """The same of those that read the stream; and of their inputs, those that another reader has too."""

    @property
    def active(self) -> int:
        """Parameters that a token of text uses: without towers, and without the experts that it does not take."""
        return self.parameters - self.towers - round(self.idle)

    def parameters_a_step(self, tokens: int, *, logits: bool = True) -> int:
        """Parameters that a forward call over so many tokens reads; of an untied embedding it reads only some rows.

        Of experts, as many as these tokens take if the router treats all alike.
        """
        share = self.idle / self.experts if self.experts and self.skipped else 0
        missed = self.experts * share**tokens
        embedding = 0 if self.tied else self.unembedding
        read = self.parameters - self.towers - round(missed) - embedding
        return read if logits else read - self.unembedding

    def cache_bytes(self, tokens: int, places: int | None = None) -> int:
        """Bytes of a row's cache: layers without a window have room for `places` tokens, or for all that there are."""
        places = tokens if places is None else places
        return sum(
            layer.state + layer.token * (places if layer.window is None else layer.kept(tokens))
            for layer in self.layers
        )

    def pair_flops(self, past: int, new: int) -> int:
        """Operations of attention for a row's `new` tokens after `past` ones, in all layers.

        For every pair of a new token and a token in the cache, as masked kernels compute them, not for half of them.
        """
        return sum(layer.pairs * new * (layer.kept(past) + new) for layer in self.layers)


def dimensions_of(hf_config: Any, dtype_bytes: int = 2) -> Dimensions:
    """Measure a model of which the config alone is there; takes seconds, and no memory for weights.

    Args:
        hf_config: a Hugging Face config (`read_hf_config`).
        dtype_bytes: of a number of the weights: 2 for bfloat16, 4 for float32.

    Raises:
        InterpAblateError: transformers cannot build it, or its pass depends on values.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, counted_attention)
    faults = []
    for attention in (ATTENTION, "eager"):  # the second for classes with attentions of their own
        try:
            model = _model(hf_config, _DTYPES[dtype_bytes], attention)
            decoder = _decoder(model)
            step = _step(decoder)
            passes = [CountedPass(decoder, n * step) for n in (1, 2, 3)]
            return _dimensions(model, decoder, passes, step, dtype_bytes)
        except Exception as error:  # transformers' own code, under a config that nobody has loaded
            faults.append(_fault(error))
    raise InterpAblateError(
        f"no arithmetic for this {hf_config.model_type} model: its decoder cannot be counted without data "
        f"({'; '.join(dict.fromkeys(faults))}). Load it and measure what it takes"
    )


def _fault(error: Exception) -> str:
    """What stopped a pass, in words, and the line of the model's code where it did."""
    words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    frames = reversed(traceback.extract_tb(error.__traceback__))
    at = next((f for f in frames if Path(f.filename).name.startswith("modeling_")), None)
    return f"{words}, at `{at.line}` in {Path(at.filename).name}" if at else words


def _model(hf_config: Any, dtype: torch.dtype, attention: str) -> Any:
    config = copy.deepcopy(hf_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # such weights are loaded dequantized
    config._attn_implementation = "eager"  # the one that every class has where it is built
    model = without_data(config).to("meta", dtype).eval().requires_grad_(False)
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = attention
    return model


def _decoder(model: Any) -> Any:
    """The part that text passes, without the unembedding."""
    head = unembedding_of(model)
    named = model.get_decoder() if hasattr(model, "get_decoder") else model
    inner = [getattr(named, name, named) for name in ("model", "base_model")]
    parts = [named, *inner, model.base_model]
    found = next((p for p in parts if hasattr(p, "config") and head not in set(p.modules())), None)
    if found is None:
        raise InterpAblateError("its unembedding is a part of what text passes")
    vars(found.config)["pad_token_id"] = None  # else tokens are searched for it
    return found


def _step(decoder: Any) -> int:
    """Tokens of a pass that no padding to chunks makes longer; few, as some recurrences go token by token."""
    if "chunk_size" not in inspect.getsource(sys.modules[type(decoder).__module__]):
        return _STEP
    return math.lcm(_CHUNK, *(getattr(decoder.config, name, None) or 1 for name in _CHUNKS))


def _fit(values: list[int], step: int) -> tuple[int, int]:
    """a and b of c + a n + b n * n, from its values at one, two and three steps."""
    one, two, three = values
    b = (three - 2 * two + one) // (2 * step * step)
    return (two - one) // step - 3 * step * b, b


def _layers(decoder: Any, passes: list[CountedPass], step: int, pairs: int) -> tuple[Layer, ...]:
    """The layers of the caches; what of attention's operations none of them has is in one before them."""
    attention: Counter[int] = Counter()
    repeated: Counter[int] = Counter()
    for module in decoder.modules():
        counted = module.__dict__.pop("counted", None)
        if counted is not None:
            index = getattr(module, "layer_idx", None) or 0
            attention[index] += counted[0]
            repeated[index] += counted[1]
    layers = []
    first = passes[0]
    for index, parts in enumerate(zip(*(each.caches for each in passes)), -1):
        window = parts[0]["window"] - 1 if parts[0]["window"] else None
        token = state = 0
        for name, tensor in parts[0]["tensors"].items():
            one, two, three = (part["tensors"][name].nbytes for part in parts)
            if window is not None and name in (".keys", ".values"):
                token += one // tensor.shape[-2]
            elif three - two == two - one and (one == two > 0 or first.tokens in tensor.shape):
                token += (two - one) // step
                state += one - (two - one)
            else:
                raise InterpAblateError(f"{name[1:]} of layer {index} does not grow by the token")
        layers.append(Layer(token, window, state, attention[index], repeated[index]))
    rest = pairs - sum(layer.pairs for layer in layers)
    layers.insert(0, Layer(pairs=max(rest, 0)))
    return tuple(layer for layer in layers if layer != Layer())


def _linear(model: Any, decoder: Any) -> list[tuple[str, nn.Module]]:
    """The linear layers that a LoRA would adapt, by their names in the decoder."""
    adapted = {id(model.get_submodule(name)) for name in linear_modules(model)}
    return [(name, m) for name, m in decoder.named_modules() if id(m) in adapted]


def _widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; transformers' Conv1D has its axes the other way round."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _logits(model: Any, one: CountedPass) -> tuple[int, dict[int, int]]:
    """Operations for a token's logits, and by id the sizes of the parameters outside the decoder that they take."""
    head = unembedding_of(model)
    own = list(head.parameters()) if head is not None else []
    flops = 2 * sum(p.numel() for p in own if p.ndim == 2)
    try:
        whole = CountedPass(model, one.tokens)
    except Exception:  # a model that does not run on tokens alone
        return flops, {id(p): p.numel() for p in own}
    if whole.flops - one.flops < one.tokens * flops:
        raise InterpAblateError(
            "its decoder alone computes more than the whole model with its unembedding"
        )
    own += [p for p in model.parameters() if id(p) in whole.used]
    return (whole.flops - one.flops) // one.tokens, {id(p): p.numel() for p in own}


def _dimensions(
    model: Any, decoder: Any, passes: list[CountedPass], step: int, dtype_bytes: int
) -> Dimensions:
    config, embedding = text_config(model.config), decoder.get_input_embeddings()
    d_model, head = config.hidden_size, unembedding_of(model)
    inside = {id(p): p.numel() for p in decoder.parameters()}
    logit_flops, used = _logits(model, passes[0])
    inside |= used
    experts = experts_of(decoder, passes[0].experts)
    flops, pairs = _fit([each.flops for each in passes], step)
    if passes[0].flops > 1.1 * step * (flops + step * pairs):
        raise InterpAblateError("it computes more than what its tokens need")
    saved, saved_pairs = _fit([each.saved for each in passes], step)
    total, n_layers = sum(p.numel() for p in model.parameters()), config.num_hidden_layers
    routed = [each for each in experts if each.chosen < each.number]
    return Dimensions(
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.vocab_size,
        unembedding=d_model * config.vocab_size if head is None else head.weight.numel(),
        tied=head is not None and head.weight is embedding.weight,
        dtype_bytes=dtype_bytes,
        parameters=total,
        towers=total - sum(inside.values()),
        experts=sum(each.parameters for each in routed),
        idle=sum(each.parameters * (1 - each.chosen / each.number) for each in routed),
        skipped=all(each.run < each.number for each in routed),
        logit_flops=logit_flops,
        token_flops=flops + sum(each.flops for each in experts),
        layers=_layers(decoder, passes, step, pairs),
        saved=saved + sum(each.saved for each in experts) * dtype_bytes,
        saved_pairs=saved_pairs,
        **_tensors_of(model, decoder, passes[0].read, experts, n_layers),
    )


def _tensors_of(
    model: Any, decoder: Any, reads: Mapping[str, int], experts: list[Experts], n_layers: int
) -> dict[str, Any]:
    """Sizes of single tensors and blocks, and the widths that an adapter has."""
    d_model = text_config(model.config).hidden_size
    linear = [(*_widths(m), reads.get(name)) for name, m in _linear(model, decoder)]
    shared = Counter(key for *_, key in linear if key is not None)
    read = [(n_in, n_out) for n_in, n_out, key in linear if key is not None]
    write = [n_in for n_in, n_out, key in linear if n_out == d_model and key is None]
    stacked = [each.number * sum(shape) for each in experts for shape in each.matrices]
    of_readers = [each.number * sum(shape) for each in experts for shape in each.matrices[:-1]]
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    blocks = [sum(p.numel() for p in block.parameters()) for each in lists for block in each]
    written = [math.prod((each.number, *each.matrices[-1])) for each in experts]
    return {
        "d_inner": max([*write, *(each.inner for each in experts)], default=d_model),
        "largest": max([d_model * max(write, default=1), *written]),
        "block": max(blocks, default=sum(p.numel() for p in decoder.parameters())),
        "linear": (
            sum(n_in + n_out for n_in, n_out, _ in linear) + sum(stacked),
            sum(n_in for n_in, *_ in linear),
        ),
        "readers": (
            sum(map(sum, read)) + sum(of_readers),
            sum(n_in for n_in, _ in read),
            d_model * (sum(shared.values()) - len(shared)),
        ),
    }
