"""A search over several calls: its time, what ends it, whose plans it replaces, what it may run."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.cli.search import _rubric
from interp_ablate.edits.plan import Plan
from interp_ablate.errors import RunError
from interp_ablate.runs.configuration import Configuration
from interp_ablate.runs.kept_plans import keep_plan
from interp_ablate.runs.run_folder import Run, read_run
from interp_ablate.runs.search_objectives import objective_scores
from interp_ablate.runs.search_run import LEAST_SECONDS, SearchClock
from interp_ablate.runs.search_settings import SearchSettings

pytest.importorskip("optuna")


def test_a_search_that_took_its_time_has_none_left_in_another_call() -> None:
    """A minute of trials is of all calls together, by the clock and not by the trials' own seconds."""
    run: Any = SimpleNamespace(state={"search": {}}, save=lambda: None)
    first = SearchClock(run, time.monotonic() - 500, 0.0)  # a long preparation
    assert first.left(60) == LEAST_SECONDS
    first.last -= LEAST_SECONDS  # the trials' minute, of which the trials themselves took a part
    first.keep()
    again = SearchClock(run, time.monotonic() - 3, 20.0)
    assert again.left(60) <= 0
    assert again.left(3600) == pytest.approx(3600 - 500 - LEAST_SECONDS - 3, abs=1)


def test_its_own_scorer_s_condition_ends_it_and_kept_plans_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The objective that is the behaviour itself is measured under another column's name."""
    write_task(tmp_path)
    words = tmp_path / "anything.txt"
    words.write_text("\n".join("abcdefghijklmnopqrstuvwxyz"))
    out = tmp_path / "out"
    flags = [
        *("--model", tmp_path / "model", "--expressions", words, "--positive", tmp_path / "yes.txt"),
        *("--negative", tmp_path / "no.txt", "--n-train", 8, "--n-validation", 6, "--n-test", 6),
        *("--max-new-tokens", 4, "--max-kl", 50, "--no-fits", "--objective", f"expr=expressions:{words}"),
        *("--objective", "kl", "--out", out),
    ]  # fmt: skip
    command = ["--quiet", "search", *map(str, flags)]
    assert main([*command, "--trials", "7", "--stop-at", "expr<=1"]) in (0, 1)
    assert "meets expr<=1" in capsys.readouterr().out
    state = read_run(out)
    assert state is not None and state["search_end"]["trials"] == 3
    plan = Plan.load(next((out / "plans").glob("*.json")))
    mine = keep_plan(out, "mine", plan)
    for name in ("7", "trial-7"):
        with pytest.raises(RunError, match="a search gives"):
            keep_plan(out, name, plan)
    assert main([*command, "--trials", "4"]) in (0, 1)
    assert Plan.load(mine) == plan


def test_a_file_of_python_runs_only_where_a_person_named_it(tmp_path: Path) -> None:
    write_task(tmp_path)
    own, ran = tmp_path / "own.py", tmp_path / "ran"
    own.write_text(f"open({str(ran)!r}, 'w').close()\ndef f(answer):\n    return 1.0\n")
    sides = {"positive": str(tmp_path / "yes.txt"), "negative": str(tmp_path / "no.txt")}
    sizes = {"n_train": 8, "n_validation": 6, "n_test": 6}
    run = Run(tmp_path / "out", Configuration("m", **sides, **sizes, expressions="declining"))  # type: ignore[arg-type]
    search = SearchSettings(objective=(f"own={own}:f", "kl"))
    with pytest.raises(RunError, match="only where a person names it"):
        objective_scores(run, search)
    assert not ran.exists()
    objective_scores(run, search, own_code=True)
    assert ran.exists()


def test_a_rubric_is_some_judge_s(tmp_path: Path) -> None:
    """A file's text may begin as a name does; a rubric that no judge would read is refused."""
    file = tmp_path / "rubric.txt"
    file.write_text("Score=0 means rude, 100 polite")
    judge = "judge:m@http://h/v1"
    for given in (f"@{file}", f"judge=@{file}", "=Score=0 means rude, 100 polite"):
        settings = SearchSettings(objective=(judge,), objective_rubric=(_rubric(given),))
        assert list(settings.rubrics.values()) == [file.read_text()]
    for objectives, rubrics, said in (
        ((judge,), ("=a", "=b"), "NAME=TEXT, each name once"),
        (("lexicon:formality",), ("lexicon=a",), "no judge among the objectives"),
        ((), ("a",), "no judge among the objectives"),
        ((judge,), ("judge=a", "=b"), "without a name"),
        ((judge,), ("Score=a",), "no objective of that name"),
    ):
        with pytest.raises(RunError, match=said):
            SearchSettings(objective=objectives, objective_rubric=rubrics)
