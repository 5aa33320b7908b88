"""How a command ends: signals, closed pipes, crashes, full disks; each with its exit status and one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import tiny

from interp_ablate.cli import main as cli
from interp_ablate.cli.main import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")

# A command that waits inside a file that is being written, as every stage may.
WAITS = """
import sys, time
from pathlib import Path
from interp_ablate.cli import main as cli, lint
from interp_ablate.storage.atomic_files import atomic_path

def run(args):
    with atomic_path(Path(sys.argv[-1]) / "out.txt") as place:
        place.write_text("half")
        print("waiting", flush=True)
        time.sleep(60)
    return 0

lint.run = run
sys.exit(cli.main(["lint", sys.argv[-1]]))
"""


# under nohup, or in the background of a shell, the tests' own process ignores some of them
HEARS = """
import signal
for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(each, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_end_a_process_leave_no_temporary_file(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS + WAITS, str(tmp_path / "new")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "interrupted; the same command again goes on from what it kept\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", ["--help", "models", "persona traits", "lint declining --json"]
)
def test_whoever_stops_reading_sees_no_broken_pipe(arguments: str) -> None:
    command = f"{sys.executable} -m interp_ablate {arguments} | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_an_error_that_nobody_reads_keeps_its_status() -> None:
    command = (
        f"({sys.executable} -m interp_ablate lint; echo $? >&3) 3>&1 2>&1 1>/dev/null | sleep 0"
    )
    script = (
        f"exec 3>&1; ({sys.executable} -m interp_ablate run --out x >&- 2> >(sleep 0); echo $? >&3)"
    )
    for text in (command, script):
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_disk_under_standard_output_is_said() -> None:
    command = f"{sys.executable} -m interp_ablate models > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_crash_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from interp_ablate.cli import lint

    def crash(args: Namespace) -> int:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(lint, "run", crash)
    assert main(["lint", "declining"]) == cli.CRASHED == 70
    error = capsys.readouterr().err
    assert "Traceback" in error and "interp-ablate lint: a fault of interp-ablate" in error


def test_handlers_are_as_they_were() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    assert main(["models"]) == 0
    assert before == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    mine: list[Any] = []
    old = signal.signal(signal.SIGTERM, lambda *given: mine.append(given))
    try:  # what a caller arranged stays
        assert main(["models"]) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert mine
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["run", "--model", "m", "--otu", "x"], "--otu; did you mean --out?"),
        (["export", "folder", "--forse"], "--forse; did you mean --force?"),
        (
            ["filter", "data.jsonl", "--expresions", "a"],
            "--expresions; did you mean --expressions?",
        ),
        (["lint", "declining", "--jsn"], "--jsn; did you mean --json?"),
    ],
)
def test_a_typo_is_told_also_where_something_is_missing(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and meant in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "search", "evaluate", "chat", "extract", "heal"])
def test_answers_that_do_not_fit_are_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has as many positions as it learned: before, `run` failed after it had collected."""
    model = str(tiny.folder_of(tmp_path / "gpt2", "gpt2"))
    files = []
    for name in ("Order", "Draw"):
        (tmp_path / name).write_text("\n".join(f"{name} {letter}" for letter in "abcdefghijkl"))
        files.append(str(tmp_path / name))
    sets = ["--positive", files[0], "--negative", files[1], "--expressions", "hedging"]
    arguments = {
        "run": ["run", "--model", model, *sets],
        "search": ["search", "--model", model, *sets],
        "evaluate": ["evaluate", model, model + "/", "--prompts", files[0], "--tasks", "none"],
        "chat": ["chat", "--model", model],
        "extract": ["persona", "extract", "formal", "--model", model],
        "heal": ["heal", model, "--original", model, "--make-preferences", files[0]],
    }[command]
    out = tmp_path / "out"
    place = [] if command == "chat" else ["--out", str(out)]
    assert main([*arguments, *place, "--max-new-tokens", "250"]) == 2
    assert (
        "has 256 positions: give shorter prompts, or ask for fewer new tokens"
        in capsys.readouterr().err
    )
    assert not out.exists()
