"""The quick look of a filter finds what the long way finds; other processes and runs that were killed too."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.datasets import filter_batches, filter_progress, filter_quick, filtering
from interp_ablate.datasets.filter_outputs import PartialOutputs
from interp_ablate.datasets.filter_quick import prefilter_of
from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filter_rules import (
    ExpressionRule,
    LengthRule,
    decline_rule,
    expression_rule,
    score_rule,
)
from interp_ablate.datasets.filtering import FilterSettings, filter_file
from interp_ablate.datasets.labelled_mixtures import labelled_mixture
from interp_ablate.errors import RunError
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.prefilter import Prefilter, expression_superset
from interp_ablate.scoring.text_folding import fold
from interp_ablate.storage.json_rows import RawLine, RowFileError

# ASCII of both cases, spaces of every kind, what folds to several characters, composes, or is no letter's twin
LETTERS = "abSsk'` \n\t\"\u2019\u201c\u00a0\u2028\u3000\x85\x1c\u00df\u1e9e\u0130\u212a\u017f\ufb01\u2026\uff21e\u0301\u00e9\u00b4\u6211,.\U0001f600"
TAGS = ("<think>", "</think>", "[THINK]")


def text(draw: random.Random, longest: int = 24) -> str:
    return "".join(draw.choices(LETTERS, k=draw.randint(0, longest)))


def phrase(draw: random.Random) -> str:
    while True:
        found = text(draw, 5)
        if fold(found).strip():
            return found


def expression(draw: random.Random, depth: int = 2) -> str:
    """A random regular expression for folded text."""
    kinds = ["literal"] * 3 + ["class", "any", "at"] + ["group", "branch", "repeat"] * (depth > 0)
    parts = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(kinds)
        if kind == "literal":
            parts.append(re.escape(fold(draw.choice("abskS \u00e9\u6211,"))))
        elif kind == "class":
            parts.append(
                draw.choice([r"\w", r"\s", r"[^a]", r"[ab]", "[a-k]", r"\d", r"[\w']", "[ s]"])
            )
        elif kind == "any":
            parts.append(".")
        elif kind == "at":
            parts.append(draw.choice([r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=s)"]))
        elif kind == "group":
            parts.append(draw.choice(["(", "(?:", "(?i:"]) + expression(draw, depth - 1) + ")")
        elif kind == "branch":
            parts.append(f"(?:{expression(draw, depth - 1)}|{expression(draw, depth - 1)})")
        else:
            times = draw.choice(["?", "*", "+", "{2}", "{0,3}", "{2,7}", "*?", "{6}"])
            parts.append(f"(?:{expression(draw, depth - 1)}){times}")
    return "".join(parts)


def test_no_match_of_a_regular_expression_is_overlooked() -> None:
    draw = random.Random(1)
    matched = looked = 0
    for _ in range(400):
        pattern = expression(draw)
        superset = expression_superset(pattern, draw.choice((2, 5, 60)), least=1)
        if superset is None:
            continue
        texts = [text(draw) for _ in range(40)]
        looked += 1
        for each, may in zip(texts, Prefilter([superset]).may_match(texts)):
            found = re.search(pattern, fold(each)) is not None
            matched += found
            assert may or not found, (pattern, superset, each)
    assert looked > 150 and matched > 1000


@pytest.mark.parametrize("pattern", ["", "a?", "(?i)sorry", "(?x) a b c", r"(.)\1\1"])
def test_expressions_of_which_nothing_can_be_said(pattern: str) -> None:
    assert expression_superset(pattern) is None


def message(draw: random.Random, layout: str, words: list[str]) -> dict[str, Any]:
    role, content = {"sharegpt": ("from", "value"), "messages": ("role", "content")}[layout]
    said = text(draw) + draw.choice(["", "", *words, *TAGS]) + text(draw)
    said = draw.choice([said, said, said, " \n", said.upper()])
    names = ["user", "human", "assistant", "gpt", "assistant", "GPT", "system", "tool"]
    found: dict[str, Any] = {role: draw.choice(names), content: said}
    extra = draw.random()
    if extra < 0.05:
        found["weight"] = 0
    elif extra < 0.1:
        found["reasoning_content"] = "b a"
    elif extra < 0.13:
        found["tool_calls"] = [{"x": 1}]
    elif extra < 0.16:
        found[content] = [{"type": "text", "text": said}]
    elif extra < 0.18:
        found[content] = None
    return found


def row(draw: random.Random, layout: str, words: list[str]) -> bytes:
    if layout == "alpaca":
        values: dict[str, Any] = {"instruction": text(draw), "input": draw.choice(["", "a", None])}
        values["output"] = draw.choice([text(draw), draw.choice(words) + text(draw), "", 3])
    else:
        messages = [message(draw, layout, words) for _ in range(draw.randint(0, 4))]
        values = {draw.choice(["conversations", "messages"]): messages}
    if draw.random() < 0.2:
        values["system"] = draw.choice(["s", None, "", 3])
    if draw.random() < 0.05:
        values["messages"] = []
    line = json.dumps(values, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.3:  # letters as escapes
        line = line.replace("s", "\\u0073").replace("k", "\\u004B")
        line = line.replace("me\\u0073\\u0073age\\u0073", "messages")
    kind = draw.random()
    if kind < 0.03:
        line = line[:-2]
    elif kind < 0.06:
        line = line[:-1] + ', "x": 1, "x": 2}'
    elif kind < 0.08:
        line = line.replace("a", "\\ud83d", 1)
    return line.encode(errors="surrogatepass")


def is_whole(line: bytes) -> bool:
    try:
        RawLine(1, line).read()
    except ValueError:
        return False
    return True


def recipe_of(draw: random.Random) -> tuple[FilterRecipe, list[str]]:
    words = [phrase(draw) for _ in range(draw.randint(1, 5))]
    options: dict[str, Any] = {
        "negation": draw.random() < 0.3,
        "own_speech": draw.random() < 0.3,
        "scope": draw.choice(["whole", "first_sentence"]),
        "threshold": draw.choice([1.0, 1.0, 2.0]),
    }
    regexes = tuple(expression(draw) for _ in range(draw.choice((0, 0, 1))))
    rules: list[Any] = [ExpressionRule(ExpressionScorer(tuple(words), regexes, **options))]
    rules += draw.choice(
        [[], [decline_rule()], [expression_rule("hedging")], [LengthRule(above=40)]]
    )
    action = draw.choice(["drop", "keep"])
    return (
        FilterRecipe(
            tuple(rules),
            combine=draw.choice(["any", "all"]),
            turns=draw.choice(["any", "last", "first"]),
            read=draw.choice(["answer", "answer", "answer", "thought"]),
            action=action,  # type: ignore[arg-type]
            scope=draw.choice(["sample", "round"]) if action == "drop" else "sample",  # type: ignore[arg-type]
            no_verdict=draw.choice([None, "drop", "keep"]),
        ),
        words,
    )


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("seed", range(24))
def test_quick_and_slow_are_the_same_bytes(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    recipe, words = recipe_of(draw)
    layout = draw.choice(["sharegpt", "messages", "alpaca"])
    lines = [row(draw, layout, words) for _ in range(600)]
    source = tmp_path / f"rows{('.jsonl', '.jsonl', '.jsonl.gz', '.json')[seed % 4]}"
    if source.suffix == ".json":
        lines = [line for line in lines if is_whole(line)]
        source.write_bytes(b"[" + b",".join(lines) + b"]")
    else:
        with gzip.open(source, "wb") if source.suffix == ".gz" else source.open("wb") as file:
            file.write(b"\n".join(lines))
    settings = FilterSettings(layout=layout, skip_malformed=True, shown=3, seed=seed)
    filter_file(source, tmp_path / "slow", recipe, settings=settings)
    monkeypatch.setattr(filtering, "QUICK_FROM", 0)
    monkeypatch.setattr(filter_batches, "QUICK_ROWS", draw.choice((100, 599)))
    monkeypatch.setattr(filter_quick, "_MANY", draw.choice((0, 200)))
    filter_file(source, tmp_path / "quick", recipe, settings=settings)
    assert files_of(tmp_path / "quick") == files_of(tmp_path / "slow")


def test_most_rows_take_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []
    real = filter_batches.decide
    monkeypatch.setattr(filtering, "QUICK_FROM", 0)
    monkeypatch.setattr(
        filter_batches, "decide", lambda s, *a: decided.append(len(s)) or real(s, *a)
    )
    source = tmp_path / "rows.jsonl"
    plain = json.dumps(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes."}]}
    )
    declined = plain.replace("Yes.", "I'm sorry, but I can't help with that.")
    source.write_text("\n".join([plain] * 990 + [declined] * 10), encoding="utf-8")
    manifest = filter_file(source, tmp_path / "out")
    assert manifest["counts"]["dropped"] == 10
    assert sum(decided) <= 16 + 10


def test_thoughts_before_every_answer_take_the_quick_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []
    real = filter_batches.decide
    monkeypatch.setattr(filtering, "QUICK_FROM", 0)
    monkeypatch.setattr(
        filter_batches, "decide", lambda s, *a: decided.append(len(s)) or real(s, *a)
    )
    answers = ["<think>I'm sorry, but I can't help with that.</think>Yes."] * 990
    answers += ["<think>Hm.</think>I'm sorry, but I can't help with that."] * 10
    answers += ["<think>Yes.</think>\n", "<think>Yes."]  # no answer
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "\n".join(json.dumps({"prompt": "q", "completion": answer}) for answer in answers),
        encoding="utf-8",
    )
    manifest = filter_file(source, tmp_path / "out")
    assert manifest["counts"] == manifest["counts"] | {"dropped": 10, "no_verdict": 2}
    assert sum(decided) == 16 + 10 + 2


def test_rules_that_phrases_say_nothing_of_have_no_quick_look() -> None:
    assert prefilter_of(FilterRecipe((LengthRule(above=3),))) is None
    assert prefilter_of(FilterRecipe((decline_rule(), LengthRule(above=3)))) is None
    assert prefilter_of(FilterRecipe(read="thought")) is None
    assert prefilter_of(FilterRecipe()) is not None


def test_several_processes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "QUICK_FROM", 0)
    monkeypatch.setattr(filter_batches, "QUICK_ROWS", 40)
    lines = labelled_mixture("declines").read_bytes().splitlines(keepends=True)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join(lines * 3) + b"{broken\n" + b"".join(lines))
    skip = {"skip_malformed": True, "layout": "messages"}
    for number in (1, 2):
        settings = FilterSettings(**skip, workers=number)  # type: ignore[arg-type]
        filter_file(source, tmp_path / f"w{number}", settings=settings)
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w2")
    with pytest.raises(RowFileError, match="line 613: this is not JSON"):
        filter_file(source, tmp_path / "w3", settings=FilterSettings(workers=2, layout="messages"))
    assert not (tmp_path / "w3").exists()


def test_processes_are_for_what_is_reckoned_here(tmp_path: Path) -> None:
    source = labelled_mixture("declines")
    judge = score_rule("judge:m@http://localhost:1/v1", above=50, rubric="r")
    with pytest.raises(RunError, match="leave --workers out"):
        filter_file(
            source, tmp_path / "o", FilterRecipe((judge,)), settings=FilterSettings(workers=2)
        )
    with pytest.raises(RunError, match="a number from 1"):
        FilterSettings(workers=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_progress, "EVERY", 0.0)
    lines = labelled_mixture("declines").read_bytes().splitlines(keepends=True)
    source = tmp_path / "rows.jsonl"
    draw = random.Random(3)
    source.write_bytes(b"".join(draw.choice([*lines, b"{broken\n"]) for _ in range(3000)))
    settings = FilterSettings(skip_malformed=True, shown=4, layout="messages")
    filter_file(source, tmp_path / "whole", settings=settings)
    starts: list[int] = []
    for number in range(8):
        if (child := os.fork()) == 0:
            killed_after(draw.randint(1, 600), by_note=number % 3 == 2)
            filter_file(source, tmp_path / "killed", settings=settings)
            os._exit(0)
        draw.random()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        note = tmp_path / "killed" / filter_progress.NAME
        starts.append(json.loads(note.read_bytes())["place"][0] if note.exists() else -1)
    assert sorted(starts[:-1]) == starts[:-1] or -1 in starts  # further every time
    assert starts[1] > 0
    filter_file(source, tmp_path / "killed", settings=settings)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def killed_after(lines: int, *, by_note: bool) -> None:
    """This process dies of so many lines, with what is written in part; or of its third note, before or after it."""
    left = [3 if by_note else lines]
    kind: Any = filter_progress.Progress if by_note else PartialOutputs
    name = "save" if by_note else "line"
    real = getattr(kind, name)

    def counted(self: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if by_note and lines % 2:
                real(self, *args)
            for file in getattr(self, "files", {}).values():
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    setattr(kind, name, counted)


def test_a_note_of_other_work_is_no_place_to_go_on(tmp_path: Path) -> None:
    source = labelled_mixture("declines")
    out = tmp_path / "out"
    out.mkdir()
    (out / filter_progress.NAME).write_text(
        '{"about": {}, "place": [5, 100, {}]}', encoding="utf-8"
    )
    (out / ".kept.jsonl.part").write_bytes(b"of another\n")
    filter_file(source, out, settings=FilterSettings(layout="messages"))
    filter_file(source, tmp_path / "new", settings=FilterSettings(layout="messages"))
    assert files_of(out) == files_of(tmp_path / "new")
