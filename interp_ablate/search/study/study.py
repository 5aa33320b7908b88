"""Study: a search over named parameters for named objectives that survives being killed.

Knows: Optuna (its samplers, its journal on disk), locks, killed processes, torn lines, other searches'
studies. Does not know: models, prompts, plans, or what a parameter or a score means.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.search.study.locks import WorkerFile, disk_errors, living_workers, locked_file
from interp_ablate.search.study.parameters import Goal, Int, Space, check_names_apart, parameter_key
from interp_ablate.search.study.trials import TRIAL_COLUMNS, TrialRecord

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

KILLED = "its process was killed"
INTERRUPTED = "it was interrupted"
# The same parameters are not tried again after so many kills: they may be what kills (out of memory).
KILLS = 5
# Without a number of trials to reach: so many known points in a row, and there is nothing left to try.
COPIES = 100


@dataclass(frozen=True)
class Objectives:
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
    twin: TrialRecord | None


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
        worker: WorkerFile,
        space: Space,
        aims: Objectives,
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
        with disk_errors(self.folder), locked_file(self.folder / "ask.lock"):
            yield

    # ------------------------------------------------------------------- handing out trials

    def enqueue(self, params: Mapping[str, Any], note: str = "") -> bool:
        """Have these parameters tried before any other; what is left out is suggested.

        Returns whether they are new: the same parameters are enqueued once, across restarts too.

        Raises:
            RunError: parameters that are not in the space, or a disk that cannot be written.
        """
        fixed = self.space.admit(params)
        prior = parameter_key(fixed)
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

        living = living_workers(self.folder / "workers")
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
        logger.info("trial %d: %s", frozen.number, reason)

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
    ) -> TrialRecord | None:
        wanted = parameter_key(params)
        outcomes = (_outcome(trial) for trial in known if _complete(trial))
        return next(
            (o for o in outcomes if o.copied_from is None and parameter_key(o.params) == wanted),
            None,
        )

    # ------------------------------------------------------------------- running trials

    def run(
        self,
        objective: Objective,
        *,
        n_trials: int | None = None,
        seconds: float | None = None,
        on_trial: Callable[[TrialRecord], None] | None = None,
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
                logger.info("%d known points in a row: nothing new is left to try", copies)
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
    ) -> Generator[TrialRecord, None, None]:
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
        firsts = {
            parameter_key(asked.params): asked for asked in reversed(some) if asked.twin is None
        }
        found: dict[str, tuple[_Scored, float]] = {}
        if together is not None and len(firsts) > 1:
            start = time.perf_counter()
            several = self._score_together(together, [one.params for one in firsts.values()])
            share = (time.perf_counter() - start) / len(firsts)
            found = {key: (scored, share) for key, scored in zip(firsts, several)}
        for asked in some:
            start, key = time.perf_counter(), parameter_key(asked.params)
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
            logger.info("%d trials together failed (%s): one by one", len(params), error)
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
        check_names_apart(self.space, list(scores))
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        bad = [f"{name} = {scores[name]}" for name in self._aims.names if name not in finite]
        return _Scored(finite, f"not finite: {', '.join(bad)}" if bad else "")

    def _record(self, trial: optuna.Trial, scored: _Scored, seconds: float) -> None:
        with disk_errors(self.folder):
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

    def outcomes(self) -> list[TrialRecord]:
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

    def _frame(self, outcomes: Sequence[TrialRecord]) -> pd.DataFrame:
        scores = dict.fromkeys([*self._aims.names, *(name for o in outcomes for name in o.scores)])
        head, tail = TRIAL_COLUMNS[:2], TRIAL_COLUMNS[2:]
        rows = [
            {**{name: getattr(o, name) for name in TRIAL_COLUMNS}, **o.params, **o.scores}
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


def _outcome(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    attrs = trial.user_attrs
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        params=dict(trial.params or attrs.get("fixed", {})),
        scores=dict(attrs.get("scores", {})),
        seconds=attrs.get("seconds"),
        reason=attrs.get("reason", ""),
        note=attrs.get("note", ""),
        copied_from=attrs.get("copied_from"),
    )
