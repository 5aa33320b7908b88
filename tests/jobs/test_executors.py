"""Executors: the same results everywhere, and what happens when workers, jobs or drivers die."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.errors import DirectionError, RunError
from interp_ablate.jobs.ray_cluster import (
    OBJECT_STORE,
    PASSED_ON,
    cores_a_worker,
    cores_bound_to,
    start_ray,
    worker_limit,
)
from interp_ablate.jobs.ray_executor import RayExecutor, RaySettings

PATIENCE = 40.0  # seconds until a test that waits gives up


# --------------------------------------------------------------------------------- workers
# In a folder that driver and workers share: `builds` has a line a worker built, `runs` a line a job.


def note(folder: Path, name: str, line: object) -> None:
    with open(folder / name, "a") as file:
        file.write(f"{line}\n")


def noted(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().split() if path.exists() else []


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class TwoReasons(Exception):
    """Cannot be built again from its pickle, as many exceptions of other packages."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def squares(folder: Path) -> Callable[[int], int]:
    note(folder, "builds", os.getpid())

    def work(job: int) -> int:
        note(folder, "runs", job)
        return job**2

    return work


def deeds(folder: Path) -> Callable[[str], Any]:
    """Jobs are words: what the worker does."""
    note(folder, "builds", os.getpid())

    def hang() -> str:
        note(folder, "hanging", os.getpid())
        if noted(folder, "runs").count("hang") == 1:
            time.sleep(PATIENCE)
        return "hung once"

    def held() -> bool:
        return wait_for((folder / "go").exists)

    def refuse() -> None:
        raise DirectionError("zero at layer 3")

    def fail() -> None:
        raise ZeroDivisionError("by nothing")

    def fail_oddly() -> None:
        raise TwoReasons("heat", "dust")

    acts: dict[str, Callable[[], Any]] = {
        "hang": hang,
        "held": held,
        "refuse": refuse,
        "fail": fail,
        "fail oddly": fail_oddly,
        "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "name": os.getpid,
        "unpicklable": threading.Lock,
    }

    def work(job: str) -> Any:
        note(folder, "runs", job.replace(" ", "_"))
        return acts.get(job, lambda: job.upper())()

    return work


def surroundings() -> Callable[[int], dict[str, Any]]:
    import torch

    def work(job: int) -> dict[str, Any]:
        names = ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
        return {"threads": torch.get_num_threads(), **{n: os.environ.get(n) for n in names}}

    return work


def refusing(folder: Path, error: Exception) -> Callable[[int], int]:
    note(folder, "builds", os.getpid())
    raise error


def dying(folder: Path) -> Callable[[int], int]:
    note(folder, "builds", os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Elsewhere:
    """Pickles here; in another process it is not what it was."""

    def __reduce__(self) -> Any:
        return (_only_in, (os.getpid(),))

    def __call__(self) -> Callable[[int], int]:
        return int


def _only_in(pid: int) -> Elsewhere:
    if os.getpid() != pid:
        raise ModuleNotFoundError("no module of that name on this machine")
    return Elsewhere()


# --------------------------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two cores and one GPU (in name only), whose processes would use two threads each."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "2")
        for folder in (Path(__file__).parents[1] / "support", Path(__file__).parent):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=1,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            logging_level="ERROR",
            log_to_driver=False,
        )
    yield ray
    ray.shutdown()


On = Callable[..., RayExecutor]


