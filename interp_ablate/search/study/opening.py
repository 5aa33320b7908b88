"""Opening a study folder, new or to go on.

Knows: Optuna's storage. Does not know: trials.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from interp_ablate.errors import RunError
from interp_ablate.search.study.locks import (
    AppendLock,
    WorkerFile,
    check_lines,
    disk_errors,
    locked_file,
)
from interp_ablate.search.study.parameters import Goal, Space, check_names_apart
from interp_ablate.search.study.study import Objectives, Study

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "random", "nsga2"]

FORMAT = "interp_ablate.study/1"


# --------------------------------------------------------------------------------- opening


def open_study(
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    space: Space,
    objectives: Mapping[str, Goal],
    limits: Mapping[str, float] | None = None,
    seed: int = 0,
    sampler: Sampler = "tpe",
    startup: int = 10,
) -> Study:
    """A study in a folder, new or as it was left; several processes may have it open.

    Args:
        identity: what the scores depend on besides the parameters (fingerprints of model, prompts,
            settings), as plain data. It is kept, with the arguments below, and must be the same when
            the study is opened again.
        objectives: scores to make small or large; with several, a front is searched.
        limits: scores and the most each may be; a trial above one is never on the front.
        startup: random trials before "tpe" learns; the size of a generation for "nsga2".

    Raises:
        RunError: another search's study (with what differs), a corrupt or unwritable one, names that
            collide, or no Optuna.
    """
    api, folder, limits = _optuna(), Path(folder), dict(limits or {})
    _check_names(space, objectives, limits)
    whole = {
        **identity,
        "format": FORMAT,
        "space": space.describe(),
        "objectives": dict(objectives),
        "limits": limits,
        "seed": seed,
        "sampler": sampler,
        "startup": startup,
    }
    samplers = _samplers(sampler, seed=seed, startup=startup)
    with disk_errors(folder):
        workers = folder / "workers"
        workers.mkdir(parents=True, exist_ok=True)
        with locked_file(folder / "ask.lock"):
            found = _load(api, folder, list(objectives.values()), json.loads(json.dumps(whole)))
            worker = WorkerFile(workers)
    study = Study(folder, found, worker, space, Objectives(dict(objectives), limits), samplers)
    study.recover()
    return study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RunError(
            "a search needs Optuna, which is not installed: pip install 'interp-ablate[search]'"
        ) from error
    if int(optuna.__version__.split(".")[0]) < 5:
        raise RunError(
            f"a search needs Optuna 5 or later, this is {optuna.__version__}: "
            "pip install 'interp-ablate[search]'"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check_names(space: Space, objectives: Mapping[str, Goal], limits: Mapping[str, float]) -> None:
    if not objectives or set(objectives.values()) - {"minimize", "maximize"}:
        raise RunError(
            f"objectives {dict(objectives)}: give at least one score name and its goal, "
            "'minimize' or 'maximize'"
        )
    bad = [name for name, limit in limits.items() if not math.isfinite(limit)]
    if bad:
        raise RunError(f"the limit of {', '.join(bad)} is not a finite number: leave it out")
    check_names_apart(space, [*objectives, *limits])


def _samplers(kind: Sampler, *, seed: int, startup: int) -> Callable[[int], Any]:
    """From the number of a draw to its sampler: a restart then draws what would have been drawn."""
    import numpy as np
    from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

    if startup < 0 or seed < 0:
        raise RunError(f"startup {startup}, seed {seed}: both are 0 or more")
    make: dict[str, Callable[[int], Any]] = {
        "tpe": lambda number: TPESampler(seed=number, n_startup_trials=startup),
        "random": lambda number: RandomSampler(seed=number),
        "nsga2": lambda number: NSGAIISampler(seed=number, population_size=max(2, startup)),
    }
    if kind not in make:
        raise RunError(f"unknown sampler {kind!r}: there are {', '.join(make)}")

    def sampler(draw: int) -> Any:
        # not seed + draw: the studies of neighbouring seeds would draw the same points
        return make[kind](int(np.random.SeedSequence([seed, draw]).generate_state(1)[0]))

    return sampler


def _load(api: Any, folder: Path, goals: list[Goal], identity: dict[str, Any]) -> optuna.Study:
    """Optuna's study, made where there is none; the caller holds the ask lock."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path = folder / "study.jsonl"
    path.touch()
    lock = AppendLock(path)
    lock.acquire()  # mends the file
    try:
        check_lines(path)
    finally:
        lock.release()
    # Optuna asks of a lock only these two methods; its base class would need Optuna at import
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, lock)))
    name = "search"
    if name in api.get_all_study_names(storage):
        study = api.load_study(study_name=name, storage=storage)
        there = study.user_attrs.get("identity")
        if there is not None:
            _check_identity(folder, there, identity)
            return study
        if study.get_trials(deepcopy=False):
            raise RunError(f"{folder} holds a study of another program: choose another folder")
        api.delete_study(study_name=name, storage=storage)  # killed between these two lines:
    study = api.create_study(study_name=name, storage=storage, directions=goals)
    study.set_user_attr("identity", identity)
    return study


def _check_identity(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    old, new = _flat(there), _flat(here)
    differ = [
        f"{key} ({_short(old, key)} there, {_short(new, key)} now)"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    ]
    if differ:
        raise RunError(
            f"{folder} is the study of another search: {', '.join(differ)} differ. Choose another "
            "folder, or delete it"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        whole = isinstance(inner, Mapping) and inner
        found.update(_flat(inner, f"{prefix}{key}.") if whole else {f"{prefix}{key}": inner})
    return found


def _short(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key]) if key in values else "nothing"
    return text if len(text) <= 40 else text[:37] + "..."
