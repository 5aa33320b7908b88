"""Lenses: one small face for each of TransformerLens' two model classes, and how they are built.

Knows: TransformerLens (the only file that imports it), KV caches, the checks that a built or wrapped
object computes what the checkpoint computes. Does not know: prompts, plans or batches of prompts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.architectures import ARCHITECTURES, Architecture, Layout, Writer
from interp_ablate.models.backends.backend import Backend, ForwardCall, ResumePoint
from interp_ablate.models.backends.checks import check_logits, fixed_tokens, lens_tokenizer
from interp_ablate.sites import EMBEDDING_POINTS, Site

# A Bridge runs the checkpoint's own modules: only the attention kernel may differ.
BRIDGE_TOLERANCE = 1e-3
# Packages that keep hooks of their own in a model; any other hook is somebody's who wants it called.
_HOOKING = ("transformer_lens", "transformers")


class BridgeBackend:
    """TransformerBridge: the HF model with hook points in it; runs the HF forward itself.

    Inside `forward` the checkpoint's own attention and norms take the place of the Bridge's, which compute
    the same step by step for the sake of hooks on patterns, scores and scales (norms twice), as long as
    nobody uses those hooks.
    """

    def __init__(self, tl: Any) -> None:
        self.tl = tl
        self.hf = tl.original_model
        self._besides: list[int | None] = []  # what blocks return beside the stream, as a tuple
        self.own_parts = self._own_parts_are_the_same()

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
        from interp_ablate.models.kv_cache import growing_cache

        return growing_cache(self.hf.config)

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        gathered = copy.copy(cache)  # layers replace their tensors, they never write into them
        gathered.layers = [copy.copy(layer) for layer in cache.layers]
        return self.select_cache(gathered, rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        cache.batch_select_indices(rows)
        return cache

    def forward(self, step: ForwardCall, keep: int) -> Tensor | None:
        arguments = {
            "input_ids": step.tokens,
            "attention_mask": step.mask,
            "position_ids": step.positions,
            "past_key_values": step.cache,
            "use_cache": step.cache is not None,
        }
        with self._with_own_parts(), self._started(step):
            if keep == 0:
                self.hf.base_model(**arguments)
                return None
            return self.hf(**arguments, logits_to_keep=keep).logits

    @contextmanager
    def _started(self, step: ForwardCall) -> Iterator[None]:
        """Below the step's start blocks are not run: the last one gives what enters there, as if it had."""
        start = step.start
        if start is None:
            yield
            return
        skipped = range(start.block)
        with self._handing_on(skipped, {start.block - 1: start.entering}):
            yield
        if step.cache is not None:  # masks are made as wide as the first layer's cache is long
            batch, new = step.tokens.shape
            places = start.entering.new_zeros(batch, 1, new, 1)
            for i in skipped:
                step.cache.layers[i].update(places, places)

    @contextmanager
    def _handing_on(self, skipped: Iterable[int], given: dict[int, Tensor]) -> Iterator[None]:
        """Some blocks return what is given for them, or what they got; the Bridge's hooks around them stay.

        A block may be the Bridge's with the checkpoint's in it: it is the latter that is not run.
        """
        inner = {i: self.tl.blocks[i].original_component for i in skipped}
        before = {i: block.__dict__.get("forward") for i, block in inner.items()}
        try:
            for i, block in inner.items():
                instead = functools.partial(_handed_on, given.get(i), self._besides[i])
                block.__dict__["forward"] = instead
            yield
        finally:
            for i, block in inner.items():
                block.__dict__.pop("forward", None)
                if before[i] is not None:  # accelerate's, where layers are on several devices
                    block.__dict__["forward"] = before[i]

    @cached_property
    def starts_late(self) -> bool:
        """Whether all that reaches a block from the blocks below it is what enters it.

        (There are blocks that take an earlier one's keys and values.) Each block is run alone on fixed
        tokens, a prompt and a cached step, and must give exactly what it gave in a whole pass; with
        the last one, so must the model.
        """
        layers = self.new_cache(1).layers
        if len(layers) != len(self.tl.blocks) or not all(map(_counts_places, layers)):
            return False
        whole = self._fixed_outputs()
        shapes = {x.shape for outputs in whole[:-1] for x in outputs}
        if any(len(shape) != 3 or shape[-1] != self.tl.cfg.d_model for shape in shapes):
            return False
        for i in range(1, len(layers) + 1):
            try:
                alone = self._fixed_outputs(i, whole[i - 1])
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
                return False  # it looked for what the blocks below would have left somewhere
            if not all(map(torch.equal, whole[i], alone[i])):
                return False
        return True

    def _fixed_outputs(self, only: int = 0, entering: Sequence[Tensor] = ()) -> list[list[Tensor]]:
        """What every block gives in each step on fixed tokens, and last the logits.

        With what enters one (the number of blocks: the final norm), no other block is run, and there are
        no logits but from the last one and the norm.
        """
        inner = [block.original_component for block in self.tl.blocks]
        found: list[list[Tensor]] = [[] for _ in (*inner, None)]
        besides: list[int | None] = [None for _ in inner]

        def reader(i: int) -> Callable[..., None]:
            def read(module: nn.Module, args: Any, out: Any) -> None:
                found[i].append(out if isinstance(out, Tensor) else out[0])
                besides[i] = None if isinstance(out, Tensor) else len(out) - 1

            return read

        handles = [block.register_forward_hook(reader(i)) for i, block in enumerate(inner)]
        above = range(only + 1, len(inner)) if entering else ()
        try:
            for n, step in enumerate(self._fixed_steps()):
                step.start = ResumePoint(only, entering[n]) if entering else None
                keep = 0 if above else step.tokens.shape[1]
                with torch.no_grad(), self._handing_on(above, {}):
                    logits = self.forward(step, keep)
                found[-1].extend([logits] if logits is not None else [])
        finally:
            for handle in handles:
                handle.remove()
        if not entering:
            self._besides = besides
        return found

    def first_block(self, site: Site) -> int:
        """The first block that must be run for a site to hold what it holds in a whole pass."""
        if site.point in EMBEDDING_POINTS:
            return 0
        block = self.tl.blocks[site.layer]
        return site.layer + (self.hook_point(site) is block.hook_out)

    def is_hooked_below(self, block: int) -> bool:
        """Whether somebody's hooks would not be called, or change what enters a block.

        From the number of layers + 1 on: whether there are any.
        """
        last = self.tl.blocks[
            max(block - 1, 0) : block
        ]  # it hands on to its hook_out, which is called
        passed = {*self.tl.blocks[block:], *(each.hook_out for each in last)}
        waiting = [self.tl]
        while waiting:
            module = waiting.pop()
            if module in passed:
                continue
            if _is_foreign(module):
                return True
            passed.add(module)
            waiting.extend(part for part in module._modules.values() if part is not None)
        return False

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

    @cached_property
    def _norms(self) -> list[tuple[Any, list[nn.Module]]]:
        """Norms whose output is the checkpoint's own, with the hook points that the Bridge alone passes."""
        from transformer_lens.model_bridge.generalized_components import (
            NormalizationBridge,
            RMSNormalizationBridge,
        )

        return [
            (norm, [norm.hook_scale, norm.hook_normalized])
            for norm in self.tl.modules()
            if type(norm) in (NormalizationBridge, RMSNormalizationBridge)
            and norm.use_native_layernorm_autograd
        ]

    @contextmanager
    def _with_own_parts(self) -> Iterator[None]:
        replaced: list[Any] = []
        for parts, own in ((self._attentions, _own_attention), (self._norms, _own_norm)):
            if self.own_parts and not any(_is_used(p) for _, inner in parts for p in inner):
                for part, _ in parts:
                    part.__dict__["forward"] = functools.partial(own, part)
                replaced += parts
        try:
            yield
        finally:
            for part, _ in replaced:
                part.__dict__.pop("forward", None)

    def _own_parts_are_the_same(self) -> bool:
        """Whether logits of a prompt and of a cached step are the same with the checkpoint's own parts."""
        if not self._attentions and not self._norms:
            return False
        found = []
        for self.own_parts in (False, True):
            for step in self._fixed_steps():
                with torch.no_grad():
                    logits = self.forward(step, step.tokens.shape[1])
                assert logits is not None
                found.append(logits.float())
        want, got = torch.cat(found[:2], 1), torch.cat(found[2:], 1)
        scale = max(float(want.abs().max()), 1.0)
        limit = max(BRIDGE_TOLERANCE, 64 * torch.finfo(self.hf.dtype).eps * scale)
        return float((want - got).abs().max()) <= limit

    def _fixed_steps(self) -> Iterator[ForwardCall]:
        """A prompt and a cached step on fixed tokens."""
        width = 12
        device = next(self.tl.parameters()).device
        tokens = fixed_tokens(self.hf.config.vocab_size, width).to(device)
        ones, positions = torch.ones_like(tokens), torch.arange(width, device=device)[None]
        cache = self.new_cache(1)
        for part in (slice(0, width - 1), slice(width - 1, width)):
            yield ForwardCall(
                tokens[:, part], ones[:, : part.stop], positions[:, part], ones.sum(1), cache
            )

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


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module has hooks of others than the Bridge itself, which keeps some in its blocks."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if not any(hooks):
        return False
    from transformer_lens.hook_points import HookPoint

    given = [hook for kind in hooks for hook in kind.values()]
    return isinstance(module, HookPoint) or any(
        hook.__module__.split(".")[0] not in _HOOKING for hook in given
    )


