"""The operations that a backend offers (sites, hooks, caches, forward calls), and the sites of one loaded model.

Knows: the protocol of a backend, the data of one forward call, points that an architecture lacks. Does not know: any TransformerLens class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp_ablate.edits.affine import NormGain
from interp_ablate.errors import ModelError
from interp_ablate.models.architectures import Architecture, Layout, max_positions
from interp_ablate.models.loading import BackendName
from interp_ablate.sites import EMBEDDING_POINTS, POINTS, RESIDUAL_POINTS, Point, Site, sites_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class WritingModule:
    """One module that writes to the stream."""

    output: nn.Module
    """The module whose output, times `scale`, reaches the stream."""
    projection: nn.Module
    """The module before the norm, where a norm follows it; else the same."""
    layouts: dict[str, Layout]
    """The parameters of the projection that write, by their names in it."""
    scale: float = 1.0


class Backend(Protocol):
    """The operations that `Model` needs of a TransformerLens object; each backend is one class."""

    name: BackendName
    tl: Any
    module: nn.Module
    """The torch module that holds the model's tensors."""
    hf_config: Any
    generation_config: Any

    @property
    def architecture(self) -> Architecture:
        """The tensors that write to the stream."""

    def require_exact_writers(self) -> None:
        """Refuse a model of which it is measured that something else writes to the stream than its writers.

        Raises:
            ExportError: it names what writes.
        """

    def hook_point(self, site: Site) -> nn.Module | None:
        """The module whose output is the activation at a site; None if the model has no such site."""

    @property
    def unembed_input(self) -> nn.Module:
        """The module whose output the unembedding reads."""

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | None:
        """The weight that turns the final norm's output into logits; None where there is none."""

    def block(self, layer: int) -> nn.Module:
        """The module of one block."""

    def post_norm_gains(self, site: Site) -> tuple[NormGain | None, ...]:
        """The gain of the norms between each projection of a site, or an embedding, and the stream; None if none follows.

        Several where modules with norms of their own write at one site: its hook point is then called once
        for each, in this order, and its `part` says for which.
        """

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        """The hook point before the writing weight of a site, and the weight; None if it is not one matrix."""

    def writing_modules(self, site: Site) -> list[WritingModule]:
        """The modules whose outputs sum to what reaches the stream at an output site; empty if unknown."""

    def head_sizes(self) -> list[int | None]:
        """The width of one attention head's output in each layer; None for a layer that keeps no values."""

    def new_cache(self, batch: int) -> Any:
        """An empty KV cache for a number of rows."""

    def gathered_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        """A cache of some rows (one may come several times); the old one stays as it is."""

    def select_cache(self, cache: Any, rows: Int[Tensor, " row"]) -> Any:
        """The cache of some rows; the old one is not used again."""

    def forward(self, call: ForwardCall, keep: int) -> Tensor | None:
        """Run a call; logits [batch, keep, d_vocab] of the last `keep` positions, None for 0."""

    @property
    def can_resume(self) -> bool:
        """True if calls may have a resume point."""

    def first_block(self, site: Site) -> int:
        """The first block that must run for a site to hold what it holds in a whole pass."""

    def is_hooked_below(self, block: int) -> bool:
        """True if a pass that resumes at a block would leave out hooks of somebody else."""

    def hook_ids(self) -> frozenset[int]:
        """The ids of all hooks in the model but TransformerLens' own: plans', captures' and the user's."""

    def unhooked(self) -> AbstractContextManager[None]:
        """Inside the block none of these hooks is called."""

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under their Hugging Face names."""


@dataclass(frozen=True, eq=False)
class ResumePoint:
    """The block at which a forward call starts; the blocks below it are not run."""

    block: int
    """The first block that runs; the number of layers if none does."""
    entering: Float[Tensor, "batch new d_model"]
    """The residual stream that enters the block, at every new token."""


@dataclass
class ForwardCall:
    """One call of a model's forward pass, for a batch of rows."""

    tokens: Int[Tensor, "batch new"]
    """The new tokens, those that the cache does not hold yet."""
    mask: Int[Tensor, "batch pos"]
    """1 for real tokens and 0 for padding, over cached and new tokens."""
    positions: Int[Tensor, "batch new"]
    """The position of each new token in its own row, counted from 0."""
    prompt_lengths: Int[Tensor, " batch"]
    cache: Any = None
    """The backend's KV cache."""
    plans: Int[Tensor, " batch"] | None = None
    """The index of each row's plan, where rows are under different plans."""
    resume: ResumePoint | None = None
    """Where the call starts; None for the embedding."""
    padded: bool = True
    """False where all tokens are real: the mask says nothing then."""
    decisions: dict[str, Bool[Tensor, " batch"]] = field(default_factory=dict)
    """For each condition that was read, by its key, the rows whose prompt meets it; kept while a row is decoded."""

    def of_rows(self, rows: Int[Tensor, " row"], cache: Any) -> ForwardCall:
        """The same call for some of its rows, with the cache of these rows."""
        return ForwardCall(
            self.tokens[rows],
            self.mask[rows],
            self.positions[rows],
            self.prompt_lengths[rows],
            cache,
            None if self.plans is None else self.plans[rows],
            padded=self.padded,
            decisions={key: met[rows.to(met.device)] for key, met in self.decisions.items()},
        )

    def followed_by(self, tokens: Int[Tensor, " batch"]) -> ForwardCall:
        """The next decoding call: one more token in each row; without a cache, after all that were before."""
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        new, positions = tokens[:, None], self.positions[:, -1:] + 1
        if self.cache is None:
            new = torch.cat([self.tokens, new], 1)
            positions = torch.cat([self.positions, positions], 1)
        return ForwardCall(
            new, mask, positions, self.prompt_lengths, self.cache, self.plans,
            padded=self.padded, decisions=self.decisions,
        )  # fmt: skip

    @cached_property
    def generated(self) -> Bool[Tensor, "batch new"]:
        """True for the new tokens that come after the prompt, counted from the start of the row."""
        return self.positions >= self.prompt_lengths[:, None]


