"""How far a filter is: written now and then beside its unfinished files, so that a killed run goes on from there.

Knows: everything that a run knows of the rows behind it, as JSON. Does not know: what a row means, or its files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp_ablate import __version__
from interp_ablate.datasets.filter_outputs import MALFORMED, WHY, part_of
from interp_ablate.datasets.filter_recipe import Decision, RuleHit, SampledDecisions
from interp_ablate.datasets.filter_rules import RuleValue
from interp_ablate.errors import InterpAblateError
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.json_rows import FileRow, MalformedRow, RawLine
from interp_ablate.storage.strict_json import as_read_back, json_text

NAME = ".progress.json"
EVERY = 5.0  # seconds between two notes
_COUNTERS = ("counts", "why", "phrases", "labelled")


@dataclass(frozen=True)
class Place:
    """A place in a file of JSON lines, up to which all is done."""

    number: int = 0
    """Lines before it."""
    at: int = 0
    """Bytes before it."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of every output that belong to those lines."""


class Progress:
    """The note of a folder's unfinished run (of `filter_file`), which is `run` below."""

    def __init__(self, out: Path) -> None:
        self.path, self.out = out / NAME, out
        self._next = time.monotonic() + EVERY

    def is_due(self) -> bool:
        """Whether the last note is old."""
        return time.monotonic() >= self._next

    def save(
        self, run: Any, sizes: Mapping[str, int], item: RawLine | FileRow | MalformedRow
    ) -> None:
        """Note that all is done up to and with a line.

        Raises:
            RunError: the disk is full.
        """
        assert isinstance(item, RawLine)
        parser = run.decider.parser
        state = {
            "about": _about(run),
            "place": [item.number, item.end, dict(sizes)],
            "layout": [parser.layout, parser.first],
            **{name: dict(getattr(run, name)) for name in _COUNTERS},
            "shown": {part: _drawn_as_json(drawn) for part, drawn in run.shown.items()},
        }
        write_atomic(self.path, json_text(state))
        self._next = time.monotonic() + EVERY

    def load(self, run: Any) -> Place:
        """Go on from the note of the same work, if there is one; otherwise from the beginning."""
        try:
            state = incoming_object(self.path)
            if state["about"] != _about(run):
                return self._from_the_start(run)
            number, at, sizes = state["place"]
            for name in (*run.names.values(), WHY, MALFORMED):
                if part_of(self.out, name).stat().st_size < sizes[name]:
                    return self._from_the_start(run)
            layout, first = state["layout"]
            counters = {name: Counter(state[name]) for name in _COUNTERS}
            parser = run.decider.parser
            parser.layout, parser.first = layout, first
            shown = {
                part: _drawn_of_json(run, drawn, state["shown"][part])
                for part, drawn in run.shown.items()
            }
        except (OSError, ValueError, KeyError, TypeError, InterpAblateError):
            return self._from_the_start(run)
        for name, counter in counters.items():
            setattr(run, name, counter)
        run.shown = shown
        return Place(number, at, sizes)

    def _from_the_start(self, run: Any) -> Place:
        run.decider.parser.layout, run.decider.parser.first = run.settings.layout, 0
        self.remove()
        return Place()

    def remove(self) -> None:
        """Forget the note."""
        self.path.unlink(missing_ok=True)


def _about(run: Any) -> dict[str, Any]:
    """What a note is of; as it is read back."""
    return as_read_back({**run.about(), "version": __version__})  # type: ignore[no-any-return]


def _drawn_as_json(drawn: SampledDecisions) -> dict[str, Any]:
    items = [
        [sample.number, (sample.line or b"").decode(), decision.outcome, decision.matched,
         [[hit.turn, hit.rule, *hit.value] for hit in decision.hits]]
        for sample, decision in drawn.items
    ]  # fmt: skip
    version, state, _ = drawn.random.getstate()
    return {"seen": drawn.seen, "random": [version, list(state)], "items": items}


def _drawn_of_json(run: Any, like: SampledDecisions, state: Mapping[str, Any]) -> SampledDecisions:
    drawn = SampledDecisions(like.size, run.settings.seed)
    version, numbers = state["random"]
    drawn.random.setstate((version, tuple(numbers), None))
    drawn.seen = state["seen"]
    for number, line, outcome, matched, hits in state["items"]:
        found = tuple(
            RuleHit(
                turn, rule, RuleValue(value, why, tuple((kind, text) for kind, text in phrases))
            )
            for turn, rule, value, why, phrases in hits
        )
        sample = run.decider.sample(RawLine(number, line.encode()))
        drawn.items.append((sample, Decision(outcome, matched, found, None)))
    return drawn