def _counts_places(layer: Any) -> bool:
    """Whether a cache layer holds keys and values by place and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from interp_ablate.models.kv_cache import GrowingLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)


def _handed_on(given: Tensor | None, besides: int | None, *args: Any, **kwargs: Any) -> Any:
    """In place of a block: what is given, or what it got, as the block would return it."""
    x = given if given is not None else args[0] if args else kwargs["hidden_states"]
    return x if besides is None else (x, *[None] * besides)


def _own_attention(attn: Any, *args: Any, **kwargs: Any) -> Any:
    """The checkpoint's own attention between the Bridge's hooks at its input and output."""
    if args:
        args = (attn.hook_in(args[0]), *args[1:])
    else:
        kwargs["hidden_states"] = attn.hook_in(kwargs["hidden_states"])
    output, *rest = attn.original_component(*args, **kwargs)
    return (attn.hook_out(output), *rest)


def _own_norm(norm: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The checkpoint's own norm between the Bridge's hooks at its input and output."""
    x = norm.hook_in(hidden_states)
    return norm.hook_out(norm.original_component(x).to(x.dtype))


def _discovered(lens: BridgeBackend) -> Architecture | None:
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


def bridge_from_hf(hf: Any, tokenizer: Any) -> Backend:
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(hf.parameters())
    name = getattr(hf.config, "_name_or_path", "") or type(hf).__name__
    hf.config.architectures = hf.config.architectures or [type(hf).__name__]  # the Bridge asks
    width = min(24, getattr(hf.config, "max_position_embeddings", None) or 24)
    tokens = fixed_tokens(hf.config.vocab_size, width).to(parameter.device)
    with torch.no_grad():
        want = hf(tokens).logits.float()
    bridge = TransformerBridge.boot_transformers(
        name,
        hf_model=hf,
        tokenizer=lens_tokenizer(tokenizer),
        dtype=parameter.dtype,
        device=parameter.device,
    )
    with torch.no_grad():
        got = hf(tokens).logits.float()
    check_logits(got, want, hf, "TransformerBridge built on", BRIDGE_TOLERANCE)
    return BridgeBackend(bridge)
