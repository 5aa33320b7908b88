"""Study: real processes killed at every moment, torn files, two at once, and the same points each time."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from interp_ablate.errors import ModelError, RunError
from interp_ablate.search.study.opening import open_study
from interp_ablate.search.study.parameters import Choice, Float, Int, Space
from interp_ablate.search.study.study import KILLED, KILLS, Study
from interp_ablate.search.study.trials import TrialRecord

pytest.importorskip("optuna")

IDENTITY = {"model": "abc", "settings": {"max_kl": 0.1, "layers": (1, 2)}}
PLANE = Space((Float("x", 0.0, 1.0), Float("y", 0.0, 1.0)))
KERNELS = Space(
    (
        Choice("kernel", ("none", "linear", "gaussian")),
        Int("rank", 1, 8),
        Float("width", 0.01, 10.0, log=True, when=("kernel", "linear", "gaussian")),
        Float("sharpness", 0.0, 2.0, step=0.25, when=("kernel", "gaussian")),
    )
)
Params = dict[str, Any]


def opened(folder: Path, **changes: Any) -> Study:
    one: Any = {
        "identity": IDENTITY,
        "space": PLANE,
        "objectives": {"loss": "minimize"},
        "startup": 4,
    }
    return open_study(folder, **{**one, **changes})


def loss(params: Params) -> dict[str, float]:
    return {"loss": (params["x"] - 0.3) ** 2 + (params["y"] - 0.6) ** 2, "other": params["x"]}


def kernel_scores(params: Params) -> dict[str, float]:
    width = params.get("width", 0.1) * (1 + params.get("sharpness", 0.0))
    return {"loss": abs(width - 1) + 1 / params["rank"], "cost": params["rank"] + width}


# Four searches, one a sampler and kind of space; what each draws must not depend on restarts.
SEARCHES: dict[str, tuple[Params, Callable[[Params], dict[str, float]]]] = {
    "tpe": ({}, loss),
    "fronts": (
        {"space": KERNELS, "objectives": {"loss": "minimize", "cost": "minimize"}, "limits": {"cost": 7.0}},
        kernel_scores,
    ),
    "nsga2": (
        {"space": KERNELS, "objectives": {"loss": "minimize", "cost": "minimize"}, "sampler": "nsga2"},
        kernel_scores,
    ),
    "random": ({"sampler": "random"}, loss),
}  # fmt: skip


def worker(config: Mapping[str, Any]) -> None:
    """What a subprocess of these tests does; each evaluation is a line of the log when it begins and ends."""

    def objective(params: Params) -> dict[str, float]:
        note(Path(config["log"]), "begin", params)
        time.sleep(config["sleep"])
        note(Path(config["log"]), "end", params)
        return loss(params)

    for name in config.get("searches", ()):
        changes, scores = SEARCHES[name]
        with opened(Path(config["folder"]) / name, **changes) as study:
            study.run(scores, n_trials=config["n_trials"])
    if "searches" not in config:
        with opened(Path(config["folder"])) as study:
            wait_at(config.get("gate"))
            study.run(objective, n_trials=config["n_trials"])


def wait_at(gate: str | None) -> None:
    """Say that this process is there, and wait for "go"."""
    if gate is not None:
        (Path(gate) / str(os.getpid())).touch()
        while not (Path(gate) / "go").exists():
            time.sleep(0.01)


def note(log: Path, what: str, params: Params) -> None:
    line = json.dumps([what, os.getpid(), params["x"], params["y"]]) + "\n"
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)


def noted(log: Path, what: str) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(pid, x, y) for kind, pid, x, y in lines if kind == what]


@contextmanager
def process(config: Mapping[str, Any], **environment: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-W", "error", __file__, json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def finish(started: subprocess.Popen[str]) -> None:
    out, err = started.communicate(timeout=50)
    assert (started.returncode, out, err) == (0, "", "")


def forked(work: Callable[[], None]) -> int:
    """Run in a process of its own; its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complete(study: Study) -> list[tuple[Params, dict[str, float]]]:
    return [(o.params, o.scores) for o in study.outcomes() if o.state == "COMPLETE"]


# --------------------------------------------------------------------------------- killed


N = 4  # two priors, two suggestions
PRIORS = ({"x": 0.5, "y": 0.5}, {"x": 0.25})


