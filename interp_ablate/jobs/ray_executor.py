"""Trials on Ray actors, each with a model of its own.

Knows: Ray's start, losses and limits. Does not know: what a job computes.
"""

from __future__ import annotations

import logging
import os
import pickle
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Generic

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.jobs.executors import Job, Result
from interp_ablate.jobs.ray_cluster import (
    PASSED_ON,
    cores_a_worker,
    import_ray,
    loss_errors,
    one_line,
    plain_text,
    start_ray,
    worker_limit,
)

logger = logging.getLogger(__name__)

# Builds a worker's function in the worker's own process; it is sent there, so it must pickle.
Make = Callable[[], Callable[[Job], Result]]

SHOWN = 200  # characters of a job that an error shows


@dataclass(frozen=True)
class RaySettings:
    """Which workers Ray is asked for.

    Raises:
        RunError: values out of range.
    """

    workers: int | None = None
    """How many at most; as many as the cluster holds by default."""
    cpus: float = 1.0
    """Cores a worker (all of a machine that has fewer); also the threads torch uses in one without a GPU."""
    gpus: float | None = None
    """GPUs a worker (a half lets two share one); by default one where the cluster has any, else none."""
    address: str | None = None
    """Of a running cluster ("auto", "host:port", "ray://host:port"); the variable RAY_ADDRESS by default, else
    Ray is started on this machine and stopped at the end. Not looked at where Ray already runs in this process."""
    retries: int = 3
    """How many times a job is handed out again after its worker died."""

    def __post_init__(self) -> None:
        if (
            (self.workers is not None and self.workers < 1)
            or self.cpus <= 0
            or (self.gpus or 0) < 0
            or self.retries < 0
        ):
            raise RunError(
                f"workers={self.workers}, cpus={self.cpus}, gpus={self.gpus}, retries={self.retries}: "
                "expected at least one worker, more than 0 cores a worker, and gpus and retries of 0 or more"
            )


@dataclass(frozen=True)
class _Task(Generic[Job]):
    """A job on its way: its number (from 1) and how many workers it was lost with."""

    number: int
    job: Job
    lost: int = 0

    def __str__(self) -> str:
        return f"job {self.number} ({textwrap.shorten(str(self.job), SHOWN, placeholder=' ...')})"


