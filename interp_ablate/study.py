"""Study: a search over named parameters for named objectives that survives being killed.

Knows: Optuna (its samplers, its journal on disk), locks, killed processes, torn lines, other searches'
studies. Does not know: models, prompts, plans, or what a parameter or a score means.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

import pandas as pd

from interp_ablate.errors import InterpAblateError, RunError

if TYPE_CHECKING:
    import optuna

_log = logging.getLogger(__name__)

Scalar: TypeAlias = str | int | float | bool | None
Sampler = Literal["tpe", "random", "nsga2"]
Goal = Literal["minimize", "maximize"]

FORMAT = "interp_ablate.study/1"
KILLED = "its process was killed"
INTERRUPTED = "it was interrupted"
# The same parameters are not tried again after so many kills: they may be what kills (out of memory).
KILLS = 5
# Without a number of trials to reach: so many known points in a row, and there is nothing left to try.
COPIES = 100

# --------------------------------------------------------------------------------- the space


class Suggests(Protocol):
    """What a space needs of an Optuna trial."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Scalar: ...


@dataclass(frozen=True)
class Float:
    """A number between two bounds, both included; on a logarithmic scale, or in steps from `low`.

    `when`: the name of an earlier parameter and the values of it for which this one exists.
    """

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self, self.step)

    def suggest(self, trial: Suggests) -> float:
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def admit(self, value: Any) -> float:
        """The value as this parameter holds it.

        Raises:
            RunError: not a number, out of range, or between two steps.
        """
        return _admit_number(self, float, value)


@dataclass(frozen=True)
class Int:
    """A whole number between two bounds, both included; see `Float`."""

    name: str
    low: int
    high: int
    log: bool = False
    step: int = 1
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self, None if self.log and self.step == 1 else self.step)

    def suggest(self, trial: Suggests) -> int:
        return trial.suggest_int(self.name, self.low, self.high, step=self.step, log=self.log)

    def admit(self, value: Any) -> int:
        """As `Float.admit`."""
        return _admit_number(self, int, value)


@dataclass(frozen=True)
class Choice:
    """One of a few values; see `Float` for `when`."""

    name: str
    choices: tuple[Scalar, ...]
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        plain = all(isinstance(c, str | int | float | None) for c in self.choices)
        if not plain or not self.choices or len(set(self.choices)) < len(self.choices):
            raise RunError(
                f"{self.name} has the choices {list(self.choices)}: give at least one, each once "
                "(1 and True are the same), of text, numbers, True, False and None"
            )

    def suggest(self, trial: Suggests) -> Scalar:
        return trial.suggest_categorical(self.name, self.choices)

    def admit(self, value: Any) -> Scalar:
        """As `Float.admit`."""
        for choice in self.choices:
            if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                return choice
        raise RunError(f"{self.name} = {value!r}: it is one of {list(self.choices)}")


Parameter: TypeAlias = Float | Int | Choice


def _check_range(parameter: Float | Int, step: float | None) -> None:
    low, high = parameter.low, parameter.high
    place = f"{parameter.name} from {low} to {high}"
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RunError(f"{place}: the bounds are finite numbers, the lower one first")
    if parameter.log and (low <= 0 or step is not None):
        raise RunError(f"{place}: a logarithmic scale starts above 0 and has no steps")
    if step is not None and (step <= 0 or not _whole((high - low) / step)):
        raise RunError(f"{place}: steps of {step} do not lead from one bound to the other")


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-8


def _admit_number(parameter: Float | Int, kind: type, value: Any) -> Any:
    place = f"{parameter.name} = {value!r}"
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{place}: it is a number of type {kind.__name__}") from error
    if isinstance(value, str | bool) or number != value:
        raise RunError(f"{place}: it is a number of type {kind.__name__}")
    if not parameter.low <= number <= parameter.high:
        raise RunError(f"{place}: it lies between {parameter.low} and {parameter.high}")
    if parameter.step and not _whole((number - parameter.low) / parameter.step):
        raise RunError(f"{place}: it goes from {parameter.low} in steps of {parameter.step}")
    return number


