"""`score`: answers from 0 to 100 by expressions, a lexicon, a classifier or a judge.

Knows: flags, and what is printed and written. Does not know: how anything is scored.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from interp_ablate.cli.options import (
    REPLACE,
    RUBRIC,
    JudgeSettings,
    check_new,
    judge_settings,
    rubric_of,
    tell,
    tell_spent,
)
from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.prompts.chat_format import ReadPart
from interp_ablate.settings import setting
from interp_ablate.storage.strict_json import json_text

CHUNK = 256  # rows that are scored together, and in memory
GROUPS = ("split", "condition", "label")  # of a run's generations.jsonl


@dataclass(frozen=True)
class Score:
    """Which answers are scored, by what, and where the scores go."""

    file: str = setting(
        help="a run folder or its generations.jsonl; chat data (prompt/response, messages, ShareGPT, Alpaca; "
        ".jsonl, .json, .parquet)",
        positional=True,
        metavar="FILE",
    )
    scorer: tuple[str, ...] = setting(
        help="expressions:NAME_OR_FILE[?languages=all&scope=first_sentence&negation=true&threshold=2], "
        "lexicon:sentiment|formality|length, classifier:FOLDER#LABEL, judge:MODEL@BASE_URL, FILE.py:FUNCTION; a - after the "
        "colon reverses it; may be given again",
        repeat=True,
        metavar="SPEC",
    )
    rubric: str | None = setting(None, RUBRIC)
    cache: str | None = setting(None, "judge's replies (default: OUT.replies.jsonl beside --out)")
    answer: str | None = setting(None, "the key of the answer, beside 'prompt'", metavar="KEY")
    layout: str | None = setting(None, "of chat data that fits several")
    read: ReadPart = setting(
        "answer", "part of what a thinking model wrote that is scored", choices=get_args(ReadPart)
    )
    by: tuple[str, ...] = setting(
        (), "a line of the table for each of their values", metavar="KEY,KEY"
    )
    out: str | None = setting(None, ".csv or .jsonl: a row an answer, with scores and matches")
    force: bool = setting(False, REPLACE)
    json: bool = setting(False, "the table as one JSON object a line")


add = adding(Score, JudgeSettings)


@dataclass
class _Row:
    number: int
    fields: dict[str, Any]
    exchange: Any


@dataclass
class _Tally:
    """What a line of the table is made of."""

    scores: list[float] = field(default_factory=list)
    why: Counter[str] = field(default_factory=Counter)


def run(args: Namespace) -> int:
    """Score every answer, and print a table of means."""
    from interp_ablate.scoring.registry import make_scorer

    settings = settings_from(args, Score)
    out = Path(settings.out) if settings.out else None
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise RunError(f"--out {out}: give a name that ends in .csv or .jsonl")
    if out is not None:
        check_new(
            out, settings.force, ours=lambda begins: begins.startswith((b"row,", b'{"row": '))
        )
    cache = settings.cache or (out.with_name(out.name + ".replies.jsonl") if out else None)
    rubric = rubric_of(settings.rubric)
    options: dict[str, Any] = {"rubric": rubric, "cache": cache, "endpoint": judge_settings(args)}
    options["own_code"] = True
    scorers = [make_scorer(spec, **options) for spec in settings.scorer]
    names = _distinct(settings.scorer, [scorer.name for scorer in scorers])
    rows, done = _rows(settings), 0
    tallies: dict[tuple[str, str], _Tally] = {}
    with _writing(out) as write:
        while chunk := list(islice(rows, CHUNK)):
            exchanges = [row.exchange for row in chunk]
            verdicts = {name: s.explain(exchanges) for name, s in zip(names, scorers)}
            for i, row in enumerate(chunk):
                of_row = {name: verdicts[name][i] for name in names}
                write(_record(row, of_row))
                _count(tallies, row, of_row, settings.by)
            done += len(chunk)
            tell(args, f"{done} scored")
    tell_spent(args, *scorers)
    if not done:
        raise RunError(f"{settings.file} holds no answer to score")
    _print(tallies, json_lines=settings.json)
    return 0


def _distinct(specs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of columns: the scorer's own, or what was asked for where two have the same."""
    chosen = list(names) if len(set(names)) == len(names) else list(specs)
    if len(set(chosen)) < len(chosen):
        raise RunError(f"the same scorer is given twice: {', '.join(specs)}")
    return chosen


def _rows(settings: Score) -> Iterator[_Row]:
    from interp_ablate.datasets.chat_reader import read_samples
    from interp_ablate.storage.row_files import RowFile

    path = Path(settings.file)
    if (path / "generations.jsonl").is_file():
        path = path / "generations.jsonl"
    file, key = RowFile.at(path), settings.answer
    if key is None and {"prompt", "text", "condition"} <= set(next(file.rows()).values):
        key = "text"
    if key is not None:
        yield from _plain(file, key, settings.read)
        return
    for sample in read_samples(path, layout=settings.layout):
        try:
            exchange = sample.last_turn(read=settings.read).exchange
        except InterpAblateError as error:
            raise RunError(f"{file.place(sample.number)}: {error}") from error
        fields = {k: v for k, v in sample.raw.items() if isinstance(v, (str, int, float, bool))}
        yield _Row(sample.number, fields, exchange)


