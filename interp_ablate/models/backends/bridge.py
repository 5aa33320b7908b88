"""TransformerBridge as a backend: the checkpoint's own model, with hook points in it.

Knows: the Bridge, its hook names, transformers' KV cache. Does not know: prompts, plans or batches.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.edits.affine import NormGain
from interp_ablate.errors import ExportError, InterpAblateError, ModelError
from interp_ablate.models.anatomy import Anatomy
from interp_ablate.models.architectures import (
    Architecture,
    declared_architecture,
    declared_types,
    max_positions,
    text_config,
)
from interp_ablate.models.backends.backend import ForwardCall, WritingModule
from interp_ablate.models.backends.block_skipping import BlockSkipping
from interp_ablate.models.backends.bridge_shortcuts import OwnParts
from interp_ablate.models.backends.checks import (
    check_logits,
    fixed_tokens,
    plain_call,
    tokenizer_copy,
)
from interp_ablate.models.backends.component_map import (
    describe_components,
    discovered_architecture,
)
from interp_ablate.models.backends.foreign_hooks import without_hooks
from interp_ablate.models.backends.hf import measured_anatomy
from interp_ablate.models.backends.proof import (
    Proof,
    plain_modules,
    refusal,
    sums_that_fail,
    unlike,
)
from interp_ablate.models.backends.transformers_passes import TransformersPasses
from interp_ablate.models.float32 import in_float32
from interp_ablate.models.loading import BackendName
from interp_ablate.models.measured_architecture import architecture_from
from interp_ablate.models.written_parameters import gain_of
from interp_ablate.sites import EMBEDDING_POINTS, PROJECTION_POINTS, Site

# A Bridge runs the checkpoint's own modules: only the attention kernel may differ.
BRIDGE_TOLERANCE = 1e-3


def _exact(hf: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """In float32 the logits of a model in half precision; None where memory is short, or its code is for one dtype."""
    try:
        with in_float32(hf, level=logging.DEBUG) as widened:
            return hf(tokens).logits if widened else None
    except RuntimeError:
        return None


def _open_scaled_outputs(tl: Any) -> None:
    """Have blocks with outputs of their own hand them through their hook points.

    Granite's blocks scale what they add to the stream, and show it only where one of TransformerLens's own hooks
    is: their hook points say that there is one.
    """
    for block in tl.blocks:
        points = dict(block.named_children())
        for name in ("hook_attn_out", "hook_mlp_out"):
            if name in points:
                points[name].has_hooks = MethodType(_shown, points[name])


def _shown(point: Any, dir: str = "both", **rest: Any) -> bool:
    return dir == "both" or type(point).has_hooks(point, dir=dir, **rest)


class BridgeBackend(TransformersPasses):
    """TransformerBridge: runs the Hugging Face model's own forward pass, with hook points in it."""

    name: BackendName = "bridge"

    def __init__(self, tl: Any) -> None:
        self.anatomy: Anatomy | None = None
        """What was measured of the checkpoint's model before the Bridge was built on it."""
        self._proof = Proof(tl, self._fault)
        self.tl = self.module = tl
        self.hf = tl.original_model
        self.hf_config = self.hf.config
        self.generation_config = getattr(self.hf, "generation_config", None)
        _open_scaled_outputs(tl)
        blocks = [block.original_component for block in tl.blocks]
        self._skipping = BlockSkipping(blocks, tl.cfg.d_model, tl, self._still_called)
        self._own_parts = OwnParts(tl)
        self._own_parts.enable_if_same(self.forward, self.fixed_calls, BRIDGE_TOLERANCE)

    @classmethod
    def from_hf(cls, hf: Any, tokenizer: Any) -> BridgeBackend:
        """A Bridge over a Hugging Face model, which it uses in place.

        Raises:
            ModelError: the Bridge's logits are not the model's; a model that wraps its decoder of text with
                others (of images, say), for which TransformerLens would install packages while it runs.
        """
        if (
            text_config(hf.config) is not hf.config
            and importlib.util.find_spec("torchvision") is None
        ):
            raise ModelError(
                f"{type(hf).__name__} wraps its decoder of text: TransformerLens would run `pip install "
                "torchvision`, which may replace torch itself. Use backend='hf', or install torchvision first"
            )
        from transformer_lens.model_bridge import TransformerBridge

        parameter = next(hf.parameters())
        name = getattr(hf.config, "_name_or_path", "") or type(hf).__name__
        hf.config.architectures = hf.config.architectures or [type(hf).__name__]  # the Bridge asks
        width = min(24, max_positions(hf.config))
        tokens = fixed_tokens(text_config(hf.config).vocab_size, width).to(parameter.device)
        with torch.no_grad():
            want = hf(tokens).logits.float()
            exact = _exact(hf, tokens)
        try:
            bridge = TransformerBridge.boot_transformers(
                name,
                hf_model=hf,
                tokenizer=tokenizer_copy(tokenizer) if tokenizer is not None else None,
                dtype=parameter.dtype,
                device=parameter.device,
            )
            with torch.no_grad():
                got = hf(tokens).logits.float()
            check_logits(got, want, hf, "TransformerBridge built on", BRIDGE_TOLERANCE, exact)
            built = cls(bridge)
            with torch.no_grad():  # without a cache some components take another way
                built.forward(plain_call(tokens), 1)
        except ModelError:
            raise
        except Exception as error:  # TransformerLens raises of every kind for what it does not know
            raise ModelError(
                f"TransformerLens cannot build a TransformerBridge on {type(hf).__name__}, or not run it "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}): use "
                "backend='hf'"
            ) from error
        return built

    @cached_property
    def _entry(self) -> Architecture | None:
        """The declared entry, or the one that the Bridge's component map gives."""
        return declared_architecture(self.hf_config.model_type) or discovered_architecture(self.tl)

    @property
    def architecture(self) -> Architecture:
        """The tensors that write to the stream: the declared entry, or the component map's.

        Raises:
            ExportError: neither names every writer, and the message shows the component map; or it was measured
                that something else writes.
        """
        if self._entry is None:
            raise ExportError(
                f"{describe_components(self.tl)}: not every tensor that writes to the residual stream "
                f"is named there as a plain matrix, and there is no entry for {self.hf_config.model_type!r} among "
                f"{', '.join(declared_types())}. Plans run as hooks; backend='hf' measures what writes, and edits it"
            )
        self.require_exact_writers()
        return self._entry

    def require_exact_writers(self) -> None:
        self._proof.require()

    def _fault(self) -> str:
        """Why the sites and the entry are not all that was measured to write to the stream; empty if they are."""
        config = self.hf_config
        with without_hooks(self.tl, points_only=True):
            try:
                with plain_modules(self.hf):
                    anatomy = self.anatomy or measured_anatomy(self.hf)
                self.anatomy = None  # another proof, of other modules, measures again
                measured = architecture_from(anatomy, "", config)
            except InterpAblateError as error:
                return str(error)
            faults = unlike(self._entry, measured, self._tensors, config) if self._entry else []
            faults += sums_that_fail(self, (1.0, anatomy.embed_scale))
        return refusal(f"Bridge on this {config.model_type} model", faults)

    def hook_point(self, site: Site) -> nn.Module | None:
        # on models with rotary positions hook_pos_embed is an alias of the rotary tables
        if site.point == "pos_embed" and "pos_embed" not in self.tl.adapter.component_mapping:
            return None
        return self.tl.get_hook_point(str(site))

    @property
    def unembed_input(self) -> nn.Module:
        return self.tl.get_hook_point("unembed.hook_in")

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | None:
        return self.tl.unembed.original_component.weight.detach()

    def block(self, layer: int) -> nn.Module:
        return self.tl.blocks[layer]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Live parameters under their Hugging Face names."""
        named = self.hf.named_parameters(remove_duplicate=False)  # joint projections have two names
        return {name.replace("._original_component", ""): p for name, p in named}

    def post_norm_gains(self, site: Site) -> tuple[NormGain | None, ...]:
        entry = self._entry
        if entry is None or site.point not in PROJECTION_POINTS or not entry.is_normed(site):
            return (None,)
        ((gains, _),) = entry.parts(site, self._tensors, self.hf_config)
        return (gain_of(gains, self._tensors.__getitem__, self.tl.cfg.d_model),)

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        branch, part = ("attn", "o") if site.point.startswith("attn") else ("mlp", "out")
        inner = self.tl.get_hook_point(f"blocks.{site.layer}.{branch}.{part}.hook_in")
        if inner is None or self._entry is None:
            return None
        writers = self._entry.writers(site, self._tensors, self.hf_config)
        name, layout = next(iter(writers.items()))
        weight = self._tensors[name].detach()
        return inner, weight.T if layout == "conv1d" else weight

    def writing_modules(self, site: Site) -> list[WritingModule]:
        block = self.tl.blocks[site.layer]
        holder = block.attn if site.point.startswith("attn") else block.mlp
        module = holder.original_component
        if self._entry is None or module is None:
            return []
        written = self._entry.writers(site, self._tensors, self.hf_config)
        layouts = {id(self._tensors[name]): layout for name, layout in written.items()}
        own = {n: layouts[id(p)] for n, p in module.named_parameters() if id(p) in layouts}
        return [WritingModule(module, module, own)]

    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        arguments = self.arguments(call)
        with self._own_parts.in_place(), self._skipping.resumed(call):
            if keep == 0:
                self.hf.base_model(**arguments)
                return None
            with self.whole_products():
                return self.hf(**arguments, logits_to_keep=keep).logits

    def first_block(self, site: Site) -> int:
        """The first block that must run for a site to hold what it holds in a whole pass."""
        if site.point in EMBEDDING_POINTS:
            return 0
        block = self.tl.blocks[site.layer]
        return site.layer + (self.hook_point(site) is block.hook_out)

    def _still_called(self, block: int) -> set[nn.Module]:
        """Blocks that run, and the last skipped one's hook_out, to which it hands on."""
        last = self.tl.blocks[max(block - 1, 0) : block]
        return {*self.tl.blocks[block:], *(each.hook_out for each in last)}

    def hf_state_dict(self) -> dict[str, Tensor]:
        with torch.device("meta"):
            expected = list(type(self.hf)(self.hf_config).state_dict())
        state = self.hf.state_dict()
        names = {name.replace("._original_component", ""): name for name in state}
        missing = [name for name in expected if name not in names]
        if missing:
            raise ModelError(
                f"the Bridge holds no tensor for {missing[:3]} ({len(missing)} in all) of "
                f"{type(self.hf).__name__}: it cannot be written back as a Hugging Face checkpoint"
            )
        return {name: state[names[name]] for name in expected}
