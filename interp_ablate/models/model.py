"""Models: one face over HookedTransformer and TransformerBridge, with hooks that mean the same on both.

Knows: forward passes in batches, generation with a KV cache, how a plan becomes hooks.
Does not know: which TransformerLens class is underneath (`lens` does), what prompts mean, how directions are found, or how an edit is written into weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp_ablate.directions.direction import Direction
from interp_ablate.edits.affine import Affine, rescale_rows
from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import DirectionError, ExportError, ModelError, PlanError
from interp_ablate.models.applied_plans import AppliedPlans, as_plan
from interp_ablate.models.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    writer_points,
)
from interp_ablate.models.backends.backend import Backend, ForwardCall, ResumePoint
from interp_ablate.models.backends.bridge import BridgeBackend
from interp_ablate.models.backends.hooked import HookedBackend, refuse_processed
from interp_ablate.models.batches import Batch, batches, common_prefix, in_parts
from interp_ablate.models.forward import Capture
from interp_ablate.models.generation import Choose, Generation, MonitoredToken
from interp_ablate.models.loading import BackendName
from interp_ablate.models.plan_hooks import SiteWriter
from interp_ablate.models.residual_cache import ResidualCache, layers_to_keep, n_tokens
from interp_ablate.models.sources import ModelSource, free_memory, weights_fingerprint
from interp_ablate.prompts.chat_template import encode
from interp_ablate.prompts.prompt import Prompt, PromptLike
from interp_ablate.settings import MAX_NEW_TOKENS
from interp_ablate.sites import (
    EMBEDDING_POINTS,
    POINTS,
    PROJECTION_POINTS,
    RESIDUAL_POINTS,
    Point,
    Site,
    sites_of,
)

logger = logging.getLogger(__name__)


# Sharing a prefix costs one more forward call; below this many tokens it is not worth it.
MIN_SHARED_PREFIX = 8
# More rows a batch bring nothing: forward passes are bound by arithmetic, and wide batches pad more;
# decoding gains until the weights' reading is shared by some hundred rows.
STREAM_ROWS, DECODED_ROWS = 32, 96


class Model:
    """A decoder with named sites: forward passes, generation, plans; HookedTransformer or Bridge below.

    Make one with `load_model` or `Model.wrap`. `model.tl` is the TransformerLens object itself; its
    own `run_with_cache` works inside `with model.applied(plan):` and sees the edited activations.
    """

    def __init__(
        self,
        lens: Backend,
        tokenizer: Any,
        source: ModelSource,
        *,
        hf_config: Any = None,
        generation_config: Any = None,
        template: str | None = None,
    ) -> None:
        self._backend = lens
        self.tokenizer = tokenizer
        self.source = source
        self.hf_config = hf_config
        self.generation_config = generation_config
        self.template = template
        self.backend: BackendName = "bridge" if isinstance(lens, BridgeBackend) else "hooked"
        self._step: ForwardCall | None = None
        self._applied: list[AppliedPlans] = []
        self._with_grad = False

    # ---- what it is -------------------------------------------------------------------------

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

    @cached_property
    def writers(self) -> tuple[Site, ...]:
        """Every site that writes to the residual stream and has an exact weight form, in forward order.

        embed (and pos_embed), and a layer's attn_out and mlp_out; in post-norm blocks attn_proj and
        mlp_proj, the projections before their norm. Ablating a direction at all of them with strength 1
        leaves nothing along it anywhere.
        """
        points = writer_points(
            pos_embed=self._backend.hook_point(Site(0, "pos_embed")) is not None,
            post_norm=self._backend.gain(Site(0, "attn_proj")) is not None,
        )
        return sites_of(points, range(self.n_layers))

    @property
    def residual_points(self) -> tuple[Point, ...]:
        """The points of the residual stream that its blocks have: parallel ones have no resid_mid."""
        return tuple(p for p in RESIDUAL_POINTS if self._backend.hook_point(Site(0, p)) is not None)

    @property
    def architecture(self) -> Architecture:
        """Which tensors write where: the declared entry, or what the Bridge's component map says.

        Raises:
            ExportError: neither says it; the message names what was found.
        """
        if isinstance(self._backend, BridgeBackend):
            if self._backend.architecture is None:
                raise ExportError(
                    f"{self._backend.component_map()}: not every tensor that writes to the residual stream "
                    f"is named there, and there is no entry for {self.hf_config.model_type!r} among "
                    f"{', '.join(ARCHITECTURES)}. Plans run as hooks; they cannot be written into weights"
                )
            return self._backend.architecture
        if self.hf_config is None:
            raise ModelError(
                "the model was wrapped without its Hugging Face config: Model.wrap(..., hf_config=...)"
            )
        return architecture_of(self.hf_config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tl.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.tl.parameters()).device

    def __repr__(self) -> str:
        return (
            f"Model({self.source.name!r}, backend={self.backend!r}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, dtype={self.dtype})"
        )

    @classmethod
    def wrap(
        cls, obj: Any, tokenizer: Any = None, *, hf_config: Any = None, template: str | None = None
    ) -> Model:
        """Use a HookedTransformer or TransformerBridge that already exists.

        Args:
            tokenizer: default: the object's own.
            hf_config: the Hugging Face config; a HookedTransformer needs it only to be exported.

        Raises:
            ModelError: another kind of object; processed weights (LayerNorm folded, writing weights
                centred), under which activations and exports would not be those of the checkpoint.
        """
        kind = type(obj).__name__
        if kind not in ("HookedTransformer", "TransformerBridge"):
            raise ModelError(
                f"cannot wrap a {kind}: accepted are transformer_lens' HookedTransformer and "
                "TransformerBridge; for a name or a folder use load_model(...)"
            )
        refuse_processed(obj)
        tokenizer = tokenizer if tokenizer is not None else obj.tokenizer
        name = getattr(obj.cfg, "model_name", None) or kind
        source = ModelSource(str(name), "object")
        if kind == "HookedTransformer":
            lens: Backend = HookedBackend(obj, hf_config)
            return cls(lens, tokenizer, source, hf_config=hf_config, template=template)
        hf = obj.original_model
        return cls(
            BridgeBackend(obj),
            tokenizer,
            source,
            hf_config=hf.config,
            generation_config=getattr(hf, "generation_config", None),
            template=template,
        )

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights under their Hugging Face names (views of the live tensors where possible).

        Raises:
            ModelError: an object that cannot be mapped back.
        """
        return self._backend.hf_state_dict()

    @property
    def fingerprint(self) -> str:
        """sha256 over every weight's name, shape, dtype and bytes, and the backend.

        Computed anew each time: `model.tl` is the user's to edit in place.
        """
        return weights_fingerprint(self.tl.state_dict(), start=self.backend)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a response: the generation config's and the tokenizer's."""
        found: set[int] = set()
        for holder in (self.generation_config, self.hf_config, self.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            found.update([value] if isinstance(value, int) else value or [])
        return frozenset(found)

    # ---- prompts ------------------------------------------------------------------------------

    def encode(self, prompt: PromptLike) -> list[int]:
        """Token ids of one prompt, through the chat template; token lists pass through."""
        if isinstance(prompt, str):
            prompt = Prompt(prompt)
        if isinstance(prompt, Prompt):
            if self.tokenizer is None:
                raise ModelError(
                    f"{self.source.name} was wrapped without a tokenizer: give token ids, or "
                    "Model.wrap(..., tokenizer)"
                )
            return encode(prompt, self.tokenizer, template=self.template)
        return list(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out; empty without a tokenizer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer else ""

    def encode_all(self, prompts: Sequence[PromptLike]) -> list[list[int]]:
        """Token ids of many prompts.

        Raises:
            ModelError: none, or ids outside the vocabulary.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        if not rows or not all(rows):
            raise ModelError("no tokens to run: the list of prompts is empty, or one of them is")
        top = max(max(row) for row in rows)
        if top >= self.tl.cfg.d_vocab:
            raise ModelError(
                f"token id {top} but the model's vocabulary ends at {self.tl.cfg.d_vocab - 1}: "
                "is this the model's own tokenizer?"
            )
        return rows

    # ---- sites and plans -----------------------------------------------------------------------

    def hook_point(self, site: Site) -> nn.Module:
        """The TransformerLens HookPoint of a site.

        Raises:
            ModelError: a layer beyond the last, or a site this architecture does not have.
        """
        if site.layer >= self.n_layers:
            raise ModelError(
                f"no layer {site.layer}: {self.source.name} has layers 0 to {self.n_layers - 1}"
            )
        found = self._backend.hook_point(site)
        if found is None:
            has = [p for p in POINTS if self._backend.hook_point(Site(0, p)) is not None]
            raise ModelError(
                f"{self.source.name} ({self.backend}) has no site {site}; its points are "
                f"{', '.join(has)} (blocks that run attention and MLP in parallel have no resid_mid)"
            )
        return found

    @property
    def is_edited(self) -> bool:
        """Whether plans are applied now."""
        return bool(self._applied)

    @property
    def active_plan(self) -> Plan:
        """The plans applied now, outermost first, as one.

        Raises:
            PlanError: rows are under different plans (`applied_each`).
        """
        if any(applied.of_row is not None for applied in self._applied):
            raise PlanError("every row has a plan of its own here: there is no one active plan")
        return Plan(tuple(edit for applied in self._applied for edit in applied.plans[0]))

    @contextmanager
    def applied(self, plan: Plan | Edit) -> Iterator[Model]:
        """Run everything inside the block under the plan, generation with a KV cache included.

        Raises:
            PlanError: a plan that does not fit the model; on leaving the block without another
                error, a plan of which some hook never fired (nothing was measured under it).
        """
        with self._at_work(AppliedPlans((as_plan(plan),))):
            yield self

    @contextmanager
    def applied_each(self, plans: Sequence[Plan | Edit | None]) -> Iterator[Model]:
        """Run rows under plans of their own: row i of what is run inside is under `plans[i]`.

        None leaves a row unedited. What runs inside must have as many prompts as there are plans: many
        candidates then share each forward pass and each step of decoding, and prompts share a prefix
        that is run once a plan.

        Raises:
            PlanError: as `applied`; another `applied_each` outside; a norm-preserving edit (it rescales
                what a whole weight reads, for all rows); another number of prompts inside.
        """
        if any(applied.of_row is not None for applied in self._applied):
            raise PlanError(
                "applied_each inside applied_each: give every row its whole plan in one"
            )
        if not plans:
            raise PlanError("applied_each needs a plan (or None) for every row that will be run")
        given = [Plan() if plan is None else as_plan(plan) for plan in plans]
        different = {id(plan): plan for plan in given}
        number = {key: i for i, key in enumerate(different)}
        unique = tuple(different.values())
        keeping = [e for plan in unique for e in plan if e.norm_preserving]
        if keeping:
            raise PlanError(
                f"{keeping[0]!r} is norm-preserving: run its plan with `applied`, alone"
            )
        of_row = tuple(number[id(plan)] for plan in given)
        with self._at_work(AppliedPlans(unique, of_row)):
            yield self

    @contextmanager
    def _at_work(self, state: AppliedPlans) -> Iterator[None]:
        try:
            self._install(state)
            self._applied.append(state)
            yield
        finally:
            state.remove()
            if state in self._applied:
                self._applied.remove(state)
        silent = [str(site) for site, count in state.fired.items() if not count]
        if silent:
            raise PlanError(
                f"{len(silent)} of {len(state.fired)} sites of the plan were never written, such as "
                f"{silent[:3]}: nothing ran inside the block, or nothing at the positions it names"
            )

    @contextmanager
    def unembedding_through(self, affine: Affine | None) -> Iterator[Model]:
        """The unembedding reads the final normed stream through a map; nothing changes for None.

        What a tied embedding edited in place does to the logits.
        """
        if affine is None:
            yield self
            return
        inside = affine.to(next(self.tl.parameters()))

        def read(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return inside(x)

        handle = self._backend.unembed_input.register_forward_hook(read)
        try:
            yield self
        finally:
            handle.remove()

    @contextmanager
    def erasing(
        self,
        read: Float[Tensor, " d_model"],
        write: Float[Tensor, " d_model"],
        sites: Sequence[Site],
        strengths: Float[Tensor, " site"],
    ) -> Iterator[Model]:
        """x -> x - strength * write * (read . x) with live tensors: gradients flow from what is computed
        inside to `read`, `write` and `strengths`, which are taken as they are, not scaled.

        For fitting; a plan with the values found (`Erase`, or `Ablate` where read and write are one) is
        what is applied, saved and exported afterwards. Before the norm of post-norm blocks it is, as
        there, the ablation of `read` pulled back through the gain.

        Raises:
            PlanError: resid_mid among the sites (it is no hook of its own on the Bridge).
        """
        if any(site.point == "resid_mid" for site in sites):
            raise PlanError("strengths are fitted at writer sites, resid_pre or resid_post")

        def writer(i: int) -> Callable[..., Tensor]:
            gain = self._backend.gain(sites[i])

            def edit(module: nn.Module, args: Any, x: Tensor) -> Tensor:
                amount, along, reading = strengths[i], write, read
                if gain is not None:
                    pulled = read * gain.to(read)
                    along = reading = pulled / pulled.norm()
                    amount = amount * (read @ write)
                return x - amount.to(x) * (x @ reading.to(x))[..., None] * along.to(x)

            return edit

        handles: list[Any] = []
        self._with_grad = True
        try:
            for i, site in enumerate(sites):
                handles.append(self.hook_point(site).register_forward_hook(writer(i)))
            yield self
        finally:
            self._with_grad = False
            for handle in handles:
                handle.remove()

    def _install(self, state: AppliedPlans) -> None:
        for plan in state.plans:
            if len(plan) and plan.d_model != self.d_model:
                raise PlanError(
                    f"the plan's directions have d_model {plan.d_model}, the model {self.d_model}: "
                    "it was made for another model"
                )
        for site in state.sites:
            self.hook_point(site)  # every name is checked before any hook is placed
            gain = self._backend.gain(site)
            maps = [plan.maps_at(site, gain) for plan in state.plans]
            for plan in state.plans:
                self._check_nested(site, plan)
            keeping = state.plans[0].norm_preserving_at(site)
            if keeping is not None and site.point not in EMBEDDING_POINTS:
                self._install_norm_preserving(site, keeping.map_at(site, gain), state)
            state.writers[site] = SiteWriter(
                site,
                maps,
                self.d_model,
                norm_kept=keeping is not None and site.point in EMBEDDING_POINTS,
            )
        state.fired.update(dict.fromkeys(state.sites, 0))
        for site in state.sites:
            if site.point == "resid_mid":
                continue

            def write(module: nn.Module, args: Any, x: Tensor, site: Site = site) -> Tensor:
                return self._edited(x, site, state)

            state.handles.append(self.hook_point(site).register_forward_hook(write))
        # An outer plan's resid_mid comes after what an inner plan writes at resid_pre and attn_out.
        for applied in (*self._applied, state):
            applied.remove(middle_only=True)
            for site in applied.sites:
                if site.point == "resid_mid":
                    self._install_resid_mid(site, applied)

    def _check_nested(self, site: Site, plan: Plan) -> None:
        """Refuse what one plan would refuse, and two names of one hook in the wrong order."""
        for applied in self._applied:
            for other in applied.plans:
                (other + plan).keeps_norm_at(site)
        if site.point not in PROJECTION_POINTS or self._backend.gain(site) is not None:
            return
        out = site.output
        outer = {site for applied in self._applied for site in applied.sites}
        if out in outer and self.hook_point(out) is self.hook_point(site):
            raise PlanError(
                f"{site} and {out} are one place here, and an outer plan writes the second: use one "
                "name for both"
            )

    def _install_norm_preserving(self, site: Site, affine: Affine, state: AppliedPlans) -> None:
        """Scale the projection's input: the same as giving its weight's projected columns their norms back."""
        found = self._backend.projection(site)
        if site.point.endswith("_out") and self._backend.gain(site.projection) is not None:
            raise PlanError(
                f"a norm-preserving ablation at {site}, after a norm: it is an edit of weights, which are "
                f"before the norm: use {site.projection.point}"
            )
        if found is None:
            raise PlanError(
                f"{self.source.name} ({self.backend}) has no single projection at {site} (fused experts): "
                "a norm-preserving ablation runs there in an exported checkpoint only"
            )
        inner, weight = found
        eps = torch.finfo(weight.dtype).eps
        _, scale = rescale_rows(weight.double().T, affine, eps=eps)
        scale = scale.to(weight)

        def rescale(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return x * scale.view(x.shape[-2:] if x.ndim == 4 else x.shape[-1:])

        state.handles.append(inner.register_forward_hook(rescale))

    def _install_resid_mid(self, site: Site, state: AppliedPlans) -> None:
        """Write resid_mid through attn_out, which reaches the MLP and the skip path on both backends.

        (On the Bridge, hook_resid_mid is the MLP branch's input only.) What is read at attn_out under
        such a plan holds the change at resid_mid.
        """
        held: list[Tensor] = []

        def hold(module: nn.Module, args: Any, x: Tensor) -> None:
            held[:] = [x]

        def write(module: nn.Module, args: Any, attn_out: Tensor) -> Tensor:
            middle = held.pop() + attn_out
            return attn_out + (self._edited(middle, site, state) - middle)

        pre, attn = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
        state.middle_handles.append(self.hook_point(pre).register_forward_hook(hold))
        state.middle_handles.append(self.hook_point(attn).register_forward_hook(write))

    def _edited(self, x: Tensor, site: Site, state: AppliedPlans) -> Tensor:
        edited, fired = state.writers[site](x, self._step)
        state.fired[site] += fired
        return edited

    # ---- running --------------------------------------------------------------------------------

    def _forward(self, step: ForwardCall, keep: int) -> Tensor | None:
        self._step = step
        try:
            with torch.set_grad_enabled(self._with_grad):
                return self._backend.forward(step, keep)
        finally:
            self._step = None

    def stream(
        self,
        rows: Sequence[Sequence[int]],
        *,
        keep: int = 1,
        prompt_lengths: Sequence[int] | None = None,
        capture: dict[Site, Capture] | None = None,
        batch_size: int | None = None,
        tail: int = 1,
        below: ResidualCache | None = None,
    ) -> Iterator[tuple[Batch, Tensor | None, dict[Site, Tensor]]]:
        """Forward passes over token rows in length-sorted batches.

        Yields for each batch: the batch (its `index` says which rows), the logits of its last `keep`
        positions [batch, keep, d_vocab] (None for 0: no logits are computed; fewer where the batch is
        shorter, and what stands before a row's first token means nothing), and what each capture
        function returned for its site. Captures see the last positions of the rows; `tail` says how
        many of them at least. The tokens all rows share in front are run once for all (once a plan).

        Args:
            batch_size: rows a batch at most; by default as many as fit into the free memory, up to
                some. A batch for which memory runs out is run again in halves.
            below: what `remembering` kept of these rows: blocks below the first that is edited or
                captured are not run again.
        """
        capture = capture or {}
        if not 0 <= keep <= max(len(row) for row in rows):
            raise ModelError(f"keep={keep}: the longest row has {max(map(len, rows))} tokens")
        lengths = prompt_lengths or [len(row) for row in rows]
        plans = self._plans_of(rows)
        prefix = self._shared_prefix(rows, lengths, keep=max(keep, tail, 1))
        first = self._first_block(below, rows, capture)

        def start(index: Sequence[int], positions: Tensor) -> ResumePoint | None:
            if below is None or not first:
                return None
            return ResumePoint(first, below.entering(first, [rows[i] for i in index], positions))

        shared = self._prefix_cache(rows[0][:prefix], lengths, plans, start) if prefix else None

        def run(batch: Batch) -> tuple[Batch, Tensor | None, dict[Site, Tensor]]:
            step = self._step_of(batch, prefix, shared, plans)
            step.start = start(batch.index, step.positions)
            with self._captured(capture, batch) as captured:
                logits = self._forward(step, keep)
            return batch, logits, captured

        width = max(map(len, rows))
        size = batch_size or self._rows_that_fit(width, keep, len(capture) * tail, STREAM_ROWS)
        yield from in_parts(
            batches(
                rows, size=size, prompt_lengths=prompt_lengths, prefix=prefix, device=self.device
            ),
            run,
        )

    def remembering(self, prompts: Sequence[PromptLike]) -> ResidualCache:
        """Run prompts unedited and keep what leaves their blocks: for `stream` and `logits` as `below`.

        Passes under a plan then start at the first block that its edits reach. On the Bridge, for models
        of which each block needs nothing but what the one before it gives (tried once on fixed tokens);
        for others, and where somebody's own hooks are in the way, it stays empty and every pass is whole.
        What is kept takes n_layers * tokens * d_model numbers of the model's dtype, and at most a
        quarter of the free memory: else only every k-th layer is kept. It holds for the weights as they are now.

        Raises:
            PlanError: a plan is applied.
        """
        if self._applied or self._with_grad:
            raise PlanError(
                "what is remembered is the unedited model's: call remembering outside of applied(...)"
            )
        rows = self.encode_all(prompts)
        n_layers, used = self.n_layers, n_tokens(rows) * self.d_model * self.dtype.itemsize
        layers: tuple[int, ...] = ()
        if not self._backend.is_hooked_below(n_layers + 1) and self._backend.starts_late:
            layers = layers_to_keep(n_layers, used, free_memory(self.device))
        logger.debug("remembering %d of %d layers, %d bytes each", len(layers), n_layers, used)
        found = ResidualCache(rows, layers, self._weights_now)
        if layers:
            self._fill(found)
        return found

    def _fill(self, memory: ResidualCache) -> None:
        rows, lengths = memory.rows, [len(row) for row in memory.rows]

        def reader(layer: int) -> Capture:
            def read(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
                memory.keep(layer, x, batch)
                return x[:0]

            return read

        capture = {Site(layer, "resid_post"): reader(layer) for layer in memory.layers}
        prefix, shared = self._shared_prefix(rows, lengths, keep=1), None
        if prefix:
            (front,) = batches([rows[0][:prefix]], size=1, device=self.device)
            with self._captured(capture, front):
                shared = self._prefix_cache(rows[0][:prefix], lengths, None)

        def run(batch: Batch) -> None:
            with self._captured(capture, batch):
                self._forward(self._step_of(batch, prefix, shared, None), 0)

        size = self._rows_that_fit(max(lengths), 0, 0, STREAM_ROWS)
        for _ in in_parts(batches(rows, size=size, prefix=prefix, device=self.device), run):
            pass

    @property
    def _weights_now(self) -> tuple[tuple[int, int], ...]:
        """Changes with every write to a weight (but through `.data`), and with every new one."""
        return tuple((weight.data_ptr(), weight._version) for weight in self.tl.parameters())

    def first_block(self, plan: Plan | Edit) -> int:
        """The first block that a plan's edits need run: below it all is as in the unedited model.

        The number of layers for a plan without edits; 0 for edits of the embedding, and for every plan on
        a HookedTransformer, which runs whole passes only.

        Raises:
            ModelError: a site that the model does not have.
        """
        return min(map(self._first_block_of, as_plan(plan).sites), default=self.n_layers)

    def _first_block_of(self, site: Site) -> int:
        self.hook_point(site)  # it is there
        return self._backend.first_block(site)

    def _first_block(
        self,
        below: ResidualCache | None,
        rows: Sequence[Sequence[int]],
        capture: dict[Site, Capture],
    ) -> int:
        """The block at which a pass can start; 0: the whole pass."""
        if below is None or not below.layers or self._with_grad:
            return 0
        plans = [plan for applied in self._applied for plan in applied.plans]
        first = min(
            [*map(self.first_block, plans), *map(self._first_block_of, capture), self.n_layers]
        )
        first = below.first_block(first)
        if not first or not below.holds(rows) or self._backend.is_hooked_below(first):
            return 0
        if below.state != self._weights_now:
            logger.warning(
                "the weights have changed since prompts were remembered: running all blocks"
            )
            return 0
        return first

    def _plans_of(self, rows: Sequence[Sequence[int]]) -> list[int] | None:
        """Which plan each row is under; None where one plan (or none) is for all.

        Raises:
            PlanError: another number of rows than `applied_each` was given plans.
        """
        of_row = next((a.of_row for a in self._applied if a.of_row is not None), None)
        if of_row is None:
            return None
        if len(of_row) != len(rows):
            raise PlanError(
                f"{len(rows)} prompts inside applied_each with {len(of_row)} plans: it takes one plan "
                "(or None) a prompt, in the prompts' order"
            )
        return list(of_row)

    def _rows_that_fit(self, width: int, keep: int, captured: int, most: int) -> int:
        """How many rows of `width` tokens fit, by a rough count of what one needs, into half of what is free."""
        cfg, size = self.tl.cfg, self.dtype.itemsize
        # the KV cache of every layer, a few copies of the widest activations, logits in fp32
        cache = 2 * self.n_layers * width * self.d_model * size
        live = width * (6 * self.d_model + 3 * (cfg.d_mlp or 4 * self.d_model)) * size
        held = captured * self.d_model * size + keep * cfg.d_vocab * (size + 8)
        return max(1, min(most, free_memory(self.device) // (2 * (cache + live + held))))

    @contextmanager
    def _captured(self, capture: dict[Site, Capture], batch: Batch) -> Iterator[dict[Site, Tensor]]:
        """Reading hooks for one forward call; the dict is filled as the sites are reached."""
        captured: dict[Site, Tensor] = {}

        def reader(site: Site, read: Capture) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, x: Tensor) -> None:
                captured[site] = read(x, batch)

            return hook

        handles: list[Any] = []
        try:
            for site, read in capture.items():
                handles.append(self.hook_point(site).register_forward_hook(reader(site, read)))
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _shared_prefix(
        self,
        rows: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        *,
        keep: int,
        max_new_tokens: int = 0,
    ) -> int:
        """How many leading tokens are run once for all rows: all of them prompt, in every row.

        0 where a row outgrows a sliding window: that counts the padding between prefix and rest.
        """
        window = getattr(self.hf_config, "sliding_window", None)
        if len(rows) < 2 or (window and max(map(len, rows)) + max_new_tokens > window):
            return 0
        prefix = min(common_prefix(rows, keep=keep), *prompt_lengths)
        return prefix if prefix >= MIN_SHARED_PREFIX else 0

    def _prefix_cache(
        self,
        prefix: Sequence[int],
        prompt_lengths: Sequence[int],
        plans: list[int] | None,
        start: Callable[[Sequence[int], Tensor], ResumePoint | None] = lambda index, positions: (
            None
        ),
    ) -> Any:
        """KV cache of the shared leading tokens under the active plan; a row a plan if there are several.

        `start`: from which block on some rows are run at some positions.
        """
        size = 1 if plans is None else max(plans) + 1
        cache = self._backend.new_cache(size)
        tokens = torch.tensor([list(prefix)], device=self.device).expand(size, -1)
        positions = torch.arange(len(prefix), device=self.device).expand(size, -1)
        self._forward(
            ForwardCall(
                tokens,
                torch.ones_like(tokens),
                positions,
                torch.tensor([min(prompt_lengths)], device=self.device).expand(size),
                cache,
                None if plans is None else torch.arange(size, device=self.device),
                start([0] * size, positions),
            ),
            keep=0,
        )
        return cache

    def _step_of(
        self,
        batch: Batch,
        prefix: int,
        shared: Any,
        plans: list[int] | None,
        *,
        cache: bool = False,
    ) -> ForwardCall:
        """The forward call that runs a batch of rows without their shared prefix."""
        size = len(batch.index)
        of_row = torch.tensor([plans[i] if plans else 0 for i in batch.index], device=self.device)
        past = self._backend.gathered_cache(shared, of_row) if prefix else None
        if cache and past is None:
            past = self._backend.new_cache(size)
        mask = torch.cat([batch.mask.new_ones(size, prefix), batch.mask], 1)
        positions = batch.positions + prefix
        return ForwardCall(
            batch.tokens, mask, positions, batch.prompt_lengths, past, of_row if plans else None
        )

    def logits(
        self,
        prompts: Sequence[PromptLike],
        *,
        keep: int = 1,
        batch_size: int | None = None,
        below: ResidualCache | None = None,
    ) -> Float[Tensor, "prompt keep d_vocab"]:
        """Logits at the last `keep` positions of every prompt, in the prompts' order; `below` as for `stream`."""
        rows = self.encode_all(prompts)
        if not 1 <= keep <= min(len(row) for row in rows):
            raise ModelError(
                f"keep={keep}: accepted are 1 to {min(map(len, rows))}, the shortest prompt's tokens"
            )
        found: list[Tensor | None] = [None] * len(rows)
        for batch, logits, _ in self.stream(rows, keep=keep, batch_size=batch_size, below=below):
            assert logits is not None
            for i, row in zip(batch.index, logits):
                found[i] = row
        return torch.stack([row for row in found if row is not None])

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> list[Generation]:
        """Continue every prompt with a KV cache: greedy at temperature 0, else sampled with the seed.

        `batch_size`: as for `stream`. What is sampled depends on it; greedy text does not.

        Raises:
            ModelError: fewer than one new token, a negative temperature.
        """
        choose = self._chooser(max_new_tokens, temperature, seed)
        rows = self.encode_all(prompts)
        lengths, plans = [len(row) for row in rows], self._plans_of(rows)
        prefix = self._shared_prefix(rows, lengths, keep=1, max_new_tokens=max_new_tokens)
        shared = self._prefix_cache(rows[0][:prefix], lengths, plans) if prefix else None

        def run(batch: Batch) -> dict[int, tuple[list[int], bool]]:
            step = self._step_of(batch, prefix, shared, plans, cache=True)
            return self._decode(step, batch.index, choose, max_new_tokens)

        width = max(lengths) + max_new_tokens
        size = batch_size or self._rows_that_fit(width, 1, 0, DECODED_ROWS)
        written: dict[int, tuple[list[int], bool]] = {}
        for part in in_parts(batches(rows, size=size, prefix=prefix, device=self.device), run):
            written.update(part)
        return [
            Generation(
                tuple(written[i][0]),
                self.decode(written[i][0]),
                written[i][1],
            )
            for i in range(len(rows))
        ]

    def _chooser(self, max_new_tokens: int, temperature: float, seed: int) -> Choose:
        if max_new_tokens < 1 or temperature < 0:
            raise ModelError(
                f"max_new_tokens must be at least 1 and temperature at least 0; "
                f"got {max_new_tokens} and {temperature}"
            )
        generator = torch.Generator(self.device).manual_seed(seed)

        def choose(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
            if temperature == 0:
                return logits.argmax(-1)
            chances = (logits.float() / temperature).softmax(-1)
            return torch.multinomial(chances, 1, generator=generator)[:, 0]

        return choose

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

        Yields (piece, projection) for every generated token but the end of sequence, as it is made: the
        scalar product of the activation at the direction's own site with its unit vector, float64, after
        what the plans write there; a tuple of them, in order, where a sequence of directions is given.
        The same numbers as `collect` gives for the whole text. Hooks are in place only while a token is
        computed: a consumer may stop at any token, or run other prompts in between.

        Raises:
            ModelError: as `generate`; a site the model lacks; NaN or infinity in the activations.
            DirectionError: no direction, or one of another d_model.
            PlanError: while iterating, other plans are applied than when this was called.
        """
        single = isinstance(directions, Direction)
        watched = (directions,) if isinstance(directions, Direction) else tuple(directions)
        if not watched or any(len(item.vector) != self.d_model for item in watched):
            came = ", ".join(str(len(item.vector)) for item in watched) or "none"
            raise DirectionError(
                f"monitor needs directions of the model's d_model {self.d_model}; got {came}"
            )
        for item in watched:
            self.hook_point(item.site)
        choose = self._chooser(max_new_tokens, temperature, seed)
        (row,) = self.encode_all([prompt])
        found = self._monitored(row, watched, choose, max_new_tokens, tuple(self._applied))
        return ((piece, values[0] if single else values) for piece, values in found)

    def _monitored(
        self,
        row: list[int],
        watched: tuple[Direction, ...],
        choose: Choose,
        max_new_tokens: int,
        applied: tuple[AppliedPlans, ...],
    ) -> Iterator[tuple[MonitoredToken, tuple[float, ...]]]:
        def advance(
            step: ForwardCall, capture: dict[Site, Capture]
        ) -> tuple[int, dict[Site, Tensor]]:
            if list(map(id, applied)) != list(map(id, self._applied)):
                raise PlanError(
                    "the plans applied now are not those under which monitor was called: iterate "
                    "inside the same `with model.applied(...)` block"
                )
            with self._captured(capture, batch) as captured:
                logits = self._forward(step, 1)
            assert logits is not None
            return int(choose(logits[:, -1])), captured

        def last(x: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, " d_model"]:
            return x[0, -1].detach().cpu().double()

        (batch,) = batches([row], size=1, device=self.device)
        step = self._step_of(batch, 0, None, self._plans_of([row]), cache=True)
        reading: dict[Site, Capture] = {item.site: last for item in watched}
        token, _ = advance(step, {})
        tokens: list[int] = []
        shown = ""
        while token not in self.eos_token_ids and len(tokens) < max_new_tokens:
            tokens.append(token)
            mask = torch.cat([step.mask, step.mask.new_ones(1, 1)], 1)
            new = step.tokens.new_full((1, 1), token)
            places, lengths = step.positions[:, -1:] + 1, step.prompt_lengths
            step = ForwardCall(new, mask, places, lengths, step.cache, step.plans)
            token, captured = advance(step, reading)
            values = tuple(float(captured[item.site] @ item.vector) for item in watched)
            if not all(map(math.isfinite, values)):
                raise ModelError(
                    f"NaN or infinity in the activations at token {len(tokens)}: float16 overflows on "
                    "many models; use --dtype bfloat16 or float32"
                )
            ended = token in self.eos_token_ids or len(tokens) == max_new_tokens
            piece = MonitoredToken(tokens[-1], self._added_text(tokens, shown, ended))
            shown += piece.text
            yield piece, values

    def _added_text(self, tokens: list[int], shown: str, ended: bool) -> str:
        """What `tokens` say beyond `shown`; nothing while their last character lacks some bytes."""
        text = self.decode(tokens)
        whole = ended or not text.endswith("\N{REPLACEMENT CHARACTER}")
        return text[len(shown) :] if whole else ""

    def _decode(
        self,
        step: ForwardCall,
        index: tuple[int, ...],
        choose: Choose,
        max_new_tokens: int,
    ) -> dict[int, tuple[list[int], bool]]:
        """Decode one batch; rows that ended leave it."""
        written: dict[int, tuple[list[int], bool]] = {i: ([], False) for i in index}
        active = list(index)
        for n in range(max_new_tokens):
            logits = self._forward(step, 1)
            assert logits is not None
            tokens = choose(logits[:, -1])
            going = []
            for place, (i, token) in enumerate(zip(active, tokens.tolist())):
                if token in self.eos_token_ids:
                    written[i] = (written[i][0], True)
                else:
                    written[i][0].append(token)
                    going.append(place)
            if not going or n + 1 == max_new_tokens:
                return written
            mask, positions, lengths = step.mask, step.positions[:, -1:], step.prompt_lengths
            cache, plans = step.cache, step.plans
            if len(going) < len(active):
                rows = torch.tensor(going, device=self.device)
                cache = self._backend.select_cache(cache, rows)
                mask, positions, lengths = mask[rows], positions[rows], lengths[rows]
                plans = None if plans is None else plans[rows]
                tokens, active = tokens[rows], [active[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = ForwardCall(tokens[:, None], mask, positions + 1, lengths, cache, plans)
        return written
