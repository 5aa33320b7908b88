"""Progress bars: where they are shown, that they leave nothing behind, and that other libraries' are off."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interp_ablate.jobs import bars

SLOW = """
import sys, time
import interp_ablate.jobs.bars as bars
from interp_ablate import ContrastSet, collect
from tests.support.tiny import make
bars.DELAY = 0.05
model = make()
whole = model._passes.run
def slow(*args, **options):
    time.sleep(0.1)
    return whole(*args, **options)
model._passes.run = slow
prompts = ["a b c %d" % i for i in range(12)]
collect(model, prompts, batch_size=2)
print("a table")
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(bars, "_screen", lambda: screen)
    monkeypatch.setattr(bars, "DELAY", 0.0)
    for name in ("TQDM_DISABLE", bars.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return screen


def visible(text: str) -> list[str]:
    """The lines that are left on a terminal: what is written over is gone."""
    rows, row, column = [""], 0, 0
    at = 0
    while at < len(text):
        if text.startswith("\x1b[A", at):
            row, at = max(row - 1, 0), at + 3
            continue
        letter = text[at]
        if letter == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif letter == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column].ljust(column) + letter + rows[row][column + 1 :]
            column += 1
        at += 1
    return [line for line in map(str.rstrip, rows) if line]


@pytest.mark.parametrize(("forced", "shown"), [({bars.VARIABLE: "1"}, True), ({}, False)])
def test_a_slow_collect_has_a_bar_when_forced_and_none_when_piped(
    forced: dict[str, str], shown: bool
) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", bars.VARIABLE)}
    run = subprocess.run(
        [sys.executable, "-c", SLOW], env={**clean, **forced}, capture_output=True, text=True,
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ("passes:" in run.stderr and "/12" in run.stderr) is shown, run.stderr
    assert run.stdout == "a table\n"


def test_a_bar_is_shown_on_a_terminal_and_leaves_nothing(terminal: Terminal) -> None:
    assert list(bars.with_bar([1, 2, 3], "things")) == [1, 2, 3]
    assert "things" in terminal.getvalue() and "/3" in terminal.getvalue()
    assert visible(terminal.getvalue()) == []
    with pytest.raises(ValueError, match="stop"), bars.bar("things", 5) as advance:
        advance(1)
        raise ValueError("stop")
    assert visible(terminal.getvalue()) == []


def test_nested_bars_and_lines_between_them_leave_no_rubbish(terminal: Terminal) -> None:
    for outer in bars.with_bar(range(2), "outer"):
        for _ in bars.with_bar(range(3), "inner"):
            for _ in bars.with_bar(range(4), "innermost"):
                pass
        bars.write(f"line {outer}")
    said = terminal.getvalue()
    assert "outer" in said and "inner" in said and "innermost" not in said
    assert visible(said) == ["line 0", "line 1"]


def test_no_bar_of_what_another_counts_already_nor_of_a_single_item(terminal: Terminal) -> None:
    with bars.bar("prompts", 6), bars.bar("passes", 6) as advance:
        advance(6)
    assert "passes" not in terminal.getvalue()
    list(bars.with_bar([1], "one thing"))
    assert "one thing" not in terminal.getvalue()


def test_quick_work_has_no_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "DELAY", 2.0)
    list(bars.with_bar(range(100), "things"))
    with bars.waiting("a moment"):
        pass
    assert terminal.getvalue() == ""


def test_waiting_shows_a_clock(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "DELAY", 0.01)
    with bars.waiting("loading"):
        time.sleep(0.7)
    assert "loading: 00:00" in terminal.getvalue() and visible(terminal.getvalue()) == []


def test_who_says_where_bars_are_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bars.are_shown()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not bars.are_shown()
    monkeypatch.setenv(bars.VARIABLE, "1")
    assert bars.are_shown()
    with bars.showing(False):
        assert not bars.are_shown()
        with bars.showing(None):
            assert not bars.are_shown()
    monkeypatch.setenv(bars.VARIABLE, "0")
    assert not bars.are_shown()
    monkeypatch.delenv(bars.VARIABLE)
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(bars, "_screen", io.StringIO)
    assert not bars.are_shown()
    monkeypatch.setattr(bars, "_in_notebook", lambda: True)
    assert bars.are_shown()


def test_other_libraries_bars_are_off_inside_and_as_before_afterwards(terminal: Terminal) -> None:
    from tqdm import tqdm
    from tqdm.auto import tqdm as automatic
    from transformers.utils import logging as transformers_logging

    def theirs() -> None:
        for kind in (tqdm, automatic, transformers_logging.tqdm):
            list(kind(range(3), desc="theirs", file=terminal))

    before = vars(tqdm)["__init__"]
    with bars.quiet_libraries(), bars.quiet_libraries():
        theirs()
        assert "theirs" not in terminal.getvalue()
        list(bars.with_bar(range(2), "ours"))
    assert "ours" in terminal.getvalue()
    assert vars(tqdm)["__init__"] is before
    theirs()
    assert terminal.getvalue().count("theirs") >= 3


def test_a_bar_that_is_not_shown_costs_nothing_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bars.VARIABLE, "0")
    start = time.perf_counter()
    for _ in bars.with_bar(range(100_000), "things"):
        pass
    assert time.perf_counter() - start < 1.0  # ten microseconds an item, on any machine
