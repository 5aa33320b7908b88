"""Files: whole or not there at all, whatever happens in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp_ablate.errors import InterpAblateError, PlanError, RunError
from interp_ablate.storage.atomic_files import (
    atomic_path,
    remove_left_overs,
    temporary_beside,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("content", [b"\x00\xff\n", "d\u00e9j\u00e0 vu\r\n", "", b""])
def test_what_is_written_is_read(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "new" / "folder" / "out.txt"
    for _ in range(2):  # a second time over the first
        write_atomic(path, content)
        expected = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == expected and names(path.parent) == ["out.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_block_that_ends_badly_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "out.txt"
    write_atomic(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old" and temporary.parent == path.parent
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["out.txt"]


def test_a_failed_write_says_where_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/out\.txt: "):
        write_atomic(tmp_path / "file" / "out.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match=r"cannot write .*folder: Is a directory"):
        write_atomic(tmp_path / "folder", "x", error=PlanError)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InterpAblateError, match=r"out\.txt: No space left on device\. Free space"):
        write_atomic(tmp_path / "out.txt", "x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process is not asked whether it lives")
def test_what_a_dead_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = temporary_beside(tmp_path / "a.png").name
    of_dead = own.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    elsewhere = f".a.png.00000000-{dead.pid}-0.tmp"  # of another machine
    for name in (own, of_dead, elsewhere, ".mine.tmp", ".a.png.12.tmp"):
        (tmp_path / name).write_text("x")
    old = of_dead.replace("a.png", "out").removesuffix("tmp") + "old"
    for name in (old, f"{of_dead[:-3]}x.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "out").mkdir()
    write_atomic(tmp_path / "b.txt", "x")  # whatever is written in that folder next
    left = sorted([own, elsewhere, ".mine.tmp", ".a.png.12.tmp", "b.txt", "out"])
    assert names(tmp_path) == sorted([*left, f"{of_dead[:-3]}x.tmp"])
    os.utime(tmp_path / elsewhere, (1, 1))
    write_atomic(tmp_path / "b.txt", "x")
    assert elsewhere not in names(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process is not asked whether it lives")
def test_a_result_that_was_moved_aside_and_never_replaced_is_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = temporary_beside(tmp_path / "out", "old").name.replace(str(os.getpid()), str(dead.pid))
    (tmp_path / old).mkdir()
    (tmp_path / old / "file").write_text("whole")
    remove_left_overs(tmp_path)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "whole"


def test_folders_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(OSError), atomic_path(tmp_path / "a" / "b" / "c.txt"):
        raise OSError
    assert not names(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), atomic_path(tmp_path / "a" / "b" / "c.txt"):
        raise OSError
    assert names(tmp_path) == ["a"]