def _plain(file: Any, key: str, read: ReadPart) -> Iterator[_Row]:
    """Rows with a prompt, an answer under `key`, and whatever else.

    A thought is in front of the answer, or under a key of its own, as `generate` writes it.
    """
    from interp_ablate.prompts.prompt import Prompt
    from interp_ablate.prompts.thoughts import split_thought
    from interp_ablate.scoring.exchange import PromptResponse

    for row in file.rows():
        prompt, answer = row.values.get("prompt"), row.values.get(key)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise RunError(
                f"{file.place(row.number)}: expected texts under 'prompt' and {key!r}; its keys are "
                f"{', '.join(row.values)}"
            )
        if read == "thought":
            answer = split_thought(answer)[0] or str(row.values.get(f"{key}_thought") or "")
        try:
            exchange = PromptResponse(Prompt(prompt, row.values.get("system")), answer)
        except InterpAblateError as error:
            raise RunError(f"{file.place(row.number)}: {error}") from error
        yield _Row(row.number, row.values, exchange)


def _record(row: _Row, verdicts: dict[str, Any]) -> dict[str, Any]:
    """A row of --out."""
    record: dict[str, Any] = {"row": row.number}
    record |= {key: row.fields[key] for key in GROUPS if key in row.fields}
    record |= {"prompt": row.exchange.prompt.text, "answer": row.exchange.answer}
    for name, verdict in verdicts.items():
        record[name] = verdict.score
        record[f"{name}: no verdict"] = verdict.why
        matches = verdict.detail.get("matches")
        # each is of this one answer
        own = [{k: v for k, v in match.items() if k != "text"} for match in matches or ()]
        record[f"{name}: detail"] = dict(verdict.detail) if matches is None else own
    return record


@contextmanager
def _writing(out: Path | None) -> Iterator[Any]:
    """A function that writes a row; the file is there when the block ends well."""
    from interp_ablate.storage.atomic_files import atomic_path

    if out is None:
        yield lambda record: None
        return
    with (
        atomic_path(out) as place,
        open(place, "w", encoding="utf-8", newline="", errors="backslashreplace") as file,
    ):
        if out.suffix == ".jsonl":
            yield lambda record: file.write(
                json_text(record, ensure_ascii=False, default=str) + "\n"
            )
            return
        table: list[Any] = []

        def write(record: dict[str, Any]) -> None:
            flat = {key: _flat(value) for key, value in record.items()}
            if not table:
                # of the columns only what a run says of a row may be missing further down
                table.append(csv.DictWriter(file, list(flat), extrasaction="ignore"))
                table[0].writeheader()
            table[0].writerow(flat)

        yield write


def _flat(value: Any) -> Any:
    """As a cell: matches as expression@start-end, in characters of the answer; other details as JSON."""
    if isinstance(value, dict):
        return json_text(value, ensure_ascii=False) if value else ""
    if not isinstance(value, list):
        return value
    return "; ".join(
        f"{m['expression']}@{m['start']}-{m['end']}{' (negated)' if m['negated'] else ''}"
        for m in value
    )


def _count(
    tallies: dict[tuple[str, str], _Tally], row: _Row, verdicts: dict[str, Any], by: Sequence[str]
) -> None:
    keys = by or [key for key in GROUPS if key in row.fields]
    lacking = [key for key in keys if key not in row.fields]
    if lacking:
        raise RunError(
            f"--by {','.join(keys)}: row {row.number} has no {', '.join(lacking)}; there are "
            f"{', '.join(row.fields)}"
        )
    group = ", ".join(str(row.fields[key]) for key in keys) or "all"
    for name, verdict in verdicts.items():
        tally = tallies.setdefault((name, group), _Tally())
        if verdict.score is None:
            tally.why[verdict.why] += 1
        else:
            tally.scores.append(verdict.score)


def _line(scorer: str, group: str, tally: _Tally) -> dict[str, Any]:
    """A line of the table, with the mean's 95% interval."""
    from interp_ablate.stats.intervals import SCORE, mean_interval

    interval = mean_interval(tally.scores, bounds=SCORE) if tally.scores else None
    low, high = interval or (None, None)
    return {
        "scorer": scorer,
        "of": group,
        "n": len(tally.scores),
        "mean": fmean(tally.scores) if tally.scores else None,
        "low": low,
        "high": high,
        "no verdict": dict(tally.why.most_common()),
    }


def _print(tallies: dict[tuple[str, str], _Tally], *, json_lines: bool) -> None:
    lines = [_line(*key, tally) for key, tally in tallies.items()]
    if json_lines:
        for line in lines:
            print(json_text(line, ensure_ascii=False))
        return
    wide = [max(len(str(line[key])) for line in lines) for key in ("scorer", "of")]
    print(
        f"{'scorer':<{wide[0]}}  {'of':<{wide[1]}}  {'n':>6}  {'mean':>6}  {'95%':>13}  no verdict"
    )
    for line in lines:
        mean = "none" if line["mean"] is None else f"{line['mean']:.1f}"
        interval = "" if line["low"] is None else f"{line['low']:.1f} to {line['high']:.1f}"
        why = ", ".join(f"{count} {reason}" for reason, count in line["no verdict"].items()) or "0"
        print(
            f"{line['scorer']:<{wide[0]}}  {line['of']:<{wide[1]}}  {line['n']:>6}  {mean:>6}  "
            f"{interval:>13}  {why}"
        )
