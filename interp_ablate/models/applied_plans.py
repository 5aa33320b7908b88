"""Plans as hooks on a running model: installed, checked against each other, removed, in one thread at a time.

Knows: hook points, what each plan does at each of them, which thread applied it. Does not know: tokens, batches or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.edits.affine import Affine, before_norm, rescale_rows
from interp_ablate.edits.conditional import Condition
from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import Backend, ForwardCall, SiteMap
from interp_ablate.models.installed_plans import InstalledPlans, as_plan, condition_reader
from interp_ablate.models.plan_hooks import SiteWriter
from interp_ablate.precision import to_float64
from interp_ablate.sites import EMBEDDING_POINTS, PROJECTION_POINTS, Site


class AppliedPlans:
    """The plans that are applied to one model, outermost first."""

    def __init__(self, backend: Backend, site_map: SiteMap) -> None:
        self._backend, self._site_map = backend, site_map
        self.installed: list[InstalledPlans] = []
        self.current_call: ForwardCall | None = None
        """The forward call that runs now; whoever runs one sets it. It says which rows and positions are which."""
        self.with_gradients = False
        self.lock = RLock()
        """Held during a forward call, and while hooks come and go: one thread's hooks never meet another's call."""
        self._live_edits: list[list[Any]] = []
        self._thread: int | None = None

    @property
    def is_edited(self) -> bool:
        """True while a plan is applied, an erasure is fitted or the unembedding reads through a map."""
        return bool(self.installed or self._live_edits)

    @property
    def in_force(self) -> tuple[object, ...]:
        """What edits the model now, as a value that equals another where the same plans are applied.

        Raises:
            PlanError: another thread has applied a plan.
        """
        self._check_thread()
        return (*((p.plans, p.plan_of_row) for p in self.installed), *map(id, self._live_edits))

    @property
    def foreign_hooks(self) -> frozenset[int]:
        """The ids of hooks in the model that somebody else put there."""
        return self._backend.hook_ids() - self.hook_ids

    @property
    def has_unknown_edits(self) -> bool:
        """True where hooks of somebody else, or an edit that is no plan, are in the model.

        What is computed then has no name under which it could be kept on disk.
        """
        return bool(self._live_edits or self.foreign_hooks)

    def require(self, in_force: tuple[object, ...], what: str) -> None:
        """Refuse to go on under other plans than those in force when something was begun.

        Raises:
            PlanError: other plans are applied now, or another thread has applied one.
        """
        if self.in_force != in_force:
            raise PlanError(
                f"the plans applied now are not those under which {what}: read it inside the same "
                "`with model.applied(...)` block, and what was begun outside of one outside of it"
            )

    @property
    def hook_ids(self) -> frozenset[int]:
        """The ids of the hooks through which the plans work."""
        live = (handle.id for handles in self._live_edits for handle in handles)
        return frozenset([n for p in self.installed for n in p.hook_ids]).union(live)

    def _check_thread(self) -> None:
        if self._thread not in (None, get_ident()):
            raise PlanError(
                "another thread has a plan applied to this Model, whose hooks would edit this one's "
                "passes: load one Model a thread, or let threads take turns (a threading.Lock around each "
                "`with model.applied(...)` block and each call)"
            )

    @contextmanager
    def _editing(self) -> Iterator[None]:
        """Inside the block the model is this thread's alone."""
        with self.lock:
            self._check_thread()
            before, self._thread = self._thread, get_ident()
        try:
            yield
        finally:
            self._thread = before

    @contextmanager
    def _live(self) -> Iterator[list[Any]]:
        """Inside the block an edit that is no plan is in force; its handles are removed afterwards."""
        handles: list[Any] = []
        with self._editing():
            self._live_edits.append(handles)
            try:
                yield handles
            finally:
                with self.lock:
                    self._live_edits.pop()
                    for handle in handles:
                        handle.remove()

    @property
    def active_plan(self) -> Plan:
        """See `Model.active_plan`."""
        if any(installed.plan_of_row is not None for installed in self.installed):
            raise PlanError("every row has a plan of its own here: there is no one active plan")
        return Plan(tuple(edit for installed in self.installed for edit in installed.plans[0]))

    @property
    def sites(self) -> set[Site]:
        """Every site that an applied plan writes."""
        return {site for installed in self.installed for site in installed.sites}

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every condition of the prompt on which an applied plan depends."""
        return tuple(each for installed in self.installed for each in installed.conditions)

    def plan_of_rows(self, n_rows: int) -> list[int] | None:
        """For each row the index of its plan; None where one plan (or none) is for all.

        Raises:
            PlanError: another number of rows than `applied_each` was given plans.
        """
        each = next((p.plan_of_row for p in self.installed if p.plan_of_row is not None), None)
        if each is None:
            return None
        if len(each) != n_rows:
            raise PlanError(
                f"{n_rows} prompts inside applied_each with {len(each)} plans: it takes one plan "
                "(or None) a prompt, in the prompts' order"
            )
        return list(each)

    @contextmanager
    def applied(self, plan: Plan | Edit | None) -> Iterator[None]:
        """See `Model.applied`."""
        chosen = as_plan(plan)
        if not chosen.edits:  # nothing to install: the model stays as it is
            yield
            return
        with self._installed(InstalledPlans((chosen,))):
            yield

    @contextmanager
    def applied_each(self, plans: Sequence[Plan | Edit | None]) -> Iterator[None]:
        """See `Model.applied_each`."""
        if any(installed.plan_of_row is not None for installed in self.installed):
            raise PlanError(
                "applied_each inside applied_each: give every row its whole plan in one"
            )
        if not plans:
            raise PlanError("applied_each needs a plan (or None) for every row that will be run")
        different = {id(plan): as_plan(plan) for plan in plans}
        number = {key: i for i, key in enumerate(different)}
        norm_preserving = [e for plan in different.values() for e in plan if e.norm_preserving]
        if norm_preserving:
            raise PlanError(
                f"{norm_preserving[0]!r} is norm-preserving: run its plan with `applied`, alone"
            )
        plan_of_row = tuple(number[id(plan)] for plan in plans)
        with self._installed(InstalledPlans(tuple(different.values()), plan_of_row)):
            yield

    @contextmanager
    def _installed(self, new: InstalledPlans) -> Iterator[None]:
        with self._editing():
            try:
                with self.lock:
                    self._install(new)
                    self.installed.append(new)
                yield
            finally:
                with self.lock:
                    new.remove()
                    if new in self.installed:
                        self.installed.remove(new)
        silent = [str(site) for site, count in new.n_writes.items() if not count]
        if silent:
            raise PlanError(
                f"{len(silent)} of {len(new.n_writes)} sites of the plan were never written, such as "
                f"{silent[:3]}: nothing ran inside the block"
            )

    def _install(self, new: InstalledPlans) -> None:
        d_model = self._backend.tl.cfg.d_model
        for plan in new.plans:
            if len(plan) and plan.d_model != d_model:
                raise PlanError(
                    f"the plan's directions have d_model {plan.d_model}, the model {d_model}: "
                    "it was made for another model"
                )
        for condition in new.conditions:
            self._site_map.hook_point(condition.site)
        for site in new.sites:
            self._site_map.hook_point(site)  # every name is checked before any hook is placed
            gains = self._backend.post_norm_gains(site)
            for plan in new.plans:
                self._check_nested(site, plan)
            rescaled = new.plans[0].norm_preserving_at(site)
            if rescaled is not None and site.point not in EMBEDDING_POINTS:
                self._install_norm_preserving(site, rescaled.map_at(site, gains[0]), new)
            norm_kept = rescaled is not None and site.point in ("embed", "pos_embed")
            new.writers[site] = [
                SiteWriter(
                    site,
                    [plan.maps_at(site, gain) for plan in new.plans],
                    d_model,
                    norm_kept=norm_kept,
                )
                for gain in gains
            ]
        new.n_writes.update(dict.fromkeys(new.sites, 0))
        for condition in new.conditions:  # read before this plan, and any around it, writes there
            reader = condition_reader(condition, lambda: self.current_call)
            new.handles.append(self._hook(condition.site, reader, first=True))
        for site in new.sites:
            if site.point != "resid_mid":
                new.handles.append(self._hook(site, self._writing_hook(site, new)))
        # An outer plan's resid_mid comes after what an inner plan writes at resid_pre and attn_out.
        for installed in (*self.installed, new):
            installed.remove(resid_mid_only=True)
            for site in installed.sites:
                if site.point == "resid_mid":
                    self._install_resid_mid(site, installed)

    def _hook(self, site: Site, hook: Callable[..., Any], *, first: bool = False) -> Any:
        return self._site_map.hook_point(site).register_forward_hook(hook, prepend=first)

    def _writing_hook(self, site: Site, plans: InstalledPlans) -> Callable[..., Tensor]:
        def write(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return self._edited(x, site, plans, getattr(module, "part", 0))

        return write

    def _edited(self, x: Tensor, site: Site, plans: InstalledPlans, part: int = 0) -> Tensor:
        plans.n_writes[site] += 1
        return plans.writers[site][part](x, self.current_call)

    def _check_nested(self, site: Site, plan: Plan) -> None:
        """Refuse what one plan would refuse, and two names of one hook in the wrong order."""
        for installed in self.installed:
            for outer in installed.plans:
                (outer + plan).norm_preserving_at(site)
        if site.point not in PROJECTION_POINTS or self._site_map.is_normed(site):
            return
        out, hook_point = site.output, self._site_map.hook_point
        if out in self.sites and hook_point(out) is hook_point(site):
            raise PlanError(
                f"{site} and {out} are one place here, and an outer plan writes the second: use one "
                "name for both"
            )

    def _install_norm_preserving(self, site: Site, affine: Affine, plans: InstalledPlans) -> None:
        """Scale the projection's input: the same as giving its weight's projected columns their norms back."""
        if site.point.endswith("_out") and self._site_map.is_normed(site):
            raise PlanError(
                f"a norm-preserving ablation at {site}, after a norm: it is an edit of weights, which are "
                f"before the norm: use {site.projection.point}"
            )
        projection = self._backend.projection(site)
        if projection is None:
            raise PlanError(
                f"this model ({self._backend.name}) has no single projection at {site} (fused experts): "
                "a norm-preserving ablation runs there in an exported checkpoint only"
            )
        input_point, weight = projection
        eps = torch.finfo(weight.dtype).eps
        scale = rescale_rows(to_float64(weight).T, affine, eps=eps)[1].to(weight)

        def rescale(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return x * scale.view(x.shape[-2:] if x.ndim == 4 else x.shape[-1:])

        plans.handles.append(input_point.register_forward_hook(rescale))

    def _install_resid_mid(self, site: Site, plans: InstalledPlans) -> None:
        """Write resid_mid through attn_out, which reaches the MLP and the skip path on both backends.

        (On the Bridge, hook_resid_mid is the MLP branch's input only.) Under such a plan, attn_out holds
        the change of resid_mid too.
        """
        resid_pre: list[Tensor] = []

        def hold(module: nn.Module, args: Any, x: Tensor) -> None:
            resid_pre[:] = [x]

        def write(module: nn.Module, args: Any, attn_out: Tensor) -> Tensor:
            resid_mid = resid_pre.pop().to(attn_out) + attn_out
            return attn_out + (self._edited(resid_mid, site, plans) - resid_mid)

        before, attention = Site(site.layer, "resid_pre"), Site(site.layer, "attn_out")
        plans.resid_mid_handles.append(self._hook(before, hold))
        plans.resid_mid_handles.append(self._hook(attention, write))

    @contextmanager
    def unembedding_through(self, affine: Affine | None) -> Iterator[None]:
        """The unembedding reads the final normed stream through a map; nothing changes for None.

        This is what a tied embedding that is edited in place does to the logits.
        """
        if affine is None:
            yield
            return

        def read(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            return affine.to(x)(x)

        with self._live() as handles:
            handles.append(self._backend.unembed_input.register_forward_hook(read))
            yield

    @contextmanager
    def fitting_erasure(
        self,
        read: Float[Tensor, " d_model"],
        write: Float[Tensor, " d_model"],
        sites: Sequence[Site],
        strengths: Float[Tensor, " site"],
    ) -> Iterator[None]:
        """Apply x -> x - strength * write * (read . x) with live tensors, for fitting.

        Gradients flow from what is computed inside to `read`, `write` and `strengths`, which are taken as
        they are, not scaled. Afterwards a plan with the values found (`Erase`, or `Ablate` where read and
        write are one) is applied, saved and exported. Before the norm of post-norm blocks the edit is the
        ablation of `read` through the norm's gain, as it is for plans.

        Raises:
            PlanError: resid_mid among the sites (it is no hook of its own on the Bridge).
        """
        if any(site.point == "resid_mid" for site in sites):
            raise PlanError("strengths are fitted at writer sites, resid_pre or resid_post")

        def writer(i: int) -> Callable[..., Tensor]:
            gains = self._backend.post_norm_gains(sites[i])

            def edit(module: nn.Module, args: Any, x: Tensor) -> Tensor:
                strength, along, reading = strengths[i], write, read
                gain = gains[getattr(module, "part", 0)]
                if gain is not None:
                    reading = before_norm(read, gain)
                    along = reading = reading / reading.norm()
                    strength = strength * (read @ write)
                return x - strength.to(x) * (x @ reading.to(x))[..., None] * along.to(x)

            return edit

        with self._live() as handles:
            self.with_gradients = True
            try:
                for i, site in enumerate(sites):
                    handles.append(self._hook(site, writer(i)))
                yield
            finally:
                self.with_gradients = False