@dataclass(frozen=True)
class Space:
    """Parameters in the order they are suggested; a conditional one comes after what it depends on.

    Raises:
        RunError: a name given twice, or a condition on no earlier parameter or on no value of it.
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        earlier: dict[str, Parameter] = {}
        for each in self.parameters:
            if each.name in earlier:
                raise RunError(f"two parameters are named {each.name}: give each a name of its own")
            if each.when:
                parent = earlier.get(str(each.when[0]))
                if parent is None or len(each.when) < 2:
                    raise RunError(
                        f"{each.name} exists when {each.when}: give the name of an earlier "
                        f"parameter ({', '.join(earlier) or 'there is none'}) and its values"
                    )
                for value in each.when[1:]:
                    parent.admit(value)
            earlier[each.name] = each

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.parameters)

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Values for the parameters that exist, in order."""
        params: dict[str, Any] = {}
        for each in self.parameters:
            if _exists(each, params):
                params[each.name] = each.suggest(trial)
        return params

    def admit(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Chosen values, some or all, as the space holds them.

        Raises:
            RunError: an unknown name, a value out of range, or a parameter that does not exist beside
                the others.
        """
        unknown = sorted(set(params) - set(self.names))
        if unknown:
            raise RunError(
                f"unknown parameters: {', '.join(unknown)}. There are: {', '.join(self.names)}"
            )
        admitted: dict[str, Any] = {}
        for each in self.parameters:
            if each.name not in params:
                continue
            if not _exists(each, admitted):
                parent, *values = each.when
                raise RunError(
                    f"{each.name} exists only when {parent} is {' or '.join(map(repr, values))}: "
                    f"leave it out, or give that {parent} too"
                )
            admitted[each.name] = each.admit(params[each.name])
        return admitted

    def describe(self) -> dict[str, Any]:
        """Plain data, by parameter name."""
        return {
            each.name: {
                "kind": type(each).__name__.lower(),
                **{f.name: getattr(each, f.name) for f in fields(each) if f.name != "name"},
            }
            for each in self.parameters
        }


def _exists(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    if not parameter.when:
        return True
    parent, *values = parameter.when
    return str(parent) in params and params[str(parent)] in values


def _key(params: Mapping[str, Any]) -> str:
    """The same for the same parameters; floats to 12 digits, for a grid's points are sums of steps."""
    rounded = {k: float(f"{v:.12g}") if isinstance(v, float) else v for k, v in params.items()}
    return json.dumps(rounded, sort_keys=True)


# --------------------------------------------------------------------------------- locks and files


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A failure of the disk as this package's error."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the study {folder}: {error.strerror or error}. Free space or choose "
            "another place, and run again: finished trials are kept"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time inside the block; the system lets go of a killed one's lock."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mend(journal: Path) -> None:
    """Cut off a line that was never finished; the caller holds the lock that every writer takes."""
    with open(journal, "rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


class _AppendLock:
    """Optuna's lock around each append to its journal file.

    Optuna's own locks are files that a killed process leaves behind: the next one waits 30 seconds, or
    for ever where the path is relative. Here the system frees the lock, and what the killed process
    left of a line is cut off before another writes behind it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._path = journal, journal.with_name("append.lock")
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        with ExitStack() as stack:
            file = stack.enter_context(open(self._path, "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
            _mend(self._journal)
            stack.pop_all()
        self._file = file
        return True

    def release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _check_lines(journal: Path) -> None:
    with open(journal, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict) or not {"op_code", "worker_id"} <= value.keys():
                    raise ValueError("not a line of Optuna's journal")
            except ValueError as error:
                raise RunError(
                    f"corrupt study {journal}, line {number}: {error}. The lines after it count on "
                    "it: put the file back from a copy, or search again in another folder"
                ) from error


class _Worker:
    """A file that this process holds locked: while it does, its running trial is its own."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self._path = folder / self.name
        self._file = open(self._path, "ab")  # noqa: SIM115  (held open until close)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        if not self.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _living(folder: Path) -> set[str]:
    """Workers whose files are locked; the files of the others are removed."""
    living = set()
    for path in folder.iterdir():
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # it has just closed
            continue
        except BlockingIOError:
            living.add(path.name)
    return living


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
    with _disk(folder):
        workers = folder / "workers"
        workers.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "ask.lock"):
            found = _load(api, folder, list(objectives.values()), json.loads(json.dumps(whole)))
            worker = _Worker(workers)
    study = Study(folder, found, worker, space, _Aims(dict(objectives), limits), samplers)
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
    _check_apart(space, [*objectives, *limits])


def _check_apart(space: Space, scores: Sequence[str]) -> None:
    """Parameters and scores are columns of one table."""
    taken = sorted((set(scores) | set(space.names)) & set(_COLUMNS))
    taken += sorted(set(scores) & set(space.names))
    if taken:
        raise RunError(
            f"{', '.join(taken)}: named twice in the table of trials. Rename the parameter or score"
        )


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
    lock = _AppendLock(path)
    lock.acquire()  # mends the file
    try:
        _check_lines(path)
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


# --------------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Outcome:
    """One trial as a study has it. `state` is Optuna's: COMPLETE, FAIL, RUNNING or WAITING.

    `copied_from`: the trial of the same parameters whose scores these are.
    """

    number: int
    state: str
    params: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""
    note: str = ""
    copied_from: int | None = None


_COLUMNS = ("number", "state", "seconds", "reason", "note", "copied_from")


@dataclass(frozen=True)
class _Aims:
    objectives: dict[str, Goal]
    limits: dict[str, float]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.objectives, *self.limits]))