@pytest.fixture
def on_ray(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> On:
    """Two workers that share the GPU: without one each would import torch, which takes seconds."""
    for name in PASSED_ON:  # the cluster has them; a list of their own delays every worker by 1 s
        monkeypatch.delenv(name, raising=False)

    def executor(make: Any, **changes: Any) -> RayExecutor:
        return RayExecutor(make, RaySettings(**{"workers": 2, "gpus": 0.5, **changes}))

    return executor


def gone(folder: Path) -> bool:
    """Have all workers that were ever built there ended?"""

    def ended(pid: str) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    return wait_for(lambda: all(ended(pid) for pid in noted(folder, "builds")))


# --------------------------------------------------------------------------------- results


def test_every_job_is_done_and_a_worker_built_once(on_ray: On, tmp_path: Path) -> None:
    jobs = list(range(12))
    expected = {job: job**2 for job in jobs}
    with on_ray(partial(squares, tmp_path)) as executor:
        first = list(executor.run(jobs))
        again = list(executor.run(jobs))  # the workers are still there
    assert len(first) == len(again) == len(jobs)
    assert dict(first) == dict(again) == expected
    assert len(noted(tmp_path, "builds")) <= 2
    assert str(os.getpid()) not in noted(tmp_path, "builds")
    assert gone(tmp_path)


def test_no_more_workers_than_jobs(on_ray: On, tmp_path: Path) -> None:
    with on_ray(partial(squares, tmp_path)) as executor:
        assert list(executor.run([])) == []
        assert list(executor.run([5])) == [(5, 25)]
        assert len(noted(tmp_path, "builds")) == 1


def test_results_come_as_they_finish(on_ray: On, tmp_path: Path) -> None:
    seen = []
    with on_ray(partial(deeds, tmp_path)) as executor:
        for job, result in executor.run(["held", "a", "b"]):
            seen.append((job, result))
            if job == "b":
                (tmp_path / "go").touch()
    assert seen == [("a", "A"), ("b", "B"), ("held", True)]


def test_jobs_are_read_when_a_worker_is_free(cluster: Any, tmp_path: Path) -> None:
    results = [1]

    def jobs() -> Iterator[int]:
        for _ in range(4):
            yield 1 + results[-1]  # needs the result before it

    settings = RaySettings(workers=1, gpus=1.0)
    with RayExecutor(partial(squares, tmp_path), settings) as executor:
        assert executor.n_workers == 1
        for _, result in executor.run(jobs()):
            results.append(result)
    assert results == [1, 4, 25, 26**2, (26**2 + 1) ** 2]


# --------------------------------------------------------------------------------- deaths


def test_a_killed_worker_costs_its_running_job_only(on_ray: On, tmp_path: Path) -> None:
    def kill_once() -> None:
        assert wait_for(lambda: bool(noted(tmp_path, "hanging")))
        os.kill(int(noted(tmp_path, "hanging")[0]), signal.SIGKILL)

    jobs = ["a", "hang", "b", "c", "d", "e"]
    killer = threading.Thread(target=kill_once)
    killer.start()
    with on_ray(partial(deeds, tmp_path)) as executor:
        found = list(executor.run(jobs))
    killer.join()
    assert sorted(found) == sorted((j, "hung once" if j == "hang" else j.upper()) for j in jobs)
    assert Counter(noted(tmp_path, "runs")) == Counter([*jobs, "hang"])
    assert len(noted(tmp_path, "builds")) <= 3  # the other worker went on
    assert gone(tmp_path)


def test_a_job_that_kills_its_workers_is_given_up(on_ray: On, tmp_path: Path) -> None:
    reason = r"job 2 \(die\) lost its worker 2 times.* died unexpectedly .*fewer workers"
    with on_ray(partial(deeds, tmp_path), workers=1, retries=1) as executor:
        with pytest.raises(RunError, match=reason):
            list(executor.run(["a", "die", "b"]))
        assert noted(tmp_path, "runs") == ["a", "die", "die"]
        assert gone(tmp_path)


def test_workers_that_die_while_they_are_built_end_the_run(on_ray: On, tmp_path: Path) -> None:
    with on_ray(partial(dying, tmp_path), workers=1, retries=1) as executor:
        with pytest.raises(RunError, match=r"2 workers died in a row while they were built"):
            list(executor.run([1]))
        assert len(noted(tmp_path, "builds")) == 2


# --------------------------------------------------------------------------------- errors


def test_a_jobs_own_error_is_raised_as_it_was(on_ray: On, tmp_path: Path) -> None:
    with on_ray(partial(deeds, tmp_path)) as executor:
        with pytest.raises(DirectionError) as caught:
            list(executor.run(["held", "refuse"]))
        assert type(caught.value) is DirectionError
        assert str(caught.value) == "zero at layer 3"
        assert gone(tmp_path)  # the one that was busy too
        assert list(executor.run(["a"])) == [("a", "A")]  # and the executor is as new


@pytest.mark.parametrize(
    ("job", "reason", "logged"),
    [
        ("fail", "ZeroDivisionError: by nothing", "in fail\n"),
        ("fail oddly", "UnserializableException", "heat and dust"),
        ("unpicklable", "TypeError: .*cannot pickle", "lock"),
    ],
)
def test_any_other_error_names_the_job_and_is_logged(
    on_ray: On, tmp_path: Path, caplog: pytest.LogCaptureFixture, job: str, reason: str, logged: str
) -> None:
    with (
        on_ray(partial(deeds, tmp_path), workers=1) as executor,
        pytest.raises(RunError, match=rf"(?s)job 2 \({job}\) failed: {reason}"),
    ):
        list(executor.run(["a", job]))
    assert logged in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (DirectionError("no such model"), DirectionError, "^no such model$"),
        (OSError("no disk"), RunError, "a worker could not be built: OSError: no disk"),
    ],
)
def test_a_worker_that_cannot_be_built_ends_the_run_at_once(
    on_ray: On, tmp_path: Path, error: Exception, kind: type[Exception], reason: str
) -> None:
    with on_ray(partial(refusing, tmp_path, error), workers=1) as executor:
        with pytest.raises(kind, match=reason):
            list(executor.run([1, 2]))
        assert len(noted(tmp_path, "builds")) == 1


