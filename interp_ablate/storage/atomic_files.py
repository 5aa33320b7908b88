"""Files: outputs that are whole or not there at all, and nothing left of processes that died.

Knows: writing beside a file's place and renaming, cleaning up, and a write's failure as this package's
error; a file's bytes into a hash. Does not know: what is written, or any format.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from interp_ablate.errors import InterpAblateError, RunError

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_SERIAL = itertools.count()
# The name that a temporary takes: .NAME.HOST-PROCESS-SERIAL.tmp; .old for what was replaced.
_TEMPORARY = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-\w+\.(tmp|old)")
_DAY = 86400.0  # after so many seconds without a change another machine's temporary is left over


def temporary_beside(path: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """A hidden name beside `path` that says which process it is of; what dead processes left there is removed."""
    remove_left_overs(path.parent)
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_SERIAL)}.{kind}")


def temporary_folder(name: str, place: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder in `place` (default: the system's folder for such), removed at the latest by the next call."""
    place = place or Path(tempfile.gettempdir())
    remove_left_overs(place)
    prefix = f".{name}.{_HOST}-{os.getpid()}-"
    return tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=place)


def remove_left_overs(folder: Path) -> None:
    """Remove the temporaries of dead processes; a result that was moved aside and not replaced comes back."""
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not _is_left_over(path, match[2], int(match[3])):
            continue
        try:
            if match[4] == "old" and not os.path.lexists(path.with_name(match[1])):
                os.replace(path, path.with_name(match[1]))
            else:
                remove(path)
        except OSError:
            continue  # not ours to remove, or another process just did


def _is_left_over(path: Path, host: str, process: int) -> bool:
    if host == _HOST and os.name == "posix":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        return False
    try:
        return time.time() - path.lstat().st_mtime > _DAY
    except OSError:
        return False


def remove(path: Path) -> None:
    """A file, a link or a folder with all in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing with those above it; what stays empty goes again after the block.

    Raises:
        OSError: it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        remove_empty(made)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the work whose results go there; nothing is left.

    Raises:
        RunError: it says why.
    """
    try:
        with folder_made(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"cannot write into {folder}: {error.strerror or error}. Choose another place"
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the place of `path` when the block ends well.

    A reader sees the old file or the whole new one. The folder is made where it is missing; nothing is
    left beside `path` however the block ends, nor by a process that was killed in it (`remove_left_overs`).

    Raises:
        OSError: the place cannot be written, or the disk is full.
    """
    with folder_made(path.parent):
        temporary = temporary_beside(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(
    path: Path, content: bytes | str, *, error: type[InterpAblateError] = RunError
) -> None:
    """Write a file (text as UTF-8), whole or not at all.

    Raises:
        InterpAblateError: of the kind `error`: the place cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as failure:
        raise error(
            f"cannot write {path}: {failure.strerror or failure}. Free space or choose another place"
        ) from failure


def hash_file(digest: Any, path: Path) -> None:
    """A file's bytes into a `hashlib` object, a part at a time.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
