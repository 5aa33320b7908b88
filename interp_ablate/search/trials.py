"""Trials: plans to try and what came of them, one line each in a log that survives a kill.

Knows: the record, its log, which scores a stage takes. Does not know: which plans are proposed or chosen.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from interp_ablate.edits.kinds import Add
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import InterpAblateError, PlanError
from interp_ablate.jobs.bars import bar
from interp_ablate.jobs.executors import Executor
from interp_ablate.search.bench import ValidationBench
from interp_ablate.search.edit_space import EditSpace, plan_of
from interp_ablate.search.objective_scores import PromptScores
from interp_ablate.storage.json_shapes import NONE, NUMBER, OBJECT, misfit
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.provenance import versions

Stage = Literal["screen", "refine", "search", "finalist"]
FORMAT = "interp_ablate.trials/3"
# A trial is given up after its process was killed so often: it may be the cause (out of memory).
KILLS = 5
_SHAPE = {
    "params": OBJECT,
    **dict.fromkeys(("stage", "status", "reason"), str),
    **dict.fromkeys(("prompts", "number"), (NONE, int)),
    "seconds": NUMBER,
    "scores": {"*": NUMBER},
    "by_prompt": {"*": [(NONE, *NUMBER)]},
}


@dataclass(frozen=True)
class Trial:
    """One plan by its parameters and, once it is scored, what came of it. One line of the log."""

    params: dict[str, Any]
    """What `edit_space.plan_of` makes the plan of."""
    stage: Stage = "screen"
    prompts: int | None = None
    """Prompts of each side that it is scored on; None for all."""
    number: int | None = None
    """Place among the trials of a search, which the samplers' draws depend on."""
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    status: Literal["proposed", "ok", "failed"] = "proposed"
    reason: str = ""
    """Why it failed."""
    by_prompt: dict[str, list[float]] = field(default_factory=dict)
    """Of some scores the numbers that they are means of, a number a prompt of their side."""

    @property
    def key(self) -> str:
        """Identity in the log: everything but the result."""
        return json.dumps([self.stage, self.prompts, self.number, self.params], sort_keys=True)

    def scored(self, scores: dict[str, float], seconds: float) -> Trial:
        """The finished trial; scores that are not finite make it a failed one."""
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        missing = [name for name in scores if name not in finite]
        if missing:
            reason = f"not finite: {', '.join(missing)}"
            return replace(self, scores=finite, seconds=seconds, status="failed", reason=reason)
        by_prompt = scores.by_prompt if isinstance(scores, PromptScores) else {}
        return replace(self, scores=finite, seconds=seconds, status="ok", by_prompt=by_prompt)

    def failed(self, reason: object, seconds: float = 0.0) -> Trial:
        """The trial that came to nothing."""
        return replace(self, seconds=seconds, status="failed", reason=str(reason))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        trial = cls(**data)
        if (place := misfit(vars(trial), _SHAPE)) is not None or trial.stage not in get_args(Stage):
            raise TypeError(f"not a trial: its {place or 'stage'} is not one")
        return trial


class TrialLog:
    """Finished trials on disk: a header that says what was tried, then a line a trial.

    A line before it says that the trial was begun; begun ones that never finish are counted as kills. Another line
    says which versions of packages made the trials after it.

    Raises:
        RunError: another run's log, a corrupt line (its number), or a log in use by another process.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self._lines = JsonlLog(
            path, identity, kind="log of trials", format=FORMAT, lost="its trial is run again"
        )
        self.done: dict[str, Trial] = {}
        self.kills: Counter[str] = Counter()
        self.made_by: list[dict[str, Any]] = []  # versions, and how many trials they finished

    @contextmanager
    def open(self) -> Iterator[TrialLog]:
        """Read what is there; the other methods work inside the block, in one process at a time."""
        with self._lines.open() as lines:
            self.done, self.kills, self.made_by = {}, Counter(), []
            for number, line in enumerate(lines, 2):
                try:
                    self._take(line)
                except (TypeError, KeyError, ValueError, AttributeError) as error:
                    raise self._lines.corrupt(number, error) from error
            yield self

    def _take(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self.kills.update(line["begun"])
        elif "released" in line:
            self.kills.subtract(line["released"])
        elif "versions" in line:
            self.made_by.append({"versions": dict(line["versions"]), "trials": 0})
        else:
            trial = Trial.from_dict(line)
            self.done[trial.key] = trial
            if self.made_by:
                self.made_by[-1]["trials"] += 1

    def begin(self, trials: Sequence[Trial]) -> None:
        """Record that trials are being scored, and by which versions where those are others than before."""
        now = versions()
        if not self.made_by or self.made_by[-1]["versions"] != now:
            self._append({"versions": now})
        self._append({"begun": [trial.key for trial in trials]})

    def release(self, keys: Sequence[str]) -> None:
        """Record that begun trials were interrupted, which is no sign that they kill."""
        if keys:
            self._append({"released": list(keys)})

    def finish(self, trial: Trial) -> None:
        """Record a finished trial; it is on disk when this returns."""
        self._append(asdict(trial))

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._take(line)


@dataclass(frozen=True, eq=False, repr=False)
class PlannedTrial:
    """A trial with its plan: what a worker needs beside the bench."""

    trial: Trial
    plan: Plan
    addition: Plan | None = None
    """Of a screened direction: its addition at its own site."""

    def __repr__(self) -> str:
        return f"trial {self.trial.key}"


def planned_trial(trial: Trial, space: EditSpace) -> PlannedTrial:
    """The plan of a trial's parameters.

    Raises:
        InterpAblateError: parameters that make no plan here.
    """
    plan = plan_of(trial.params, space)
    if trial.stage != "screen":
        return PlannedTrial(trial, plan)
    direction = space.direction(trial.params)
    return PlannedTrial(trial, plan, Plan((Add(direction, direction.site),)))


def score_trials(bench: ValidationBench, batch: Sequence[PlannedTrial]) -> list[Trial]:
    """The finished trials of a batch; a search's are answered in one batch of the model."""
    if len(batch) > 1 and all(each.trial.stage == "search" for each in batch):
        start = time.perf_counter()
        try:
            several = bench.objectives_of([each.plan for each in batch])
        except InterpAblateError:
            several = []  # which one is at fault shows when each is scored alone
        if several:
            share = (time.perf_counter() - start) / len(batch)
            return [each.trial.scored(scores, share) for each, scores in zip(batch, several)]
    return [score_trial(bench, each) for each in batch]


