"""A league on a tiny model, by the command: what it leaves, what it refuses, that a kill loses and repeats nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.edits.plan import Plan
from interp_ablate.league.page import page
from interp_ablate.league.saved_results import read_results

METHODS = ("difference_in_means", "norm_preserving", "lda", "random_direction")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint with peaked first tokens, and a folder of prompts with a list of expressions."""
    place = tmp_path_factory.mktemp("league")
    write_task(place)
    (place / "set").mkdir()
    for name, side in (("yes", "positive"), ("no", "negative")):
        (place / "set" / f"{side}.txt").write_text((place / f"{name}.txt").read_text())
    anything = place / "anything.txt"  # a byte that most answers of this model hold
    anything.write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    return [
        *("--model", str(place / "model"), "--methods", ",".join(METHODS)),
        *("--behaviours", f"{place / 'set'}#{anything},{place / 'set'}", "--budget", "60s"),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6", "--seeds", "0,1"),
        *("--max-new-tokens", "5"),
    ]


def command(flags: list[str], out: Path, *more: str) -> list[str]:
    return ["--quiet", "league", *flags, "--out", str(out), *more]


@pytest.fixture(scope="module")
def played(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("played") / "league"
    assert main(command(flags, out)) == 0
    return out


def records(out: Path) -> list[dict[str, Any]]:
    """The journal's lines of finished work."""
    lines = [json.loads(line) for line in (out / "league.jsonl").read_text().splitlines()]
    return [line for line in lines if "key" in line]


def test_what_a_league_leaves(played: Path, flags: list[str]) -> None:
    done = records(played)
    kinds = Counter(record["key"][0] for record in done)
    # two behaviours and two seeds; one of the behaviours is judged by detection alone
    assert kinds["fit"] == 2 * 2 * len(METHODS) and kinds["unedited"] == 2
    assert max(Counter(tuple(record["key"]) for record in done).values()) == 1
    plans = [record for record in done if record["key"][0] == "plan"]
    sides = Counter((record["key"][4], record["key"][5]) for record in plans)
    assert sides["difference_in_means", "removal"] == sides["difference_in_means", "induction"]
    assert ("norm_preserving", "induction") not in sides and sides["norm_preserving", "removal"]
    for record in plans:
        assert all(len(record["values"][name]) == 6 for name in ("rate", "kl", "kl_answers"))
        assert not record["failed"]
    results = read_results(played / "league.json")
    assert set(results["methods"]) == set(METHODS) and (played / "league.png").stat().st_size > 1e4
    assert (played / "league.md").read_text(encoding="utf-8") == page(results, figure="league.png")
    for name in METHODS:
        row = results["methods"][name]
        assert row["control"] == (name == "random_direction")
        value, low, high = row["overall"]["removal"]
        assert low <= value <= high
    assert not results["methods"]["random_direction"]["ranks"]
    named = [name for name in flags[flags.index("--behaviours") + 1].split(",") if "#" not in name]
    assert all(
        row["by_behaviour"][name]["removal"] is None
        for row in results["methods"].values()
        for name in named
    )


def test_kls_rise_along_a_ladder_and_end_near_the_limit(played: Path) -> None:
    ladders: dict[tuple[str, ...], list[float]] = {}
    for record in records(played):
        if record["key"][0] == "plan":
            kl = float(np.mean(record["values"]["kl"]))
            ladders.setdefault(tuple(record["key"][:-1]), []).append(kl)
    assert ladders
    for key, kls in ladders.items():
        assert kls == sorted(kls), key
        limit = 0.1 if key[-1] == "removal" else 2.0
        assert kls[0] < limit / 3 and limit / 10 < kls[-1] < 6 * limit, (key, kls)


def test_the_numbers_of_a_plan_are_those_of_the_plan(played: Path, flags: list[str]) -> None:
    """One kept plan measured again by hand: KL from plain logits, the rate from plain generation."""
    import torch

    from interp_ablate.league.behaviours import behaviour_named
    from interp_ablate.models.load import load_model

    behaviour = behaviour_named(flags[flags.index("--behaviours") + 1].split(",")[0])
    test = behaviour.split(0, n_train=8, n_validation=6, n_test=6).test
    model = load_model(flags[1])
    record = next(
        r
        for r in records(played)
        if r["key"][0] == "plan" and r["key"][3:6] == ["0", "lda", "removal"]
    )
    (file,) = (played / "plans").glob(f"*-0/lda/removal-{record['key'][-1]}.json")
    plan = Plan.load(file)
    kls, rates = [], []
    for positive, negative in zip(test.positive, test.negative, strict=True):
        before = model.logits([negative])[0, -1].double().log_softmax(-1)
        with model.applied(plan):
            after = model.logits([negative])[0, -1].double().log_softmax(-1)
            text = model.generate([positive], max_new_tokens=5)[0].text
        kls.append(float(torch.sum(before.exp() * (before - after))))
        rates.append(float(any(c in text.lower() for c in "abcdefghijklmnopqrstuvwxyz")))
    assert record["values"]["kl"] == pytest.approx(kls, abs=2e-5)
    assert (
        sum(abs(a - b) for a, b in zip(record["values"]["rate"], rates)) <= 1
    )  # words, not letters


def test_a_finished_league_does_nothing_again(
    flags: list[str], played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (played / "league.jsonl").read_bytes()
    written = tmp_path / "pages" / "league.md"
    monkeypatch.setattr("interp_ablate.league.competition.collect", None)
    assert main(command(flags, played, "--page", str(written))) == 0
    assert (played / "league.jsonl").read_bytes() == before
    assert (written.parent / "figures" / "league.png").exists()
    again = tmp_path / "again.md"
    assert main(["league", "--from", str(played / "league.json"), "--page", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == written.read_text(encoding="utf-8")


def test_killed_at_any_moment_and_run_again(flags: list[str], played: Path, tmp_path: Path) -> None:
    """No finished work is lost or repeated, and in the end it is the league that was never killed."""
    out = tmp_path / "league"
    arguments = [sys.executable, "-m", "interp_ablate.cli.main", *command(flags, out)]
    log = out / "league.jsonl"
    seen: list[str] = []
    for wanted in (2, 9):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_text().count('"key"') >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (out / "league.json").exists()
        seen.append(log.read_text())
    assert seen[1].startswith(seen[0][: seen[0].rindex("\n") + 1])  # what was there stays there
    assert main(command(flags, out)) == 0
    assert log.read_text().startswith(seen[1][: seen[1].rindex("\n") + 1])
    keys = [tuple(record["key"]) for record in records(out)]
    assert len(set(keys)) == len(keys)
    got, want = (
        {
            tuple(r["key"]): (r["values"].get("rate"), r["values"].get("scores"))
            for r in records(each)
        }
        for each in (out, played)
    )
    assert got.keys() == want.keys()
    for key, values in want.items():
        for a, b in zip(got[key], values, strict=True):
            assert a == (None if b is None else pytest.approx(b, rel=1e-3, abs=1e-4)), key


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--n-test", "5"), "n_test differ"),
        (("--budget", "2min"), "seconds differ"),
        (("--max-kl", "0.2"), "max_kl differ"),
    ],
)
def test_other_rules_in_the_folder_are_refused(
    flags: list[str], played: Path, more: tuple[str, ...], message: str, capsys: Any
) -> None:
    before = sorted(path.name for path in played.iterdir())
    assert main(command(flags, played, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "another --out" in error and "Traceback" not in error
    assert sorted(path.name for path in played.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "soon"), "--budget is a time such as 30s"),
        (("--budget", "0s"), "--budget is a time such as 30s"),
        (("--seeds", "0,x"), "--seeds are numbers"),
        (("--seeds", "1,1"), "--seeds names one or more, each once"),
        (("--seeds", "0,00"), "--seeds names one or more, each once"),
        (("--seeds", "²"), "--seeds are numbers"),
        (("--methods", "lad"), "unknown method of the league 'lad'"),
        (("--behaviours", "declinign"), "declinign"),
        (("--behaviours", "persona:nobody"), "no trait 'nobody'"),
        (("--n-train", "400"), "400"),
        (("--max-kl", "0"), "--max-kl is a number of nats above 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    flags: list[str], more: tuple[str, ...], message: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "league"
    assert main(command(flags, out, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not out.exists()


def test_a_league_without_a_folder_is_told_what_to_give(capsys: Any) -> None:
    assert main(["league"]) == 2
    assert "--out FOLDER" in capsys.readouterr().err
    assert main(["league", "--from", "nothing.json"]) == 2
    assert "--page FILE.md" in capsys.readouterr().err
