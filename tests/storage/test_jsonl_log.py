"""The log of lines: what is never lost, whom it binds, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interp_ablate import __version__
from interp_ablate.errors import RunError
from interp_ablate.storage.jsonl_log import JsonlLog


def log(path: Path, identity: dict[str, Any] | None = None, **options: Any) -> JsonlLog:
    return JsonlLog(
        path, identity or {"of": "this"}, kind="log", format="f/1", lost="lost", **options
    )


def write(path: Path, *values: int) -> None:
    lines = log(path)
    with lines.open():
        for value in values:
            lines.append({"value": value})


def read(path: Path, identity: dict[str, Any] | None = None, **options: Any) -> list[int]:
    with log(path, identity, **options).open() as lines:
        return [line["value"] for line in lines]


def test_a_log_without_lines_leaves_nothing_and_binds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "log.jsonl"
    with pytest.raises(ZeroDivisionError), log(path).open():
        assert path.exists()  # locked
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "log.jsonl").write_text(json.dumps({"format": "f/1", "of": "other"}) + "\n")
    write(tmp_path / "log.jsonl", 1)
    assert read(tmp_path / "log.jsonl") == [1]


@pytest.mark.parametrize(
    "change", ["no line breaks", "only after the header", "a text", "glued end"]
)
def test_what_is_not_a_torn_line_is_never_removed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "log.jsonl"
    write(path, *range(22))
    header, *lines = path.read_bytes().splitlines()
    path.write_bytes(
        {
            "no line breaks": b"".join([header, *lines]),
            "only after the header": header + b"\n" + b"".join(lines),
            "a text": b"my own notes, without a line break",
            "glued end": header + b"\n" + b"".join(lines) + b'{"val',
        }[change]
    )
    before = path.read_bytes()
    with pytest.raises(RunError, match="corrupt log"):
        read(path)
    assert path.read_bytes() == before


def test_blank_lines_and_a_lost_last_line_break_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, 1, 2)
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n")[:-3])
    assert read(path) == [1, 2]
    write(path, 3)
    assert read(path) == [1, 2, 3]
    with open(path, "ab") as file:
        file.write(b'{"value": 4')  # cut
    assert read(path) == [1, 2, 3]
    write(path, 5)
    assert read(path) == [1, 2, 3, 5]


def test_other_work_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, 1)
    with pytest.raises(RunError, match="other work: of differ"):
        read(path, {"of": "that"})
    text = path.read_text()
    path.write_text(text.replace(__version__, "0.0.1"))
    with pytest.raises(RunError, match="other work: interp-ablate differ"):
        read(path)
    assert read(path, any_version=True) == [1]


def test_what_is_replaced_stays_until_there_is_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, 1)
    before = path.read_bytes()
    other = log(path, {"of": "that"}, replace=True)
    with other.open() as lines:
        assert lines == [] and path.read_bytes() == before
    assert path.read_bytes() == before
    with other.open():
        other.append({"value": 2})
    assert read(path, {"of": "that"}) == [2]
    assert read(path, {"of": "that"}, replace=True) == [2]  # of the same work nothing is replaced


HOLDS = """
import sys, time
from interp_ablate.storage.jsonl_log import JsonlLog
log = JsonlLog(sys.argv[1], {"of": "this"}, kind="log", format="f/1", lost="lost")
with log.open():
    log.append({"value": 1})
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="in use by another process"):
        read(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(path) == [1]