@dataclass(frozen=True)
class _Scored:
    """What an evaluation came to; with a reason it failed."""

    scores: dict[str, float]
    reason: str = ""
    copied_from: int | None = None


@dataclass(frozen=True)
class _Asked:
    """A trial handed out, its parameters, and an earlier trial that has their scores."""

    trial: optuna.Trial
    params: dict[str, Any]
    twin: Outcome | None


Objective: TypeAlias = Callable[[dict[str, Any]], Mapping[str, float]]
Together: TypeAlias = Callable[[Sequence[dict[str, Any]]], Sequence[Mapping[str, float]]]


class Study:
    """A search that is on disk at every moment; made by `open_study`, closed at the end of a `with`.

    One process may be killed while another goes on, or while none does: what was finished stays, what
    was running is run again. A forked child must not use its parent's study, nor outlive a parent that
    is killed: it would hold the lock that says the parent lives.
    """

    def __init__(
        self,
        folder: Path,
        study: optuna.Study,
        worker: _Worker,
        space: Space,
        aims: _Aims,
        samplers: Callable[[int], Any],
    ) -> None:
        self.folder, self.space = folder, space
        self._study, self._worker, self._aims, self._samplers = study, worker, aims, samplers

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the study; another process need not find out by the lock."""
        self._worker.close()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """One process at a time hands out trials."""
        with _disk(self.folder), _locked(self.folder / "ask.lock"):
            yield

    # ------------------------------------------------------------------- handing out trials

    def enqueue(self, params: Mapping[str, Any], note: str = "") -> bool:
        """Have these parameters tried before any other; what is left out is suggested.

        Returns whether they are new: the same parameters are enqueued once, across restarts too.

        Raises:
            RunError: parameters that are not in the space, or a disk that cannot be written.
        """
        fixed = self.space.admit(params)
        prior = _key(fixed)
        with self._step():
            known = self._all()
            if any(t.user_attrs.get("prior") == prior for t in known):
                return False
            kept = {"prior": prior, "fixed": fixed, "note": note, "draw": _next_draw(known)}
            self._study.enqueue_trial(fixed, kept)
        return True

    def recover(self) -> int:
        """Have the trials of killed processes run again; how many there were.

        `open_study` does this, and so does every ask of `run`.
        """
        with self._step():
            return self._recover()

    def _recover(self) -> int:
        from optuna.trial import TrialState

        living = _living(self.folder / "workers")
        running = [t for t in self._all() if t.state == TrialState.RUNNING]
        # one without a worker was killed in the ask lock, which this process holds now
        lost = [t for t in running if t.user_attrs.get("asked", {}).get("worker") not in living]
        for trial in lost:
            self._abandon(trial, KILLED)
        return len(lost)

    def _abandon(self, frozen: optuna.trial.FrozenTrial, reason: str) -> None:
        """Tell a running trial failed and enqueue its parameters again; the caller is in `_step`.

        In this order, each step once: killed in the middle of it, the next process goes on from there.
        """
        from optuna.trial import Trial, TrialState

        trial, attrs = Trial(self._study, frozen._trial_id), frozen.user_attrs
        if "scores" in attrs:  # it was finished and not yet told
            self._settle(trial)
            return
        asked = attrs.get("asked", {})
        kills = attrs.get("kills", 0) + bool(asked and reason == KILLED)
        params = frozen.params if asked else attrs.get("fixed")
        if kills < KILLS:
            retried = any(t.user_attrs.get("retry_of") == frozen.number for t in self._all())
            if params is not None and not retried:
                kept = {"retry_of": frozen.number, "fixed": params, "kills": kills}
                kept |= {k: v for k, v in {**attrs, **asked}.items() if k in ("note", "draw")}
                self._study.enqueue_trial(params, kept)
            trial.set_user_attr("abandoned", True)
        else:
            reason = f"{reason}, {kills} times with these parameters: not tried again"
        trial.set_user_attr("reason", reason)
        self._study.tell(frozen.number, state=TrialState.FAIL)
        _log.info("trial %d: %s", frozen.number, reason)

    def _ask(self, n_trials: int | None) -> _Asked | None:
        """A trial of this process's own; None when the study has its trials."""
        with self._step():
            self._recover()
            known = self._all()
            if n_trials is not None and sum(map(_counts, known)) >= n_trials:
                return None
            trial = self._study.ask()
            draw = trial.user_attrs.get("draw", _next_draw(known))
            self._study.sampler = self._samplers(draw)
            # NSGA-II counts a trial to a generation here, which Optuna leaves out where all is fixed
            _ = trial.relative_params
            params = self.space.suggest(trial)
            # last, and in one line: without it the trial was not handed out
            trial.set_user_attr("asked", {"worker": self._worker.name, "draw": draw})
        return _Asked(trial, params, self._twin(params, known))

    def _twin(
        self, params: dict[str, Any], known: Sequence[optuna.trial.FrozenTrial]
    ) -> Outcome | None:
        wanted = _key(params)
        outcomes = (_outcome(trial) for trial in known if _complete(trial))
        return next(
            (o for o in outcomes if o.copied_from is None and _key(o.params) == wanted), None
        )

    # ------------------------------------------------------------------- running trials

    def run(
        self,
        objective: Objective,
        *,
        n_trials: int | None = None,
        seconds: float | None = None,
        on_trial: Callable[[Outcome], None] | None = None,
        together: Together | None = None,
        at_once: int = 1,
    ) -> int:
        """Ask, evaluate and tell; how many trials this call finished.

        Args:
            objective: from parameters to scores by name, the objectives and limits among them. Where it
                raises an error of this package, or one of those scores is not finite, the trial is
                recorded as failed with the reason. Any other exception leaves `run`, and the trial is
                run again by the next one.
            n_trials: of the whole study, failed ones included, those of killed processes not.
            seconds: of this call; the trials that are running then are finished.
            on_trial: called with every trial this call finishes.
            together: scores several trials in one go, as `objective` would each of them. Where it raises an
                error of this package, each is scored alone.
            at_once: how many trials `together` takes. They are drawn without knowing of each other's scores,
                and a kill costs all of them.

        Raises:
            RunError: neither a number nor seconds, a study that is closed, scores without a name that is
                needed, or a disk that cannot be written.
        """
        if n_trials is None and seconds is None:
            raise RunError("a search without an end: give n_trials, or seconds, or both")
        if at_once < 1 or (at_once > 1 and together is None):
            raise RunError(f"at_once={at_once}: it is at least 1, and above 1 it needs `together`")
        if self._worker.closed:
            raise RunError(f"the study {self.folder} is closed: open it again")
        start, done, copies = time.monotonic(), 0, 0
        while seconds is None or time.monotonic() - start < seconds:
            some = self._ask_some(n_trials, at_once)
            with closing(self._evaluate(some, objective, together)) as outcomes:
                for outcome in outcomes:
                    done += 1
                    if on_trial is not None:
                        on_trial(outcome)
                    copies = copies + 1 if outcome.copied_from is not None else 0
            if len(some) < at_once:
                break
            if n_trials is None and copies >= COPIES:
                _log.info("%d known points in a row: nothing new is left to try", copies)
                break
        return done

    def _ask_some(self, n_trials: int | None, most: int) -> list[_Asked]:
        """Trials of this process's own, fewer where the study has its trials."""
        some: list[_Asked] = []
        try:
            while len(some) < most and (asked := self._ask(n_trials)) is not None:
                some.append(asked)
        except BaseException:
            self._give_back(some)
            raise
        return some

    def _evaluate(
        self, some: Sequence[_Asked], objective: Objective, together: Together | None
    ) -> Generator[Outcome, None, None]:
        """What asked trials come to, in order, each told before it is given; what is not told is given back."""
        told = 0
        try:
            scores = self._scores_of(some, objective, together)
            for asked, (scored, seconds) in zip(some, scores, strict=True):
                self._record(asked.trial, scored, seconds)
                told += 1
                yield _outcome(self._all()[asked.trial.number])
        finally:
            if told < len(some):
                self._give_back(some[told:])

    def _scores_of(
        self, some: Sequence[_Asked], objective: Objective, together: Together | None
    ) -> Iterator[tuple[_Scored, float]]:
        """Scores of trials in order and the seconds they took; the same parameters are scored once."""
        firsts = {_key(asked.params): asked for asked in reversed(some) if asked.twin is None}
        found: dict[str, tuple[_Scored, float]] = {}
        if together is not None and len(firsts) > 1:
            start = time.perf_counter()
            several = self._score_together(together, [one.params for one in firsts.values()])
            share = (time.perf_counter() - start) / len(firsts)
            found = {key: (scored, share) for key, scored in zip(firsts, several)}
        for asked in some:
            start, key = time.perf_counter(), _key(asked.params)
            if asked.twin is not None:
                copy = _Scored(asked.twin.scores, copied_from=asked.twin.number)
                yield copy, time.perf_counter() - start
            elif firsts[key] is asked:
                if key not in found:
                    scored = self._score(objective, asked.params)
                    found[key] = scored, time.perf_counter() - start
                yield found[key]
            else:
                scored, number = found[key][0], firsts[key].trial.number
                copy = scored if scored.reason else replace(scored, copied_from=number)
                yield copy, time.perf_counter() - start

    def _score_together(
        self, together: Together, params: Sequence[dict[str, Any]]
    ) -> list[_Scored]:
        """Nothing where it fails: whose fault it is shows when each is scored alone."""
        try:
            found = together([dict(each) for each in params])
        except InterpAblateError as error:
            _log.info("%d trials together failed (%s): one by one", len(params), error)
            return []
        if len(found) != len(params):
            raise RunError(f"`together` returned {len(found)} scores for {len(params)} trials")
        return [self._checked(each) for each in found]

    def _give_back(self, some: Sequence[_Asked]) -> None:
        from optuna.trial import TrialState

        with self._step():
            for asked in some:
                trial = self._all()[asked.trial.number]
                if trial.state == TrialState.RUNNING:
                    self._abandon(trial, INTERRUPTED)

    def _score(self, objective: Objective, params: dict[str, Any]) -> _Scored:
        try:
            found = objective(dict(params))
        except InterpAblateError as error:
            return _Scored({}, str(error) or type(error).__name__)
        return self._checked(found)

    def _checked(self, found: Mapping[str, float]) -> _Scored:
        scores = {name: float(value) for name, value in found.items()}
        missing = [name for name in self._aims.names if name not in scores]
        if missing:
            raise RunError(
                f"the objective returned the scores {', '.join(scores) or 'none'}; this study needs "
                f"{', '.join(missing)} too"
            )
        _check_apart(self.space, list(scores))
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        bad = [f"{name} = {scores[name]}" for name in self._aims.names if name not in finite]
        return _Scored(finite, f"not finite: {', '.join(bad)}" if bad else "")

    def _record(self, trial: optuna.Trial, scored: _Scored, seconds: float) -> None:
        with _disk(self.folder):
            if scored.reason:
                trial.set_user_attr("reason", scored.reason)
            if scored.copied_from is not None:
                trial.set_user_attr("copied_from", scored.copied_from)
            trial.set_user_attr("seconds", round(seconds, 4))
            # from this line on the trial is finished, whoever tells it
            trial.set_user_attr("scores", scored.scores)
            self._settle(trial)

    def _settle(self, trial: optuna.Trial) -> None:
        """Tell a trial whose scores are recorded."""
        from optuna.trial import TrialState

        frozen = self._all()[trial.number]
        attrs = frozen.user_attrs
        if "reason" in attrs:
            self._study.tell(trial.number, state=TrialState.FAIL)
            return
        for name, limit in self._aims.limits.items():
            if name not in frozen.constraints:
                trial.set_constraint(name, attrs["scores"][name] - limit)
        self._study.tell(trial.number, [attrs["scores"][name] for name in self._aims.objectives])

    # ------------------------------------------------------------------- reading

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    @property
    def n_finished(self) -> int:
        """Trials that are finished, failed ones included, those of killed processes not."""
        return sum(t.state.is_finished() and _counts(t) for t in self._all())

    def outcomes(self) -> list[Outcome]:
        """Every trial, by number."""
        return [_outcome(trial) for trial in self._all()]

    def trials(self) -> pd.DataFrame:
        """Every trial, by number: state, parameters, scores, seconds, reason; what is not there is NaN."""
        return self._frame(self.outcomes())

    def front(self) -> pd.DataFrame:
        """Complete trials within the limits that no other is better than in every objective.

        Sorted by the objectives, the best of the first one first, then by number; as `trials` else.
        Copies of another trial's scores are left out.
        """
        numbers = {trial.number for trial in self._study.best_trials}
        signs = {
            name: 1 if goal == "minimize" else -1 for name, goal in self._aims.objectives.items()
        }
        best = [o for o in self.outcomes() if o.number in numbers and o.copied_from is None]
        best.sort(
            key=lambda o: (*(sign * o.scores[name] for name, sign in signs.items()), o.number)
        )
        return self._frame(best)

    def _frame(self, outcomes: Sequence[Outcome]) -> pd.DataFrame:
        scores = dict.fromkeys([*self._aims.names, *(name for o in outcomes for name in o.scores)])
        head, tail = _COLUMNS[:2], _COLUMNS[2:]
        rows = [
            {**{name: getattr(o, name) for name in _COLUMNS}, **o.params, **o.scores}
            for o in outcomes
        ]
        frame = pd.DataFrame(rows, columns=[*head, *self.space.names, *scores, *tail])
        whole = [each.name for each in self.space.parameters if isinstance(each, Int)]
        numbers = dict.fromkeys([*scores, "seconds"], "float64")
        return frame.astype(
            {**numbers, **dict.fromkeys([*whole, "number", "copied_from"], "Int64")}
        )


def _complete(trial: optuna.trial.FrozenTrial) -> bool:
    from optuna.trial import TrialState

    return trial.state == TrialState.COMPLETE


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Finished or being run; not what waits, nor what a killed process left and is run again."""
    from optuna.trial import TrialState

    return trial.state != TrialState.WAITING and "abandoned" not in trial.user_attrs


def _next_draw(known: Sequence[optuna.trial.FrozenTrial]) -> int:
    """Which draw of the sampler comes next; a trial that is run again keeps its own."""
    attrs = [{**t.user_attrs, **t.user_attrs.get("asked", {})} for t in known]
    return 1 + max((each["draw"] for each in attrs if "draw" in each), default=-1)


def _outcome(trial: optuna.trial.FrozenTrial) -> Outcome:
    attrs = trial.user_attrs
    return Outcome(
        number=trial.number,
        state=trial.state.name,
        params=dict(trial.params or attrs.get("fixed", {})),
        scores=dict(attrs.get("scores", {})),
        seconds=attrs.get("seconds"),
        reason=attrs.get("reason", ""),
        note=attrs.get("note", ""),
        copied_from=attrs.get("copied_from"),
    )
