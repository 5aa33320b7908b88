"""Incoming files: what others wrote or an earlier run left, read through one gate.

Every file that is not this process's own comes in here: a FIFO is not waited for, nothing is read beyond a limit,
JSON is not nested deeper than any honest writer nests it, and a git-lfs pointer is called one.

Knows: files, bytes, JSON. Does not know: what a file is for.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.storage.json_shapes import LEFT_BEHIND, misfit

MAX_BYTES = 1 << 28  # of a file that is read whole; the largest tokenizers have a tenth of it
MAX_LOG = 1 << 34  # bytes of a file that this package wrote line by line
MAX_DEPTH = 64  # of lists and objects in each other
MAX_DIGITS = 300  # of a whole number: one that is longer is no float
_LONG = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_POINTER = b"version https://git-lfs.github.com/spec/"
WHOLE = "download it again into its folder (hf download OWNER/MODEL), or copy it again"


def check_file(path: Path, error: type[InterpAblateError], *, limit: int | None = None) -> int:
    """The size of a regular file, after it was found to be one and no git-lfs pointer; bytes.

    Raises:
        InterpAblateError: of the kind `error`: no file, something else than a file, a pointer, more bytes than
            `limit`.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, a socket or a device"
            raise error(f"{path} is not a file but {kind}: put the file there")
        if state.st_size < 1024:
            with path.open("rb") as file:
                _check_pointer(file.read(1024), path, error)
    except (OSError, ValueError) as failure:  # a name with a null byte is a ValueError
        if isinstance(failure, InterpAblateError):
            raise
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"cannot read {path}: {reason}") from failure
    if limit is not None and state.st_size > limit:
        raise error(
            f"{path} has {state.st_size} bytes, and such a file at most {limit}: is it the right one?"
        )
    return state.st_size


def _check_pointer(start: bytes, path: Path, error: type[InterpAblateError]) -> None:
    if not start.startswith(_POINTER):
        return
    size = re.search(rb"^size (\d{1,20})$", start, re.MULTILINE)
    stands_for = f" of {int(size[1])} bytes" if size else ""
    raise error(
        f"{path} is a git-lfs pointer, the name of a file{stands_for} and not the file itself: it was cloned "
        f"without git-lfs. Run `git lfs install` and `git lfs pull` there, or {WHOLE}"
    )


def incoming_bytes(
    path: str | Path, *, error: type[InterpAblateError] = RunError, limit: int = MAX_BYTES
) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        InterpAblateError: of the kind `error`: see `check_file`; or a file that is longer.
    """
    path = Path(path)
    check_file(path, error, limit=limit)
    try:
        return path.read_bytes()
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from failure


def incoming_text(
    path: str | Path, *, error: type[InterpAblateError] = RunError, limit: int = MAX_BYTES
) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InterpAblateError: of the kind `error`: see `incoming_bytes`; or bytes that are not UTF-8.
    """
    data = incoming_bytes(path, error=error, limit=limit)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8 text ({failure}): save it as UTF-8") from failure
    if "\0" in text:
        raise error(f"{path} holds null bytes, as no text does: is it the right file?")
    return text


def incoming_json(
    path: str | Path,
    *,
    error: type[InterpAblateError] = RunError,
    limit: int = MAX_BYTES,
    unique: bool = True,
    finite: bool = False,
    advice: str = WHOLE,
) -> Any:
    """The content of a JSON file.

    Args:
        unique: refuse a key that stands twice in one object, of which readers take different ones.
        finite: refuse NaN and Infinity, which are no JSON.
        advice: what to do about a broken file.

    Raises:
        InterpAblateError: of the kind `error`: see `incoming_text` and `parse_json`.
    """
    text = incoming_text(path, error=error, limit=limit)
    try:
        return parse_json(text, unique=unique, finite=finite)
    except ValueError as failure:
        raise error(f"{path} is not whole JSON: {failure}; {advice}") from failure


def incoming_object(
    path: str | Path, *, fields: Sequence[str] = (), shape: Any = None, **options: Any
) -> dict[str, Any]:
    """The object in a JSON file, with all of `fields`; `options` are those of `incoming_json`.

    Args:
        shape: what its parts are (see `json_shapes`); by default what a run or an export left under that name.
            What has one is ours, and has no NaN.

    Raises:
        InterpAblateError: of the kind `error`: see `incoming_json`; no object, one that lacks a field or has
            another shape.
    """
    shape = LEFT_BEHIND.get(Path(path).name) if shape is None else shape
    content = incoming_json(path, **options, finite=shape is not None)
    error, advice = options.get("error", RunError), options.get("advice", WHOLE)
    if not isinstance(content, dict):
        raise error(
            f"{path} holds a {type(content).__name__} where a JSON object belongs; {advice}"
        )
    if lacking := [name for name in fields if name not in content]:
        raise error(f"{path} lacks {', '.join(lacking)}; {advice}")
    if shape is not None and (place := misfit(content, shape)) is not None:
        raise error(
            f"{path} is cut or was changed: {place} is not there, or not of the kind that belongs there; "
            f"{advice}"
        )
    return content


def parse_json(text: str | bytes, *, unique: bool = True, finite: bool = False) -> Any:
    """JSON in memory, at most `MAX_DEPTH` deep; with `finite`, without Python's NaN and Infinity.

    Raises:
        ValueError: what is wrong with it, as a message to a person.
    """
    more: dict[str, Any] = {"parse_constant": _no_constant} if finite else {}
    if _LONG.search(text if isinstance(text, str) else text.decode(errors="replace")):
        more["parse_int"] = _whole
    try:
        content = json.loads(text, object_pairs_hook=_once if unique else None, **more)
    except RecursionError:
        raise ValueError(f"it is nested too deeply, more than {MAX_DEPTH} deep") from None
    _check_depth(content)
    return content


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is none of ours")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {again!r} is there twice in one object; remove one")
    "".join(values).encode()  # a lone surrogate is not text
    return values


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for many in inside for value in many if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"it is nested too deeply, more than {MAX_DEPTH} deep")


def shortened(value: Any, length: int = 60) -> str:
    """The value as text of at most `length` characters and three dots."""
    try:
        text = str(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[:length]}..."
