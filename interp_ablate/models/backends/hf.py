"""A plain Hugging Face decoder as a backend: its own modules with hooks, no copy and no TransformerLens.

Knows: transformers' forward arguments and KV caches, the anatomy's sites. Does not know: prompts, plans or batches.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.edits.affine import NormGain
from interp_ablate.errors import ModelError
from interp_ablate.models.anatomy import Anatomy, Branch, measure
from interp_ablate.models.architectures import max_positions, text_config
from interp_ablate.models.backends.backend import ForwardCall, WritingModule
from interp_ablate.models.backends.block_skipping import BlockSkipping
from interp_ablate.models.backends.checks import fixed_tokens
from interp_ablate.models.backends.hf_sites import HFSites
from interp_ablate.models.backends.transformers_passes import TransformersPasses
from interp_ablate.models.embedding_anatomy import unembedding_of
from interp_ablate.models.loading import BackendName
from interp_ablate.models.measured_architecture import MeasuredArchitecture, architecture_from
from interp_ablate.models.quantized_modules import is_packed, plain_weight, refuse_export
from interp_ablate.models.written_parameters import Norm, gain_of
from interp_ablate.sites import EMBEDDING_POINTS, PROJECTION_POINTS, Site

WIDTH = 24  # fixed tokens of the measurement


_OF_ANY_MODULE = (
    "buffers", "modules", "named_buffers", "named_modules", "named_parameters", "parameters",
    "requires_grad_", "state_dict",
)  # fmt: skip
_INSTEAD = (
    "this model runs in plain transformers (backend 'hf'): {}. model.tl.hf is the Hugging Face model, "
    "model.tl.cfg has its sizes; read and write activations with collect(...), model.applied(plan) and "
    "model.hook_point(site)"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, under TransformerLens' names."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    d_mlp: int | None
    model_name: str

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain data."""
        return asdict(self)