def score_trial(bench: ValidationBench, planned: PlannedTrial) -> Trial:
    """One finished trial; an error of the model, or of its numbers, is a failed one with the reason."""
    start, trial, plan = time.perf_counter(), planned.trial, planned.plan
    if trial.prompts is not None:
        bench = bench.head(trial.prompts)
    if trial.stage == "finalist":
        bench = bench.finalists or bench
    try:
        if trial.stage == "search":
            scores = bench.objectives_of([plan])[0]
        else:
            scores = bench.score(plan, generate=trial.stage == "finalist")
            scores.update(bench.baseline)
            if planned.addition is not None:
                scores["addition"] = bench.addition(planned.addition)
    except InterpAblateError as error:
        return trial.failed(error, time.perf_counter() - start)
    return trial.scored(scores, time.perf_counter() - start)


Batch = tuple[PlannedTrial, ...]
Key = TypeVar("Key", bound=Hashable)


def together(keys: Sequence[Key], most: int, kills: Mapping[Key, int]) -> Sequence[Key]:
    """The first keys whose work may be done in one piece: one alone where a process was killed at it before.

    So only the work at fault is killed often enough to be given up.
    """
    clean = list(takewhile(lambda key: not kills.get(key), keys[:most]))
    return clean or keys[:1]


def _checked(trials: Iterable[Trial]) -> list[Trial]:
    """The trials as a list; something else is refused."""
    given = list(trials) if isinstance(trials, Iterable) else [trials]
    if wrong := [each for each in given if not isinstance(each, Trial)]:
        raise PlanError(
            f"trials are Trial objects, such as those of `bands`; got {wrong[0]!r:.80} ({type(wrong[0]).__name__})"
        )
    return given


def run_trials(
    trials: Sequence[Trial],
    space: EditSpace,
    bench: ValidationBench,
    log: TrialLog,
    *,
    executor: Executor[Batch, list[Trial]] | None = None,
    batch_size: int = 1,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Score every trial that the log does not hold yet; returns them all finished, in order.

    The log is written here only, whoever scored the trial.

    Args:
        executor: scores batches elsewhere; by default it is done here.
        batch_size: trials that are handed out together.
    """
    trials = _checked(trials)
    begun: dict[str, Trial] = {}

    def record(trial: Trial) -> None:
        log.finish(trial)
        begun.pop(trial.key, None)
        if on_trial:
            on_trial(trial)

    def batches() -> Iterator[Batch]:
        todo = {each.key: each for each in trials if each.key not in log.done}
        while todo:
            batch, some = [], list(islice(todo, batch_size))
            for trial in map(todo.pop, together(some, batch_size, log.kills)):
                if log.kills[trial.key] >= KILLS:
                    record(trial.failed(f"its process was killed {KILLS} times: not tried again"))
                    continue
                try:
                    batch.append(planned_trial(trial, space))
                except InterpAblateError as error:
                    record(trial.failed(error))
            if batch:
                log.begin([each.trial for each in batch])
                begun.update((each.trial.key, each.trial) for each in batch)
                yield tuple(batch)

    for trial in trials:
        if on_trial and trial.key in log.done:
            on_trial(log.done[trial.key])
    try:
        here = ((batch, score_trials(bench, batch)) for batch in batches())
        results = here if executor is None else executor.run(batches())
        with bar("trials", sum(trial.key not in log.done for trial in trials)) as advance:
            for _, finished in results:
                for trial in finished:
                    record(trial)
                advance(len(finished))
    except BaseException:
        log.release(list(begun))
        raise
    return [log.done[trial.key] for trial in trials]
