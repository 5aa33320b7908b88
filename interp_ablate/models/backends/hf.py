"""A plain Hugging Face decoder as a backend: its own modules with hooks, no copy and no TransformerLens.

Knows: transformers' forward arguments and KV caches, the anatomy's sites. Does not know: prompts, plans or batches.
"""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.errors import ModelError
from interp_ablate.models.anatomy import Anatomy, measure
from interp_ablate.models.architectures import text_config
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.backends.bridge_shortcuts import growing_cache
from interp_ablate.models.backends.checks import fixed_tokens
from interp_ablate.models.backends.hf_sites import HFSites
from interp_ablate.models.loading import BackendName
from interp_ablate.models.measured_architecture import MeasuredArchitecture, architecture_from
from interp_ablate.sites import Site

WIDTH = 24  # fixed tokens of the measurement


class NoTransformerLens:
    """Stands in for `model.tl` where there is none: sizes and weights; everything else is refused in words."""

    def __init__(self, hf: Any, sizes: dict[str, Any]) -> None:
        self.hf = hf
        """The Hugging Face model."""
        self.cfg = SimpleNamespace(**sizes)
        """The sizes under TransformerLens' names."""
        self.parameters, self.state_dict = hf.parameters, hf.state_dict
        self.requires_grad_ = hf.requires_grad_

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this model runs in plain transformers (backend 'hf'): there is no TransformerLens object "
            f"with {name!r}. model.tl.hf is the Hugging Face model, model.tl.cfg has its sizes; read and write "
            "activations with collect(...), model.applied(plan) and model.hook_point(site)"
        )


class HFBackend:
    """The Hugging Face model's own forward pass, with hooks on the modules that its anatomy names."""

    name: BackendName = "hf"

    def __init__(self, hf: Any, anatomy: Anatomy | None = None) -> None:
        self.hf, self.hf_config = hf, hf.config
        self.generation_config = getattr(hf, "generation_config", None)
        self._text = text_config(hf.config)
        self._accepted = frozenset(inspect.signature(hf.forward).parameters)
        self.anatomy = anatomy or measured_anatomy(hf)
        self.tl = NoTransformerLens(hf, _sizes(self._text, self.anatomy, hf.get_input_embeddings()))
        self._sites = HFSites(hf, self.anatomy)

    @classmethod
    def from_hf(cls, hf: Any, tokenizer: Any) -> HFBackend:
        """A backend over a Hugging Face model, which it uses in place.

        Raises:
            ModelError: no residual stream was found in the model.
        """
        return cls(hf)

    @cached_property
    def architecture(self) -> MeasuredArchitecture:
        """What writes to the stream, as it was measured.

        Raises:
            ExportError: something writes there that no edit of a weight reaches; the message names it.
        """
        head = self.hf.get_output_embeddings()
        names = {id(module): name for name, module in self.hf.named_modules()}
        unembed = f"{names[id(head)]}.weight" if head is not None else "lm_head.weight"
        return architecture_from(self.anatomy, unembed, self.hf_config)

    def require_exact_writers(self) -> None:
        self.architecture  # noqa: B018 - it raises

    def hook_point(self, site: Site) -> nn.Module | None:
        return self._sites.points.get(site)

    @property
    def unembed_input(self) -> nn.Module:
        return self._sites.unembed_input

    def _branches(self, site: Site) -> Any:
        block = self.anatomy.blocks[site.layer]
        return block.attn if site.point.startswith("attn") else block.mlp

    def post_norm_gain(self, site: Site) -> Float[Tensor, " d_model"] | None:
        if not site.point.endswith("_proj") or site.layer >= len(self.anatomy.blocks):
            return None
        branches = self._branches(site)
        if len(branches) != 1 or branches[0].norm is None:
            return None
        weight = self.hf.get_submodule(branches[0].norm.path).weight
        return weight.detach().cpu().double() + branches[0].norm.offset

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        point = self._sites.inputs.get(site.projection)
        if point is None:
            return None
        (branch,) = self._branches(site)
        name, layout = next((n, lay) for n, lay in branch.writers.items() if lay != "bias")
        weight = self.hf.get_parameter(name).detach()
        return point, weight.T if layout == "conv1d" else weight

    def new_cache(self, batch: int) -> Any:
        return growing_cache(self._text)

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        gathered = copy.copy(cache)  # layers replace their tensors, they never write into them
        gathered.layers = [copy.copy(layer) for layer in cache.layers]
        return self.select_cache(gathered, rows)

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        cache.batch_select_indices(rows)
        return cache

    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        arguments = {
            "input_ids": call.tokens,
            "attention_mask": call.mask,
            "position_ids": call.positions,
            "past_key_values": call.cache,
            "use_cache": call.cache is not None,
        }
        if keep == 0:
            body = self.hf.base_model
            taken = inspect.signature(body.forward).parameters
            body(**{name: value for name, value in arguments.items() if name in taken})
            return None
        given = {name: value for name, value in arguments.items() if name in self._accepted}
        if "logits_to_keep" in self._accepted:
            given["logits_to_keep"] = keep
        return self.hf(**given).logits[:, -keep:]

    @property
    def can_resume(self) -> bool:
        return False

    def first_block(self, site: Site) -> int:
        return 0

    def is_hooked_below(self, block: int) -> bool:
        return True

    def hf_state_dict(self) -> dict[str, Tensor]:
        return dict(self.hf.state_dict())


def measured_anatomy(hf: Any) -> Anatomy:
    """The anatomy of a decoder, from one pass of fixed tokens; the model is left as it was.

    Raises:
        ModelError: no residual stream was found, or the model does not run on tokens alone.
    """
    text, weight = text_config(hf.config), hf.get_input_embeddings().weight
    width = min(WIDTH, getattr(text, "max_position_embeddings", None) or WIDTH)
    tokens = fixed_tokens(weight.shape[0], width).to(weight.device)
    uncached = (
        {"use_cache": False} if "use_cache" in inspect.signature(hf.forward).parameters else {}
    )
    try:
        return measure(hf, lambda: hf(input_ids=tokens, **uncached))
    except ModelError:
        raise
    except Exception as error:  # a model's own code, run on tokens alone
        raise ModelError(
            f"{type(hf).__name__} does not run on tokens alone ({type(error).__name__}: "
            f"{(str(error).splitlines() or ['no reason'])[0]}): is it a decoder of text?"
        ) from error


def _sizes(text: Any, anatomy: Anatomy, embedding: nn.Module) -> dict[str, Any]:
    """Sizes of the decoder, measured where they can be."""
    d_vocab, d_model = embedding.weight.shape  # type: ignore[misc]
    return {
        "n_layers": len(anatomy.blocks),
        "d_model": d_model,
        "d_vocab": d_vocab,
        "n_ctx": getattr(text, "max_position_embeddings", None) or 1 << 20,
        "d_mlp": getattr(text, "intermediate_size", None),
    }