class _Worker:
    """What runs on an actor. Built by a call of its own, so that a failure comes with its cause."""

    def build(self, make: Make[Any, Any], threads: int | None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.work = make()

    def do(self, job: Any) -> Any:
        return self.work(job)


class RayExecutor(Generic[Job, Result]):
    """Workers on Ray actors, each building once and holding one job at a time.

    A worker that dies costs the job it was doing: it is replaced and the job handed out again. Leaving
    a run early (an error, a closed generator) releases every worker, since some are busy with jobs
    whose results nobody will take.

    Ray runs code sent to it, with the rights of whoever started it: connect to clusters you trust.

    Raises:
        RunError: Ray is missing or does not start, the workers do not fit its cluster, a worker cannot
            be built, or a job lost its worker more than `retries` times.
    """

    def __init__(self, make: Make[Job, Result], settings: RaySettings | None = None) -> None:
        self.make, self.settings = make, settings or RaySettings()
        self._ray: Any = None
        self._clear()
        self._ready = self._owner = self._in_use = False

    def _clear(self) -> None:
        self._idle: list[Any] = []
        self._building: dict[Any, Any] = {}  # reference to the coming answer -> actor
        self._running: dict[Any, tuple[Any, _Task[Job]]] = {}
        self._waiting: deque[_Task[Job]] = deque()
        self._stillborn = 0  # workers that died while building, since one was built

    def __enter__(self) -> RayExecutor[Job, Result]:
        self._ray = import_ray()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()
        if self._owner:
            self._ray.shutdown()
        self._ray = None
        self._ready = self._owner = False

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """See `Executor.run`.

        Raises:
            InterpAblateError: raised by a job or by building a worker, with its message.
            RunError: any other error of theirs (its traceback is logged); and see the class.
        """
        if self._ray is None or self._in_use:
            raise RunError(
                "this executor is doing another run: finish or close that one first"
                if self._in_use
                else "a Ray executor runs inside its `with` block only, which releases its workers"
            )
        tasks = (_Task(number, job) for number, job in enumerate(jobs, 1))
        self._in_use, whole = True, False
        try:
            while self._hand_out(tasks):
                pending = [*self._running, *self._building]
                (reference,), _ = self._ray.wait(pending, num_returns=1)
                if reference in self._building:
                    self._built(reference)
                    continue
                yield from self._finished(reference)
                if self._ray is None:
                    raise RunError("the executor's `with` block ended in the middle of a run")
            whole = True
        finally:
            self._in_use = False
            if not whole:
                self._release()

    @property
    def n_workers(self) -> int:
        """How many workers there may be at once; Ray is started to find out."""
        if not self._ready:
            self._start()
        return self._limit

    def _hand_out(self, tasks: Iterator[_Task[Job]]) -> bool:
        """Give every idle worker a job and start the workers that are missing; is anything left to do?"""
        if not self._ready:
            self._waiting.extend(islice(tasks, 1))
            if not self._waiting:  # nothing to do: Ray is not even started
                return False
            self._start()
        free = self._limit - len(self._running) - len(self._waiting)
        self._waiting.extend(islice(tasks, max(0, free)))
        while len(self._idle) + len(self._building) < len(self._waiting):
            self._spawn()
        while self._idle and self._waiting:
            actor, task = self._idle.pop(), self._waiting.popleft()
            self._running[actor.do.remote(task.job)] = (actor, task)
        return bool(self._running or self._waiting)

    def _start(self) -> None:
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        if not self._ray.is_initialized():
            address = self.settings.address or os.environ.get("RAY_ADDRESS") or "local"
            start_ray(self._ray, address)
            self._owner = True
            if address == "local":  # inherited; a list of their own would delay every worker by 1 s
                variables = {}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = (
            float(any(node.get("GPU") for node in nodes))
            if self.settings.gpus is None
            else self.settings.gpus
        )
        cpus = cores_a_worker(nodes, self.settings.cpus)
        self._limit = worker_limit(nodes, self.settings.workers, cpus, gpus)
        self._actor = self._ray.remote(_Worker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables} if variables else {},
        )
        try:
            self._make = self._ray.put(self.make)  # once for all workers
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise RunError(f"what builds the workers cannot be sent to them: {error}") from error
        self._threads = None if gpus else max(1, int(cpus))
        self._ready = True

    def _spawn(self) -> None:
        actor = self._actor.remote()
        self._building[actor.build.remote(self._make, self._threads)] = actor

    def _built(self, reference: Any) -> None:
        actor = self._building.pop(reference)
        try:
            self._get(reference, "a worker could not be built")
        except loss_errors(self._ray) as error:
            self._kill(actor)
            self._stillborn += 1
            logger.warning("a worker died while it was built: %s", one_line(error))
            if self._stillborn > self.settings.retries:
                raise RunError(
                    f"{self._stillborn} workers died in a row while they were built, the last one "
                    f"of: {one_line(error)}. If memory ran out, ask for fewer workers"
                ) from error
            return
        self._stillborn = 0
        self._idle.append(actor)

    def _finished(self, reference: Any) -> Iterator[tuple[Job, Result]]:
        """The job and its result; nothing where the worker died and the job waits for another one."""
        actor, task = self._running[reference]
        try:
            result = self._get(reference, f"{task} failed")
        except loss_errors(self._ray) as error:
            del self._running[reference]
            self._kill(actor)
            task = replace(task, lost=task.lost + 1)
            logger.warning("the worker of %s died: %s", task, one_line(error))
            if task.lost > self.settings.retries:
                raise RunError(
                    f"{task} lost its worker {task.lost} times, the last one of: {one_line(error)}. If "
                    "memory ran out, ask for fewer workers or smaller batches"
                ) from error
            self._waiting.appendleft(task)
            return
        del self._running[reference]
        self._idle.append(actor)
        yield task.job, result

    def _get(self, reference: Any, what: str) -> Any:
        """An answer; a lost worker's error passes through, any other becomes this package's."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:  # first: it is also of its cause's own type
            if isinstance(error.cause, InterpAblateError):
                logger.debug("%s:\n%s", what, plain_text(error))
                raise error.cause from None
            logger.error("%s:\n%s", what, plain_text(error))
            # Ray's own causes carry a traceback in their text; it is in the log already
            cause = f"{type(error.cause).__name__}: {str(error.cause).partition('traceback:')[0]}"
            raise RunError(
                f"{what}: {cause.strip()}. The log has the worker's traceback"
            ) from error
        except loss_errors(self._ray):
            raise
        except errors.RayError as error:
            logger.error("%s:\n%s", what, plain_text(error))
            raise RunError(f"{what}: {type(error).__name__}: {one_line(error)}") from error

    def _kill(self, actor: Any) -> None:
        if self._ray.is_initialized():
            self._ray.kill(actor, no_restart=True)

    def _release(self) -> None:
        busy = [actor for actor, _ in self._running.values()]
        for actor in (*self._idle, *self._building.values(), *busy):
            self._kill(actor)
        self._clear()
