"""Files: whole or not there at all, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interp_ablate.errors import InterpAblateError, PlanError, RunError
from interp_ablate.storage.atomic_files import atomic_path, write_atomic


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