def test_a_factory_that_cannot_travel(on_ray: On) -> None:
    assert pickle.loads(pickle.dumps(Elsewhere()))
    reason = "(?s)a worker could not be built.*no module of that name"
    with on_ray(Elsewhere()) as executor, pytest.raises(RunError, match=reason):
        list(executor.run([1]))
    lock = threading.Lock()
    with on_ray(lambda: lock) as executor, pytest.raises(RunError, match="cannot be sent"):
        list(executor.run([1]))


# --------------------------------------------------------------------------------- leaving early


def test_closing_a_run_releases_the_workers(on_ray: On, tmp_path: Path) -> None:
    with on_ray(partial(deeds, tmp_path)) as executor:
        run = executor.run(["a", "held", "b"])
        assert next(run) == ("a", "A")
        with pytest.raises(RunError, match="another run"):
            next(executor.run(["c"]))
        run.close()  # type: ignore[attr-defined]
        assert gone(tmp_path)
        assert list(executor.run(["c"])) == [("c", "C")]


def test_an_error_of_the_consumer_releases_the_workers(
    on_ray: On, cluster: Any, tmp_path: Path
) -> None:
    run: Any = None
    with pytest.raises(KeyError), on_ray(partial(deeds, tmp_path)) as executor:
        run = executor.run(["a", "held"])
        for _ in run:
            raise KeyError
    assert gone(tmp_path)
    assert cluster.is_initialized()  # Ray itself was not the executor's
    with pytest.raises(RunError, match="ended in the middle"):
        next(run)
    with pytest.raises(RunError, match="inside its `with`"):
        next(executor.run(["a"]))


# --------------------------------------------------------------------------------- surroundings


