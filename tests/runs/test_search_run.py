"""A search in a run folder, on a tiny model: what it leaves, kills, controls; trials on Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.edits.plan import Plan
from interp_ablate.search.selection import pareto_front

pytest.importorskip("optuna")
TRIALS = 14


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint with peaked first tokens, and two files of prompts."""
    place = tmp_path_factory.mktemp("search")
    write_task(place)
    anything = place / "anything.txt"  # a byte that most answers of this model hold
    anything.write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    return [
        *("--model", str(place / "model"), "--expressions", str(anything)),
        *("--positive", str(place / "yes.txt"), "--negative", str(place / "no.txt")),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--max-new-tokens", "5", "--max-kl", "50"),
    ]


def command(flags: list[str], out: Path, *more: str) -> list[str]:
    return ["--quiet", "search", *flags, "--out", str(out), "--trials", str(TRIALS), *more]


@pytest.fixture(scope="module")
def searched(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searched") / "run"
    assert main(command(flags, out)) in (0, 1)
    return out


def finished(out: Path) -> pd.DataFrame:
    table = pd.read_csv(out / "trials.csv")
    return table[table["stage"] == "search"]


def logged(out: Path) -> list[dict[str, Any]]:
    """The log's lines of finished trials."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if "params" in line]


def test_what_a_search_leaves(searched: Path) -> None:
    table = finished(searched)
    objectives = ["expression_rate", "kl", "positive_repetition"]
    assert len(table) == TRIALS and table["number"].tolist() == list(range(TRIALS))
    assert set(table["edit"]) <= {"band", "fitted"} and (table["status"] == "ok").sum() > 8
    every = pd.read_csv(searched / "trials.csv")
    finalists = every[every["stage"] == "finalist"].set_index("trial")
    front = pareto_front(table[table["status"] == "ok"], objectives=objectives)
    params = [
        "edit",
        "method",
        "layer",
        "attention_layer",
        "mlp_layer",
        "width",
        "fit",
        "mlp_scale",
    ]
    tried = set(finalists[params].astype(str).itertuples(index=False, name=None))
    assert set(front[params].astype(str).itertuples(index=False, name=None)) <= tried
    assert {int(path.stem) for path in (searched / "plans").iterdir()} == set(finalists.index)
    for number in finalists.index:
        assert len(Plan.load(searched / "plans" / f"{number}.json"))
    selected = json.loads((searched / "selected.json").read_text())
    unedited = selected["validation_baseline"]
    assert selected["control"] is None and every["control"].isna().all()
    text = ["negative_expression_rate", "repetition", "length", "unedited_answer_logprob"]
    assert finalists[text].notna().all(axis=None)
    if selected["plan"] is not None:
        row = finalists.loc[selected["trial"]["trial"]]
        assert row["kl_high"] <= 50
        for name in ("repetition", "empty"):
            assert row[name] <= unedited[name]
        assert "positive_repetition_after" in selected["test"]
        controls = selected["test"]["controls"]
        names = [control["name"] for control in controls if control["matched"] == "strength"]
        assert names == ["random 0", "random 1", "shuffled labels"]
    screened = every[every["stage"] == "screen"]
    assert set(screened["prompts"]) <= {3, 6} and len(screened) >= 1
    assert list(every["trial"]) == list(range(len(every)))


def test_a_search_and_a_run_have_one_table(flags: list[str], tmp_path: Path) -> None:
    """Both leave the same columns; in one folder the second goes on with what the first tried."""
    out = tmp_path / "run"
    assert main(["--quiet", "sweep", *flags, "--out", str(out)]) == 0
    swept, before = pd.read_csv(out / "trials.csv"), logged(out)
    assert main(command(flags, out)) in (0, 1)
    both = pd.read_csv(out / "trials.csv")
    assert list(both) == list(swept)
    assert len(finished(out)) == TRIALS and logged(out)[: len(before)] == before
    kept = both[both["stage"] == "refine"].drop(columns="trial").reset_index(drop=True)
    want = swept[swept["stage"] == "refine"].drop(columns="trial").reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, want, check_dtype=False)


def test_a_finished_search_repeats_nothing(flags: list[str], searched: Path) -> None:
    before = (searched / "trials.jsonl").read_text()
    table = pd.read_csv(searched / "trials.csv")
    main(command(flags, searched))
    assert (searched / "trials.jsonl").read_text() == before
    pd.testing.assert_frame_equal(pd.read_csv(searched / "trials.csv"), table)


def test_a_search_that_is_longer_goes_on(flags: list[str], tmp_path: Path, searched: Path) -> None:
    out = tmp_path / "run"
    for trials in ("5", str(TRIALS)):
        assert main([*command(flags, out), "--trials", trials]) in (0, 1)
        assert len(finished(out)) == int(trials)
    numbers = [line["number"] for line in logged(out) if line["stage"] == "search"]
    assert sorted(numbers) == list(range(TRIALS)), "a trial was lost or repeated"
    columns = ["expression_rate", "kl", "positive_repetition"]
    # drawn in other rounds: the random ones are the same
    got, want = finished(out)[columns][:10], finished(searched)[columns][:10]
    assert got.to_numpy() == pytest.approx(want.to_numpy(), abs=1e-5, nan_ok=True)


def test_killed_at_any_moment_and_run_again(
    flags: list[str], searched: Path, tmp_path: Path
) -> None:
    """No finished trial is lost or repeated, and in the end it is the search that was never killed."""
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "interp_ablate.cli.main", *command(flags, out)]
    log = out / "trials.jsonl"
    for wanted in (3, 7):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_text().count('"stage": "search"') >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    trials = [line for line in logged(out) if line["stage"] == "search"]
    assert sorted(line["number"] for line in trials) == list(range(TRIALS))
    columns = ["number", "status", "expression_rate", "kl", "positive_repetition"]
    killed, whole = (finished(each)[columns].reset_index(drop=True) for each in (out, searched))
    pd.testing.assert_frame_equal(killed, whole, atol=1e-5)


def test_a_second_process_in_the_folder_is_refused_in_words(
    flags: list[str], searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with open(searched / "trials.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(flags, searched)) == 2
    assert "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize("control", ("random", "shuffled"))
def test_controls_are_searched_the_same_way(
    flags: list[str], searched: Path, tmp_path: Path, control: str
) -> None:
    out = tmp_path / "run"
    assert main(command(flags, out, "--control", control)) in (0, 1)
    table = finished(out)
    assert len(table) == TRIALS and set(table["control"]) == {control}
    assert not any(line["stage"] == "screen" for line in logged(out))
    if control == "random":
        assert set(table["method"].dropna()) <= {
            "difference_in_means",
            "difference_in_means_orthogonalized",
        }
    assert json.loads((out / "selected.json").read_text())["control"] == control


def test_without_fits(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command(flags, out, "--no-fits")) in (0, 1)
    assert set(finished(out)["edit"]) == {"band"} and not (out / "fits").exists()


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (("--minutes", "0"), "minutes above 0"),
        (("--trials", "0"), "at least one trial"),
        (("--control", "shuffled"), "control"),
    ],
)
def test_bad_input(
    flags: list[str],
    searched: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[str, str],
    reason: str,
) -> None:
    """Another control in the same folder is another search."""
    assert main([*command(flags, searched), *wrong]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ("sweep", "search"))
def test_trials_on_ray_are_those_here(flags: list[str], tmp_path: Path, name: str) -> None:
    pytest.importorskip("ray")
    more = ("--trials", "9", "--sampler", "random") if name == "search" else ()
    ray = ("--executor", "ray", "--workers", "2", "--cpus", "1")
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["--quiet", name, *flags, "--out", str(here), *more]) in (0, 1)
    assert main(["--quiet", name, *flags, "--out", str(there), *more, *ray]) in (0, 1)
    tables = [pd.read_csv(out / "trials.csv").drop(columns="seconds") for out in (here, there)]
    pd.testing.assert_frame_equal(*tables, atol=1e-6)


def test_ray_settings_need_ray(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *flags, "--out", str(tmp_path / "run"), "--workers", "2"]) == 2
    assert "--executor ray" in capsys.readouterr().err


def test_more_trials_and_other_minutes_go_on_and_another_control_begins(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--trials 5`, then `--trials 9`: the first five are those; what was never searched binds nobody."""
    out = tmp_path / "run"

    def searched(*more: str) -> int:
        return main(["--quiet", "search", *flags, "--no-fits", "--out", str(out), *more])

    assert searched("--trials", "5") in (0, 1)
    first = [line for line in logged(out) if line["stage"] == "search"]
    assert searched("--trials", "9", "--minutes", "3") in (0, 1)
    both = [line for line in logged(out) if line["stage"] == "search"]
    assert both[:5] == first and [line["number"] for line in both] == list(range(9))
    assert searched("--trials", "9", "--sampler", "random") == 2
    assert "holds another search" in capsys.readouterr().err
    lines = (out / "trials.jsonl").read_text().splitlines(keepends=True)
    (out / "trials.jsonl").write_text("".join(line for line in lines if '"search"' not in line))
    assert searched("--trials", "2", "--sampler", "random") in (0, 1)
