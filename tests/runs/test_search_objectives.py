"""A search by objectives of one's own on a tiny model: what is scored, when it stops, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_task import write_task

from interp_ablate.cli.main import main

pytest.importorskip("optuna")
SCORER = """
def vowels(answer):
    return 100 * sum(c in "aeiou" for c in answer) / max(1, len(answer))

def fails(answer):
    raise ValueError("no")
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("objectives")
    write_task(place)
    (place / "anything.txt").write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    (place / "own.py").write_text(SCORER)
    return [
        *("--model", str(place / "model"), "--expressions", str(place / "anything.txt")),
        *("--positive", str(place / "yes.txt"), "--negative", str(place / "no.txt")),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--max-new-tokens", "5", "--max-kl", "50", "--no-fits"),
        *("--objective", "expressions", "--objective", "kl<=40", "--objective", "false_hits"),
        *("--objective", f"max:{place / 'own.py'}:vowels"),
    ]


def search(flags: list[str], out: Path, *more: str) -> int:
    return main(["--quiet", "search", *flags, "--out", str(out), *more])


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("stage") == "search"]


def read(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


def test_scored_stopped_and_gone_on(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every trial is within a wide condition: one round is drawn. More trials go on with the draws of one search."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert search(flags, out, "--trials", "8", "--stop-at", "kl<=1000,vowels>=0") in (0, 1)
    assert "meets kl<=1000,vowels>=0" in capsys.readouterr().out
    end = read(out, "run.json")["search_end"]
    assert end["by"] == "stop_at" and end["trials"] == 3 and end["met_by"] == [0, 1, 2]
    assert search(flags, out, "--trials", "4") in (0, 1)  # a part of a round
    first = logged(out)
    assert len(first) == 4 and read(out, "run.json")["search_end"]["by"] == "trials"
    assert search(flags, out, "--trials", "8") in (0, 1)
    assert logged(out)[:4] == first
    assert search(flags, whole, "--trials", "8") in (0, 1)
    drawn = [[line["params"] for line in logged(each)] for each in (out, whole)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8

    table = pd.read_csv(out / "trials.csv")
    trials = table[table["stage"].isin(("search", "finalist")) & (table["status"] == "ok")]
    assert trials[["vowels", "false_hits"]].notna().all(axis=None)
    for line in first:
        values = line["by_prompt"]
        for name in ("vowels", "false_hits", "expression_rate", "kl"):
            mean = sum(values[name]) / len(values[name])
            assert mean == pytest.approx(line["scores"][name], rel=1e-4, abs=1e-6)
    selected = read(out, "selected.json")
    assert [text.split("=")[0] for text in selected["objectives"]] == [
        "expressions", "kl", "false_hits", "vowels",
    ]  # fmt: skip
    assert "kl > 40 (upper bound)" in selected["limits"]["removed"]
    if selected["plan"] is not None:
        assert [each["name"] for each in selected["test"]["objectives"]] == ["false_hits", "vowels"]
    assert main(["--quiet", "plot", str(out)]) == 0
    assert (out / "figures" / "search.png").exists()
    report = (out / "report.html").read_text()
    assert "The search drew 8 trials by these objectives: expressions, kl&lt;=40" in report
    capsys.readouterr()
    assert search([*flags, "--objective", "repetition"], out) == 2
    assert "holds another search (objectives" in capsys.readouterr().err


def test_bad_objectives_leave_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for more, said in (
        (("--objective", "layer=lexicon:length"), "has for something else"),
        (("--objective", "nothing:here"), "no scorer 'nothing:here'"),
        (("--objective", "gone.py:f"), "cannot load the scorer"),
        (("--objective", "judge:m@http://localhost:1/v1"), "needs a rubric"),
        (("--stop-at", "repetition<=1"), "the search has no objective 'repetition'"),
    ):
        assert search(flags, out, *more) == 2
        message = capsys.readouterr().err
        assert said in message and "Traceback" not in message and not out.exists()


def test_finalists_meet_prompts_that_no_trial_was_chosen_on(tmp_path: Path) -> None:
    """With prompts left over they are a fourth part; the choice and the report are by its numbers."""
    from interp_ablate.prompts.contrast_set import ContrastSet
    from interp_ablate.runs.configuration import Configuration
    from interp_ablate.runs.validation_bench import split_of

    write_task(tmp_path, n_prompts=52)
    (tmp_path / "anything.txt").write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    sides = {
        side: str(tmp_path / f"{name}.txt")
        for side, name in (("positive", "yes"), ("negative", "no"))
    }
    sizes = {"n_train": 8, "n_validation": 20, "n_test": 6}
    contrast = ContrastSet.load(**sides)
    split = split_of(contrast, Configuration(model="m", **sides, **sizes))
    assert split.finalists is not None and len(split.finalists.positive) == 18
    three = contrast.split(**sizes)
    assert (three.train, three.validation, three.test) == split.parts[
        :3
    ] and three.finalists is None
    texts = [{p.text for p in (*part.positive, *part.negative)} for part in split.parts]
    assert sum(map(len, texts)) == len(set.union(*texts))
    few = Configuration(model="m", **sides, **{**sizes, "n_train": 12})
    assert split_of(contrast, few).finalists is None  # 14 left

    out = tmp_path / "out"
    flags = [
        *("--model", tmp_path / "model", "--expressions", tmp_path / "anything.txt", "--no-fits"),
        *("--positive", sides["positive"], "--negative", sides["negative"], "--max-new-tokens", 4),
        *("--n-train", 8, "--n-validation", 20, "--n-test", 6, "--max-kl", 50, "--trials", 3),
    ]
    assert search(list(map(str, flags)), out, "--rule", "cheapest") in (0, 1)
    selected = read(out, "selected.json")
    assert selected["finalist_prompts"] == 18 and selected["validation_prompts"] == 20
    assert selected["rule"] == "cheapest" and selected["optimism"]["plans"] == 3
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    by_stage = {
        line["stage"]: len(line["by_prompt"]["kl"]) for line in lines if line.get("by_prompt")
    }
    assert by_stage["search"] == 20 and by_stage["finalist"] == 18
