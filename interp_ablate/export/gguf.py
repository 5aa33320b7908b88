"""A Llama-style Hugging Face folder as one GGUF file that llama.cpp runs, written tensor by tensor.

Knows: how both lay out weights, rotary scaling and the config's numbers. Does not know: plans (the folder is edited
already), or tokenizers' insides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.errors import ExportError
from interp_ablate.export.gguf_tokenizer import add_tokenizer
from interp_ablate.jobs.bars import waiting
from interp_ablate.models.model_files import check_folder, read_config
from interp_ablate.models.sources import read_hf_config
from interp_ablate.storage.atomic_files import atomic_path
from interp_ablate.storage.output_folder import check_output_file
from interp_ablate.storage.safetensors_header import TensorInfo
from interp_ablate.storage.safetensors_reader import Checkpoint, TensorSource

if TYPE_CHECKING:
    from gguf import GGUFWriter

DType = Literal["f16", "f32"]
# name -> (torch dtype of matrices, GGUF file type)
_DTYPES: dict[str, tuple[torch.dtype, int]] = {"f32": (torch.float32, 0), "f16": (torch.float16, 1)}


@dataclass(frozen=True)
class LlamaCppArchitecture:
    """llama.cpp's architecture for a model type."""

    name: str
    permuted: bool
    """True where it rotates neighbouring pairs of a head's entries (transformers rotates halves)."""
    biases: tuple[str, ...]
    """Modules of a block that may have a bias."""
    head_norms: bool = False
    """True where queries and keys have norms of their own."""
    free_head_dim: bool = True
    """True where heads times head_dim may differ from d_model."""


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ALL = (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# model_type -> architecture; read from llama.cpp's src/models/{llama,qwen2,qwen3}.cpp. Mistral is its "llama".
ARCHITECTURES: dict[str, LlamaCppArchitecture] = {
    "llama": LlamaCppArchitecture("llama", permuted=True, biases=_ALL),
    "mistral": LlamaCppArchitecture("llama", permuted=True, biases=_ALL),
    "qwen2": LlamaCppArchitecture("qwen2", permuted=False, biases=_ATTENTION, free_head_dim=False),
    "qwen3": LlamaCppArchitecture("qwen3", permuted=False, biases=_ATTENTION, head_norms=True),
}
# module of a block -> GGUF name
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # buffers of old checkpoints
ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    target: str
    """Its name in the GGUF file."""
    info: TensorInfo
    """Where the checkpoint holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape


@waiting("export")
def export_gguf(
    folder: str | Path, out: str | Path, *, dtype: DType = "f16", overwrite: bool = False
) -> dict[str, Any]:
    """Write a Hugging Face checkpoint folder (edited or not) as one GGUF file, whole or not at all.

    Tensors are read, converted and written one at a time. Matrices become float16 or float32, norms and
    biases float32; from a float32, float16 or bfloat16 source "f32" is exact, "f16" rounds once. Tied
    embeddings stay one tensor. Tokenizer, special tokens and chat template are those of the folder.

    Returns what was written: `architecture`, `dtype`, `tensors` (GGUF name -> source name), `tokenizer`,
    and `notes` on what llama.cpp computes differently, if anything.

    Raises:
        ExportError: a model type, rotary scaling, tensor or tokenizer without a form in llama.cpp; a
            weight beyond float16; a place that cannot be written.
        ModelError: a folder that is not whole; see `check_folder`.
    """
    import gguf

    folder, out = Path(folder), Path(out)
    if dtype not in _DTYPES:
        raise ExportError(f"unknown dtype {dtype!r}: accepted are {', '.join(_DTYPES)}")
    check_output_file(out, overwrite=overwrite, ours=lambda begins: begins.startswith(b"GGUF"))
    config = _read_config(folder)
    arch = ARCHITECTURES[config.model_type]
    entries = _entries(Checkpoint.open(folder), config, arch)
    check_folder(folder)
    try:
        with atomic_path(out) as temporary:
            writer = gguf.GGUFWriter(temporary, arch.name)
            try:
                _add_config(writer, folder, config, dtype)
                tokenizer = add_tokenizer(writer, folder, config.vocab_size)
                _write_tensors(writer, entries, config, arch, _DTYPES[dtype][0])
            finally:
                writer.close()
    except OSError as error:
        raise ExportError(
            f"cannot write {out}: {error.strerror or error}; nothing is left. Free space or choose "
            "another place"
        ) from error
    return {
        "architecture": arch.name,
        "dtype": dtype,
        "tensors": {entry.target: entry.info.name for entry in entries},
        "tokenizer": tokenizer,
        "notes": _notes(config),
    }


def _read_config(folder: Path) -> Any:
    """The config as transformers understands it (defaults filled in), if its model has a form here."""
    model_type = read_config(folder).get("model_type")
    if model_type not in ARCHITECTURES:
        raise ExportError(
            f"no GGUF form for model type {model_type!r}: there is one for {', '.join(ARCHITECTURES)}. "
            "llama.cpp's own convert_hf_to_gguf.py reads more, and reads an exported checkpoint too"
        )
    config = read_hf_config(folder)
    _check_config(config, ARCHITECTURES[model_type])
    return config


def _check_config(config: Any, arch: LlamaCppArchitecture) -> None:
    head_dim, heads = _head_dim(config), config.num_attention_heads
    if config.hidden_act != "silu":
        raise ExportError(
            f"llama.cpp's {arch.name} has a silu MLP; this config says {config.hidden_act!r}"
        )
    if not arch.free_head_dim and head_dim * heads != config.hidden_size:
        raise ExportError(
            f"llama.cpp's {arch.name} needs heads times head_dim = d_model; this config has "
            f"{heads} x {head_dim} and {config.hidden_size}"
        )
    rope = _rope(config)
    if rope["rope_type"] not in ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"no GGUF form for the rotary embedding {rope}: accepted are rope_type {', '.join(ROPES)}, "
            "over the whole head"
        )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters as transformers 5 holds them, older spellings brought to the same form."""
    return {"rope_type": "default", **config.rope_parameters}


def _notes(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and window is not None
    if used and window < config.max_position_embeddings:
        return [f"attends over {window} tokens only; llama.cpp does not: longer texts differ"]
    return []


def _add_config(writer: GGUFWriter, folder: Path, config: Any, dtype: DType) -> None:
    from gguf import RopeScalingType

    head_dim, rope = _head_dim(config), _rope(config)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(_DTYPES[dtype][1])
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(config: Any) -> Float[Tensor, " head_dim/2"] | None:
    """The divisor of each rotary frequency in llama.cpp, for Llama 3.1's scaling; else None.

    Frequencies of long wavelengths are divided by `factor`, of short ones by 1, with a linear blend of
    the frequency in between (Llama 3.1, as documented for transformers' `rope_type` "llama3").
    """
    rope, dim = _rope(config), _head_dim(config)
    if rope["rope_type"] != "llama3":
        return None
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** exponent
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelength
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # share of the unscaled frequency
    return (1 / (unscaled + (1 - unscaled) / rope["factor"])).float()


def _entries(checkpoint: Checkpoint, config: Any, arch: LlamaCppArchitecture) -> list[_Entry]:
    """Every tensor of the file in order; the checkpoint must hold each of them, and nothing else."""
    tensors = checkpoint.tensors
    wanted = {"model.embed_tokens.weight": "token_embd.weight"}
    optional = set()
    names = {**_BLOCK, **(_HEAD_NORMS if arch.head_norms else {})}
    for layer in range(config.num_hidden_layers):
        for module, target in names.items():
            source = f"model.layers.{layer}.{module}"
            wanted[f"{source}.weight"] = f"blk.{layer}.{target}.weight"
            if module in arch.biases:
                wanted[f"{source}.bias"] = f"blk.{layer}.{target}.bias"
                optional.add(f"{source}.bias")
    wanted["model.norm.weight"] = "output_norm.weight"
    ignored = {name for name in tensors if name.endswith(_NOT_WEIGHTS)}
    if config.tie_word_embeddings and _is_tied(checkpoint):
        ignored.add("lm_head.weight")  # llama.cpp takes the embedding in its place
    else:
        wanted["lm_head.weight"] = "output.weight"
    missing = [name for name in wanted if name not in tensors and name not in optional]
    extra = sorted(set(tensors) - set(wanted) - ignored)
    if missing or extra:
        raise ExportError(
            f"the tensors in {checkpoint.folder} are not those of llama.cpp's {arch.name}: "
            + "; ".join(
                f"{len(some)} {what} (such as {some[0]})"
                for some, what in ((missing, "missing"), (extra, "without a place"))
                if some
            )
        )
    return [
        _Entry(target, tensors[source]) for source, target in wanted.items() if source in tensors
    ]


def _is_tied(checkpoint: Checkpoint) -> bool:
    """True where a config's tie holds: transformers 5 drops it where both are stored and differ."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if any(name not in checkpoint.tensors for name in names):
        return True
    embed, unembed = map(checkpoint.read, names)
    return torch.equal(embed, unembed)


def _write_tensors(
    writer: GGUFWriter,
    entries: list[_Entry],
    config: Any,
    arch: LlamaCppArchitecture,
    dtype: torch.dtype,
) -> None:
    factors = _rope_factors(config)
    for entry in entries:
        kind = dtype if len(entry.shape) > 1 else torch.float32
        empty = torch.empty(0, dtype=kind).numpy().dtype
        size = math.prod(entry.shape) * kind.itemsize
        writer.add_tensor_info(entry.target, entry.shape, empty, size)
    if factors is not None:
        size = factors.numel() * 4
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in _converted(entries, config, arch, dtype):
        writer.write_tensor_data(tensor.numpy())
    if factors is not None:
        writer.write_tensor_data(factors.numpy())


def _converted(
    entries: list[_Entry], config: Any, arch: LlamaCppArchitecture, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Each tensor as the file holds it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for entry in entries:
        tensor = TensorSource(entry.info).read()
        if not tensor.is_floating_point():
            raise ExportError(
                f"{entry.info.name} is {tensor.dtype}: only float checkpoints can be written as GGUF. Export "
                "from the model before it was quantized"
            )
        module = entry.info.name.split(".")[-2]
        if arch.permuted and module in heads:
            tensor = _pairs(tensor, heads[module])
        result = tensor.to(dtype if tensor.ndim > 1 else torch.float32).contiguous()
        if not torch.isfinite(result).all():
            raise ExportError(
                f"{entry.info.name} does not fit in {str(result.dtype).removeprefix('torch.')} (largest entry "
                f'{float(tensor.float().abs().max()):g}): write dtype="f32"'
            )
        yield result


def _pairs(x: Float[Tensor, "out *in"], n_heads: int) -> Float[Tensor, "out *in"]:
    """Rows of each head from (first half, second half) to alternating: entry i next to i + half."""
    return x.reshape(n_heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
