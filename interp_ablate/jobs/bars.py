"""Progress bars for work of more than two seconds, in a terminal and in a notebook, and other libraries' bars off.

A bar is shown on standard error where that is a terminal, and in notebooks; elsewhere nothing is written, so that
logs stay clean. `INTERP_ABLATE_PROGRESS=1` shows bars everywhere, `=0` nowhere; `TQDM_DISABLE=1` is obeyed too.

Knows: tqdm. Does not know: what is done meanwhile.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
DELAY = 2.0  # seconds before a bar is shown
MOST_NESTED = 2
VARIABLE = "INTERP_ABLATE_PROGRESS"
_lock = threading.Lock()
_forced: list[bool] = []  # of `showing`, the innermost last
_silencing: list[
    Callable[..., None]
] = []  # tqdm's own __init__, once for each `quiet_libraries` that is open


class _Open(threading.local):
    """The bars that are open in a thread, the outermost first."""

    def __init__(self) -> None:
        self.bars: list[Any] = []
        self.most = MOST_NESTED


_open = _Open()


def hide_in_thread() -> None:
    """Show no bar of this thread: others do the same work beside it."""
    _open.most = 0


def are_shown() -> bool:
    """Whether bars are shown now: see the head of this file."""
    if _forced:
        return _forced[-1]
    if wanted := os.environ.get(VARIABLE):
        return wanted != "0"
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return False
    screen = _screen()
    return _in_notebook() or (screen is not None and screen.isatty())


def _screen() -> Any:
    """Where bars are drawn; None in a process without standard error."""
    return sys.stderr


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def showing(shown: bool | None) -> Iterator[None]:
    """Bars on or off inside the block; None leaves them as they are."""
    if shown is None:
        yield
        return
    _forced.append(shown)
    try:
        yield
    finally:
        _forced.pop()


def _nothing(n: int = 1) -> None:
    """Hear of progress and show none."""


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar for the length of a block, which is told how many are done; gone when the block ends.

    Bars inside others are drawn below them, two at most, and only where they count something else. One of a
    single item is never shown.
    """
    if (opened := _opened(what, total)) is None:
        yield _nothing
        return
    try:
        yield opened.update
    finally:
        _close(opened)


def with_bar(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar once they take more than two seconds."""
    with bar(what, len(items) if total is None and isinstance(items, Sized) else total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A clock for the length of a block that cannot say how far it is."""
    if not are_shown() or len(_open.bars) >= _open.most:
        yield
        return
    clock, done = _opened(what, None, bar_format="{desc}: {elapsed}"), threading.Event()

    def tick() -> None:
        while not done.wait(DELAY * 1.05 if clock.n == 0 else 0.5):
            clock.update(1)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _close(clock)


def _opened(what: str, total: int | None, **look: Any) -> Any:
    """A new bar; None where none is to be shown."""
    if total in (0, 1) or not are_shown() or len(_open.bars) >= _open.most:
        return None
    if total is not None and any(each.total == total for each in _open.bars):
        return None
    look |= {"delay": DELAY, "leave": False, "disable": False, "dynamic_ncols": True}
    opened = _kind_of_bar()(total=total, desc=what, file=_screen(), **look)
    _open.bars.append(opened)
    return opened


def _close(opened: Any) -> None:
    opened.close()
    if opened in _open.bars:
        _open.bars.remove(opened)


@functools.cache
def _kind_of_bar() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets text, and no advice
        from tqdm.auto import tqdm
    # without the thread that watches all bars: a process that forks must have none
    return type("Bar", (tqdm,), {"is_ours": True, "monitor_interval": 0})


def write(text: str) -> None:
    """A line on standard error that breaks no bar."""
    if _open.bars:
        type(_open.bars[-1]).write(text, file=_screen())
    elif (screen := _screen()) is not None:
        screen.write(f"{text}\n")
        screen.flush()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block no bar of tqdm is shown but those of this file; then all is as it was."""
    from tqdm.std import tqdm

    kind: Any = tqdm
    with _lock:
        own = _silencing[0] if _silencing else vars(kind)["__init__"]
        made = own.__get__(None, kind)
        _silencing.append(own)

        @functools.wraps(made)
        def silent(self: Any, *args: Any, **options: Any) -> None:
            if not getattr(self, "is_ours", False) and len(args) < _DISABLE:
                options["disable"] = True
            made(self, *args, **options)

        kind.__init__ = silent
    try:
        yield
    finally:
        with _lock:
            _silencing.pop()
            if not _silencing:
                kind.__init__ = own


_DISABLE = 11  # the place of `disable` among tqdm's arguments


class Progress(Protocol):
    """Who is told of progress: `start(stage, total)`, `advance(n)`, `note(text)`, `finish()`."""

    def start(self, stage: str, total: int | None) -> None: ...
    def advance(self, n: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def finish(self) -> None: ...


class Bars:
    """A listener (`Progress`) that shows a bar for each stage that it is told of."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage, and end the one before."""
        self.finish()
        self._bar = _opened(stage, total)

    def advance(self, n: int = 1) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(n)

    def note(self, text: str) -> None:
        """Hear of a note; who shows notes is the command line."""

    def finish(self) -> None:
        """End the stage."""
        if self._bar is not None:
            _close(self._bar)
            self._bar = None
