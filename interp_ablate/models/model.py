"""The model: one face over HookedTransformer and TransformerBridge, with hooks that mean the same on both.

Knows: how its parts fit together, prompts as tokens. Does not know: how passes are batched, hooks installed or tokens chosen (its parts do).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.directions.direction import Direction, as_directions
from interp_ablate.display import Html, html_of, shortened
from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError, ModelError
from interp_ablate.models.applied_plans import AppliedPlans
from interp_ablate.models.architectures import Architecture
from interp_ablate.models.backends.backend import Backend, SiteMap
from interp_ablate.models.backends.registry import backend_of
from interp_ablate.models.batches import Batch
from interp_ablate.models.fingerprint import ModelFingerprint, rendered
from interp_ablate.models.forward import Capture, ForwardPasses
from interp_ablate.models.generation import (
    Decoding,
    MonitoredToken,
    generate_tokens,
    monitored_tokens,
)
from interp_ablate.models.loading import BackendName
from interp_ablate.models.residual_cache import ResidualCache, ResidualCaching
from interp_ablate.models.site_tree import site_tree
from interp_ablate.models.sources import ModelSource
from interp_ablate.models.thinking import Generation, Thinking
from interp_ablate.prompts.chat_format import TemplateLike, as_chat_format
from interp_ablate.prompts.chat_template import check_format, encode
from interp_ablate.prompts.messages import is_chat
from interp_ablate.prompts.prompt import Prompt, PromptLike, as_prompt, as_prompts
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import Point, Site, SiteLike


class Model:
    """A decoder with named sites: forward passes, generation, plans; HookedTransformer or Bridge below.

    Make one with `load_model` or `Model.wrap`. `model.tl` is the TransformerLens object itself; its
    own `run_with_cache` works inside `with model.applied(plan):` and sees the edited activations.

    The sites, in the order in which a forward pass reaches them:

        embed (and pos_embed, where positions are learned; embed_bias, where a norm with a bias follows)
        block L
        ├── resid_pre                                     the stream that enters the block
        ├── attention ── attn_proj ── (norm) ── attn_out  added to the stream
        ├── resid_mid                                     not in parallel blocks
        ├── MLP ──────── mlp_proj ─── (norm) ── mlp_out   added to the stream
        └── resid_post                                    the stream that leaves the block
        final norm, unembedding

    `*_proj` is the output of W_O or W_out itself, `*_out` what reaches the stream: they differ where a
    norm stands between them (post-norm blocks: Gemma 2 and 3, OLMo 2).

    Its parts: `model.plans` holds the applied plans and their hooks, `model.site_map` the sites it has.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        source: ModelSource,
        *,
        template: TemplateLike = None,
    ) -> None:
        self._backend = backend
        self.backend: BackendName = backend.name
        self.tokenizer, self.source, self.chat_format = tokenizer, source, as_chat_format(template)
        check_format(tokenizer, template)
        self.thinking = Thinking(tokenizer, self.chat_format)
        self.hf_config, self.generation_config = backend.hf_config, backend.generation_config
        self.site_map = SiteMap(backend, source.name)
        self.plans = AppliedPlans(backend, self.site_map)
        self._fingerprint = ModelFingerprint(backend.module)
        self._passes = ForwardPasses(backend, self.site_map, self.plans)
        self._residuals = ResidualCaching(self._passes, self.site_map, self._fingerprint)

    @classmethod
    def wrap(
        cls,
        obj: Any,
        tokenizer: Any = None,
        *,
        hf_config: Any = None,
        template: TemplateLike = None,
    ) -> Model:
        """Use a HookedTransformer or TransformerBridge that already exists.

        Args:
            tokenizer: default: the object's own.
            hf_config: the Hugging Face config; a HookedTransformer needs it only to be exported.

        Raises:
            ModelError: another kind of object; processed weights (LayerNorm folded, writing weights
                centred), under which activations and exports would not be those of the checkpoint.
        """
        backend = backend_of(obj, hf_config)
        source = ModelSource(
            str(getattr(obj.cfg, "model_name", None) or type(obj).__name__), "object"
        )
        tokenizer = tokenizer if tokenizer is not None else obj.tokenizer
        return cls(backend, tokenizer, source, template=template)

    def __repr__(self) -> str:
        return (
            f"Model({self.source.name!r}, backend={self.backend!r}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, dtype={self.dtype})"
        )

    def _repr_html_(self) -> str:
        return Html(f"<pre>{html_of(site_tree(repr(self), self.site_map, self.n_layers))}</pre>")

    @property
    def tl(self) -> Any:
        """The HookedTransformer or TransformerBridge itself."""
        return self._backend.tl

    @property
    def n_layers(self) -> int:
        return self.tl.cfg.n_layers

    @property
    def d_model(self) -> int:
        return self.tl.cfg.d_model

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tl.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tl.parameters()).device

    @property
    def writers(self) -> tuple[Site, ...]:
        """Every site that writes to the residual stream and has an exact weight form, in forward order.

        embed (pos_embed, embed_bias), and a layer's attn_out and mlp_out; in post-norm blocks attn_proj and
        mlp_proj, the projections before their norm. Ablating a direction at all of them with strength 1
        leaves nothing along it anywhere.
        """
        return self.site_map.writers

    @property
    def residual_points(self) -> tuple[Point, ...]:
        """The points of the residual stream that its blocks have: parallel ones have no resid_mid."""
        return self.site_map.residual_points

    def hook_point(self, site: SiteLike) -> nn.Module:
        """The TransformerLens HookPoint of a site.

        Raises:
            ModelError: a layer beyond the last, or a site this architecture does not have.
        """
        return self.site_map.hook_point(Site.parse(site))

    @property
    def architecture(self) -> Architecture:
        """The tensors that write to the stream: the declared entry, or what the Bridge's component map says.

        Raises:
            ExportError: neither names every writer; the message shows what there is.
        """
        return self._backend.architecture

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under their Hugging Face names (views of the live tensors where possible).

        Raises:
            ModelError: an object that cannot be mapped back.
        """
        return self._backend.hf_state_dict()

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides outputs: weights, config, attention, tokenizer, template, applied plans.

        Weights are hashed once, and again after a write to one of them. Under hooks of your own in `model.tl`
        it is another at every reading, so that nothing that was kept is taken for theirs, nor theirs kept.
        """
        name = [
            [[plan.fingerprint for plan in each.plans], each.plan_of_row]
            for each in self.plans.installed
        ]
        unknown = uuid4().hex if self.plans.has_unknown_edits else None
        tokens = rendered(self.encode) if self.tokenizer is not None else []
        about = (self.backend, tokens, sorted(self.eos_token_ids), name, unknown)
        configs = (self.hf_config, getattr(self.tl, "cfg", None))
        return self._fingerprint.of(configs, self.tokenizer, self.chat_format, *about)

    @property
    def state(self) -> tuple[tuple[object, ...], object]:
        """What decides outputs now, as a value to compare with a later one: plans, and weights with hooks.

        Raises:
            PlanError: another thread has applied a plan.
        """
        changeable = self._fingerprint.weights_version, self.plans.foreign_hooks
        return self.plans.in_force, changeable

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a response: the generation config's and the tokenizer's."""
        tokens: set[int] = set()
        for holder in (self.generation_config, self.hf_config, self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            tokens.update([value] if isinstance(value, int) else value or [])
        return frozenset(tokens)

    def encode(self, prompt: PromptLike) -> list[int]:
        """Token ids of one prompt, through the chat template; token lists pass through."""
        if isinstance(prompt, (str, Prompt)) or is_chat(prompt):
            if self.tokenizer is None:
                raise ModelError(
                    f"{self.source.name} was wrapped without a tokenizer: give token ids, or "
                    "Model.wrap(..., tokenizer)"
                )
            return encode(as_prompt(prompt), self.tokenizer, template=self.chat_format)
        return list(prompt)  # type: ignore[arg-type]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out; empty without a tokenizer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer else ""

    def encode_all(self, prompts: PromptLike | Sequence[PromptLike]) -> list[list[int]]:
        """Token ids of many prompts.

        Raises:
            ModelError: none, or ids outside the vocabulary.
        """
        rows = [self.encode(prompt) for prompt in as_prompts(prompts)]
        if not rows or not all(rows):
            raise ModelError("no tokens to run: the list of prompts is empty, or one of them is")
        top = max(max(row) for row in rows)
        if top >= self.tl.cfg.d_vocab:
            raise ModelError(
                f"token id {top} but the model's vocabulary ends at {self.tl.cfg.d_vocab - 1}: "
                "is this the model's own tokenizer?"
            )
        return rows

    @contextmanager
    def applied(self, plan: Plan | Edit | None) -> Iterator[Model]:
        """Run everything inside the block under the plan, generation with a KV cache included.

        None, or a plan without edits, leaves the model as it is.

        Raises:
            PlanError: a plan that does not fit the model; on leaving the block without another
                error, a plan of which some hook never fired (nothing was measured under it).
        """
        with self.plans.applied(plan):
            yield self

    @contextmanager
    def applied_each(self, plans: Sequence[Plan | Edit | None]) -> Iterator[Model]:
        """Run rows under plans of their own: row i of what is run inside is under `plans[i]`.

        None leaves a row unedited. What runs inside must have as many prompts as there are plans. Many
        candidates then share each forward pass, and a prefix of the prompts is run once a plan.

        Raises:
            PlanError: as `applied`; another `applied_each` outside; a norm-preserving edit (it rescales
                what a whole weight reads, for all rows); another number of prompts inside.
        """
        with self.plans.applied_each(plans):
            yield self

    @property
    def active_plan(self) -> Plan:
        """The plans applied now, outermost first, as one.

        Raises:
            PlanError: rows are under different plans (`applied_each`).
        """
        return self.plans.active_plan

    def stream(
        self,
        rows: Sequence[Sequence[int]],
        *,
        keep: int = 1,
        prompt_lengths: Sequence[int] | None = None,
        capture: Mapping[SiteLike, Capture] | None = None,
        batch_size: int | None = None,
        tail: int = 1,
        residual_cache: ResidualCache | None = None,
    ) -> Iterator[tuple[Batch, Tensor | None, dict[Site, Tensor]]]:
        """Forward passes over token rows in length-sorted batches.

        Yields for each batch: the batch (its `index` says which rows), the logits of its last `keep`
        positions [batch, keep, d_vocab] (None for 0: no logits are computed; fewer where the batch is
        shorter, and values before a row's first token mean nothing), and what each capture function
        returned for its site (a `Site`). Captures see the last positions of the rows; `tail` says how many of them
        at least. The tokens all rows share in front are run once for all (once a plan) where that changes
        nothing (measured on fixed tokens).

        Args:
            batch_size: rows a batch at most; by default as many as fit into the free memory, up to
                some. A batch for which memory runs out is run again in halves.
            residual_cache: what `cache_residuals` kept of these rows: blocks below the first that is
                edited or captured are not run again.
        """
        self.site_map.check_positions(max(map(len, rows), default=0))
        sites = {Site.parse(site): read for site, read in (capture or {}).items()}
        return self._passes.stream(
            rows,
            keep=keep,
            prompt_lengths=prompt_lengths,
            capture=sites,
            batch_size=batch_size,
            tail=tail,
            resume=self._residuals.resume(residual_cache, rows, sites),
        )

    def logits(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        keep: int = 1,
        batch_size: int | None = None,
        residual_cache: ResidualCache | None = None,
    ) -> Float[Tensor, "prompt keep d_vocab"]:
        """Logits at the last `keep` positions of every prompt, in the prompts' order.

        `batch_size` and `residual_cache`: as for `stream`.
        """
        rows = self.encode_all(prompts)
        if not 1 <= keep <= min(len(row) for row in rows):
            raise ModelError(
                f"keep={keep}: accepted are 1 to {min(map(len, rows))}, the shortest prompt's tokens"
            )
        options: dict[str, Any] = {"batch_size": batch_size, "residual_cache": residual_cache}
        logits_of_row: dict[int, Tensor] = {}
        for batch, logits, _ in self.stream(rows, keep=keep, **options):
            logits_of_row.update(zip(batch.index, logits if logits is not None else ()))
        return torch.stack([logits_of_row[i] for i in range(len(rows))])

    def cache_residuals(self, prompts: PromptLike | Sequence[PromptLike]) -> ResidualCache:
        """Run prompts unedited and keep the stream after each block, for `stream` and `logits`.

        Passes under a plan then resume at the first block that its edits reach. The cache stays empty, and
        every pass whole, on a HookedTransformer, for models whose blocks need more than the stream (tried
        once on fixed tokens), and where somebody's own hooks are in the way. It takes n_layers * tokens *
        d_model numbers and at most a quarter of the free memory (else only every k-th layer is kept), and
        holds for the weights as they are now.

        Raises:
            PlanError: a plan is applied.
        """
        return self._residuals.filled(self.encode_all(prompts))

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int | None = None,
        settled: Callable[[str], bool] | None = None,
    ) -> list[Generation]:
        """Continue every prompt with a KV cache: greedy at temperature 0, else sampled with the seed.

        A thought before the answer is told apart from it, and has its own limit (`ChatFormat.max_thought_tokens`).

        `batch_size`: as for `stream`. What is sampled depends on it; greedy text does not.
        `settled`: an answer ends, cut, as soon as this is true of its text so far (models that think are not asked).

        Raises:
            ModelError: fewer than one new token, a negative temperature.
        """
        decoding = Decoding(max_new_tokens, temperature, seed, self.eos_token_ids)
        rows = self.encode_all(prompts)
        opened = [self.thinking.is_opened(row) for row in rows]
        budget = self.thinking.budget(opened, max_new_tokens, settled)
        self.site_map.check_positions(max(map(len, rows)) + budget.most - 1)
        written = generate_tokens(self._passes, rows, decoding, budget, batch_size=batch_size)
        return [
            self.thinking.generation(*each, opened=inside) for each, inside in zip(written, opened)
        ]

    def monitor(
        self,
        prompt: PromptLike,
        directions: Direction | Sequence[Direction],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[tuple[MonitoredToken, Any]]:
        """Generate token by token, and project what the stream holds at each token on directions.

        Yields (token, projection) for every generated token but the end of sequence, as it is made. The
        projection is the scalar product of the activation at the direction's own site with its unit vector,
        float64, after what the plans write there; a tuple of them if a sequence of directions is given. An
        empty sequence only generates. Of each token it is known whether it is the thought's or the answer's, and
        each has its limit, as in `generate`.
        Hooks are in place only while a token is computed: a consumer may stop at any token, or run other
        prompts in between.

        Raises:
            ModelError: as `generate`; a site the model lacks; NaN or infinity in the activations.
            DirectionError: a direction of another d_model.
            PlanError: while iterating, other plans are applied than when this was called.
        """
        single = isinstance(directions, Direction)
        watched = as_directions(directions)
        sizes = [len(item.vector) for item in watched]
        if not set(sizes) <= {self.d_model}:
            raise DirectionError(
                f"monitor needs directions of the model's d_model {self.d_model}; got "
                f"{', '.join(map(str, sizes))}"
            )
        self.site_map.first_block(item.site for item in watched)  # the model has these sites
        decoding = Decoding(max_new_tokens, temperature, seed, self.eos_token_ids)
        (row,) = self.encode_all([prompt])
        budget = self.thinking.budget([self.thinking.is_opened(row)], max_new_tokens)
        self.site_map.check_positions(len(row) + budget.most)
        in_force = self.plans.in_force
        pieces = monitored_tokens(
            self._passes, row, watched, decoding, self.decode, in_force, budget
        )
        return ((token, values[0] if single else values) for token, values in pieces)


def check_model(given: object, *, loaders: bool = False) -> None:
    """Refuse what is no Model; with `loaders`, a function that loads one is taken too.

    Raises:
        ModelError: what came, and how a Model is made.
    """
    # what these packages' objects are called for loads nothing
    packages = {kind.__module__.partition(".")[0] for kind in type(given).__mro__}
    known = {"torch", "transformers", "transformer_lens", __name__.partition(".")[0]}
    other = isinstance(given, type) or packages & known
    if isinstance(given, Model) or (loaders and callable(given) and not other):
        return
    raise ModelError(
        f"a Model{', or a function that loads one,' if loaders else ''} is needed, as load_model(name or folder), "
        f"from_hf(model, tokenizer) or Model.wrap(transformer_lens object) gives one; got {shortened(repr(given))} ({type(given).__name__})"
    )


def model_of(given: Model | Callable[[], Model]) -> Model:
    """The model itself, or the one that a function loads.

    Raises:
        ModelError: something else.
    """
    model = given if isinstance(given, Model) else given()
    check_model(model)
    return model
