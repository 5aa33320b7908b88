"""Filtering: chat samples dropped or kept by rules, as a stream, with counts, reasons and a manifest.

Knows: resuming, and the files of a result. Does not know: what a rule looks for, formats and layouts.

The idea of training on what is left when an instruction set's declines and sermons are gone is that of the
Dolphin data sets (Hartford 2023, https://erichartford.com/uncensored-models); phrases and code are our own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interp_ablate import __version__
from interp_ablate.datasets.chat_reader import check_layout
from interp_ablate.datasets.filter_batches import BatchDecider, Item, Verdict, verdicts_of_batches
from interp_ablate.datasets.filter_journal import LINE, StoredValues
from interp_ablate.datasets.filter_outputs import (
    MALFORMED,
    WHY,
    Outputs,
    PartialOutputs,
    atomic_outputs,
)
from interp_ablate.datasets.filter_progress import Place, Progress
from interp_ablate.datasets.filter_recipe import (
    Decision,
    FilterRecipe,
    SampledDecisions,
    quiet_decision,
    reason_kinds,
    samples_page,
)
from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import bar
from interp_ablate.settings import setting
from interp_ablate.stats.intervals import rate
from interp_ablate.storage.atomic_files import write_atomic
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.json_rows import FileRow, MalformedRow, RawLine, RowFileError
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.storage.row_files import RowFile
from interp_ablate.storage.strict_json import json_text

logger = logging.getLogger(__name__)


FORMAT = "interp_ablate.filter/1"
JOURNAL = "verdicts.jsonl"
QUICK_FROM = 1 << 22  # bytes of a file from which on a quick look is worth its preparation
_TOGETHER = 256  # rows of which why.jsonl speaks together, behind the malformed ones among them
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
    workers: int = setting(1, "processes that look for phrases and count words")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise RunError(f"--workers {self.workers}: a number from 1")
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
        shape=LINE,
        replace=settings.force,
    )
    with journal.open() as lines:
        run.work(StoredValues(journal, lines))
        return run.finish()


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
    pending: list[bytes] = field(default_factory=list)  # lines of why.jsonl that wait for others

    def __post_init__(self) -> None:
        self.names = {part: f"{part}{self.source.suffix}" for part in ("kept", "dropped")}
        check_layout(self.settings.layout)
        self.quiet = quiet_decision(self.recipe)
        self.progress = Progress(self.out)
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
        del settings["force"], settings["workers"]
        return {
            "format": FORMAT,
            "data": {"name": self.source.path.name, "sha256": self.fingerprint},
            "recipe": self.recipe.as_dict(),
            "settings": settings,
        }

    def check(self) -> None:
        """Refuse an output folder that holds something else than a result of the same work."""
        stored = [rule.name for rule in self.recipe.rules if rule.stored]
        if self.settings.workers > 1 and stored:
            raise RunError(
                f"--workers {self.settings.workers}: {stored[0]} is asked in one process, many answers at a time; "
                "leave --workers out (a judge has --concurrency)"
            )
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

    def work(self, ask: StoredValues) -> None:
        """Read, decide and write; from where an earlier run was, if that is known."""
        try:
            self._work(ask)
        except Exception:
            self.progress.remove()
            raise

    def _work(self, ask: StoredValues) -> None:
        decider = BatchDecider(
            self.source,
            self.recipe,
            self.settings.layout,
            skip=self.settings.skip_malformed,
            labels=self.settings.labels,
            quick=self._is_large(),
        )
        self.decider = decider
        names = list(self.names.values())
        resumable = self.source.format == "jsonl" and not self.source.compression
        place = self.progress.load(self) if resumable else Place()
        parts = PartialOutputs(self.out, names, place.sizes)
        with ExitStack() as stack:
            files: Outputs = stack.enter_context(
                parts if resumable else atomic_outputs(self.out, self.source, names)
            )
            advance = stack.enter_context(bar("rows", None))
            items = self.source.unread(place.number, place.at)
            decided = verdicts_of_batches(decider, items, ask, self.settings.workers)
            for batch, verdicts in stack.enter_context(closing(decided)):
                for last in self._committed(batch, verdicts, files):
                    if resumable and not self.pending and self.progress.is_due():
                        self.progress.save(self, parts.secure(), last)
                advance(len(batch))
            self._told(files)
            self._check_end()
            # from here on the files are new ones: the old manifest is of none, and the folder is a filter's
            ask.journal.begin()
            self.replaced = list(self._manifest().get("files", {}))
            (self.out / "manifest.json").unlink(missing_ok=True)

    def _is_large(self) -> bool:
        return sum(size for _, size, _ in self.stat) >= QUICK_FROM

    def _committed(
        self, batch: list[Item], verdicts: list[Verdict], files: Outputs
    ) -> Iterator[Item]:
        """Count and write rows, those that match nothing many at a time; the last one of each time."""
        start = 0
        while start < len(batch):
            stop, most = start, start + _TOGETHER - len(self.pending)
            while stop < len(batch) and verdicts[stop] is None and stop < most:
                stop += 1
            if stop > start:
                quiet: list[Any] = batch[start:stop]
                self._count(quiet, self.quiet)
                rows = ((i.values if isinstance(i, FileRow) else {}, i.line) for i in quiet)
                files.rows(self.names[_part_of(self.quiet)], rows)
                self._say([b""] * len(quiet), files)
            else:
                self._commit(batch[start], verdicts[start], files)
                stop = start + 1
            yield batch[stop - 1]
            start = stop

    def _commit(self, item: Item, verdict: Verdict, files: Outputs) -> None:
        """Count a row and write it; what is said of it waits for the next 256 that can be used."""
        if isinstance(verdict, MalformedRow):
            line = verdict.line if verdict.line.endswith(b"\n") else verdict.line + b"\n"
            files.line(MALFORMED, line)
            files.line(WHY, _note(verdict.number, outcome="malformed", why=verdict.why))
            logger.info("left out %s: %s", self.source.place(verdict.number), verdict.why)
            self.counts["malformed"] += 1
            return
        assert not isinstance(item, MalformedRow) and verdict is not None
        decision = verdict.decision
        self._count([item], decision)
        if self.settings.labels is not None:
            self._count_label(item, bool(decision.matched), verdict.label)
        said = b""
        if decision.matched is not False:
            hits = [hit.as_dict for hit in decision.hits]
            said = _note(item.number, outcome=decision.outcome, because=hits)
        values = item.values if isinstance(item, FileRow) else {}
        row = (values, item.line) if verdict.changed is None else verdict.changed
        files.rows(self.names[_part_of(decision)], [row])
        self._say([said], files)

    def _say(self, said: list[bytes], files: Outputs) -> None:
        self.pending += said
        if len(self.pending) == _TOGETHER:
            self._told(files)

    def _told(self, files: Outputs) -> None:
        files.line(WHY, b"".join(self.pending))
        self.pending.clear()

    def _check_end(self) -> None:
        if not self.counts["rows"]:
            usable = (
                " that can be used" if self.settings.skip_malformed else ": at least one is needed"
            )
            raise RowFileError(f"{self.source.path} holds no row{usable}")
        if self._stat() != self.stat:
            raise RunError(f"{self.source.path} changed while it was read: run again")

    def _count(self, items: Sequence[RawLine | FileRow], decision: Decision) -> None:
        """Count rows with one decision."""
        self.layout = self.decider.parser.layout or ""
        self.counts["rows"] += len(items)
        self.counts[decision.outcome] += len(items)
        part = "no verdict" if decision.matched is None else decision.outcome
        self.shown[part].add(items, self.decider.sample, decision)
        if decision.matched is not False:
            self.counts["matched" if decision.matched else "no_verdict"] += len(items)
        if decision.hits:
            kinds = list(reason_kinds(decision))
            self.why.update({kind for kind, _ in kinds})
            self.phrases.update({f"{kind}: {text}" for kind, text in kinds if text})
            if len(self.phrases) > _PHRASES:  # rare ones are forgotten
                self.phrases = Counter(dict(self.phrases.most_common(_PHRASES // 10)))

    def _count_label(self, item: RawLine | FileRow, matched: bool, label: Any) -> None:
        if label not in (True, False):
            raise RowFileError(
                f"{self.source.place(item.number)}: {self.settings.labels!r} is {label!r}, not true "
                "or false"
            )
        self.labelled[f"{'matched' if matched else 'not'} {bool(label)}"] += 1

    def finish(self) -> dict[str, Any]:
        """The page and, last, the manifest."""
        self.progress.remove()
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


def _part_of(decision: Decision) -> str:
    """The file that a row goes to."""
    return "dropped" if decision.outcome == "dropped" else "kept"


def _note(number: int, **values: Any) -> bytes:
    """A line of JSON about a row."""
    text = json_text({"number": number, **values}, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # half a character as JSON's escape of it
