"""Lenses: one small face for each of TransformerLens' two model classes, and how they are built.

Knows: TransformerLens (the only file that imports it), KV caches, the checks that a built or wrapped
object computes what the checkpoint computes. Does not know: prompts, plans or batches of prompts.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp_ablate.architectures import ARCHITECTURES, Architecture, Layout, Writer
from interp_ablate.edits import Positions
from interp_ablate.errors import ModelError
from interp_ablate.sites import PROJECTION_POINTS, Site

# A HookedTransformer built from a checkpoint must reproduce its logits to this, in fp32; else it is refused.
HOOKED_TOLERANCE = 5e-3
# A Bridge runs the checkpoint's own modules: only the attention kernel may differ.
BRIDGE_TOLERANCE = 1e-3
# HookedTransformer allocates [n_ctx, n_ctx] masks in every block; longer contexts only cost memory.
MAX_HOOKED_CONTEXT = 2048


class Lens(Protocol):
    """What `Model` needs of a TransformerLens object; one small class for each of the two."""

    tl: Any

    def hook_point(self, site: Site) -> nn.Module | None: ...

    @property
    def unembed_input(self) -> nn.Module: ...

    def gain(self, site: Site) -> Float[Tensor, " d_model"] | None: ...

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None: ...

    def new_cache(self, batch: int) -> Any: ...

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any: ...

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any: ...

    def forward(self, step: Step, keep: int) -> Tensor | None: ...

    def hf_state_dict(self) -> dict[str, Tensor]: ...


@dataclass
class Step:
    """One forward call: new tokens, the mask of all tokens so far, positions of the new ones."""

    tokens: Int[Tensor, "batch new"]
    mask: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch new"]
    prompt_lengths: Int[Tensor, " batch"]
    cache: Any = None
    plans: Int[Tensor, " batch"] | None = None  # of each row, where rows are under different ones

    @cached_property
    def generated(self) -> Bool[Tensor, "batch new"]:
        """Which of the new tokens come after the prompt, counted from the start of the sequence."""
        return self.positions >= self.prompt_lengths[:, None]

    @cached_property
    def coverage(self) -> dict[Positions, tuple[bool, bool]]:
        """For each kind of positions: (does it hold any real new token, does it hold all of them)."""
        real = self.mask[:, -self.tokens.shape[1] :].bool()
        late = self.generated & real
        any_late, all_late = bool(late.any()), bool((self.generated | ~real).all())
        early = (~self.generated & real).any()
        return {
            "all": (True, True),
            "generated": (any_late, all_late),
            "prompt": (bool(early), not any_late),
        }


class BridgeLens:
    """TransformerBridge: the HF model with hook points in it; runs the HF forward itself.

    Inside `forward` the checkpoint's own attention takes the place of the Bridge's, which computes the
    same step by step for the sake of hooks on patterns and scores, as long as nobody uses those hooks.
    """

    def __init__(self, tl: Any) -> None:
        self.tl = tl
        self.hf = tl.original_model
        self.own_attention = self._own_attention_is_the_same()

    def hook_point(self, site: Site) -> nn.Module | None:
        # on models with rotary positions hook_pos_embed is an alias of the rotary tables
        if site.point == "pos_embed" and "pos_embed" not in self.tl.adapter.component_mapping:
            return None
        return self.tl.get_hook_point(str(site))

    @property
    def unembed_input(self) -> nn.Module:
        return self.tl.get_hook_point("unembed.hook_in")

    @cached_property
    def architecture(self) -> Architecture | None:
        """The declared entry, or what the Bridge's own component map says; None if that is not enough."""
        return ARCHITECTURES.get(self.hf.config.model_type) or _discovered(self)

    def component_map(self) -> str:
        """The Bridge's own map in words, for messages."""
        parts = self.tl.adapter.component_mapping
        inner = parts["blocks"].submodules if "blocks" in parts else {}
        blocks = {
            name: f"{part.name} ({', '.join(f'{k}={v.name}' for k, v in part.submodules.items())})"
            for name, part in inner.items()
            if name in ("attn", "mlp")
        }
        names = {name: part.name for name, part in parts.items()} | blocks
        text = ", ".join(f"{name}={value}" for name, value in names.items())
        aliases = self.tl.blocks[0].hook_aliases
        hooks = {
            point: aliases.get(point, "nothing") for point in ("hook_attn_out", "hook_mlp_out")
        }
        told = ", ".join(f"{point} is {place}" for point, place in hooks.items())
        return f"the Bridge's component map of {type(self.hf).__name__} has {text}; {told}"

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Live parameters under their Hugging Face names."""
        named = self.hf.named_parameters(remove_duplicate=False)  # joint projections have two names
        return {name.replace("._original_component", ""): p for name, p in named}

    def gain(self, site: Site) -> Float[Tensor, " d_model"] | None:
        name = self.architecture and self.architecture.norm_after(site)
        if not name or self.architecture is None:
            return None
        return self._tensors[name].detach().double() + self.architecture.gain_offset

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        branch, part = ("attn", "o") if site.point.startswith("attn") else ("mlp", "out")
        inner = self.tl.get_hook_point(f"blocks.{site.layer}.{branch}.{part}.hook_in")
        if inner is None or self.architecture is None:
            return None
        found = self.architecture.writers(site, self._tensors, self.hf.config)
        name, layout = next(iter(found.items()))
        weight = self._tensors[name].detach()
        return inner, weight.T if layout == "conv1d" else weight

    def new_cache(self, batch: int) -> Any:
        from interp_ablate.kv_cache import growing_cache

        return growing_cache(self.hf.config)

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        gathered = copy.copy(cache)  # layers replace their tensors, they never write into them
        gathered.layers = [copy.copy(layer) for layer in cache.layers]
        return self.select_cache(gathered, rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        cache.batch_select_indices(rows)
        return cache

    def forward(self, step: Step, keep: int) -> Tensor | None:
        arguments = {
            "input_ids": step.tokens,
            "attention_mask": step.mask,
            "position_ids": step.positions,
            "past_key_values": step.cache,
            "use_cache": step.cache is not None,
        }
        with self._with_own_attention():
            if keep == 0:
                self.hf.base_model(**arguments)
                return None
            return self.hf(**arguments, logits_to_keep=keep).logits

    @cached_property
    def _attentions(self) -> list[tuple[Any, list[nn.Module]]]:
        """Attentions that the Bridge computes itself, with the hook points that it alone passes."""
        from transformer_lens.hook_points import HookPoint
        from transformer_lens.model_bridge.generalized_components import (
            PositionEmbeddingsAttentionBridge,
        )

        found: list[tuple[Any, list[nn.Module]]] = []
        for block in self.tl.blocks:
            attn = block.attn if "attn" in block.submodules else None
            if type(attn) is PositionEmbeddingsAttentionBridge:
                kept = (attn.hook_in, attn.hook_out)
                inner: list[nn.Module] = [
                    m for m in attn.children() if isinstance(m, HookPoint) and m not in kept
                ]
                found.append((attn, inner))
        return found

    @contextmanager
    def _with_own_attention(self) -> Iterator[None]:
        attentions = self._attentions if self.own_attention else []
        if any(_is_used(point) for _, inner in attentions for point in inner):
            attentions = []
        for attn, _ in attentions:
            attn.__dict__["forward"] = functools.partial(_own_attention, attn)
        try:
            yield
        finally:
            for attn, _ in attentions:
                attn.__dict__.pop("forward", None)

    def _own_attention_is_the_same(self) -> bool:
        """Whether logits of a prompt and of a cached step are the same with the checkpoint's own attention."""
        if not self._attentions:
            return False
        width = 12
        device = next(self.tl.parameters()).device
        tokens = _fixed_tokens(self.hf.config.vocab_size, width).to(device)
        ones, positions = torch.ones_like(tokens), torch.arange(width, device=device)[None]
        found = []
        for self.own_attention in (False, True):
            cache = self.new_cache(1)
            for part in (slice(0, width - 1), slice(width - 1, width)):
                step = Step(
                    tokens[:, part], ones[:, : part.stop], positions[:, part], ones.sum(1), cache
                )
                with torch.no_grad():
                    logits = self.forward(step, part.stop - part.start)
                assert logits is not None
                found.append(logits.float())
        want, got = torch.cat(found[:2], 1), torch.cat(found[2:], 1)
        scale = max(float(want.abs().max()), 1.0)
        limit = max(BRIDGE_TOLERANCE, 64 * torch.finfo(self.hf.dtype).eps * scale)
        return float((want - got).abs().max()) <= limit

    def hf_state_dict(self) -> dict[str, Tensor]:
        with torch.device("meta"):
            expected = list(type(self.hf)(self.hf.config).state_dict())
        state = self.hf.state_dict()
        found = {name.replace("._original_component", ""): name for name in state}
        missing = [name for name in expected if name not in found]
        if missing:
            raise ModelError(
                f"the Bridge holds no tensor for {missing[:3]} ({len(missing)} in all) of "
                f"{type(self.hf).__name__}: it cannot be written back as a Hugging Face checkpoint"
            )
        return {name: state[found[name]] for name in expected}


