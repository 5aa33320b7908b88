"""Ray's side of a run: starting or joining a cluster, what fits it, how its errors read.

Knows: Ray's settings, limits and errors. Does not know: jobs or workers' results.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from interp_ablate.errors import RunError

logger = logging.getLogger(__name__)

# Bytes of Ray's shared memory in a cluster started here (its least is 75 MB): jobs and results are small.
OBJECT_STORE = 100 * 2**20
# Set in the driver, set in every worker. Only a cluster that is started here inherits them.
PASSED_ON = ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE")
# What Ray would print, whatever its log level, and what an error or the log says here anyway.
UNPRINTED = r"^A worker died or was killed|due to memory pressure"


def import_ray() -> Any:
    unprinted = os.environ.get("RAY_DEDUP_LOGS_SKIP_REGEX", UNPRINTED)
    try:
        # the variable is read when Ray is first imported
        with _environment(RAY_DEDUP_LOGS_SKIP_REGEX=unprinted), _own_sigterm():
            import ray
            import ray.exceptions
    except ModuleNotFoundError as error:
        raise RunError(
            "the ray executor needs Ray, which is not installed: pip install 'interp-ablate[ray]'"
        ) from error
    return ray


def start_ray(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one of this machine's cores and GPUs; silent, and without reports.

    Ray keeps its files in its own folder under the system's temporary one.
    """
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        settings |= {"num_cpus": cores_bound_to()}
    logger.info("starting Ray (%s)", address)
    try:
        _knock(address)
        with _environment(RAY_USAGE_STATS_ENABLED="0"), _own_sigterm():
            ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        raise RunError(
            f"Ray does not start or connect (address {address}): {one_line(error)}. Check the address "
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


def cores_bound_to() -> int | None:
    """The cores this process is bound to; None where it may use all, which Ray counts (or a quota)."""
    if sys.platform != "linux":
        return None
    cores = len(os.sched_getaffinity(0))
    return cores if cores != os.cpu_count() else None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM does after the block what it did before: Ray would end the process with a status of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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


def cores_a_worker(nodes: list[dict[str, float]], cpus: float) -> float:
    """The cores a worker takes: those asked for, or all of the largest node where it has fewer."""
    most = max((node.get("CPU", 0) for node in nodes), default=0)
    if 0 < most < cpus:
        logger.warning(
            "%g cores a worker, but no machine has more than %g: taking those", cpus, most
        )
        return most
    return cpus


def worker_limit(
    nodes: list[dict[str, float]], workers: int | None, cpus: float, gpus: float
) -> int:
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


def loss_errors(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises when a worker, its machine, or a result on that machine is gone."""
    errors = ray.exceptions
    return (
        errors.RayActorError,
        errors.OutOfMemoryError,
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.ObjectLostError,
    )


def plain_text(error: BaseException) -> str:
    """An error's text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def one_line(error: BaseException) -> str:
    """An error's text as one line."""
    return " ".join(plain_text(error).split()).rstrip(".")
