"""The journal of a league: one line a finished piece of work, on disk before the next begins.

Knows: what is finished, what was begun and never ended. Does not know: what a piece of work is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.search.trials import KILLS, together
from interp_ablate.storage.json_shapes import NONE, NUMBER, OBJECT, misfit, optional
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.strict_json import as_read_back

FORMAT = "interp_ablate.league/1"
Key = tuple[str, ...]
_RECORD = {"key": [str], "values": OBJECT, "seconds": NUMBER, "failed": str}
_LINE = ({"begun": [[str]]}, {"released": [[str]]}, _RECORD)
_EACH: Any = [(NONE, *NUMBER)]  # a number a prompt
# The values of what did not fail, by the first word of its key.
_VALUES: dict[str, Any] = {
    "unedited": {"removal": _EACH, "induction": _EACH, "prompts": {"removal": [str], "induction": [str]}},
    "fit": {
        "site": str, "position": str, "scores": [NUMBER], "pairs": [str], "about": OBJECT,
        "plans": optional({"*": [{"strength": NUMBER, "share": NUMBER}]}),
    },
    "plan": {"rate": _EACH, "kl": [NUMBER], "kl_answers": _EACH, "repetition": _EACH},
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One finished piece of work, by its key; `failed` says why it came to nothing."""

    key: Key
    values: dict[str, Any]
    seconds: float
    failed: str = ""
    final: bool = True
    """False of what another process may bring to an end, such as one with more memory: it is not written down."""


class LeagueJournal:
    """Finished records on disk; work that was killed KILLS times is given up, since it may be the cause.

    Pieces that were killed together are done one at a time after that, so that only the one at fault is given up.

    Raises:
        RunError: a journal of other rules or another model, a corrupt line, one in use by another process.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._lines = JsonlLog(
            path,
            identity,
            kind="journal of a league",
            format=FORMAT,
            lost="its work is done again",
            shape=_LINE,
        )
        self.done: dict[Key, Record] = {}
        self._kills: Counter[Key] = Counter()

    @contextmanager
    def open(self) -> Iterator[LeagueJournal]:
        """Read what is there; the other methods work inside the block, in one process at a time."""
        with self._lines.open() as lines:
            self.done, self._kills = {}, Counter()
            for number, line in enumerate(lines, 2):
                shape = (
                    _VALUES.get("".join(line.get("key", ())[:1]))
                    if not line.get("failed")
                    else None
                )
                if shape is not None and (place := misfit(line["values"], shape)) is not None:
                    raise self._lines.corrupt(
                        number, f"its {place} is not there, or of another kind"
                    )
                self._take(line)
            yield self

    def _take(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self._kills.update(map(tuple, line["begun"]))
        elif "released" in line:
            self._kills.subtract(map(tuple, line["released"]))
        else:
            record = Record(
                tuple(line["key"]), line["values"], float(line["seconds"]), line["failed"]
            )
            self.done[record.key] = record

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._take(as_read_back(line))

    def together(self, keys: Sequence[Key], most: int) -> Sequence[Key]:
        """The first keys that may be done in one piece."""
        return together(keys, most, self._kills)

    def work(self, keys: Sequence[Key], do: Callable[[], Sequence[Record]]) -> None:
        """Do work whose keys are not done yet, and write down what came of it.

        An interruption is written down too, and is no sign that the work kills its process; nor is memory that ran
        out, whose record counts in this process alone.
        """
        if len(keys) == 1 and self._kills[keys[0]] >= KILLS:
            self.finish(Record(keys[0], {}, 0.0, f"its process was killed {KILLS} times"))
            return
        self._append({"begun": [list(key) for key in keys]})
        left = set(keys)
        try:
            for record in do():
                if record.final:
                    self.finish(record)
                    left.discard(record.key)
                else:
                    self.done[record.key] = record
        finally:
            if left:
                self._append({"released": [list(key) for key in keys if key in left]})

    def finish(self, record: Record) -> None:
        """Write down a finished record; it is on disk when this returns."""
        self._append(
            {
                "key": list(record.key),
                "values": record.values,
                "seconds": round(record.seconds, 3),
                "failed": record.failed,
            }
        )