def one_search(folder: Path, log: Path | None = None) -> list[tuple[Params, dict[str, float]]]:
    """Two priors, of which one fails, and two suggestions; what is complete at the end."""

    def objective(params: Params) -> dict[str, float]:
        if log is not None:
            note(log, "begin", params)
        return {**loss(params), "loss": math.nan if params["x"] == 0.25 else loss(params)["loss"]}

    with opened(folder, limits={"other": 0.9}, startup=1) as study:
        for prior in PRIORS:
            study.enqueue(prior, "a prior")
        study.run(objective, n_trials=N)
        assert study.n_finished == N
        assert [o.reason for o in study.outcomes() if o.params.get("x") == 0.25][
            -1
        ] == "not finite: loss = nan"
        return complete(study)


def kill_at(fsync: int, *, torn: bool) -> None:
    """Have this process killed inside its n-th append to the journal, the line whole or in part."""
    real, calls = os.fsync, iter(range(1, 10**6))

    def broken(descriptor: int) -> None:
        if next(calls) == fsync:
            if torn:
                size = os.fstat(descriptor).st_size
                os.truncate(f"/proc/self/fd/{descriptor}", size - 9)
            die()
        real(descriptor)

    os.fsync = broken


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_killed_at_any_append_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, torn: bool
) -> None:
    wanted = one_search(tmp_path / "whole")
    assert len(wanted) == N - 1
    lines = (tmp_path / "whole" / "study.jsonl").read_text().count("\n")
    assert lines > 25
    for at in range(1, lines + 1):
        folder, log = tmp_path / f"killed-{at}", tmp_path / f"log-{at}"

        def killed(at: int = at, folder: Path = folder, log: Path = log) -> None:
            kill_at(at, torn=torn)
            one_search(folder, log)

        assert forked(killed) == -signal.SIGKILL
        recorded = (folder / "study.jsonl").read_text()
        assert recorded.endswith("\n") != torn
        told = sum(
            '"user_attr":{"scores"' in line
            for line in recorded.splitlines()[: -1 if torn else None]
        )
        before = noted(log, "begin")
        assert sorted(map(str, one_search(folder, log))) == sorted(map(str, wanted)), f"append {at}"
        with pytest.raises(RunError, match="another search"):
            opened(folder, limits={"other": 0.9}, startup=1, seed=3)
        after = noted(log, "begin")
        assert len(after) - len(before) == N - told, f"append {at}: an evaluation lost or repeated"


def test_killed_again_while_it_recovers(tmp_path: Path) -> None:
    wanted = one_search(tmp_path / "whole")
    rng = random.Random(0)
    for number in range(8):
        folder, log = tmp_path / f"killed-{number}", tmp_path / f"log-{number}"
        kills = 0
        for at in (rng.randrange(8, 30), *(rng.randrange(1, 9) for _ in range(5))):

            def killed(at: int = at, folder: Path = folder, log: Path = log) -> None:
                kill_at(at, torn=at % 2 == 0)
                one_search(folder, log)

            kills += forked(killed) == -signal.SIGKILL
        assert kills >= 4
        assert sorted(map(str, one_search(folder, log))) == sorted(map(str, wanted))
        assert len(noted(log, "begin")) <= N + kills
        with opened(folder, limits={"other": 0.9}, startup=1) as study:
            retries = Counter(json.dumps(o.params) for o in study.outcomes() if o.state != "FAIL")
            assert max(retries.values()) == 1, "parameters were enqueued twice"


def test_kill_minus_nine_at_random_moments(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = {"folder": str(tmp_path / "a"), "log": str(log), "sleep": 0.06, "n_trials": 16}
    rng, known = random.Random(1), []
    for kill in range(3):
        with process(config) as running:
            while len(noted(log, "begin")) < 4 * (kill + 1) and running.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.15))
            assert running.poll() is None
            running.kill()
            running.wait()
        with opened(tmp_path / "a") as study:
            now = complete(study)
        assert now[: len(known)] == known, "a finished trial was lost or altered"
        known = now
    with process(config) as running:
        finish(running)
    with opened(tmp_path / "a") as study, opened(tmp_path / "b") as whole:
        whole.run(loss, n_trials=16)
        assert complete(study) == complete(whole)
        lost = study.trials().query("state == 'FAIL'")
    assert set(lost["reason"]) <= {KILLED} and len(lost) <= 3
    begun, killed = Counter(noted_points(log)), Counter(zip(lost["x"], lost["y"]))
    assert all(begun[point] <= 1 + killed[point] for point in begun)
    assert len(begun) == 16