def test_workers_get_threads_and_variables(on_ray: On, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # other than when the cluster started
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with on_ray(surroundings, workers=1, cpus=0.5, gpus=0.0) as executor:
        ((_, found),) = executor.run([0])
    assert found["threads"] == 1
    assert (found["OMP_WAIT_POLICY"], found["HF_HUB_OFFLINE"]) == ("ACTIVE", "yes")


def test_one_worker_a_gpu_where_there_are_any(cluster: Any) -> None:
    with RayExecutor(surroundings) as executor:
        found = [result for _, result in executor.run([0, 1])]
        assert executor._limit == 1
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0", "0"]


NODES = [{"CPU": 8.0}, {"CPU": 6.0, "GPU": 2.0}]


def test_how_many_workers_fit() -> None:
    assert worker_limit(NODES, None, 1.0, 0.0) == 14
    assert worker_limit(NODES, None, 4.0, 0.0) == 3  # not 14 // 4: a worker is on one machine
    assert worker_limit(NODES, None, 0.1, 0.0) == 140
    assert worker_limit(NODES, None, 1.0, 1.0) == 2
    assert worker_limit(NODES, None, 1.0, 0.5) == 4
    assert worker_limit(NODES, None, 4.0, 0.5) == 1
    assert worker_limit(NODES, 2, 1.0, 0.0) == 2
    assert cores_a_worker(NODES, 3.0) == 3.0
    assert cores_a_worker(NODES, 20.0) == 8.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process to cores")
def test_only_the_cores_this_process_is_bound_to() -> None:
    before = os.sched_getaffinity(0)
    if len(before) == 1:
        pytest.skip("there is only one core")
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores_bound_to() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores_bound_to() in (None, len(before))


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "wanted"),
    [
        (None, 1.0, 3.0, "1 worker.* of 1 cores and 3 GPUs"),
        (15, 1.0, 0.0, "room for 14"),
        (3, 2.0, 1.0, "8 cores and 0 GPUs, 6 cores and 2 GPUs"),
    ],
)
def test_workers_that_do_not_fit(
    workers: int | None, cpus: float, gpus: float, wanted: str
) -> None:
    with pytest.raises(RunError, match=wanted):
        worker_limit(NODES, workers, cpus, gpus)


def test_workers_that_do_not_fit_are_not_waited_for(on_ray: On) -> None:
    with on_ray(surroundings, workers=3) as executor, pytest.raises(RunError, match="room for 2"):
        list(executor.run([0]))


ALONE = """
import json, logging, os, pathlib, sys, tempfile, time
from interp_ablate.jobs.ray_executor import RayExecutor
start = time.perf_counter()
logging.getLogger("interp_ablate").setLevel("CRITICAL")
mark = pathlib.Path(tempfile.mkdtemp()) / "died"

def make():
    print("a word of the worker")
    print("another", file=sys.stderr)
    def work(job):
        if job == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        time.sleep(60 if job == 3 else 0)
        return (job, os.getcwd(), os.environ.get("RAY_USAGE_STATS_ENABLED"))
    return work

with RayExecutor(make) as executor:
    import ray
    assert list(executor.run([])) == [] and not ray.is_initialized()
    results = [result for _, result in executor.run([1])]
    seconds = time.perf_counter() - start
    results += [result for _, result in executor.run([2])]
    next(executor.run([4, 3])) # and leave
    there = ray.cluster_resources()
    workers = executor._limit
    time.sleep(1) # for what Ray might have to say
print(json.dumps({
    "results": results, "workers": workers, "there": there, "left": ray.is_initialized(),
    "reports": os.environ.get("RAY_USAGE_STATS_ENABLED"), "seconds": seconds,
}))
"""


def test_alone_ray_is_started_and_stopped_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)  # nothing else was printed
    assert found["results"] == [[job, str(tmp_path), "0"] for job in (1, 2)]
    assert found["there"]["object_store_memory"] == OBJECT_STORE
    if "GPU" not in found["there"]:
        assert found["workers"] == found["there"]["CPU"]
    assert found["left"] is False and found["reports"] is None
    assert list(tmp_path.iterdir()) == []


def nobody() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("{}", "refused"),
        ("ray://{}", "refused"),
        ("the cluster", "expected host:port"),
    ],
)
def test_an_address_where_there_is_no_cluster(address: str, reason: str) -> None:
    ray = pytest.importorskip("ray")
    with pytest.raises(RunError, match=f"does not start or connect.*{reason}"):
        start_ray(
            ray, address.format(nobody())
        )  # the executors of this module have a cluster already


# --------------------------------------------------------------------------------- choices


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'interp-ablate\[ray\]'"), RayExecutor(int):  # type: ignore[arg-type]
        pass


def test_settings_are_checked() -> None:
    for wrong in ({"workers": 0}, {"cpus": 0.0}, {"gpus": -1.0}, {"retries": -1}):
        with pytest.raises(RunError, match="expected at least one worker"):
            RaySettings(**wrong)  # type: ignore[arg-type]