class NoTransformerLens:
    """Stands in for `model.tl` where there is none: sizes and weights; everything else is refused in words."""

    def __init__(self, hf: Any, sizes: Sizes) -> None:
        self.hf = hf
        """The Hugging Face model."""
        self.cfg = sizes
        """The sizes under TransformerLens' names."""

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ANY_MODULE:
            return getattr(self.hf, name)
        raise AttributeError(_INSTEAD.format(f"there is no TransformerLens object with {name!r}"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(_INSTEAD.format("there is no TransformerLens object to call"))


class HFBackend(TransformersPasses):
    """The Hugging Face model's own forward pass, with hooks on the modules that its anatomy names."""

    name: BackendName = "hf"

    def __init__(self, hf: Any, anatomy: Anatomy | None = None) -> None:
        self.hf = self.module = hf
        self.hf_config = hf.config
        self.generation_config = getattr(hf, "generation_config", None)
        self._accepted = _accepted(hf)
        self.anatomy = anatomy or measured_anatomy(hf)
        self.tl = NoTransformerLens(hf, _sizes(hf, self.anatomy))
        self._sites = HFSites(hf, self.anatomy)
        self._blocks = list(hf.get_submodule(self.anatomy.blocks_path))
        everything = nn.ModuleList([hf, *self._sites.all_points])
        self._skipping = BlockSkipping(
            self._blocks, self.tl.cfg.d_model, everything, self._still_called
        )

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
        return measured_architecture(self.hf, self.anatomy)

    @property
    def unembed_name(self) -> str:
        """The unembedding's name in the model."""
        return _unembed_name(self.hf)

    def require_exact_writers(self) -> None:
        self.architecture  # noqa: B018 - it raises

    def hook_point(self, site: Site) -> nn.Module | None:
        return self._sites.points.get(site)

    @property
    def unembed_input(self) -> nn.Module:
        return self._sites.unembed_input

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | None:
        head = unembedding_of(self.hf)
        return None if head is None else plain_weight(head)

    def block(self, layer: int) -> nn.Module:
        return self._blocks[layer]

    def _branches(self, site: Site) -> Any:
        block = self.anatomy.blocks[site.layer]
        return block.attn if site.point.startswith("attn") else block.mlp

    def post_norm_gains(self, site: Site) -> tuple[NormGain | None, ...]:
        if site.point in ("embed", "pos_embed"):
            return (self._gain(self.anatomy.embed_norms),)
        if site.point not in PROJECTION_POINTS or site.layer >= len(self.anatomy.blocks):
            return (None,)
        parts = [part for branch in self._branches(site) for part in branch.parts]
        gains = tuple(self._gain(part.norms) for part in parts)
        return gains if any(gain is not None for gain in gains) else (None,)

    def _gain(self, norms: tuple[Norm, ...]) -> NormGain | None:
        return gain_of((n.gain for n in norms), self.hf.get_parameter, self.tl.cfg.d_model)

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        point = self._sites.inputs.get(site.projection)
        if point is None:
            return None
        (branch,) = self._branches(site)
        name, layout = next((n, lay) for n, lay in branch.writers.items() if lay != "bias")
        owner = self.hf.get_submodule(name.rpartition(".")[0])
        weight = plain_weight(owner) if is_packed(owner) else self.hf.get_parameter(name).detach()
        return point, weight.T if layout == "conv1d" else weight

    def writing_modules(self, site: Site) -> list[WritingModule]:
        return [self._writing_module(branch) for branch in self._branches(site)]

    def _writing_module(self, branch: Branch) -> WritingModule:
        output = self.hf.get_submodule(branch.path)
        if len(branch.parts) != 1:  # no one module before its norms
            return WritingModule(output, output, {}, branch.scale)
        [part] = branch.parts
        prefix = part.projection + "."
        layouts = {name.removeprefix(prefix): layout for name, layout in part.writers.items()}
        return WritingModule(output, self.hf.get_submodule(part.projection), layouts, branch.scale)

    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        arguments = {**self.arguments(call), "logits_to_keep": keep}
        model, accepted = (self.hf, self._accepted) if keep else self._body
        with self._skipping.resumed(call), self.whole_products():
            out = model(**{name: value for name, value in arguments.items() if name in accepted})
        return out.logits[:, -keep:] if keep else None

    @cached_property
    def _body(self) -> tuple[Any, frozenset[str]]:
        """The model below its unembedding, and the arguments that it takes."""
        body, taken = self.hf.base_model, _accepted(self.hf.base_model)
        # the base of an encoder's decoder takes everything there is, and hands it to another
        return (body, taken) if "input_ids" in taken else (self.hf, self._accepted)

    def first_block(self, site: Site) -> int:
        """The first block that must run for a site to hold what it holds in a whole pass."""
        return 0 if site.point in EMBEDDING_POINTS else site.layer + (site.point == "resid_post")

    def _still_called(self, block: int) -> set[nn.Module]:
        """Blocks that run and their sites, and where the last skipped one hands on."""
        points = self._sites.points.items()
        later = {p for s, p in points if s.layer >= block and s.point not in EMBEDDING_POINTS}
        last = {p for s, p in points if (s.layer, s.point) == (block - 1, "resid_post")}
        return {*self._blocks[block:], *later, *last}

    def hf_state_dict(self) -> dict[str, Tensor]:
        refuse_export(self.hf)
        return dict(self.hf.state_dict())


def _accepted(model: Any) -> frozenset[str]:
    """The arguments that a model's forward pass takes; models that wrap another hand `use_cache` on to it."""
    parameters = inspect.signature(model.forward).parameters
    hands_on = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return frozenset(parameters) | ({"use_cache"} if hands_on else set())


def word_embedding(hf: Any) -> Float[Tensor, "d_vocab d_embed"]:
    """The weight that turns tokens into what a decoder reads.

    Raises:
        ModelError: the model has none.
    """
    try:
        weight: Tensor | None = getattr(hf.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers does not know where it is
        weight = None
    if weight is None:
        raise ModelError(
            f"{type(hf).__name__} has no embedding of tokens: is it a decoder of text?"
        )
    return weight


def measured_anatomy(hf: Any) -> Anatomy:
    """The anatomy of a decoder, from one pass of fixed tokens; the model is left as it was.

    Raises:
        ModelError: no residual stream was found, or the model does not run on tokens alone.
    """
    weight = word_embedding(hf)
    width = min(WIDTH, max_positions(hf.config))
    tokens = fixed_tokens(weight.shape[0], width).to(weight.device)
    uncached = {"use_cache": False} if "use_cache" in _accepted(hf) else {}
    try:
        return measure(hf, lambda: hf(input_ids=tokens, **uncached))
    except ModelError:
        raise
    except Exception as error:  # a model's own code, run on tokens alone
        raise ModelError(
            f"{type(hf).__name__} does not run on tokens alone ({type(error).__name__}: "
            f"{(str(error).splitlines() or ['no reason'])[0]}): is it a decoder of text?"
        ) from error


def measured_architecture(hf: Any, anatomy: Anatomy | None = None) -> MeasuredArchitecture:
    """What writes to the stream of a decoder, as it was measured.

    Raises:
        ModelError: see `measured_anatomy`.
        ExportError: something writes there that no edit of a weight reaches; the message names it.
    """
    return architecture_from(anatomy or measured_anatomy(hf), _unembed_name(hf), hf.config)


def _unembed_name(hf: Any) -> str:
    head = unembedding_of(hf)
    names = {id(module): name for name, module in hf.named_modules()}
    return f"{names[id(head)]}.weight" if head is not None else "lm_head.weight"


def _sizes(hf: Any, anatomy: Anatomy) -> Sizes:
    """Sizes of the decoder, measured where they can be."""
    text, (d_vocab, width) = text_config(hf.config), hf.get_input_embeddings().weight.shape
    return Sizes(
        n_layers=len(anatomy.blocks),
        d_model=getattr(text, "hidden_size", None) or width,
        d_vocab=d_vocab,
        n_ctx=max_positions(hf.config),
        d_mlp=getattr(text, "intermediate_size", None),
        model_name=type(hf).__name__,
    )
