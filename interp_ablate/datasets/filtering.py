"""Filtering: chat samples dropped or kept by rules, as a stream, with counts, reasons and a manifest.

Knows: resuming, and the files of a result. Does not know: what a rule looks for, formats and layouts.

The idea of training on what is left when an instruction set's declines and sermons are gone is that of the
Dolphin data sets (Hartford 2023, https://erichartford.com/uncensored-models); phrases and code are our own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from interp_ablate import __version__
from interp_ablate.datasets.chat_reader import read_samples, writing_samples
from interp_ablate.datasets.conversations import Sample, Turn
from interp_ablate.datasets.filter_recipe import (
    Decision,
    FilterRecipe,
    RuleHit,
    SampledDecisions,
    decide,
    read_now,
    reason_kinds,
    samples_page,
)
from interp_ablate.datasets.filter_rules import Rule, RuleValue, ScoreRule
from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import bar
from interp_ablate.scoring.exchange import UNANSWERED
from interp_ablate.settings import setting
from interp_ablate.stats.intervals import rate
from interp_ablate.storage.atomic_files import atomic_path, write_atomic
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.json_rows import MalformedRow, RowFileError
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.row_files import RowFile
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)


FORMAT = "interp_ablate.filter/1"
JOURNAL = "verdicts.jsonl"
_CHUNK = 256  # samples in memory at a time
_STORED = 16  # answers that are scored between two writes to the journal
_PHRASES = 100_000  # different ones that are counted at a time


# ---- a file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterSettings:
    """How a file is filtered, beside the recipe.

    Raises:
        RunError: a negative number of samples.
    """

    layout: str | None = setting(None, "of DATA, where its keys fit several")
    skip_malformed: bool = setting(
        False, "rows that cannot be used go to malformed.jsonl; default: the first one is an error"
    )
    shown: int = setting(20, "of each outcome on samples.html", flag="samples")
    seed: int = setting(0, "of the samples' choice")
    labels: str | None = setting(
        None,
        "true or false in every row, whether it ought to match: precision and recall",
        metavar="FIELD",
    )
    force: bool = setting(False, "replace another filter's result")

    def __post_init__(self) -> None:
        if self.shown < 0:
            raise RunError(f"--samples {self.shown}: a number from 0")


DEFAULTS = FilterSettings()


def filter_file(
    data: str | Path,
    out: str | Path,
    recipe: FilterRecipe | None = None,
    *,
    settings: FilterSettings = DEFAULTS,
) -> dict[str, Any]:
    """Filter a file (see `read_samples`) into the folder `out`; returns the manifest.

    kept and dropped hold the rows in their order, layout and format, unchanged ones of JSONL byte for byte;
    why.jsonl has the reasons of every row that matched, has no verdict or is malformed; samples.html shows
    some of each; manifest.json, written last, has hashes, rules and counts. The same input and recipe give
    the same bytes. Values of rules that cost something are on disk as they come (verdicts.jsonl): an
    interrupted run, or one with other limits, does not ask for them again.

    Args:
        recipe: by default the Dolphin approach: drop what `DeclineRule` finds in any answer.

    Raises:
        RowFileError: data that cannot be read, by its line.
        RunError: a folder in use, that holds another result or cannot be written; input that changed.
    """
    recipe, out, source = recipe or FilterRecipe(), Path(out), RowFile.at(data)
    run = _Run(source, out, recipe, settings)
    run.check()
    journal = JsonlLog(
        out / JOURNAL,
        {"data": run.fingerprint, "layout": settings.layout},
        kind="journal of verdicts",
        format=FORMAT,
        lost="its answers are scored again",
        replace=settings.force,
    )
    with journal.open() as lines:
        run.work(_Stored(journal, lines))
        return run.finish()


class _Stored:
    """Asks rules, and keeps the values of those that are stored in the journal."""

    def __init__(self, journal: JsonlLog, lines: list[dict[str, Any]]) -> None:
        self.journal = journal
        self.names: dict[int, str] = {}  # of rules
        self.values: dict[tuple[str, int, int], RuleValue] = {}
        for number, line in enumerate(lines, 2):
            try:
                for at, turn, value, why in line["readings"]:
                    self.values[line["rule"], at, turn] = RuleValue(value, why)
            except (KeyError, TypeError, ValueError) as error:
                raise journal.corrupt(number, f"{type(error).__name__} {error}") from error

    def __call__(self, rule: Rule, asked: Sequence[tuple[Sample, Turn]]) -> list[RuleValue]:
        if not rule.stored:
            return read_now(rule, asked)
        if id(rule) not in self.names:
            identity = json.dumps(rule.identity, sort_keys=True).encode()
            self.names[id(rule)] = hashlib.sha256(identity).hexdigest()[:16]
        digest = self.names[id(rule)]
        keys = [(digest, sample.number, turn.index) for sample, turn in asked]
        waiting = [k for k, key in enumerate(keys) if key not in self.values]
        values = self._values(rule, [asked[k] for k in waiting])
        while part := {waiting[i]: value for i, value in islice(values, _STORED)}:
            rows = [[*keys[k][1:], r.value, r.why] for k, r in part.items() if r.why != UNANSWERED]
            self.journal.append({"rule": digest, "readings": rows})
            self.values.update({keys[k]: value for k, value in part.items()})
        return [self.values[key] for key in keys]

    def _values(
        self, rule: Rule, asked: Sequence[tuple[Sample, Turn]]
    ) -> Iterator[tuple[int, RuleValue]]:
        """The rule's values as they are ready: a judge's as they come, others some at a time."""
        if isinstance(rule, ScoreRule):
            yield from rule.read_each([turn for _, turn in asked])
            return
        for start in range(0, len(asked), _STORED):
            yield from enumerate(read_now(rule, asked[start : start + _STORED]), start)


@dataclass
class _Run:
    """One run over one file: its writers and counts."""

    source: RowFile
    out: Path
    recipe: FilterRecipe
    settings: FilterSettings
    counts: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    phrases: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    layout: str = ""
    replaced: list[str] = field(default_factory=list)  # files of the result that was there

    def __post_init__(self) -> None:
        self.names = {part: f"{part}{self.source.suffix}" for part in ("kept", "dropped")}
        self.stat = self._stat()
        self.fingerprint = self.source.fingerprint()
        self.shown = {
            part: SampledDecisions(self.settings.shown, self.settings.seed) for part in _PARTS
        }

    def _stat(self) -> list[tuple[str, int, int]]:
        folder = self.source.format == "folder"
        paths = sorted(self.source.path.rglob("*")) if folder else [self.source.path]
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]

    def about(self) -> dict[str, Any]:
        """Everything that makes the result: data, recipe and settings."""
        settings = asdict(self.settings)
        del settings["force"]
        return {
            "format": FORMAT,
            "data": {"name": self.source.path.name, "sha256": self.fingerprint},
            "recipe": self.recipe.as_dict(),
            "settings": settings,
        }

    def check(self) -> None:
        """Refuse an output folder that holds something else than a result of the same work."""
        places = {(self.out / name).resolve() for name in self.names.values()}
        if self.source.path.resolve() in {*places, self.out.resolve()}:
            raise RunError(f"{self.out} is where {self.source.path} is: choose another --out")
        files = [name for name in self.names.values() if (self.out / name).exists()]
        if files and not (self.out / JOURNAL).exists():
            raise RunError(
                f"{self.out} holds {files[0]}, and is not the folder of a filter: choose another --out, or "
                "move that file away yourself"
            )
        if self.settings.force:
            return
        old = self._manifest()
        if (self.out / "manifest.json").exists() and any(
            old.get(key) != value for key, value in self.about().items()
        ):
            raise RunError(
                f"{self.out} holds the result of another filter: choose another --out, or replace it with "
                "--force"
            )

    def _manifest(self) -> dict[str, Any]:
        """The folder's manifest; empty where there is none, or none of a filter."""
        try:
            manifest = incoming_object(self.out / "manifest.json")
        except (OSError, ValueError):
            return {}
        ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
        return manifest if ours else {}

    def work(self, ask: _Stored) -> None:
        """Read, decide and write."""
        faults: list[MalformedRow] = []
        skip = faults.append if self.settings.skip_malformed else None
        samples = read_samples(self.source.path, layout=self.settings.layout, malformed=skip)
        with ExitStack() as stack:
            write = {
                part: stack.enter_context(writing_samples(self.out / name, self.source.path))
                for part, name in self.names.items()
            }
            why = stack.enter_context(_Bytes(self.out / "why.jsonl"))
            bad = stack.enter_context(_Bytes(self.out / "malformed.jsonl", always=False))
            advance, more = stack.enter_context(bar("rows", None)), True
            while more:
                chunk = list(islice(samples, _CHUNK))
                more = bool(chunk)
                for fault in faults:
                    bad.write(fault.line if fault.line.endswith(b"\n") else fault.line + b"\n")
                    why.note(fault.number, outcome="malformed", why=fault.why)
                    logger.info("left out %s: %s", self.source.place(fault.number), fault.why)
                self.counts["malformed"] += len(faults)
                faults.clear()
                for sample, decision in zip(chunk, decide(chunk, self.recipe, ask)):
                    self._count(sample, decision)
                    if decision.matched is not False:
                        hits = [_as_json(hit) for hit in decision.hits]
                        why.note(sample.number, outcome=decision.outcome, because=hits)
                    if decision.sample is not None:
                        write["kept"](decision.sample)
                    else:
                        write["dropped"](sample)
                advance(len(chunk))
            self._check_end()
            # from here on the files are new ones: the old manifest is of none, and the folder is a filter's
            ask.journal.begin()
            self.replaced = list(self._manifest().get("files", {}))
            (self.out / "manifest.json").unlink(missing_ok=True)

    def _check_end(self) -> None:
        if not self.counts["rows"]:
            raise RowFileError(f"{self.source.path} holds no row that can be used")
        if self._stat() != self.stat:
            raise RunError(f"{self.source.path} changed while it was read: run again")

    def _count(self, sample: Sample, decision: Decision) -> None:
        self.layout = sample.layout
        self.counts["rows"] += 1
        self.counts[decision.outcome] += 1
        self.counts["matched"] += decision.matched is True
        self.counts["no_verdict"] += decision.matched is None
        part = "no verdict" if decision.matched is None else decision.outcome
        self.shown[part].add((sample, decision))
        self.why.update({kind for kind, _ in reason_kinds(decision)})
        self.phrases.update({f"{kind}: {text}" for kind, text in reason_kinds(decision) if text})
        if len(self.phrases) > _PHRASES:  # rare ones are forgotten
            self.phrases = Counter(dict(self.phrases.most_common(_PHRASES // 10)))
        if self.settings.labels is not None:
            label = sample.raw.get(self.settings.labels)
            if label not in (True, False):
                raise RowFileError(
                    f"{self.source.place(sample.number)}: {self.settings.labels!r} is {label!r}, not true "
                    "or false"
                )
            self.labelled[f"{'matched' if decision.matched else 'not'} {bool(label)}"] += 1

    def finish(self) -> dict[str, Any]:
        """The page and, last, the manifest."""
        write_atomic(self.out / "samples.html", samples_page(self.source.path.name, self.shown))
        names = [*self.names.values(), "why.jsonl", "samples.html"]
        if self.counts["malformed"]:
            names.append("malformed.jsonl")
        for name in self.replaced:
            if name not in names and Path(name).name == name:
                (self.out / name).unlink(missing_ok=True)
        counted = ("rows", "kept", "dropped", "cut", "matched", "no_verdict", "malformed")
        manifest: dict[str, Any] = {
            **self.about(),
            "layout": self.layout,
            "versions": {"interp-ablate": __version__},
            "counts": {name: self.counts[name] for name in counted},
            "why": dict(sorted(self.why.items(), key=lambda item: (-item[1], item[0]))),
            "phrases": dict(
                sorted(self.phrases.items(), key=lambda item: (-item[1], item[0]))[:40]
            ),
            "files": {name: RowFile(self.out / name, "jsonl").fingerprint() for name in names},
        }
        if self.settings.labels is not None:
            manifest["agreement"] = self.agreement()
        if self.counts["no_verdict"]:
            logger.warning(
                "%d of %d samples have no verdict (%s)",
                self.counts["no_verdict"], self.counts["rows"], self.recipe.without_verdict(),
            )  # fmt: skip
        write_atomic(
            self.out / "manifest.json", json_text(manifest, indent=1, ensure_ascii=False) + "\n"
        )
        return manifest

    def agreement(self) -> dict[str, Any]:
        """Precision and recall of matching against the labels."""
        right, wrong = self.labelled["matched True"], self.labelled["matched False"]
        return {
            "precision": rate(right, right + wrong),
            "recall": rate(right, right + self.labelled["not True"]),
            "false_positive_rate": rate(wrong, wrong + self.labelled["not False"]),
        }


_PARTS = ("dropped", "cut", "no verdict", "kept")


class _Bytes:
    """A file that is written as the run goes, whole or not at all; `always=False`: only if anything is."""

    def __init__(self, path: Path, *, always: bool = True) -> None:
        self.path, self.always = path, always
        self.stack = ExitStack()
        self.file: Any = None

    def __enter__(self) -> _Bytes:
        if self.always:
            self.write(b"")
        return self

    def write(self, data: bytes) -> None:
        try:
            if self.file is None:
                place = self.stack.enter_context(atomic_path(self.path))
                self.file = self.stack.enter_context(open(place, "wb"))  # noqa: SIM115  (the stack closes)
            self.file.write(data)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}. Free space") from error

    def note(self, number: int, **values: Any) -> None:
        """A line of JSON about a row."""
        self.write(json_text({"number": number, **values}, ensure_ascii=False).encode() + b"\n")

    def __exit__(self, *error: Any) -> None:
        try:
            self.stack.__exit__(*error)
        except OSError as failure:
            raise RunError(f"cannot write {self.path}: {failure.strerror}. Free space") from failure
        if self.file is None and error[0] is None:
            self.path.unlink(missing_ok=True)  # an earlier run's


def _as_json(hit: RuleHit) -> dict[str, Any]:
    value, why, phrases = hit.value
    fields = {"turn": hit.turn, "rule": hit.rule, "value": value}
    return fields | ({"why": why} if why else {}) | ({"found": phrases} if phrases else {})
