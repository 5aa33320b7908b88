"""How many rounds of a fit a search of few minutes makes, and that they are decided once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_task import write_task

from interp_ablate.cli.main import main
from interp_ablate.runs import fits, rounds_in_time

pytest.importorskip("optuna")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A checkpoint whose answers hold bytes that are no text, which is what is fitted away."""
    write_task(tmp_path)
    words = tmp_path / "words.txt"
    words.write_text("\N{REPLACEMENT CHARACTER}\n", encoding="utf-8")
    return [
        *("--model", str(tmp_path / "model"), "--expressions", str(words)),
        *("--positive", str(tmp_path / "yes.txt"), "--negative", str(tmp_path / "no.txt")),
        *("--n-train", "8", "--n-validation", "6", "--n-test", "6"),
        *("--max-new-tokens", "5", "--max-kl", "50"),
    ]


def tried(out: Path) -> list[dict[str, Any]]:
    """The search's finished trials."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("stage") == "search"]


def test_a_fit_has_the_rounds_that_there_is_time_for(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search of two minutes had only bands. What was decided once holds for a call with more minutes."""
    out = tmp_path / "run"
    made = fits_of_few_steps(monkeypatch)

    def searched(*more: str) -> dict[str, Any]:
        assert main(["--quiet", "search", *flags, "--out", str(out), *more]) in (0, 1)
        return json.loads((out / "run.json").read_text())["search"]

    state = searched("--trials", "2", "--minutes", "1e-5")
    assert list(state["fit_rounds"].values()) == [0] and state["fits"] == []
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert any("was not made: its first round is to end within" in note for note in notes)
    first = tried(out)
    state = searched("--trials", "4", "--minutes", "60")
    assert not (out / "fits").exists()
    assert tried(out)[:2] == first
    lines = (out / "trials.jsonl").read_text().splitlines(keepends=True)
    (out / "trials.jsonl").write_text("".join(line for line in lines if '"search"' not in line))
    real = time.monotonic
    late = SimpleNamespace(monotonic=lambda: real() + 3600 * (len(made) >= 2))
    with monkeypatch.context() as patched:
        patched.setattr(rounds_in_time, "time", late)  # an hour goes by in the second round
        state = searched("--trials", "2", "--minutes", "60")  # no trial was left: decided anew
    assert list(state["fit_rounds"].values()) == [2] and len(made) == 2
    (fit,) = (out / "fits").glob("*.json")
    kept = fit.read_bytes()
    fit.unlink()
    assert searched("--trials", "2", "--minutes", "60")["fits"] == [fit.stem]
    assert len(made) == 4 and fit.read_bytes() == kept


def fits_of_few_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rounds are of one step; the list gets an entry for each that is made."""
    real, made = fits.fit_edit, list[int]()

    def short(*given: Any, **options: Any) -> Any:
        made.append(options["steps"])
        return real(*given, **options | {"steps": 1, "kl_weight": 1.0})

    monkeypatch.setattr(fits, "fit_edit", short)
    return made


@pytest.mark.parametrize(("first", "made"), [(40.0, 1), (60.0, 0)])
def test_a_first_round_that_could_not_end_in_time_is_not_begun(first: float, made: int) -> None:
    """Of two minutes 50 seconds have gone: one that takes 40 ends within 80% of them, one that takes 60 does not."""
    rounds = rounds_in_time.RoundsInTime(
        None,
        2.0,
        time.monotonic() - 50,
        first,
        lambda _: None,  # type: ignore[arg-type]
    )
    assert rounds.more("fit", 0) == bool(made)
    assert rounds.more("fit", 1)  # a later one, by when it begins
    given = rounds_in_time.RoundsInTime(None, 2.0, 0.0, first, {"fit": 3}.get)  # type: ignore[arg-type]
    assert [given.more("fit", done) for done in range(4)] == [True, True, True, False]
