"""What becomes of the rows of a batch, in this process or in others, in the order of the file.

Knows: rows that are looked at quickly, and the decision on each that is not. Does not know: outputs, counts.
"""

from __future__ import annotations

import gc
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from interp_ablate.datasets.chat_reader import SampleParser
from interp_ablate.datasets.conversations import Sample
from interp_ablate.datasets.filter_quick import QuickLook, asked_without, prefilter_of
from interp_ablate.datasets.filter_recipe import Ask, Decision, FilterRecipe, decide, read_now
from interp_ablate.datasets.filter_rules import ScoreRule
from interp_ablate.errors import InterpAblateError, PromptError, RunError
from interp_ablate.jobs.bars import hide_in_thread
from interp_ablate.scoring.exchange import Server
from interp_ablate.storage.json_rows import FileRow, MalformedRow, RawLine, RowFileError
from interp_ablate.storage.row_files import RowFile, as_json

Item = RawLine | FileRow | MalformedRow
QUICK_ROWS, QUICK_BYTES = 8192, 8 << 20  # of a batch that is looked at quickly
SLOW_ROWS = 256  # of one whose rows are decided one by one
AHEAD = 8  # batches of which a server is asked at a time
_FIRST_ROWS = 16  # of the first batch, which shows the layout


class RowVerdict(NamedTuple):
    """The decision on one row, as it goes from one process to another."""

    decision: Decision
    """Without the sample."""
    changed: tuple[dict[str, Any], bytes | None] | None
    """The row without some rounds, and its bytes."""
    label: Any
    """The field that says whether it ought to match, where there is one."""


Verdict = RowVerdict | MalformedRow | None
"""None for a row that matches nothing and has no label: its decision is that of every such row."""


@dataclass
class BatchDecider:
    """Decides what becomes of the rows of a batch.

    Args:
        layout, first: see `SampleParser`.
        skip: malformed rows are verdicts; otherwise the first one is an error.
        quick: rows may be looked at quickly.
    """

    source: RowFile
    recipe: FilterRecipe
    layout: str | None
    first: int = 0
    skip: bool = False
    labels: str | None = None
    quick: bool = True

    def __post_init__(self) -> None:
        self.parser = SampleParser(self.layout, self.first)
        self.prefilter = prefilter_of(self.recipe) if self.quick and self.labels is None else None
        self._look: QuickLook | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_look": None}

    def __call__(self, items: Sequence[Item], ask: Ask = read_now) -> list[Verdict]:
        """A verdict an item.

        Raises:
            RowFileError: the first malformed row, unless such rows are skipped.
        """
        with _no_collection():
            return self.decided(items, ask)

    def decided(self, items: Sequence[Item], ask: Ask) -> list[Verdict]:
        """The same, for a block of any length."""
        verdicts: list[Verdict] = [None] * len(items)
        rows: list[tuple[int, FileRow]] = []
        for place, item in enumerate(items):
            try:
                row = item.read() if isinstance(item, RawLine) else item
            except ValueError as error:
                row = MalformedRow(item.number, str(error), item.line or b"")
            if isinstance(row, MalformedRow):
                verdicts[place] = row
                if not self.skip:
                    break
            else:
                rows.append((place, row))
        loud: list[tuple[int, Sample]] = []
        quiet, silent = self._quiet([row for _, row in rows])
        for (place, row), nothing in zip(rows, quiet):
            if nothing:
                continue
            try:
                loud.append((place, self.parser(row)))
            except PromptError as error:
                line = as_json(row.values) if row.line is None else row.line
                verdicts[place] = MalformedRow(row.number, str(error), line)
        fault = next((each for each in verdicts if isinstance(each, MalformedRow)), None)
        if fault is not None and not self.skip:
            raise RowFileError(f"{self.source.place(fault.number)}: {fault.why}")
        ask = asked_without(silent, ask) if silent else ask
        decided = decide([sample for _, sample in loud], self.recipe, ask)
        for (place, sample), decision in zip(loud, decided):
            verdicts[place] = self._verdict(sample, decision)
        return verdicts

    def _quiet(self, rows: list[FileRow]) -> tuple[list[bool], set[str]]:
        if self.prefilter is None or self.parser.layout is None:
            return [False] * len(rows), set()
        if self._look is None:
            self._look = QuickLook(self.prefilter, self.parser.layout)
        return self._look.quiet(rows)

    def _verdict(self, sample: Sample, decision: Decision) -> RowVerdict:
        changed = None
        if decision.outcome == "cut" and decision.sample is not None:
            changed = (dict(decision.sample.raw), decision.sample.line)
        label = sample.raw.get(self.labels) if self.labels is not None else None
        return RowVerdict(decision._replace(sample=None), changed, label)

    def find_layout(self, items: Sequence[Item]) -> None:
        """Take the layout of the first row that has one, unless it is known."""
        for item in items:
            if self.parser.layout is not None:
                return
            with suppress(ValueError, InterpAblateError):
                self.sample(item)

    def sample(self, item: Item) -> Sample:
        """The sample of an item that has a verdict."""
        row = item.read() if isinstance(item, RawLine) else item
        if isinstance(row, MalformedRow):
            raise RowFileError(f"{self.source.place(row.number)}: {row.why}")
        return self.parser(row)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for circles among objects: a batch has none, and many objects (a sixth of the time)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def in_batches(items: Iterable[Item], rows: int, size: int, first: int) -> Iterator[list[Item]]:
    """The items, so many or so many bytes at a time; the first batch is a small one."""
    batch: list[Item] = []
    filled, limit = 0, first
    for item in items:
        batch.append(item)
        filled += len(item.line or b"")
        if len(batch) >= limit or filled >= size:
            yield batch
            batch, filled, limit = [], 0, rows
    if batch:
        yield batch


