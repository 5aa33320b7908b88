"""The finalists that come nearest, kept as plans where none is within the limits.

Knows: which finalists those are, and what is said of them. Does not know: the limits, or the test.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from interp_ablate.runs.kept_plans import keep_trial
from interp_ablate.runs.run_folder import Run
from interp_ablate.search.edit_space import plan_of
from interp_ablate.search.rules import RuleInput
from interp_ablate.search.selection import pareto_front
from interp_ablate.search.trial_table import params_of

MOST = 3  # plans that are kept
_LEFT = "left to gain"  # a column that no objective can be named


def keep_nearest(
    run: Run, finalists: pd.DataFrame, by: RuleInput, control: str | None
) -> list[dict[str, Any]]:
    """Write the front of the finalists as `plans/trial-N.json`, those of the least KL first; what each measures.

    A finalist that does no more than the unedited model is left out.
    """
    frame = finalists[finalists[[by.column, "kl"]].notna().all(axis=1)]
    if by.unedited is not None:
        frame = frame[by.left(frame) < (1 - by.unedited if by.maximize else by.unedited)]
    if frame.empty:
        return []
    frame = frame.assign(**{_LEFT: by.left(frame)})
    front = pareto_front(frame, objectives=(_LEFT, "kl")).sort_values("kl", kind="stable")
    space, kept = run.edit_space(control=control), []
    for row in front.to_dict("records"):
        plan = plan_of(params_of(row), space)
        if not plan.edits:  # such as a trial whose strengths are all 0
            continue
        name = keep_trial(run.out, int(row["trial"]), plan)
        upper = row.get("kl_high", math.nan)
        measured = {"effect": by.column, "value": float(row[by.column]), "kl": float(row["kl"])}
        kept.append({"plan": name, **measured, "kl_high": None if upper != upper else float(upper)})
        if len(kept) == MOST:
            break
    return kept


def nearest_text(folder: object, nearest: list[dict[str, Any]]) -> str:
    """What a person can do with the plans that were kept."""
    if not nearest:
        return "no finalist does more than the unedited model"
    listed = "; ".join(
        f"{each['plan']} ({each['effect']} {each['value']:.3g}, KL {each['kl']:.3g}"
        + (f", its upper bound {each['kl_high']:.3g})" if each["kl_high"] is not None else ")")
        for each in nearest
    )
    return (
        f"the nearest finalists are kept in plans/, not tested: {listed}. `interp-ablate export {folder} --plan "
        f"{folder}/plans/{nearest[0]['plan']}.json` exports one; a --max-kl above such a bound, with another --out, "
        "lets a run choose it"
    )
