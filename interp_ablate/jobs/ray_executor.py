"""Trials on Ray actors, each with a model of its own.

Knows: Ray's start, losses and limits. Does not know: what a job computes.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Literal

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.jobs.executors import Executor, Job, Result

logger = logging.getLogger(__name__)

# Builds a worker's function in the worker's own process; it is sent there, so it must pickle.
Make = Callable[[], Callable[[Job], Result]]

# Bytes of Ray's shared memory in a cluster started here (its least is 75 MB): jobs and results are small.
OBJECT_STORE = 100 * 2**20
# Set in the driver, set in every worker. Only a cluster that is started here inherits them.
PASSED_ON = ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE")
# What Ray would print, whatever its log level, and what an error or the log says here anyway.
UNPRINTED = r"^A worker died or was killed|due to memory pressure"
SHOWN = 200  # characters of a job that an error shows


class LocalExecutor(Generic[Job, Result]):
    """One worker in this process, built when the first job comes; jobs are done in order."""

    def __init__(self, make: Make[Job, Result]) -> None:
        self.make = make
        self._work: Callable[[Job], Result] | None = None

    def __enter__(self) -> LocalExecutor[Job, Result]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._work = None

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """See `Executor.run`; errors of a job pass through as they are."""
        for job in jobs:
            if self._work is None:
                self._work = self.make()
            yield job, self._work(job)


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

    Args:
        workers: how many at most; as many as the cluster holds by default.
        cpus: cores a worker (all of a machine that has fewer); also the threads torch uses in a worker
            without a GPU.
        gpus: GPUs a worker (a half lets two share one); by default one where the cluster has any,
            else none.
        address: of a running cluster ("auto", "host:port", "ray://host:port"); the variable RAY_ADDRESS by default, else
            Ray is started on this machine and stopped at the end. Not looked at where Ray already runs
            in this process.
        retries: how many times a job is handed out again after its worker died.

    Raises:
        RunError: Ray is missing or does not start, the workers do not fit its cluster, a worker cannot
            be built, or a job lost its worker more than `retries` times.
    """

    def __init__(
        self,
        make: Make[Job, Result],
        *,
        workers: int | None = None,
        cpus: float = 1.0,
        gpus: float | None = None,
        address: str | None = None,
        retries: int = 3,
    ) -> None:
        if (workers is not None and workers < 1) or cpus <= 0 or (gpus or 0) < 0 or retries < 0:
            raise RunError(
                f"workers={workers}, cpus={cpus}, gpus={gpus}, retries={retries}: expected at least "
                "one worker, more than 0 cores a worker, and gpus and retries of 0 or more"
            )
        self.make, self.workers, self.cpus, self.gpus = make, workers, cpus, gpus
        self.address, self.retries = address, retries
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
        self._ray = _import_ray()
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
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            _start_ray(self._ray, address)
            self._owner = True
            if address == "local":  # inherited; a list of their own would delay every worker by 1 s
                variables = {}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = float(any(node.get("GPU") for node in nodes)) if self.gpus is None else self.gpus
        cpus = _share(nodes, self.cpus)
        self._limit = _limit(nodes, self.workers, cpus, gpus)
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
        except _losses(self._ray) as error:
            self._kill(actor)
            self._stillborn += 1
            logger.warning("a worker died while it was built: %s", _line(error))
            if self._stillborn > self.retries:
                raise RunError(
                    f"{self._stillborn} workers died in a row while they were built, the last one "
                    f"of: {_line(error)}. If memory ran out, ask for fewer workers"
                ) from error
            return
        self._stillborn = 0
        self._idle.append(actor)

    def _finished(self, reference: Any) -> Iterator[tuple[Job, Result]]:
        """The job and its result; nothing where the worker died and the job waits for another one."""
        actor, task = self._running[reference]
        try:
            result = self._get(reference, f"{task} failed")
        except _losses(self._ray) as error:
            del self._running[reference]
            self._kill(actor)
            task = replace(task, lost=task.lost + 1)
            logger.warning("the worker of %s died: %s", task, _line(error))
            if task.lost > self.retries:
                raise RunError(
                    f"{task} lost its worker {task.lost} times, the last one of: {_line(error)}. If "
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
                logger.debug("%s:\n%s", what, _plain(error))
                raise error.cause from None
            logger.error("%s:\n%s", what, _plain(error))
            # Ray's own causes carry a traceback in their text; it is in the log already
            cause = f"{type(error.cause).__name__}: {str(error.cause).partition('traceback:')[0]}"
            raise RunError(
                f"{what}: {cause.strip()}. The log has the worker's traceback"
            ) from error
        except _losses(self._ray):
            raise
        except errors.RayError as error:
            logger.error("%s:\n%s", what, _plain(error))
            raise RunError(f"{what}: {type(error).__name__}: {_line(error)}") from error

    def _kill(self, actor: Any) -> None:
        if self._ray.is_initialized():
            self._ray.kill(actor, no_restart=True)

    def _release(self) -> None:
        busy = [actor for actor, _ in self._running.values()]
        for actor in (*self._idle, *self._building.values(), *busy):
            self._kill(actor)
        self._clear()


def _import_ray() -> Any:
    unprinted = os.environ.get("RAY_DEDUP_LOGS_SKIP_REGEX", UNPRINTED)
    try:
        with _environment(RAY_DEDUP_LOGS_SKIP_REGEX=unprinted):  # read when first imported
            import ray
            import ray.exceptions
    except ModuleNotFoundError as error:
        raise RunError(
            "the ray executor needs Ray, which is not installed: pip install 'interp-ablate[ray]'"
        ) from error
    return ray


def _start_ray(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one of this machine's cores and GPUs; silent, and without reports.

    Ray keeps its files in its own folder under the system's temporary one.
    """
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        settings |= {"num_cpus": _bound_to()}
    logger.info("starting Ray (%s)", address)
    try:
        _knock(address)
        with _environment(RAY_USAGE_STATS_ENABLED="0"):
            ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        raise RunError(
            f"Ray does not start or connect (address {address}): {_line(error)}. Check the address "
            "(`ray status` on that machine), or leave it out to use this machine"
        ) from error


def _knock(address: str) -> None:
    """Does anything answer there? Ray itself would try for minutes, in silence.

    Raises:
        OSError: nothing does.
        ValueError: it is no address.
    """
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("expected host:port, ray://host:port or auto")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _bound_to() -> int | None:
    """The cores this process is bound to; None where it may use all, which Ray counts (or a quota)."""
    if sys.platform != "linux":
        return None
    cores = len(os.sched_getaffinity(0))
    return cores if cores != os.cpu_count() else None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables set for the block: processes started inside keep them, this one does not."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _share(nodes: list[dict[str, float]], cpus: float) -> float:
    """The cores a worker takes: those asked for, or all of the largest node where it has fewer."""
    most = max((node.get("CPU", 0) for node in nodes), default=0)
    if 0 < most < cpus:
        logger.warning(
            "%g cores a worker, but no machine has more than %g: taking those", cpus, most
        )
        return most
    return cpus


def _limit(nodes: list[dict[str, float]], workers: int | None, cpus: float, gpus: float) -> int:
    """How many workers there may be: those asked for, or as many as the nodes hold.

    Ray would wait for ever, in silence, for a worker that fits no node.

    Raises:
        RunError: they do not fit.
    """
    room = 0
    for node in nodes:
        holds = int(node.get("CPU", 0) / cpus + 1e-9)
        room += min(holds, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else holds
    if room < (workers or 1):
        there = ", ".join(f"{n.get('CPU', 0):g} cores and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise RunError(
            f"{workers or 1} worker(s) of {cpus:g} cores and {gpus:g} GPUs each do not fit: Ray's "
            f"nodes have {there or 'nothing'}, room for {room}. Ask for fewer workers, or for less "
            "a worker"
        )
    return workers or room


def _losses(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises when a worker, its machine, or a result on that machine is gone."""
    errors = ray.exceptions
    return (
        errors.RayActorError,
        errors.OutOfMemoryError,
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.ObjectLostError,
    )


def _plain(error: BaseException) -> str:
    """An error's text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _line(error: BaseException) -> str:
    """An error's text as one line."""
    return " ".join(_plain(error).split()).rstrip(".")


def _local(make: Make[Job, Result], **settings: Any) -> LocalExecutor[Job, Result]:
    if settings:
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise RunError(
            f"{given}: settings of the ray executor; the local one has none. Leave them out, or "
            "choose the ray executor"
        )
    return LocalExecutor(make)


EXECUTORS: dict[str, Callable[..., Executor[Any, Any]]] = {"local": _local, "ray": RayExecutor}


def executor_of(
    name: Literal["local", "ray"], make: Make[Job, Result], **settings: Any
) -> Executor[Job, Result]:
    """The executor of that name; a setting that is None keeps its default.

    Raises:
        RunError: an unknown name, or settings that the executor does not have.
    """
    if name not in EXECUTORS:
        raise RunError(f"no executor {name!r}: expected one of {', '.join(EXECUTORS)}")
    given = {key: value for key, value in settings.items() if value is not None}
    return EXECUTORS[name](make, **given)
