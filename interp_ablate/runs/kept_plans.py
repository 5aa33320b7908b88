"""Plans of a run folder by name: the chosen one, its addition, and those kept in `plans/`.

Knows: names and files of plans. Does not know: how a plan was made.
"""

from __future__ import annotations

import re
from pathlib import Path

from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.settings import suggestion
from interp_ablate.storage.tables import read_json

OF_RUN = {"chosen": "plan", "added": "addition_plan"}
"""Names of the plans in selected.json, and their keys there."""
_OF_TRIAL = re.compile(r"(trial-)?\d+", re.ASCII)


def plan_names(folder: str | Path) -> list[str]:
    """The names that `plan_named` takes: the run's own plans first."""
    selected = read_json(Path(folder) / "selected.json") or {}
    kept = (path.stem for path in (Path(folder) / "plans").glob("*.json"))
    return [name for name, key in OF_RUN.items() if selected.get(key)] + sorted(kept)


def plan_named(folder: str | Path, name: str) -> Plan:
    """The plan of that name.

    Raises:
        RunError: there is none; the message lists those that there are.
        PlanError: the file is no plan.
    """
    names = plan_names(folder)
    if name not in names:
        listed = f"there are {', '.join(names)}" if names else "none is kept yet"
        raise RunError(f"no plan {name!r} in {folder}{suggestion(name, names)}: {listed}")
    if name in OF_RUN:
        return Plan.from_dict((read_json(Path(folder) / "selected.json") or {})[OF_RUN[name]])
    return Plan.load(Path(folder) / "plans" / f"{name}.json")


def plans_of_trials(folder: str | Path) -> list[Path]:
    """The files of `plans/` that a search writes, `N.json` and `trial-N.json`; a person's plans have other names."""
    return [p for p in (Path(folder) / "plans").glob("*.json") if _OF_TRIAL.fullmatch(p.stem)]


def keep_trial(folder: str | Path, number: int, plan: Plan) -> str:
    """Write a trial's plan as `plans/trial-N.json`, in place of an earlier one of that name; returns the name."""
    path = Path(folder) / "plans" / f"trial-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    return path.stem


def keep_plan(folder: str | Path, name: str, plan: Plan) -> Path:
    """Write the plan as `plans/NAME.json`, which `export --plan` takes; one of that name is never replaced.

    Raises:
        RunError: a name that is taken, or that is no plain file name; a plan that edits nothing.
    """
    if not re.fullmatch(r"\w[\w.-]{0,79}", name) or name in OF_RUN:
        raise RunError(
            f"{name!r:.100} cannot be a plan's name: letters, digits, dots, - and _, at most 80 of them, and not "
            f"{' or '.join(OF_RUN)}"
        )
    if _OF_TRIAL.fullmatch(name):
        raise RunError(
            f"{name!r} is a name that a search gives its trials' plans, and replaces: choose another name"
        )
    if not plan.edits:
        raise RunError("the plan edits nothing: there is nothing to keep")
    path = Path(folder) / "plans" / f"{name}.json"
    if path.exists():
        raise RunError(f"{path} is there already: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    return path
