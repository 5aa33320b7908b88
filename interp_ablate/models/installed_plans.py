"""Plans that are installed in a model: their hooks, and the prompts' conditions that they read.

Knows: one plan for all rows or one a row, what a condition reads from a forward call. Does not know: where hooks are placed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from interp_ablate.edits.conditional import Condition, Conditional
from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import PlanError
from interp_ablate.models.backends.backend import ForwardCall
from interp_ablate.models.plan_hooks import SiteWriter
from interp_ablate.sites import Site


@dataclass(eq=False)
class InstalledPlans:
    """One plan for all rows, or one plan a row, and its hooks in the model."""

    plans: tuple[Plan, ...]
    plan_of_row: tuple[int, ...] | None = None
    """For each row the index of its plan; None where one plan is for all rows."""
    writers: dict[Site, list[SiteWriter]] = field(default_factory=dict)
    n_writes: dict[Site, int] = field(default_factory=dict)
    """The number of times that each site was written."""
    handles: list[Any] = field(default_factory=list)
    resid_mid_handles: list[Any] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that one of the plans writes, in forward order."""
        return tuple(sorted({site for plan in self.plans for site in plan.sites}))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every condition that an edit of the plans depends on, once."""
        edits = [edit for plan in self.plans for edit in plan if isinstance(edit, Conditional)]
        return tuple({edit.condition.key: edit.condition for edit in edits}.values())

    def remove(self, *, resid_mid_only: bool = False) -> None:
        """Take the hooks out of the model."""
        for handle in self.resid_mid_handles + ([] if resid_mid_only else self.handles):
            handle.remove()
        self.resid_mid_handles = []

    @property
    def hook_ids(self) -> list[int]:
        return [handle.id for handle in self.handles + self.resid_mid_handles]


def as_plan(plan: Plan | Edit | None) -> Plan:
    """A plan as it is, an edit as a plan of one, None as the plan that edits nothing."""
    return plan if isinstance(plan, Plan) else Plan((plan,) if plan is not None else ())


def condition_reader(
    condition: Condition, current_call: Callable[[], ForwardCall | None]
) -> Callable[..., None]:
    """A forward hook that decides for each row whether its prompt meets the condition, once a row.

    What it decides is kept in the forward call, and goes on with the rows into the steps of decoding.
    """

    def read(module: nn.Module, args: Any, x: Tensor) -> None:
        call = current_call()
        if call is None:
            raise PlanError(
                "the plan has a condition of the prompt, which only this Model's own methods can tell: use "
                "model.generate, model.logits or collect instead of calling model.tl"
            )
        if condition.key in call.decisions:
            return
        new = call.tokens.shape[1]
        prompt = call.mask[:, -new:].bool() & ~call.generated
        pooled = condition.pool(x.reshape(*call.tokens.shape, -1), prompt.to(x.device))
        call.decisions[condition.key] = condition.is_met(pooled)

    return read
