"""Plans at work on a model: which hooks are in place.

Knows: hooks' handles and counts. Does not know: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from interp_ablate.edits.kinds import Edit
from interp_ablate.edits.plan import Plan
from interp_ablate.models.plan_hooks import SiteWriter
from interp_ablate.sites import Site


@dataclass
class AppliedPlans:
    """Plans at work: the hooks' handles and how often each of their sites was written.

    `of_row` says which of several plans each row is under; None where one plan is for all rows.
    """

    plans: tuple[Plan, ...]
    of_row: tuple[int, ...] | None = None
    writers: dict[Site, SiteWriter] = field(default_factory=dict)
    fired: dict[Site, int] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    middle_handles: list[Any] = field(default_factory=list)  # those of resid_mid

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted({site for plan in self.plans for site in plan.sites}))

    def remove(self, *, middle_only: bool = False) -> None:
        handles = self.middle_handles if middle_only else self.handles + self.middle_handles
        for handle in handles:
            handle.remove()
        self.middle_handles = []


def as_plan(plan: Plan | Edit) -> Plan:
    return plan if isinstance(plan, Plan) else Plan((plan,))
