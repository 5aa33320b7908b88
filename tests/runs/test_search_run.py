"""A search in a run folder, on a tiny model: what it leaves, kills, two processes, controls; trials on Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny

from interp_ablate.cli.main import main
from interp_ablate.edits.plan import Plan
from interp_ablate.search.selection import pareto_front

pytest.importorskip("optuna")
TRIALS = 14


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint with peaked first tokens, and two files of prompts."""
    place = tmp_path_factory.mktemp("search")
    model, tokenizer = tiny(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name, words in (("yes", "order bring fetch send"), ("no", "name list tell describe")):
        verbs = words.split()
        lines = [f"{verbs[i % 4]} number {i * 7 + 3} now" for i in range(24)]
        (place / f"{name}.txt").write_text("\n".join(lines))
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
    table = pd.read_csv(out / "search.csv")
    return table[table["state"].isin(("COMPLETE", "FAIL"))]


def test_what_a_search_leaves(searched: Path) -> None:
    table = finished(searched)
    assert len(table) == TRIALS and {"expression_rate", "kl", "repetition"} <= set(table)
    assert set(table["edit"]) <= {"band", "fitted"} and (table["state"] == "COMPLETE").sum() > 8
    front = pd.read_csv(searched / "front.csv")
    done = table[table["state"] == "COMPLETE"]
    want = pareto_front(done, objectives=("expression_rate", "kl", "repetition"))
    assert set(front["number"]) <= set(want["number"]) and len(front)
    for number in front["number"]:
        assert len(Plan.load(searched / "plans" / f"{number}.json"))
    selected = json.loads((searched / "selected.json").read_text())
    unedited = selected["validation_baseline"]
    assert selected["control"] is None
    assert front["negative_repetition"].notna().all()
    if selected["plan"] is not None:
        finalists = pd.read_csv(searched / "finalists.csv")
        assert set(front["number"]) <= set(finalists["number"])
        row = finalists[finalists["number"] == selected["trial"]["number"]].iloc[0]
        assert row["kl_high"] <= 50
        for name in ("repetition_of_all", "empty"):
            assert row[name] <= unedited[name]
        assert "positive_repetition_after" in selected["test"]
        assert [c["name"] for c in selected["test"]["controls"]] == ["random 0", "random 1"]
    screening = pd.read_csv(searched / "screening.csv")
    assert set(screening["prompts"]) <= {3, 6} and len(screening) >= 1


def test_a_finished_search_repeats_nothing(flags: list[str], searched: Path) -> None:
    before = (searched / "search" / "study.jsonl").read_text()
    journal = (searched / "trials.jsonl").read_text()
    main(command(flags, searched))
    assert (searched / "search" / "study.jsonl").read_text().startswith(before)
    assert len(finished(searched)) == TRIALS
    assert (searched / "trials.jsonl").read_text() == journal


def test_killed_at_any_moment_and_run_again(
    flags: list[str], searched: Path, tmp_path: Path
) -> None:
    """No finished trial is lost or repeated, and in the end it is the search that was never killed."""
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "interp_ablate.cli", *command(flags, out)]
    study = out / "search" / "study.jsonl"
    for wanted in (3, 7):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if study.exists() and study.read_text().count('"scores"') >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    killed, whole = finished(out), finished(searched)
    done = killed[killed["state"] == "COMPLETE"].reset_index(drop=True)
    want = whole[whole["state"] == "COMPLETE"].reset_index(drop=True)
    assert len(done) == len(want) == len(done.drop_duplicates("number"))
    for name in ("expression_rate", "kl", "repetition", "length"):
        assert done[name].tolist() == pytest.approx(want[name].tolist(), abs=1e-5), name


def test_two_processes_search_one_folder(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "interp_ablate.cli", *command(flags, out)]
    both = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, 1), err.decode()
    table = finished(out)
    assert len(table) == TRIALS and table["number"].is_unique
    workers = {
        json.loads(line)["user_attr"]["asked"]["worker"]
        for line in (out / "search" / "study.jsonl").read_text().splitlines()
        if '"asked"' in line
    }
    assert 1 <= len(workers) <= 2  # a process that comes late may find nothing left to do
    assert (out / "trials.jsonl").read_text().count('"prompts"') == len(
        {line for line in (out / "trials.jsonl").read_text().splitlines() if '"prompts"' in line}
    )


@pytest.mark.parametrize("control", ("random", "shuffled"))
def test_controls_are_searched_the_same_way(
    flags: list[str], searched: Path, tmp_path: Path, control: str
) -> None:
    out = tmp_path / "run"
    assert main(command(flags, out, "--control", control)) in (0, 1)
    table = finished(out)
    assert len(table) == TRIALS and not (out / "screening.csv").exists()
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


def test_trials_on_ray_are_those_here(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["--quiet", "sweep", *flags, "--out", str(here)]) == 0
    ray = ("--executor", "ray", "--workers", "2", "--cpus", "1")
    assert main(["--quiet", "sweep", *flags, "--out", str(there), *ray]) == 0
    tables = [pd.read_csv(out / "trials.csv").drop(columns="seconds") for out in (here, there)]
    pd.testing.assert_frame_equal(*tables, atol=1e-6)


def test_ray_settings_need_ray(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *flags, "--out", str(tmp_path / "run"), "--workers", "2"]) == 2
    assert "--executor ray" in capsys.readouterr().err
