"""HookedTransformer (TransformerLens 3.x) as a backend.

Knows: HookedTransformer, its hook names, its KV cache. Does not know: prompts, plans or batches.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.models.anatomy import measure_blocks, problems_of
from interp_ablate.models.architectures import Architecture, architecture_of
from interp_ablate.models.backends.backend import ForwardCall, WritingModule
from interp_ablate.models.backends.checks import check_logits, fixed_tokens, tokenizer_copy
from interp_ablate.models.backends.foreign_hooks import hook_ids, without_hooks
from interp_ablate.models.backends.proof import WIDTH, Proof, refusal, sums_that_fail
from interp_ablate.models.loading import BackendName
from interp_ablate.sites import PROJECTION_POINTS, Site
from interp_ablate.storage.atomic_files import temporary_folder

# A HookedTransformer built from a checkpoint must reproduce its logits to this, in fp32; else it is refused.
HOOKED_TOLERANCE = 5e-3
# HookedTransformer allocates [n_ctx, n_ctx] masks in every block; longer contexts only cost memory.
MAX_HOOKED_CONTEXT = 2048
# The parameters of blocks that its sites say write to the stream.
_WRITES = re.compile(r"blocks\.\d+\.(attn\.[Wb]_O|mlp\.(.*\.)?([Wb]_out|W_out\.weight))")


class HookedBackend:
    """HookedTransformer: TransformerLens' own forward pass, with the checkpoint's weights."""

    name: BackendName = "hooked"
    can_resume = False  # every pass is a whole one

    def __init__(self, tl: Any, hf_config: Any = None, generation_config: Any = None) -> None:
        self.tl = self.module = tl
        self.hf_config, self.generation_config = hf_config, generation_config
        self._proof = Proof(tl, self._fault)

    @classmethod
    def from_hf(cls, hf: Any, tokenizer: Any) -> HookedBackend:
        """A HookedTransformer with the weights of any architecture that TransformerLens can convert.

        Raises:
            ModelError: TransformerLens has no HookedTransformer, cannot convert the model or not run it, or the
                logits are not the model's.
        """
        try:
            hooked = _hooked_from_hf(hf, tokenizer)
            backend = cls(hooked, hf.config, getattr(hf, "generation_config", None))
            backend._check_against(hf)
        except InterpAblateError:
            raise
        except Exception as error:  # TransformerLens raises of every kind for what it does not know
            lines = str(error).splitlines() or ["no reason"]
            raise ModelError(
                f"TransformerLens cannot build a HookedTransformer from {type(hf).__name__}, or not run it in "
                f"{str(next(hf.parameters()).dtype).removeprefix('torch.')} ({type(error).__name__}: {lines[0]}): use "
                "backend='hf', or 'bridge'"
            ) from error
        return backend

    def _check_against(self, hf: Any) -> None:
        """Compare logits with the checkpoint's own on fixed tokens; raise where they differ."""
        width = min(24, self.tl.cfg.n_ctx)
        tokens = fixed_tokens(hf.config.vocab_size, width).to(next(hf.parameters()).device)
        ones = torch.ones_like(tokens)
        positions = torch.arange(width, device=tokens.device)[None]
        with torch.no_grad():
            want = hf(tokens).logits.float()
            got = self.forward(ForwardCall(tokens, ones, positions, ones.sum(1)), width)
        assert got is not None
        check_logits(got, want, hf, "HookedTransformer built from", HOOKED_TOLERANCE)

    @property
    def architecture(self) -> Architecture:
        """The declared entry of the checkpoint's config.

        Raises:
            ExportError: there is no entry, or it was measured that something else writes.
            ModelError: the object was wrapped without the config.
        """
        if self.hf_config is None:
            raise ModelError(
                "the model was wrapped without its Hugging Face config: Model.wrap(..., hf_config=...)"
            )
        self.require_exact_writers()
        return architecture_of(self.hf_config)

    def require_exact_writers(self) -> None:
        self._proof.require()

    @torch.no_grad()
    def _fault(self) -> str:
        """Why W_E, W_pos, W_O and W_out are not all that was measured to write to the stream; empty if they are."""
        tl, width = self.tl, min(WIDTH, self.tl.cfg.n_ctx)
        tokens = fixed_tokens(tl.cfg.d_vocab, width).to(tl.cfg.device)
        with without_hooks(tl, points_only=True):
            try:
                _, blocks, _ = measure_blocks(tl, lambda: tl(tokens))
            except Exception as error:  # of a HookedTransformer that somebody has changed
                return f"what writes to its stream could not be measured: {error}"
            faults = problems_of(blocks) + sums_that_fail(self, (1.0,))
            if not torch.equal(tl.embed(tokens), tl.embed.W_E[tokens]):
                faults.append("embed does more than look up rows of W_E")
            if self.hook_point(Site(0, "pos_embed")) and not torch.equal(
                tl.pos_embed(tokens)[0], tl.pos_embed.W_pos[:width]
            ):
                faults.append("pos_embed does more than look up rows of W_pos")
        branches = (branch for block in blocks for branch in (*block.attn, *block.mlp))
        written = (name for branch in branches for name in branch.writers)
        faults += [f"{name} writes too" for name in written if not _WRITES.fullmatch(name)]
        return refusal("HookedTransformer", faults)

    def hook_point(self, site: Site) -> nn.Module | None:
        if site.point in PROJECTION_POINTS and site.layer < self.tl.cfg.n_layers:
            return getattr(self.tl.blocks[site.layer], site.point.removesuffix("_proj"))
        if site.point == "pos_embed" and self.tl.cfg.positional_embedding_type != "standard":
            return None
        return self.tl.hook_dict.get(str(site))

    @property
    def unembed_input(self) -> nn.Module:
        return self.tl.ln_final  # `forward` unembeds what it returns

    def post_norm_gains(self, site: Site) -> tuple[Float[Tensor, " d_model"] | None, ...]:
        names: dict[str, str] = {"attn_proj": "ln1_post", "mlp_proj": "ln2_post"}
        if site.point not in names or not self.tl.cfg.use_normalization_before_and_after:
            return (None,)
        return (getattr(self.tl.blocks[site.layer], names[site.point]).w.detach().cpu().double(),)

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        block = self.tl.blocks[site.layer]
        if site.point.startswith("attn"):
            weight = block.attn.W_O.detach()
            return block.attn.hook_z, weight.reshape(-1, weight.shape[-1]).T
        if self.tl.cfg.num_experts:
            return None
        return block.mlp.hook_post, block.mlp.W_out.detach().T

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | None:
        return self.tl.unembed.W_U.detach().T

    def block(self, layer: int) -> nn.Module:
        return self.tl.blocks[layer]

    def writing_modules(self, site: Site) -> list[WritingModule]:
        return []

    def head_sizes(self) -> list[int | None]:
        return [self.tl.cfg.d_head] * self.tl.cfg.n_layers

    def new_cache(self, batch: int) -> Any:
        from transformer_lens import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.tl.cfg, self.tl.cfg.device, batch)

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return self.select_cache(copy.copy(cache), rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        return self._each(cache, lambda x: x[rows])

    def first_block(self, site: Site) -> int:
        return 0

    def hook_ids(self) -> frozenset[int]:
        return hook_ids(self.tl)

    def unhooked(self) -> AbstractContextManager[None]:
        return without_hooks(self.tl)

    def is_hooked_below(self, block: int) -> bool:
        return True

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

    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        residual = self.tl(
            call.tokens,
            attention_mask=call.mask[:, -call.tokens.shape[1] :],
            past_kv_cache=call.cache,
            stop_at_layer=self.tl.cfg.n_layers,
        )
        if keep == 0:
            return None
        logits = self.tl.unembed(self.tl.ln_final(residual[:, -keep:]))
        cap = getattr(self.tl.cfg, "output_logits_soft_cap", 0) or 0
        return logits if cap <= 0 else cap * torch.tanh(logits / cap)

    def hf_state_dict(self) -> dict[str, Tensor]:
        from interp_ablate.models.backends.hooked_to_hf import hooked_to_hf

        if self.hf_config is None:
            raise ModelError(
                "this HookedTransformer was wrapped without its Hugging Face config, which holds the "
                "layout of the checkpoint: pass Model.wrap(..., hf_config=AutoConfig.from_pretrained(...))"
            )
        return hooked_to_hf(self.tl.state_dict(), self.hf_config)


def _hooked_from_hf(hf: Any, tokenizer: Any) -> Any:
    """A HookedTransformer with raw weights, by TransformerLens' own conversion."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens import loading_from_pretrained as loading
    except ImportError as error:
        raise ModelError(
            "the installed TransformerLens has no HookedTransformer (removed in 4.0): use "
            "backend='bridge', or pip install 'transformer-lens>=3.9,<4'"
        ) from error
    with temporary_folder("interp_ablate_hooked") as folder:
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
    hooked = HookedTransformer(cfg, tokenizer=tokenizer_copy(tokenizer))
    try:
        hooked.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )
    except RuntimeError as error:
        shown = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the weights of {type(hf).__name__} do not fit TransformerLens's HookedTransformer ({shown}): "
            "use backend='bridge'"
        ) from error
    for (
        parameter
    ) in hooked.parameters():  # a router of experts is made in float32, whatever its inputs
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(cfg.dtype)
    return hooked.to(hf.device, print_details=False).eval().requires_grad_(False)


def _hooked_values(loading: Any, folder: str, hf: Any) -> dict[str, Any]:
    """The fields of a HookedTransformerConfig, by TransformerLens' own reading of the checkpoint's config."""
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