def noted_points(log: Path) -> list[tuple[float, float]]:
    return [(x, y) for _, x, y in noted(log, "begin")]


def test_parameters_that_kill_their_process_are_given_up(tmp_path: Path) -> None:
    def evaluate(params: Params) -> dict[str, float]:
        if params["x"] == 0.5:
            die()
        return loss(params)

    def search() -> None:
        with opened(tmp_path) as study:
            study.enqueue({"x": 0.5, "y": 0.5}, "poison")
            study.run(evaluate, n_trials=3)

    assert [forked(search) for _ in range(KILLS + 1)] == [-signal.SIGKILL] * KILLS + [0]
    with opened(tmp_path) as study:
        frame = study.trials()
        assert study.n_finished == 3
    assert list(frame["state"]).count("COMPLETE") == 2
    poison = frame[frame["note"] == "poison"]
    assert len(poison) == KILLS and set(poison["x"]) == {0.5}
    assert f"{KILLS} times" in poison.iloc[-1]["reason"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_trial_that_was_interrupted_is_run_again(
    tmp_path: Path, error: type[BaseException]
) -> None:
    seen: list[Params] = []

    def evaluate(params: Params) -> dict[str, float]:
        seen.append(params)
        if 3 <= len(seen) <= 3 + KILLS:
            raise error
        return loss(params)

    with opened(tmp_path / "a") as study, opened(tmp_path / "b") as whole:
        for _ in range(KILLS + 1):  # it is no sign that the parameters kill
            with pytest.raises(error):
                study.run(evaluate, n_trials=6)
            assert study.n_finished == 2
        study.run(evaluate, n_trials=6)  # the same process goes on
        whole.run(loss, n_trials=6)
        assert complete(study) == complete(whole) and len(seen) == 7 + KILLS
        assert all(params == seen[2] for params in seen[2 : 4 + KILLS])
        assert "interrupted" in study.trials().query("state == 'FAIL'").iloc[0]["reason"]


def test_a_full_disk_is_an_error_and_the_search_goes_on_later(tmp_path: Path) -> None:
    def limited() -> None:
        with opened(tmp_path / "a") as study:
            study.run(loss, n_trials=2)
            size = (tmp_path / "a" / "study.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, size + 700))
            with pytest.raises(
                RunError, match=r"cannot write the study .*finished trials are kept"
            ):
                study.run(loss, n_trials=6)

    assert forked(limited) == 0
    with opened(tmp_path / "a") as study, opened(tmp_path / "b") as whole:
        assert study.n_finished >= 2
        study.run(loss, n_trials=6)
        whole.run(loss, n_trials=6)
        assert complete(study) == complete(whole)


# --------------------------------------------------------------------------------- several processes


def test_processes_share_one_study_and_do_the_work_of_a_killed_one(tmp_path: Path) -> None:
    log, gate, n = tmp_path / "log", tmp_path / "gate", 20
    gate.mkdir()
    config = {"folder": str(tmp_path / "a"), "log": str(log), "sleep": 0.1, "n_trials": n}
    config["gate"] = str(gate)
    with process(config) as first, process(config) as second, process(config) as third:
        while len(list(gate.iterdir())) < 3:  # all three make the study at once
            assert third.poll() is None
            time.sleep(0.01)
        (gate / "go").touch()
        while third.pid not in {pid for pid, _, _ in noted(log, "begin")}:
            assert third.poll() is None
            time.sleep(0.01)
        third.kill()
        third.wait()
        finish(first)
        finish(second)
    with opened(tmp_path / "a") as study:
        frame = study.trials()
    finished = frame[frame["state"] == "COMPLETE"]
    lost = frame[frame["state"] == "FAIL"]
    assert len(finished) == n and set(lost["reason"]) == {KILLED} and len(lost) == 1
    points = list(zip(finished["x"], finished["y"]))
    assert len(set(points)) == n
    assert (lost.iloc[0]["x"], lost.iloc[0]["y"]) in points, "the killed trial was not run again"
    assert sorted((x, y) for _, x, y in noted(log, "end")) == sorted(points)
    ended = Counter(pid for pid, _, _ in noted(log, "end"))
    assert ended[first.pid] > 3 and ended[second.pid] > 3
    assert not list((tmp_path / "a" / "workers").iterdir()), "the killed one's file is removed"


def test_a_living_process_keeps_its_trial(tmp_path: Path) -> None:
    with opened(tmp_path) as study:

        def evaluate(params: Params) -> dict[str, float]:
            with opened(tmp_path) as other:  # opening and asking recover what is dead, not this
                assert other.recover() == 0
                assert [o.state for o in other.outcomes()].count("RUNNING") == 1
                assert other.run(loss, n_trials=1) == 0, (
                    "the running trial is one of those asked for"
                )
            return loss(params)

        study.run(evaluate, n_trials=1)
        assert [o.state for o in study.outcomes()] == ["COMPLETE"]
    assert not list((tmp_path / "workers").iterdir())


# --------------------------------------------------------------------------------- the file


def test_the_journal_is_cut_in_its_last_line_anywhere(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as study:
        study.run(loss, n_trials=3)
        wanted = complete(study)
    data = (tmp_path / "a" / "study.jsonl").read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for cut in (last, last + 1, (last + len(data)) // 2, len(data) - 1):
        (tmp_path / "a" / "study.jsonl").write_bytes(data[:cut])
        with opened(tmp_path / "a") as study:
            assert complete(study) == wanted, "its scores were recorded: only the verdict was torn"
            assert study.run(loss, n_trials=4) == 1
        assert all(json.loads(x) for x in (tmp_path / "a" / "study.jsonl").read_text().splitlines())


def test_a_line_torn_by_another_process_meanwhile_is_cut_too(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.run(loss, n_trials=2)
        with open(tmp_path / "study.jsonl", "ab") as file:
            file.write(b'{"op_code":8,"worker')
        study.run(loss, n_trials=4)
    with opened(tmp_path) as study:
        assert len(complete(study)) == 4


def test_a_corrupt_line_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.run(loss, n_trials=2)
    path = tmp_path / "study.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for bad in ("{not json}\n", "[1]\n", '{"format": "another program"}\n'):
        path.write_text("".join([*lines[:6], bad, *lines[7:]]))
        with pytest.raises(RunError, match=r"corrupt study .*study\.jsonl, line 7: "):
            opened(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the study .*file"):
        opened(tmp_path / "file")


# --------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {**IDENTITY, "model": "abd"}}, 'model ("abc" there, "abd" now) differ'),
        ({"identity": {"model": "abc", "settings": {"max_kl": 0.2, "layers": (1, 2)}}}, "settings.max_kl (0.1 "),
        ({"identity": {**IDENTITY, "prompts": "p"}}, 'prompts (nothing there, "p" now)'),
        ({"space": Space((PLANE.parameters[0], Float("y", 0.0, 2.0)))}, "space.y.high (1.0 there, 2.0 now)"),
        ({"objectives": {"loss": "maximize"}}, 'objectives.loss ("minimize" there'),
        ({"limits": {"other": 1.0}}, "limits.other (nothing there, 1.0 now)"),
        ({"seed": 1, "sampler": "random"}, 'seed (0 there, 1 now), sampler ("tpe" there, "random" now)'),
    ],
)  # fmt: skip
def test_another_searchs_study_is_refused(tmp_path: Path, changes: Params, message: str) -> None:
    with opened(tmp_path) as study:
        study.run(loss, n_trials=1)
    before = (tmp_path / "study.jsonl").read_bytes()
    with pytest.raises(RunError) as caught:
        opened(tmp_path, **changes)
    assert message in str(caught.value) and "Choose another folder" in str(caught.value)
    assert (tmp_path / "study.jsonl").read_bytes() == before
    opened(tmp_path).close()


def test_another_programs_study_is_refused(tmp_path: Path) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.jsonl")))
    optuna.create_study(study_name="search", storage=storage).ask()
    with pytest.raises(RunError, match="another program"):
        opened(tmp_path)


# --------------------------------------------------------------------------------- the same points


def test_a_restart_draws_what_would_have_been_drawn(tmp_path: Path) -> None:
    config = {"folder": str(tmp_path), "log": "", "sleep": 0, "searches": list(SEARCHES)}
    for n_trials, hash_seed in ((5, "1"), (12, "2")):
        with process({**config, "n_trials": n_trials}, PYTHONHASHSEED=hash_seed) as running:
            finish(running)
    points = {}
    for name, (changes, scores) in SEARCHES.items():
        with (
            opened(tmp_path / name, **changes) as apart,
            opened(tmp_path / f"{name} whole", **changes) as whole,
        ):
            whole.run(scores, n_trials=12)
            assert whole.run(scores, n_trials=12) == 0, "a study that has its trials does nothing"
            pd.testing.assert_frame_equal(
                apart.trials().drop(columns="seconds"), whole.trials().drop(columns="seconds")
            )
            points[name] = [json.dumps(o.params) for o in whole.outcomes()]
            assert len(set(points[name])) > 8
    with opened(tmp_path / "seed", seed=1) as other:
        other.run(loss, n_trials=12)
        drawn = [json.dumps(o.params) for o in other.outcomes()]
    assert not set(drawn) & set(points["tpe"]), "neighbouring seeds share no points"
    assert points["tpe"][:4] == points["random"][:4] and points["tpe"][4:] != points["random"][4:]


def test_priors_come_first_and_once(tmp_path: Path) -> None:
    for _ in range(2):
        with opened(tmp_path) as study:
            study.run(loss, n_trials=1)
            study.enqueue({"x": 1, "y": 0.25}, "from the screening")
            study.enqueue({"y": 0.75})
            assert not study.enqueue({"x": 1.0, "y": 0.25}, "again")
            waiting = study.trials().query("state == 'WAITING'")
            assert list(waiting["note"]) in (["from the screening", ""], [])
            study.run(loss, n_trials=4)
    frame = opened(tmp_path).trials()
    assert list(frame["state"]) == ["COMPLETE"] * 4
    assert list(frame["note"]) == ["", "from the screening", "", ""]
    assert tuple(frame.loc[1, ["x", "y"]]) == (1.0, 0.25) and frame.loc[2, "y"] == 0.75
    assert 0 < frame.loc[2, "x"] < 1 and frame.loc[3, "y"] not in (0.25, 0.75)
    for bad, message in (
        ({"x": 1.5}, "between 0.0 and 1.0"),
        ({"x": "a"}, "number of type float"),
        ({"z": 1}, "unknown parameters: z. There are: x, y"),
    ):
        with pytest.raises(RunError, match=message):
            opened(tmp_path).enqueue(bad)


def test_priors_are_a_generation_of_nsga2(tmp_path: Path) -> None:
    space = Space(tuple(Float(name, 0.0, 1.0) for name in "abcdef"))

    def score(params: Params) -> dict[str, float]:
        return {"loss": sum(params.values())}

    with opened(tmp_path, space=space, sampler="nsga2", startup=4) as study:
        for i in range(4):
            study.enqueue(dict.fromkeys("abcdef", 0.5 + i / 1000))
        study.run(score, n_trials=8)
        children = study.trials().iloc[4:]
    inherited = ((children[list("abcdef")] - 0.5).abs() < 0.01).mean(axis=1)
    assert (inherited > 0.4).all(), "children have most of their parents' values"


# --------------------------------------------------------------------------------- scores


def test_failed_trials_say_why_and_are_never_on_the_front(tmp_path: Path) -> None:
    returned: list[Any] = [
        {"loss": math.nan, "other": 1.0},
        {"loss": -math.inf, "other": 1.0},
        ModelError("the model broke"),
        {"loss": -1.0, "other": math.nan},
        {"loss": 5.0, "other": 1.0, "extra": math.nan, "more": 7},
        {"loss": 6.0, "other": 1.0},
    ]
    seen: list[TrialRecord] = []

    def evaluate(params: Params) -> dict[str, float]:
        now = returned[len(seen)]
        if isinstance(now, Exception):
            raise now
        return now

    with opened(tmp_path, limits={"other": 2.0}) as study:
        assert study.run(evaluate, n_trials=6, on_trial=seen.append) == 6
        frame, front = study.trials(), study.front()
        assert seen == study.outcomes()
    assert list(frame["state"]) == ["FAIL"] * 4 + ["COMPLETE"] * 2
    assert list(frame["reason"]) == [
        "not finite: loss = nan",
        "not finite: loss = -inf",
        "the model broke",
        "not finite: other = nan",
        "",
        "",
    ]
    assert list(front["number"]) == [4] and front.iloc[0]["loss"] == 5.0
    assert list(frame.columns) == [
        "number", "state", "x", "y", "loss", "other", "more", "seconds", "reason", "note", "copied_from",
    ]  # fmt: skip
    assert frame.loc[4, "more"] == 7 and math.isnan(frame.loc[5, "more"])
    assert (frame["seconds"] >= 0).all()


def test_the_front_is_within_the_limits_and_in_order(tmp_path: Path) -> None:
    space = Space((Int("i", 0, 5),))
    table: list[dict[str, float]] = [
        {"good": 1.0, "kl": 0.5, "length": 2.0},
        {"good": 3.0, "kl": 0.9, "length": 2.0},
        {"good": 2.0, "kl": 0.6, "length": 2.0},
        {"good": 2.0, "kl": 0.7, "length": 1.0},  # dominated
        {"good": 9.0, "kl": 0.1, "length": 2.5},  # over the limit
        {"good": 2.0, "kl": 0.6, "length": 1.0},  # as good as another: both stay
    ]
    objectives = {"good": "maximize", "kl": "minimize"}
    with opened(tmp_path, space=space, objectives=objectives, limits={"length": 2.0}) as study:
        assert study.front().empty and study.trials().empty
        for i in range(6):
            study.enqueue({"i": i})
        study.run(lambda params: table[params["i"]], n_trials=6)
        assert list(study.front()["i"]) == [1, 2, 5, 0]
        assert study.trials()["i"].dtype == "Int64"


def test_limits_reach_the_sampler(tmp_path: Path) -> None:
    space = Space((Float("x", 0.0, 1.0),))

    def score(params: Params) -> dict[str, float]:
        return {"loss": params["x"], "lack": 1 - params["x"]}

    late = {}
    for limits in ({}, {"lack": 0.4}):
        with opened(tmp_path / str(len(limits)), space=space, limits=limits, startup=8) as study:
            study.run(score, n_trials=32)
            late[len(limits)] = study.trials()["x"].iloc[16:].median()
            best = study.front().iloc[0]["x"]
    assert late[0] < 0.25 and late[1] > 0.5 and 0.6 <= best < 0.7


# --------------------------------------------------------------------------------- several at once


def losses(some: Sequence[Params]) -> list[dict[str, float]]:
    return [loss(params) for params in some]


def alone(params: Params) -> dict[str, float]:
    raise AssertionError("scored alone")


def test_several_at_once_are_the_same_points(tmp_path: Path) -> None:
    """Of a sampler that learns nothing, that is."""
    sizes: list[int] = []

    def together(some: Sequence[Params]) -> list[dict[str, float]]:
        sizes.append(len(some))
        return losses(some)

    with (
        opened(tmp_path / "a", sampler="random") as study,
        opened(tmp_path / "b", sampler="random") as one,
    ):
        assert study.run(alone, together=together, at_once=3, n_trials=6) == 6
        assert study.run(loss, together=together, at_once=4, n_trials=11) == 5
        one.run(loss, n_trials=11)
        assert complete(study) == complete(one)
        assert sizes == [3, 3, 4], "the last one is alone"
        with pytest.raises(RunError, match="needs `together`"):
            study.run(loss, at_once=2, n_trials=12)


def test_several_that_fail_are_scored_one_by_one(tmp_path: Path) -> None:
    def together(some: Sequence[Params]) -> list[dict[str, float]]:
        raise ModelError("one of them")

    def broken(params: Params) -> dict[str, float]:
        if params["x"] == 0.25:
            raise ModelError("this one")
        return loss(params)

    with opened(tmp_path) as study:
        for params in PRIORS:
            study.enqueue(params)
        study.run(broken, together=together, at_once=3, n_trials=3)
        assert [o.state for o in study.outcomes()] == ["COMPLETE", "FAIL", "COMPLETE"]
        assert study.outcomes()[1].reason == "this one"
        with pytest.raises(RunError, match="1 scores for 3 trials"):
            study.run(loss, together=lambda some: losses(some[:1]), at_once=3, n_trials=6)
        study.run(loss, n_trials=6)
        assert study.n_finished == 6


def test_the_same_point_twice_at_once_is_scored_once(tmp_path: Path) -> None:
    space = Space((Choice("a", ("p", "q")),))
    seen: list[Params] = []

    def together(some: Sequence[Params]) -> list[dict[str, float]]:
        seen.extend(some)
        return [{"loss": float(params["a"] == "p")} for params in some]

    with opened(tmp_path, space=space, sampler="random") as study:
        study.run(alone, together=together, at_once=8, n_trials=16)
        assert len(seen) == 2
        frame = study.trials()
        assert len(frame) == 16 and frame["copied_from"].isna().sum() == 2
        assert all(frame.loc[c, "loss"] == row["loss"] for _, row in frame.iterrows()
                   if (c := row["copied_from"]) is not pd.NA)  # fmt: skip


def test_a_kill_costs_those_at_once_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def together(some: Sequence[Params]) -> list[dict[str, float]]:
        for params in some:
            note(log, "begin", params)
        if len(noted(log, "begin")) == 6:
            die()
        return losses(some)

    def search() -> None:
        with opened(tmp_path / "a") as study:
            study.run(alone, together=together, at_once=3, n_trials=9)

    assert [forked(search), forked(search)] == [-signal.SIGKILL, 0]
    with opened(tmp_path / "a") as study, opened(tmp_path / "b") as whole:
        whole.run(alone, together=losses, at_once=3, n_trials=9)
        assert complete(study) == complete(whole) and len(noted(log, "begin")) == 12


def test_of_several_those_that_were_told_stay_so(tmp_path: Path) -> None:
    def stop(outcome: TrialRecord) -> None:
        if outcome.number == 1:
            raise KeyboardInterrupt

    with opened(tmp_path / "a") as study, opened(tmp_path / "b") as whole:
        with pytest.raises(KeyboardInterrupt):
            study.run(alone, together=losses, at_once=3, n_trials=6, on_trial=stop)
        assert study.n_finished == 2
        study.run(loss, n_trials=3)
        whole.run(loss, together=losses, at_once=3, n_trials=3)
        assert complete(study) == complete(whole)


def test_known_points_are_not_evaluated_again(tmp_path: Path) -> None:
    space = Space((Choice("a", ("p", "q")), Float("b", 0.0, 0.3, step=0.1)))
    seen: list[Params] = []

    def score(params: Params) -> dict[str, float]:
        seen.append(params)
        return {"loss": params["b"], "other": 1.0}

    with opened(tmp_path, space=space, sampler="random", limits={"other": 2.0}) as study:
        study.run(score, n_trials=30)
        frame = study.trials()
        copies = frame[frame["copied_from"].notna()]
        assert len(seen) == 8 and len(frame) == 30 and len(copies) == 22
        assert set(frame["state"]) == {"COMPLETE"}
        for _, copy in copies.iterrows():
            first = frame.loc[copy["copied_from"]]
            assert first["copied_from"] is pd.NA
            assert copy["a"] == first["a"] and copy["b"] == pytest.approx(first["b"])
            assert (copy["loss"], copy["other"]) == (first["loss"], first["other"])
        assert len(study.front()) == 2, "each point once"
        assert study.enqueue({"a": "p", "b": 0.2})
        assert not study.enqueue({"a": "p", "b": 0.1 + 0.1 + 1e-16}), "the same point of the grid"
        start = time.monotonic()
        study.run(score, seconds=60)
        assert len(seen) == 8 and time.monotonic() - start < 30, "nothing new is left to try"


def test_seconds_are_of_the_call(tmp_path: Path) -> None:
    def slow(params: Params) -> dict[str, float]:
        time.sleep(0.1)
        return loss(params)

    with opened(tmp_path) as study:
        assert 1 <= study.run(slow, seconds=0.5) <= 5
        assert 1 <= study.run(slow, n_trials=1000, seconds=0.3) <= 3
        assert study.run(slow, seconds=0) == 0
        assert (study.trials()["seconds"] >= 0.1).all()
        with pytest.raises(RunError, match="n_trials, or seconds, or both"):
            study.run(slow)
    with pytest.raises(RunError, match="is closed: open it again"):
        study.run(slow, n_trials=1)


def test_scores_that_are_needed_or_named_twice(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        with pytest.raises(RunError, match="returned the scores a; this study needs loss too"):
            study.run(lambda params: {"a": 1.0}, n_trials=2)
        with pytest.raises(RunError, match="y: named twice"):
            study.run(lambda params: {"loss": 1.0, "y": 1.0}, n_trials=2)
        assert study.run(loss, n_trials=2) == 2
    for names in ({"x": "minimize"}, {"reason": "minimize"}):
        with pytest.raises(RunError, match="named twice"):
            opened(tmp_path / "b", objectives=names)
    for changes, message in (
        ({"objectives": {}}, "at least one score name"),
        ({"objectives": {"loss": "min"}}, "'minimize' or 'maximize'"),
        ({"limits": {"a": math.nan}}, "limit of a is not a finite number"),
        ({"sampler": "grid"}, "unknown sampler 'grid': there are tpe, random, nsga2"),
        ({"seed": -1}, "0 or more"),
    ):
        with pytest.raises(RunError, match=message):
            opened(tmp_path / "b", **changes)
    assert not (tmp_path / "b").exists()


# --------------------------------------------------------------------------------- the space


def test_a_conditional_parameter_exists_with_its_parents_value_only(tmp_path: Path) -> None:
    with opened(tmp_path, space=KERNELS, sampler="random") as study:
        study.enqueue({"kernel": "gaussian", "rank": 2, "width": 1, "sharpness": 0.75})
        study.run(kernel_scores, n_trials=20)
        frame = study.trials()
    assert set(frame["kernel"]) == {"none", "linear", "gaussian"}
    assert (frame["width"].notna() == (frame["kernel"] != "none")).all()
    assert (frame["sharpness"].notna() == (frame["kernel"] == "gaussian")).all()
    assert frame["width"].dropna().between(0.01, 10).all() and (frame["width"] < 0.1).any()
    assert (frame["sharpness"].dropna() % 0.25 == 0).all()
    with opened(tmp_path, space=KERNELS, sampler="random") as study:
        for bad, message in (
            (
                {"kernel": "linear", "sharpness": 0.5},
                "sharpness exists only when kernel is 'gaussian'",
            ),
            ({"width": 0.5}, "or give that kernel too"),
            ({"kernel": "gaussian", "sharpness": 0.3}, "in steps of 0.25"),
            ({"kernel": "cubic"}, r"one of \['none', 'linear', 'gaussian'\]"),
            ({"rank": 1.5}, "number of type int"),
            ({"rank": True}, "number of type int"),
        ):
            with pytest.raises(RunError, match=message):
                study.enqueue(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float("a", 1.0, 0.0), "a from 1.0 to 0.0: the bounds"),
        (lambda: Float("a", 0.0, math.inf), "finite"),
        (lambda: Float("a", 0.0, 1.0, log=True), "starts above 0"),
        (lambda: Float("a", 0.0, 1.0, step=0.3), "steps of 0.3"),
        (lambda: Int("a", 1, 8, log=True, step=2), "has no steps"),
        (lambda: Choice("a", ()), "at least one"),
        (lambda: Choice("a", (1, True)), "each once"),
        (lambda: Choice("a", ((1, 2),)), "text, numbers"),  # type: ignore[arg-type]
        (lambda: Space((Int("a", 0, 1), Int("a", 0, 2))), "two parameters are named a"),
        (lambda: Space((Int("a", 0, 1, when=("b", 1)), Int("b", 0, 1))), "an earlier parameter"),
        (lambda: Space((Int("b", 0, 1), Int("a", 0, 1, when=("b", 2)))), "b = 2: it lies between 0 and 1"),
    ],
)  # fmt: skip
def test_a_space_that_makes_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        make()


def test_optuna_is_asked_for_when_a_study_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    with monkeypatch.context() as patch:
        patch.setattr(optuna, "__version__", "4.9.0")
        with pytest.raises(RunError, match=r"Optuna 5 or later, this is 4\.9\.0"):
            opened(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        with pytest.raises(RunError, match=r"pip install 'interp-ablate\[search\]'"):
            opened(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    code = "import sys, interp_ablate.search.study.study; sys.exit(any(m in sys.modules for m in ('optuna', 'torch')))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
