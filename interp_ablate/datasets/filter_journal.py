"""The journal of a filter: values of rules that cost something are on disk as they come, and are not asked for again.

Knows: which values a rule has given. Does not know: rows, outputs, what a value means.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from interp_ablate.datasets.conversations import Sample, Turn
from interp_ablate.datasets.filter_recipe import read_now
from interp_ablate.datasets.filter_rules import Rule, RuleValue, ScoreRule
from interp_ablate.scoring.exchange import UNANSWERED
from interp_ablate.storage.json_shapes import NONE, NUMBER
from interp_ablate.storage.jsonl_log import JsonlLog

LINE = {"rule": str, "readings": [[int, int, (NONE, *NUMBER), str]]}
_STORED = 16  # answers that are scored between two writes to the journal


class StoredValues:
    """Asks rules, and keeps the values of those that are stored in the journal.

    Several threads may ask: while one waits for a server, another is served.
    """

    def __init__(self, journal: JsonlLog, lines: list[dict[str, Any]]) -> None:
        self.journal, self.lock = journal, threading.RLock()
        self.names: dict[int, str] = {}  # of rules
        self.values: dict[tuple[str, int, int], RuleValue] = {}
        for line in lines:
            for at, turn, value, why in line["readings"]:
                self.values[line["rule"], at, turn] = RuleValue(value, why)

    def __call__(self, rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
        read = self._kept if rule.stored else read_now
        if isinstance(rule, ScoreRule) and rule.server is not None:
            return read(rule, asked)
        with self.lock:  # a model, or a function of the user's, takes one at a time
            return read(rule, asked)

    def _kept(self, rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
        if id(rule) not in self.names:
            identity = json.dumps(rule.identity, sort_keys=True).encode()
            self.names[id(rule)] = hashlib.sha256(identity).hexdigest()[:16]
        digest = self.names[id(rule)]
        keys = [(digest, sample.number, turn.index) for sample, turn in asked]
        waiting = [k for k, key in enumerate(keys) if key not in self.values]
        part: dict[tuple[str, int, int], RuleValue] = {}
        try:
            for i, value in self._values(rule, [asked[k] for k in waiting]):
                part[keys[waiting[i]]] = value
                if len(part) == _STORED:
                    self._keep(digest, part)
        finally:
            self._keep(digest, part)
        return [self.values[key] for key in keys]

    def _keep(self, digest: str, part: dict[tuple[str, int, int], RuleValue]) -> None:
        """Write down values that came, and forget that they are new."""
        rows = [[*key[1:], r.value, r.why] for key, r in part.items() if r.why != UNANSWERED]
        with self.lock:
            self.values.update(part)
            part.clear()
            if rows:
                self.journal.append({"rule": digest, "readings": rows})

    def _values(
        self, rule: Rule, asked: Sequence[tuple[Sample, Turn]]
    ) -> Iterator[tuple[int, RuleValue]]:
        """The rule's values as they are ready: a judge's as they come, others some at a time."""
        if isinstance(rule, ScoreRule):
            yield from rule.read_each([turn for _, turn in asked])
            return
        for start in range(0, len(asked), _STORED):
            yield from enumerate(read_now(rule, asked[start : start + _STORED]), start)
