"""Command line, progress: bars on a terminal, a line a stage elsewhere.

Knows: rich, standard error. Does not know: what is done meanwhile.
"""

from __future__ import annotations

import time
from typing import Any


class ProgressBars:
    """Progress bars on standard error; plain lines where it is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console

        self.quiet, self.console = quiet, Console(stderr=True)
        self.bar: Any = None
        self.name, self.began = "", 0.0

    def start(self, stage: str, total: int | None) -> None:
        self.finish()
        self.name, self.began = stage, time.perf_counter()
        if self.quiet or not self.console.is_terminal:
            return
        from rich import progress

        self.bar = progress.Progress(
            "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task(f"{stage:<24}", total=total)

    def advance(self, n: int = 1) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, n)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.name and not self.quiet:
            seconds = time.perf_counter() - self.began
            self.console.print(f"{self.name:<24} {seconds:6.1f} s", markup=False, highlight=False)
        self.name = ""