def _is_used(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)


def _own_attention(attn: Any, *args: Any, **kwargs: Any) -> Any:
    """The checkpoint's own attention between the Bridge's hooks at its input and output."""
    if args:
        args = (attn.hook_in(args[0]), *args[1:])
    else:
        kwargs["hidden_states"] = attn.hook_in(kwargs["hidden_states"])
    output, *rest = attn.original_component(*args, **kwargs)
    return (attn.hook_out(output), *rest)


class HookedLens:
    """HookedTransformer (TransformerLens 3.x)."""

    def __init__(self, tl: Any, hf_config: Any) -> None:
        self.tl = tl
        self.hf_config = hf_config

    def hook_point(self, site: Site) -> nn.Module | None:
        if site.point in PROJECTION_POINTS and site.layer < self.tl.cfg.n_layers:
            return getattr(self.tl.blocks[site.layer], site.point.removesuffix("_proj"))
        if site.point == "pos_embed" and self.tl.cfg.positional_embedding_type != "standard":
            return None
        return self.tl.hook_dict.get(str(site))

    @property
    def unembed_input(self) -> nn.Module:
        return self.tl.ln_final  # `forward` unembeds what it returns

    def gain(self, site: Site) -> Float[Tensor, " d_model"] | None:
        names: dict[str, str] = {"attn_proj": "ln1_post", "mlp_proj": "ln2_post"}
        if site.point not in names or not self.tl.cfg.use_normalization_before_and_after:
            return None
        return getattr(self.tl.blocks[site.layer], names[site.point]).w.detach().double()

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        block = self.tl.blocks[site.layer]
        if site.point.startswith("attn"):
            weight = block.attn.W_O.detach()
            return block.attn.hook_z, weight.reshape(-1, weight.shape[-1]).T
        if self.tl.cfg.num_experts:
            return None
        return block.mlp.hook_post, block.mlp.W_out.detach().T

    def new_cache(self, batch: int) -> Any:
        from transformer_lens import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl.cfg, self.tl.cfg.device, batch)

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return self.select_cache(copy.copy(cache), rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return self._each(cache, lambda x: x[rows])

    @staticmethod
    def _each(cache: Any, function: Callable[[Tensor], Tensor]) -> Any:
        entries = []
        for entry in cache.entries:
            changed = copy.copy(entry)
            changed.past_keys = function(entry.past_keys)
            changed.past_values = function(entry.past_values)
            entries.append(changed)
        cache.entries = entries
        cache.previous_attention_mask = function(cache.previous_attention_mask)
        return cache

    def forward(self, step: Step, keep: int) -> Tensor | None:
        residual = self.tl(
            step.tokens,
            attention_mask=step.mask[:, -step.tokens.shape[1] :],
            past_kv_cache=step.cache,
            stop_at_layer=self.tl.cfg.n_layers,
        )
        if keep == 0:
            return None
        logits = self.tl.unembed(self.tl.ln_final(residual[:, -keep:]))
        cap = getattr(self.tl.cfg, "output_logits_soft_cap", 0) or 0
        return logits if cap <= 0 else cap * torch.tanh(logits / cap)

    def hf_state_dict(self) -> dict[str, Tensor]:
        from interp_ablate.convert import hooked_to_hf

        if self.hf_config is None:
            raise ModelError(
                "this HookedTransformer was wrapped without its Hugging Face config, which holds the "
                "layout of the checkpoint: pass Model.wrap(..., hf_config=AutoConfig.from_pretrained(...))"
            )
        return hooked_to_hf(self.tl.state_dict(), self.hf_config)


def refuse_processed(obj: Any) -> None:
    """Raise for weights that TransformerLens folded or centred."""
    norm = str(getattr(obj.cfg, "normalization_type", ""))
    folded = type(obj).__name__ == "HookedTransformer" and norm.endswith("Pre")
    if folded or getattr(obj, "_weights_processed", False):
        raise ModelError(
            f"this {type(obj).__name__} has processed weights (normalization {norm!r}): LayerNorm is "
            "folded into the weights and writing weights may be centred, so directions and exports "
            "would not be those of the checkpoint. Load it raw: "
            "HookedTransformer.from_pretrained_no_processing(...), or a Bridge without "
            "enable_compatibility_mode()"
        )


def _discovered(lens: BridgeLens) -> Architecture | None:
    """An entry read from the Bridge's component map; None where it does not name every writer.

    What is found is only believed through the export's certificate.
    """
    parts = lens.tl.adapter.component_mapping
    if not {"embed", "blocks", "unembed"} <= set(parts):
        return None
    blocks, inner = parts["blocks"].name, parts["blocks"].submodules
    attn, mlp = inner.get("attn"), inner.get("mlp")
    if attn is None or mlp is None or "o" not in attn.submodules or "out" not in mlp.submodules:
        return None
    block = f"{blocks}.{{layer}}."
    paths = [
        ".".join(name for name in (branch.name, branch.submodules[end].name) if name)
        for branch, end in ((attn, "o"), (mlp, "out"))
    ]
    modules = {n.replace("._original_component", ""): m for n, m in lens.hf.named_modules()}
    aliases = lens.tl.blocks[0].hook_aliases
    norms: list[str | None] = []
    for point in ("hook_attn_out", "hook_mlp_out"):
        holder = str(aliases.get(point, "")).split(".")[0]
        component = inner.get(holder)
        if component is None or not (
            holder in ("attn", "mlp") or "RMS" in type(component).__name__
        ):
            return None
        norms.append(None if holder in ("attn", "mlp") else block + component.name)
    layouts: list[Layout] = []
    for path in paths:
        module = modules.get(f"{blocks}.0.{path}")
        kind = type(getattr(module, "original_component", module)).__name__
        if kind not in ("Linear", "Conv1D"):
            return None
        layouts.append("conv1d" if kind == "Conv1D" else "linear")
    position = parts.get("pos_embed")
    return Architecture(
        embed=f"{parts['embed'].name}.weight",
        unembed=f"{parts['unembed'].name}.weight",
        attn=((Writer(f"{block}{paths[0]}.weight", layouts[0]),),),
        mlp=((Writer(f"{block}{paths[1]}.weight", layouts[1]),),),
        pos_embed=f"{position.name}.weight" if position is not None else None,
        attn_norm=norms[0],
        mlp_norm=norms[1],
        gain_offset=1.0 if getattr(lens.tl.cfg, "rmsnorm_uses_offset", False) else 0.0,
        parallel="hook_resid_mid" not in aliases,
        scaled_embed=True,
        prefix=f"{lens.hf.base_model_prefix}.",
        found=True,
    )


def _lens_tokenizer(tokenizer: Any) -> Any:
    """A copy for TransformerLens, marked so that it is not reloaded from a hub to add a BOS token."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.setdefault("name_or_path", getattr(own, "name_or_path", ""))
    own.init_kwargs["add_bos_token"] = True
    return own


def bridge_from_hf(hf: Any, tokenizer: Any) -> Lens:
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(hf.parameters())
    name = getattr(hf.config, "_name_or_path", "") or type(hf).__name__
    hf.config.architectures = hf.config.architectures or [type(hf).__name__]  # the Bridge asks
    width = min(24, getattr(hf.config, "max_position_embeddings", None) or 24)
    tokens = _fixed_tokens(hf.config.vocab_size, width).to(parameter.device)
    with torch.no_grad():
        want = hf(tokens).logits.float()
    bridge = TransformerBridge.boot_transformers(
        name,
        hf_model=hf,
        tokenizer=_lens_tokenizer(tokenizer),
        dtype=parameter.dtype,
        device=parameter.device,
    )
    with torch.no_grad():
        got = hf(tokens).logits.float()
    _check_logits(got, want, hf, "TransformerBridge built on", BRIDGE_TOLERANCE)
    return BridgeLens(bridge)


def _fixed_tokens(d_vocab: int, width: int) -> Int[Tensor, "1 width"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, d_vocab, (1, width), generator=generator)


def _check_logits(got: Tensor, want: Tensor, hf: Any, what: str, tolerance: float) -> None:
    """Raise where a TransformerLens object does not compute what the checkpoint does.

    A checkpoint that itself gives NaN or infinity is not held against TransformerLens.
    """
    if not bool(torch.isfinite(want).all()):
        return
    scale = max(float(want.abs().max()), 1.0)
    error = float((got.float() - want).abs().max())
    limit = max(tolerance, 64 * torch.finfo(next(hf.parameters()).dtype).eps * scale)
    if not error <= limit:
        other = "bridge" if "Hooked" in what else "hooked"
        raise ModelError(
            f"the {what} {type(hf).__name__} differs from the checkpoint by {error:.3g} in its logits "
            f"(limit {limit:.3g}): TransformerLens does not reproduce this architecture; another "
            f"version of it may, or backend={other!r}"
        )


def hooked_from_hf(hf: Any, tokenizer: Any) -> Lens:
    """Build a HookedTransformer from any architecture that TransformerLens can convert."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens import loading_from_pretrained as loading
    except ImportError as error:
        raise ModelError(
            "the installed TransformerLens has no HookedTransformer (removed in 4.0): use "
            "backend='bridge', or pip install 'transformer-lens>=3.9,<4'"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(hf.config)
        config.architectures = [type(hf).__name__]
        if config.model_type == "gpt2":
            config.n_ctx = config.n_positions  # transformers 5 dropped a name TransformerLens reads
        config.save_pretrained(folder)
        try:
            cfg = HookedTransformerConfig(**_hooked_values(loading, folder, hf))
            state = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf, dtype=cfg.dtype)
        except (NotImplementedError, KeyError, AttributeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"TransformerLens cannot build a HookedTransformer from {type(hf).__name__} "
                f"({error}): use backend='bridge'"
            ) from error
    hooked = HookedTransformer(cfg, tokenizer=_lens_tokenizer(tokenizer))
    hooked.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    hooked.to(hf.device, print_details=False).eval().requires_grad_(False)
    lens = HookedLens(hooked, hf.config)
    _check_hooked(lens, hf)
    return lens


def _hooked_values(loading: Any, folder: str, hf: Any) -> dict[str, Any]:
    """HookedTransformerConfig's fields for a checkpoint, by TransformerLens' own reading of its config."""
    values = loading.convert_hf_model_config(folder)
    head = getattr(hf.config, "head_dim", None)
    if head:  # TransformerLens assumes hidden_size / heads
        values.update(d_head=head, rotary_dim=head)
    parameter = next(hf.parameters())
    values.update(
        dtype=parameter.dtype,
        device=str(parameter.device),
        init_weights=False,
        model_name=getattr(hf.config, "_name_or_path", "") or type(hf).__name__,
        n_ctx=min(values["n_ctx"], MAX_HOOKED_CONTEXT),
    )
    return values


def _check_hooked(lens: HookedLens, hf: Any) -> None:
    """Compare logits with the checkpoint's own on fixed tokens; raise where they differ."""
    width = min(24, lens.tl.cfg.n_ctx)
    tokens = _fixed_tokens(hf.config.vocab_size, width).to(next(hf.parameters()).device)
    ones = torch.ones_like(tokens)
    positions = torch.arange(width, device=tokens.device)[None]
    with torch.no_grad():
        want = hf(tokens).logits.float()
        got = lens.forward(Step(tokens, ones, positions, ones.sum(1)), width)
    assert got is not None
    _check_logits(got, want, hf, "HookedTransformer built from", HOOKED_TOLERANCE)
