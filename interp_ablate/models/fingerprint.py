"""Fingerprints: one hash of all that decides what a model computes and how prompts reach it.

Knows: tensors and cheap marks of their changes, configs, tokenizers. Does not know: plans, hooks, or what is kept under a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_ablate.errors import PromptError
from interp_ablate.models.quantized_modules import packed_modules, scales
from interp_ablate.prompts.chat_format import ChatFormat
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.storage.incoming_files import parse_json

# Fields of configs that say where a model came from or lies, or that its tensors say themselves.
_NOT_COMPUTED = {
    "_name_or_path",
    "architectures",
    "device",
    "dtype",
    "model_name",
    "n_devices",
    "tokenizer_name",
    "torch_dtype",
    "transformers_version",
}
# Prompts whose tokens are a part of the fingerprint: they show what templates, their variables and
# special tokens come to.
PROMPTS = (Prompt("Name a colour."), Prompt("Why?", system="Be brief."))


class ModelFingerprint:
    """The fingerprint of one module in memory; its tensors are hashed once, and again when one has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._digest: tuple[Hashable, str] | None = None
        self._tokenizer: tuple[Hashable, str] = (None, "")

    @property
    def weights_version(self) -> Hashable:
        """Changes when a tensor is written to or replaced; read in milliseconds.

        It holds for each tensor its address, torch's count of writes to it, and a few values from all over it:
        writes through `.data` are not counted.
        """
        return tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version, _bytes(_sample(t)))
            for _, t in self._tensors()
        )

    @property
    def weights(self) -> str:
        """sha256 of every tensor's name, shape, dtype and bytes."""
        version = self.weights_version
        if self._digest is None or self._digest[0] != version:
            digest, contents = hashlib.sha256(), {}
            for name, tensor in self._tensors():
                if id(tensor) not in contents:  # tied tensors have two names
                    contents[id(tensor)] = hashlib.sha256(_bytes(tensor)).hexdigest()
                about = f"{name}{tuple(tensor.shape)}{tensor.dtype}{contents[id(tensor)]}"
                digest.update(about.encode())
            self._digest = version, digest.hexdigest()
        return self._digest[1]

    def of(
        self, configs: Iterable[Any], tokenizer: Any, chat_format: ChatFormat, *others: object
    ) -> str:
        """The hash of weights, modules, configs, tokenizer, chat template and others (as JSON).

        Args:
            others: the tokens of `PROMPTS`, and all else by which outputs differ.
        """
        parts = [
            self.weights,
            self._modules(),
            self._module.training,
            [_fields(config) for config in configs],
            self._of_tokenizer(tokenizer),
            (chat_format.to_dict(), getattr(tokenizer, "chat_template", None)),
            others,
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _modules(self) -> list[tuple[str, str, str]]:
        """Names, kinds and plain values (eps, sizes) of modules; not those that a Bridge puts around them."""
        return [
            (_plain(name), type(module).__qualname__, module.extra_repr())
            for name, module in self._module.named_modules()
            if not type(module).__module__.startswith("transformer_lens")
        ]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, scales of codes and stored buffers by name (other buffers, such as rotary tables, may change in a pass)."""
        named: dict[str, Tensor] = dict(self._module.named_parameters(remove_duplicate=False))
        named |= nn.Module.named_parameters(self._module, remove_duplicate=False)
        for place, module in self._module.named_modules():
            named |= {
                f"{place}.{name}": buffer
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in module._non_persistent_buffers_set
            }
        for place, module in packed_modules(self._module).items():
            named |= {f"{place}.weight.{name}": tensor for name, tensor in scales(module)}
        yield from {_plain(name): tensor for name, tensor in named.items()}.items()

    def _of_tokenizer(self, tokenizer: Any) -> str:
        key = (id(tokenizer), len(tokenizer) if tokenizer is not None else 0)
        if self._tokenizer[0] != key:
            content: Any = None
            if inner := getattr(tokenizer, "backend_tokenizer", None):
                content = parse_json(inner.to_str(), unique=False)
                content |= {"truncation": None, "padding": None}  # left behind by the last call
            elif tokenizer is not None:
                content = tokenizer.get_vocab()
            text = json.dumps([type(tokenizer).__name__, content], sort_keys=True)
            self._tokenizer = key, hashlib.sha256(text.encode()).hexdigest()
        return self._tokenizer[1]


def rendered(encode: Any) -> list[Sequence[int] | str]:
    """The tokens of `PROMPTS` by a function that encodes one, or why there are none."""
    tokens: list[Sequence[int] | str] = []
    for prompt in PROMPTS:
        try:
            tokens.append(encode(prompt))
        except PromptError as error:
            tokens.append(str(error))
    return tokens


def _plain(name: str) -> str:
    """A module's name without what a Bridge inserts."""
    return name.replace("._original_component", "")


def _fields(config: Any) -> Any:
    """A config's plain data without what does not change any output."""
    if config is None:
        return None
    fields = {**config.to_dict(), "attention": getattr(config, "_attn_implementation", None)}
    return _computed(fields)


def _computed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {str(key): _computed(v) for key, v in value.items() if key not in _NOT_COMPUTED}


def _sample(tensor: Tensor) -> Tensor:
    if not tensor.numel() or not tensor.ndim:
        return tensor
    rows = (
        tensor.detach()[:: max(len(tensor) // 4, 1)].flatten(1) if tensor.ndim > 1 else tensor[None]
    )
    return rows[:, :: max(rows.shape[1] // 8, 1)]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