def verdicts_of_batches(
    decider: BatchDecider, items: Iterable[Item], ask: Ask, workers: int = 1
) -> Generator[tuple[list[Item], list[Verdict]], None, None]:
    """The batches of a file, in order, each with its verdicts.

    Where a rule asks a server, AHEAD batches wait for their answers at a time. Close it to end what is under way.

    Args:
        workers: processes that decide; a window of batches is under way in them.

    Raises:
        RowFileError: see `BatchDecider`.
        RunError: a process that ended.
    """
    quick = decider.prefilter is not None or workers > 1
    sizes = (QUICK_ROWS, QUICK_BYTES, _FIRST_ROWS) if quick else (SLOW_ROWS, QUICK_BYTES, SLOW_ROWS)
    batches = in_batches(items, *sizes)
    rules = (rule for rule in decider.recipe.rules if isinstance(rule, ScoreRule))
    if servers := [rule.server for rule in rules if rule.server is not None]:
        yield from _in_window(_Threads(decider, ask, servers), batches, AHEAD)
        return
    for batch in batches:  # until the layout is known
        yield batch, decider(batch, ask)
        if workers > 1 and decider.parser.layout is not None:
            break
    if workers > 1:
        yield from _in_window(_Workers(decider, workers), batches, workers + 1)


def _in_window(
    place: _Workers | _Threads, batches: Iterable[list[Item]], ahead: int
) -> Iterator[tuple[list[Item], list[Verdict]]]:
    with place as pool:
        under_way: deque[tuple[list[Item], Future[list[Verdict]]]] = deque()
        for batch in batches:
            under_way.append((batch, pool.submit(batch)))
            if len(under_way) > ahead:
                done, verdicts = under_way.popleft()
                yield done, verdicts.result()
        while under_way:
            done, verdicts = under_way.popleft()
            yield done, verdicts.result()


# ---- threads that wait for servers -----------------------------------------------------------------


class _Threads:
    """Threads that decide batches; one asks a server while others wait for it. None waits when it is left."""

    def __init__(self, decider: BatchDecider, ask: Ask, servers: list[Server]) -> None:
        self.decider, self.ask, self.servers = decider, ask, servers
        self.pool = ThreadPoolExecutor(AHEAD, "filter", initializer=hide_in_thread)
        self.latest: deque[Future[list[Verdict]]] = deque(maxlen=AHEAD + 1)

    def __enter__(self) -> _Threads:
        return self

    def submit(self, batch: list[Item]) -> Future[list[Verdict]]:
        self.decider.find_layout(batch)  # before threads could find several
        self.latest.append(self.pool.submit(self.decider.decided, batch, self.ask))
        return self.latest[-1]

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        while any(not each.done() for each in self.latest):
            for server in self.servers:
                server.stop()
            wait(self.latest, timeout=0.1)


# ---- other processes -------------------------------------------------------------------------------


class _Workers:
    """Processes that decide batches, one at a time each. They end when this one does, however it ends."""

    def __init__(self, decider: BatchDecider, number: int) -> None:
        self.about = pickle.dumps(decider)
        self.threads = ThreadPoolExecutor(number, thread_name_prefix="filter")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.number = number

    def __enter__(self) -> _Workers:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from interp_ablate.datasets.filter_batches import serve; serve()"
        )
        for _ in range(self.number):
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.processes.append(process)
            self.idle.put(process)
        return self

    def submit(self, batch: list[Item]) -> Future[list[Verdict]]:
        return self.threads.submit(self._decide, batch)

    def _decide(self, batch: list[Item]) -> list[Verdict]:
        process = self.idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            if not hasattr(process, "told"):
                process.stdin.write(self.about)
                process.told = True  # type: ignore[attr-defined]
            pickle.dump(batch, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(
                f"a process of --workers ended ({type(error).__name__}): run again, with fewer of them where "
                "memory is short"
            ) from error
        finally:
            self.idle.put(process)
        if isinstance(found, InterpAblateError):
            raise found
        return found

    def __exit__(self, *error: Any) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            if error[0] is not None:
                process.kill()
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        self.threads.shutdown(wait=True)
        for process in self.processes:
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def serve() -> None:
    """Decide the batches that come on standard input, until it ends. Run by `_Workers`."""
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its owner ends it
    out = open(os.dup(1), "wb")  # noqa: SIM115 (as long as the process)
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    decider = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found: Any = decider(batch)
        except InterpAblateError as error:
            found = type(error)(*error.args)
        try:
            pickle.dump(found, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()
        except BrokenPipeError:
            return
