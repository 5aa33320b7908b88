"""Files: outputs that are whole or not there at all.

Knows: writing beside a file's place and renaming, cleaning up, and a write's failure as this package's
error; a file's bytes into a hash. Does not know: what is written, or any format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_ablate.errors import InterpAblateError, RunError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the place of `path` when the block ends well.

    A reader sees the old file or the whole new one. The folder is made where it is missing; nothing is
    left beside `path` however the block ends.

    Raises:
        OSError: the place cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