class SiteMap:
    """The sites of one model, over its backend; `model_name` is for messages."""

    def __init__(self, backend: Backend, model_name: str) -> None:
        self._backend, self._model_name = backend, model_name
        config = backend.hf_config
        self._longest = max_positions(config) if config else int(backend.tl.cfg.n_ctx)
        self.n_layers: int = backend.tl.cfg.n_layers

    def hook_point(self, site: Site) -> nn.Module:
        """The TransformerLens HookPoint of a site.

        Raises:
            ModelError: a layer beyond the last, or a site this architecture does not have.
        """
        if site.layer >= self.n_layers:
            raise ModelError(
                f"no layer {site.layer}: {self._model_name} has layers 0 to {self.n_layers - 1}"
            )
        point = self._backend.hook_point(site)
        if point is None:
            points = [p for p in POINTS if self._backend.hook_point(Site(0, p)) is not None]
            raise ModelError(
                f"{self._model_name} ({self._backend.name}) has no site {site}; its points are "
                f"{', '.join(points)} (blocks that run attention and MLP in parallel have no resid_mid)"
            )
        return point

    def has(self, site: Site) -> bool:
        """True if the model has the site."""
        return site.layer < self.n_layers and self._backend.hook_point(site) is not None

    def check_positions(self, length: int) -> None:
        """Refuse rows with more tokens than there are positions, where positions are learned; elsewhere warn.

        A rotary model runs beyond the positions of its config, on angles that it was not trained on.

        Raises:
            ModelError: a row is longer.
        """
        fixed = self._backend.name == "hooked" or self.has(Site(0, "pos_embed"))
        if fixed and length > self._backend.tl.cfg.n_ctx:
            raise ModelError(
                f"{length} tokens, and {self._model_name} has {self._backend.tl.cfg.n_ctx} positions: give "
                "shorter prompts, or ask for fewer new tokens"
            )
        if length > self._longest:
            logger.warning(
                "%d tokens, and the config of %s knows %d positions: beyond them it does what it was not trained to do "
                "(shorter prompts or fewer new tokens stay within)",
                length, self._model_name, self._longest,
            )  # fmt: skip
            self._longest = length  # said once, and again only of longer rows

    def projection(self, site: Site) -> tuple[nn.Module, Float[Tensor, "d_model in"]] | None:
        """See `Backend.projection`; None for a site that the model lacks too."""
        return self._backend.projection(site) if self.has(site) else None

    @property
    def unembed_input(self) -> nn.Module:
        """See `Backend.unembed_input`."""
        return self._backend.unembed_input

    @property
    def unembedding(self) -> Float[Tensor, "d_vocab d_model"] | None:
        """See `Backend.unembedding`."""
        return self._backend.unembedding

    def block(self, layer: int) -> nn.Module:
        """See `Backend.block`."""
        return self._backend.block(layer)

    def post_norm_gains(self, site: Site) -> tuple[NormGain | None, ...]:
        """See `Backend.post_norm_gains`."""
        return self._backend.post_norm_gains(site)

    def is_normed(self, site: Site) -> bool:
        """True if a norm stands between what is written at a site, by either of its names, and the stream."""
        return any(gain is not None for gain in self.post_norm_gains(site.projection))

    def writing_modules(self, site: Site) -> list[WritingModule]:
        """See `Backend.writing_modules`."""
        return self._backend.writing_modules(site)

    @cached_property
    def head_sizes(self) -> list[int | None]:
        """See `Backend.head_sizes`."""
        return self._backend.head_sizes()

    @property
    def writers(self) -> tuple[Site, ...]:
        """See `Model.writers`."""
        self._backend.require_exact_writers()
        return self._declared_writers

    @cached_property
    def _declared_writers(self) -> tuple[Site, ...]:
        sites = [Site(0, point) for point in EMBEDDING_POINTS]
        for site in sites_of(("attn_out", "mlp_out"), range(self.n_layers)):
            sites.append(site.projection if self.is_normed(site) else site)
        return tuple(site for site in sites if self._backend.hook_point(site) is not None)

    @property
    def residual_points(self) -> tuple[Point, ...]:
        """See `Model.residual_points`."""
        return tuple(p for p in RESIDUAL_POINTS if self._backend.hook_point(Site(0, p)) is not None)

    def first_block(self, sites: Iterable[Site]) -> int:
        """The first block that must run for the sites to hold what they hold in a whole pass.

        The number of layers for no sites; 0 for the embedding, and for every site of a HookedTransformer,
        which runs whole passes only.

        Raises:
            ModelError: a site that the model does not have.
        """
        first = self.n_layers
        for site in sites:
            self.hook_point(site)
            first = min(first, self._backend.first_block(site))
        return first
