"""The sizes of a model, read from its config.

Knows: layers, widths, parameters, and what a config does not say. Does not know: what a stage does with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.sources import read_hf_config, resolve

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ConfigTraits:
    """The traits of a model type that its config does not say in numbers.

    A bias is always there, never, or where the named field of the config is true.
    """

    gated: bool = True
    """True for an MLP of three matrices."""
    norms: int = 2
    """Norms of a block over d_model."""
    norm_bias: bool = False
    head_norm: Literal["none", "head", "whole"] = "none"
    """Norms of queries and keys: none, one a head, or one over all heads."""
    wide_norm: bool = True
    """True where a norm keeps a float32 copy of its input for the gradient."""
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    positions: str | None = None
    """Field of the config with the number of learned positions."""
    mlp_width: str = "intermediate_size"
    """Field of the config with the width of the MLP."""
    saved_mlp: int = 3
    """Tensors of d_mlp numbers that a gradient keeps for each token of a block."""


_BIASED = ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias")
# model_type of the Hugging Face config -> its traits; a missing one raises.
TRAITS: dict[str, ConfigTraits] = {
    "llama": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "smollm3": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": ConfigTraits(),
    "phi3": ConfigTraits(),
    "qwen2": ConfigTraits(qkv_bias=True),
    "qwen3": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="head"),
    "gemma": _BIASED,
    "gemma2": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", norms=4),
    "gemma3_text": ConfigTraits(
        qkv_bias="attention_bias", out_bias="attention_bias", norms=4, head_norm="head"
    ),
    "olmo2": ConfigTraits(qkv_bias="attention_bias", out_bias="attention_bias", head_norm="whole"),
    "gpt2": ConfigTraits(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        positions="max_position_embeddings", mlp_width="n_inner", saved_mlp=4,
    ),
    "gpt_neox": ConfigTraits(
        gated=False, norm_bias=True, wide_norm=False, qkv_bias="attention_bias",
        out_bias="attention_bias", mlp_bias=True, saved_mlp=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a decoder that everything else follows from."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool
    n_positions: int = 0
    biases: int = 0
    """Bias parameters of one block."""
    traits: ConfigTraits = ConfigTraits()

    @property
    def queries(self) -> int:
        """Width of a token's queries in one layer."""
        return self.n_heads * self.d_head

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values, in one layer."""
        return self.n_kv_heads * self.d_head

    @property
    def block_matrices(self) -> int:
        """Weights of a block that multiply each token: attention's four and the MLP's two or three."""
        mlp = (3 if self.traits.gated else 2) * self.d_mlp
        return self.d_model * (2 * self.queries + 2 * self.keys + mlp)

    @property
    def unembedding(self) -> int:
        """Weights of the unembedding."""
        return self.d_model * self.d_vocab

    @property
    def parameters(self) -> int:
        """Every parameter, counted once: a tied unembedding is the embedding."""
        norm = self.d_model * (2 if self.traits.norm_bias else 1)
        block = self.block_matrices + self.biases + self.traits.norms * norm + self._head_norms
        embeddings = (1 if self.tied else 2) * self.unembedding + self.n_positions * self.d_model
        return self.n_layers * block + norm + embeddings

    @property
    def _head_norms(self) -> int:
        widths = {"none": 0, "head": 2 * self.d_head, "whole": self.queries + self.keys}
        return widths[self.traits.head_norm]

    @property
    def parameters_a_step(self) -> int:
        """Parameters that a forward call with logits reads; of an untied embedding it reads only some rows."""
        return self.parameters - (0 if self.tied else self.unembedding)

    @property
    def n_residual_sites(self) -> int:
        """Number of sites that `collect` reads by default: resid_pre, resid_mid and resid_post of every layer."""
        return 3 * self.n_layers


def dimensions_of(hf_config: Any) -> Dimensions:
    """Read from a Hugging Face config.

    Raises:
        InterpAblateError: a model type without an entry in `TRAITS` (mixtures of experts among them).
    """
    traits = TRAITS.get(hf_config.model_type)
    if traits is None:
        raise InterpAblateError(
            f"no arithmetic for model type {hf_config.model_type!r}: there is for "
            f"{', '.join(TRAITS)}. For a decoder of the same shape, make Dimensions(...) by hand"
        )
    d_model, heads = hf_config.hidden_size, hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    d_head = getattr(hf_config, "head_dim", None) or d_model // heads
    d_mlp = getattr(hf_config, traits.mlp_width) or 4 * d_model

    def has(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(getattr(hf_config, bias))

    biases = has(traits.qkv_bias) * (heads + 2 * kv_heads) * d_head + has(traits.out_bias) * d_model
    biases += has(traits.mlp_bias) * ((2 if traits.gated else 1) * d_mlp + d_model)
    return Dimensions(
        n_layers=hf_config.num_hidden_layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        n_positions=getattr(hf_config, traits.positions) if traits.positions else 0,
        biases=biases,
        traits=traits,
    )


def config_at(name: str | Path) -> Any:
    """The config of a folder, of a config.json, or of whatever `load_model` takes; no weights, no code.

    Raises:
        ModelError: none of these, or one that transformers does not understand.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.name == "config.json":
        return read_hf_config(path if path.is_dir() else path.parent)
    source = resolve(name)
    file = Path(source.path or "")
    gguf = {"gguf_file": file.name} if source.kind == "gguf" else {}
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file.parent) if gguf else source.name, **gguf)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"transformers cannot read the config of {source.name!r}: {reason[0]} Give a folder with "
            "config.json; without a network hub names do not work"
        ) from error
