"""Stand-ins: the anatomy of a model that is only a config, measured on one with the same modules and small sizes.

What writes to the stream is decided by a model's code and its config's settings, not by its widths and values. A
stand-in has the config's settings, small widths and random weights; each of its blocks must have the parameters of the
real one's, name by name.

Knows: which numbers of a config are widths. Does not know: files, plans, or how an anatomy is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from interp_ablate.errors import ExportError, InterpAblateError
from interp_ablate.models.anatomy import Anatomy, BlockAnatomy, Branch
from interp_ablate.models.backends.hf import HFBackend, measured_anatomy
from interp_ablate.models.hf_classes import of_config
from interp_ablate.models.measured_architecture import MeasuredArchitecture, architecture_from

_SMALL = 20_000_000  # parameters of a model that stands for itself
_N_LAYERS = 16
# Widths by the names that configs have for them, and small ones that fit each other.
_WIDTHS: dict[tuple[str, ...], int] = {
    ("hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "dim", "emb_dim"): 64,
    ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "dim_ff"): 96,
    ("shared_expert_intermediate_size", "shared_intermediate_size", "block_ff_dim"): 96,
    ("intermediate_size_mlp", "dense_intermediate_size", "decoder_ffn_dim"): 96,
    ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size"): 32,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_global_key_value_heads"): 2,
    ("head_dim", "global_head_dim", "kv_channels", "attention_head_dim"): 16,
    ("vocab_size", "vocab_size_per_layer_input"): 300,
    ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "mamba_d_head", "mamba_head_dim"): 16,
    ("q_lora_rank",): 24,
    ("qk_rope_head_dim", "state_size", "mamba_d_state", "ssm_state_size"): 8,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "hidden_size_per_layer_input"): 8,
    ("mamba_d_ssm",): 128,
    ("n_groups", "mamba_n_groups"): 1,
    ("linear_num_key_heads", "linear_num_value_heads"): 4,
    ("linear_key_head_dim", "linear_value_head_dim"): 16,
    ("lru_width", "word_embed_proj_dim", "attention_hidden_size"): 64,
    ("rotary_dim",): 8,
    ("image_size",): 32,
    ("patch_size",): 8,
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# Latent attention has one rotary part a head; Mamba 2 calls its own heads as others call attention's.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_MAMBA_2 = {"num_heads": 8}


def measured_without_data(hf_config: Any, without_data: Any) -> MeasuredArchitecture:
    """The measured architecture of a model of which the config alone is read, in the names that it has in memory.

    Args:
        without_data: the model itself, on torch's meta device.

    Raises:
        ExportError: something writes to the stream that no edit of a weight reaches; no stand-in can be made.
    """
    whole = sum(p.numel() for p in without_data.parameters()) <= _SMALL
    faults = []
    for config in [hf_config] if whole else _small_configs(hf_config):
        try:
            stand_in = _random_model(config)
            small = measured_anatomy(stand_in)
            unembed = HFBackend(stand_in, small).unembed_name
            copied = whole or small.problems  # of which the architecture is refused
            anatomy = small if copied else _whole_anatomy(small, stand_in, without_data)
        except InterpAblateError as error:
            faults.append(str(error).splitlines()[0])
        except Exception as error:  # a model's own code, under sizes that it was not written for
            faults.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
        else:
            return architecture_from(anatomy, unembed, hf_config)
    raise ExportError(
        f"what writes to the stream of a {hf_config.model_type} model could not be measured on a small stand-in "
        f"({'; '.join(faults)}): load the model and export it: --model in place of --source"
    )


def _small_configs(hf_config: Any) -> Iterator[Any]:
    """The config with small widths, with fewer and fewer of them: some rotary tables are made for one width of heads,
    some lists for one number of layers."""
    for n_layers, wide_heads in ((_N_LAYERS, False), (_N_LAYERS, True), (None, True)):
        config = copy.deepcopy(hf_config)
        _shrink(config, n_layers, wide_heads)
        yield config


def _shrink(config: Any, n_layers: int | None, wide_heads: bool) -> None:
    """Make a config's widths, and those of the configs inside it, small; zeros and what is not set stay."""
    layers = next((getattr(config, n) for n in _LAYER_COUNTS if getattr(config, n, None)), None)
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small = {name: size for names, size in _WIDTHS.items() for name in names}
    small |= _LATENT if values.get("kv_lora_rank") else {}
    small |= _MAMBA_2 if config.model_type == "mamba2" else {}
    if wide_heads and hasattr(config, "num_attention_heads"):
        head = values.get("head_dim") or config.hidden_size // config.num_attention_heads
        small |= {"head_dim": head, "hidden_size": head * small["num_attention_heads"]}
    for name, value in values.items():
        if name in getattr(config, "sub_configs", {}) and value is not None:
            _shrink(value, n_layers, wide_heads)
        elif name in small and isinstance(value, int) and value:
            setattr(config, name, small[name])
        elif n_layers and layers and layers > n_layers:
            if name in _LAYER_COUNTS:
                setattr(config, name, n_layers)
            elif isinstance(value, list) and len(value) == layers:
                setattr(config, name, value[:n_layers])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)


