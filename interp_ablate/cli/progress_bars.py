"""Command line, progress: bars on a terminal, a line a stage everywhere.

Knows: standard error. Does not know: what is done meanwhile, or how a bar is drawn.
"""

from __future__ import annotations

import logging
import time

from interp_ablate.jobs import bars


class ProgressBars(bars.Bars):
    """Bars, and a line on standard error for each stage that is done and for each note."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.quiet = quiet
        self.name, self.began = "", 0.0

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage, and end the one before."""
        super().start(stage, total)
        self.name, self.began = stage, time.perf_counter()

    def note(self, text: str) -> None:
        """Print a note."""
        if not self.quiet:
            bars.write(f"note: {text}")

    def finish(self) -> None:
        """End the stage, and print how long it took."""
        super().finish()
        if self.name and not self.quiet:
            bars.write(f"{self.name:<24} {time.perf_counter() - self.began:6.1f} s")
        self.name = ""


class LogLines(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler of log records whose lines break no bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            bars.write(self.format(record))
        except Exception:
            self.handleError(record)