def _random_model(config: Any) -> Any:
    """A model of random weights: none is zero or one, so that nothing is missed and no norm looks like none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = of_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1 or "norm" in name.lower():
                p.add_(0.1 * noise)
            elif p.numel() > 1 and float(p.std()) < 0.05:
                p.copy_(0.08 * noise)
    return model.requires_grad_(False)


def _kind(block: Any) -> tuple[Any, ...]:
    """What two blocks of one kind have alike: modules and parameters, by name, class and number of axes."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    return (*modules, *((name, p.ndim) for name, p in block.named_parameters()))


def _whole_anatomy(small: Anatomy, stand_in: Any, model: Any) -> Anatomy:
    """The anatomy of a model from its stand-in's: each block's from one of the same kind.

    Raises:
        ExportError: the two differ in a module, or blocks of one kind in what they write with.
    """
    path = small.blocks_path
    kinds: dict[tuple[Any, ...], BlockAnatomy] = {}
    for i, (block, anatomy) in enumerate(zip(stand_in.get_submodule(path), small.blocks)):
        moved = _moved(anatomy, f"{path}.{i}.", f"{path}.#.")
        if kinds.setdefault(_kind(block), moved) != moved:
            raise ExportError(f"{path}.{i} writes otherwise than a block of the same modules")
    outside = [
        {name for name, _ in each.named_modules() if not name.startswith(f"{path}.")}
        for each in (stand_in, model)
    ]
    blocks = list(model.get_submodule(path))
    strange = [i for i, block in enumerate(blocks) if _kind(block) not in kinds]
    if strange or not all(
        name.rpartition(".")[0] in outside[1] for name in small.embeddings.values()
    ):
        raise ExportError(f"{path}.{(strange or [0])[0]} has other modules than every block of it")
    return replace(
        small,
        blocks=tuple(
            _moved(kinds[_kind(block)], f"{path}.#.", f"{path}.{i}.")
            for i, block in enumerate(blocks)
        ),
    )


def _moved(block: BlockAnatomy, start: str, other: str) -> BlockAnatomy:
    """The anatomy of a block under another name."""

    def rename(name: str) -> str:
        return name.replace(start, other, 1)

    def renamed(branch: Branch) -> Branch:
        return replace(
            branch,
            path=rename(branch.path),
            scale=round(branch.scale, 4),  # measured to rounding
            parts=tuple(
                replace(
                    part,
                    projection=rename(part.projection),
                    norms=tuple(replace(norm, path=rename(norm.path)) for norm in part.norms),
                    writers={rename(name): layout for name, layout in part.writers.items()},
                )
                for part in branch.parts
            ),
        )

    return replace(
        block,
        attn=tuple(map(renamed, block.attn)),
        mlp=tuple(map(renamed, block.mlp)),
        chained=tuple(map(rename, block.chained)),
        stream_scale=round(block.stream_scale, 4),
    )
