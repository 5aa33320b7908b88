"""Filtering: decisions, files, resuming after a kill, the planted mixture, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.cli.main import main
from interp_ablate.datasets import filtering
from interp_ablate.datasets.chat_reader import read_samples
from interp_ablate.datasets.conversations import Sample, Turn
from interp_ablate.datasets.filter_recipe import FilterRecipe, decide
from interp_ablate.datasets.filter_rules import (
    ExpressionRule,
    LengthRule,
    ProjectionRule,
    RuleValue,
    ScoreRule,
    decline_rule,
    direction_at,
    expression_rule,
    score_rule,
)
from interp_ablate.datasets.filtering import FilterSettings, filter_file
from interp_ablate.datasets.labelled_mixtures import labelled_mixture
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.prompts.messages import Message
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.scoring.refusals import (
    LANGUAGES,
    REASONS,
    RefusalDetector,
    _folded,
    phrase_patterns,
)
from interp_ablate.scoring.text_folding import fold, strip_quoted_speech
from interp_ablate.storage.json_rows import RowFileError

DECLINES = labelled_mixture("declines")
FINISHED = {
    "kept.jsonl",
    "dropped.jsonl",
    "why.jsonl",
    "samples.html",
    "manifest.json",
    "verdicts.jsonl",
}
DECLINED = "I'm sorry, but I can't help with that."


def talk(*answers: str, number: int = 1) -> Sample:
    messages: list[Message] = []
    for answer in answers:
        messages += [Message("user", "q"), Message("assistant", answer)]
    raw = {"messages": [{"role": m.role, "content": m.content} for m in messages]}
    return Sample(number, tuple(messages), raw, "messages")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(path: Path, answers: Sequence[str]) -> Path:
    rows = [{"prompt": f"q{i}", "completion": answer, "i": i} for i, answer in enumerate(answers)]
    return write_rows(path, rows)


def numbers(path: Path) -> list[int]:
    return [sample.raw["i"] for sample in read_samples(path)] if path.stat().st_size else []


def digests(folder: Path, *names: str) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not names or path.name in names
    }


class Said:
    """A rule that reads the number that an answer is; one that is none has no verdict."""

    stored = False

    def __init__(self, name: str, limit: float, *, cost: int = 3) -> None:
        self.name, self.limit, self.cost = name, limit, cost
        self.asked: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "said", "of": self.name}

    @property
    def match(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        self.asked += [turn.answer for turn in turns]
        return [
            RuleValue(None, "?") if t.answer == "?" else RuleValue(float(t.answer)) for t in turns
        ]

    def matches(self, value: float) -> bool:
        return value > self.limit


# ---- decisions -------------------------------------------------------------------------------------

T, F, N = True, False, None


@pytest.mark.parametrize(
    "answers, matched",
    [
        (["9"], T),
        (["1"], F),
        (["?"], N),
        (["1", "9"], T),
        (["9", "?"], T),
        (["1", "?"], N),
        ([], N),
    ],
)
@pytest.mark.parametrize("action", ["drop", "keep"])
@pytest.mark.parametrize("no_verdict", [None, "keep", "drop"])
def test_what_becomes_of_a_sample(
    answers: list[str], matched: Any, action: Any, no_verdict: Any
) -> None:
    recipe = FilterRecipe((Said("a", 5),), action=action, no_verdict=no_verdict)
    [decision] = decide([talk(*answers)], recipe)
    assert decision.matched is matched
    kept = (action == "keep") if matched else (action == "drop")
    if matched is None and no_verdict is not None:
        kept = no_verdict == "keep"
    assert decision.outcome == ("kept" if kept else "dropped")
    assert (decision.hits == ()) == (matched is False)


@pytest.mark.parametrize(
    "first, second, both, either",
    [
        ("9", 5, T, T), ("9", 50, F, T), ("1", 5, F, F), ("1", -5, F, T), ("?", 5, N, N),
    ],
)  # fmt: skip
def test_rules_together(first: str, second: float, both: Any, either: Any) -> None:
    for combine, wanted in (("all", both), ("any", either)):
        rules = (Said("a", 5), Said("b", second))
        [decision] = decide([talk(first)], FilterRecipe(rules, combine=combine))  # type: ignore[arg-type]
        assert decision.matched is wanted


class Fixed(Said):
    """Says the same of every answer."""

    def __init__(self, name: str, value: float | None, *, cost: int = 3) -> None:
        super().__init__(name, 0.5, cost=cost)
        self.value = value

    def read(self, turns: Sequence[Turn]) -> list[RuleValue]:
        self.asked += [turn.answer for turn in turns]
        return [RuleValue(self.value, "" if self.value is not None else "?") for _ in turns]


@pytest.mark.parametrize("combine, table", [
    ("any", {(1, 1): T, (1, 0): T, (1, N): T, (0, 0): F, (0, N): N, (N, N): N}),
    ("all", {(1, 1): T, (1, 0): F, (1, N): N, (0, 0): F, (0, N): F, (N, N): N}),
])  # fmt: skip
def test_no_verdict_is_neither_yes_nor_no(combine: Any, table: dict[Any, Any]) -> None:
    for (a, b), wanted in table.items():
        for x, y in ((a, b), (b, a)):
            rules = (Fixed("a", x), Fixed("b", y))
            [decision] = decide([talk("x")], FilterRecipe(rules, combine=combine))
            assert decision.matched is wanted, (combine, x, y)


def test_what_is_decided_is_not_paid_for() -> None:
    cheap, dear = Fixed("cheap", 1, cost=1), Fixed("dear", 1, cost=5)
    decide([talk("x", "y")], FilterRecipe((dear, cheap)))
    assert cheap.asked == ["x", "y"] and dear.asked == []
    cheap, dear = Fixed("cheap", 0, cost=1), Fixed("dear", 1, cost=5)
    decide([talk("x")], FilterRecipe((dear, cheap), combine="all"))
    assert dear.asked == []
    cheap, dear = Said("cheap", 5, cost=1), Fixed("dear", 0, cost=5)
    decide([talk("1", "9"), talk("2")], FilterRecipe((dear, cheap)))
    assert dear.asked == ["2"]  # the other answer of the first sample settled it


@pytest.mark.parametrize("turns, matched", [("any", T), ("last", F), ("first", F)])
def test_which_answers_are_looked_at(turns: Any, matched: bool) -> None:
    [decision] = decide([talk("1", "9", "2")], FilterRecipe((Said("a", 5),), turns=turns))
    assert decision.matched is matched


def test_a_round_can_be_dropped_alone() -> None:
    recipe = FilterRecipe((Said("a", 5),), scope="round")
    whole, cut, gone = decide([talk("1", "2"), talk("1", "9", "2"), talk("9", "8")], recipe)
    assert (whole.outcome, cut.outcome, gone.outcome) == ("kept", "cut", "dropped")
    assert cut.sample is not None and [t.answer for t in cut.sample.turns()] == ["1", "2"]
    recipe = FilterRecipe((Said("a", 5),), scope="round", no_verdict="drop")
    cut, gone = decide([talk("1", "9", "?"), talk("?")], recipe)
    assert cut.sample is not None and [t.answer for t in cut.sample.turns()] == ["1"]
    assert gone.outcome == "dropped"
    with pytest.raises(RunError, match="single rounds"):
        FilterRecipe((Said("a", 5),), scope="round", action="keep")


@pytest.mark.parametrize(
    "wrong", [{"rules": ()}, {"combine": "most"}, {"turns": "second"}, {"no_verdict": "?"}]
)
def test_a_recipe_that_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(RunError):
        FilterRecipe(**wrong)


# ---- phrases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    'She said, "I\'m sorry, but I can\'t help with that."',
    "“I cannot provide that information,” the clerk said.",
    "Il répond : « Je ne peux pas vous aider. »",
    "„Ich kann Ihnen leider nicht helfen“, sagte er.",
    "— Я не могу помочь, — сказал он.\nОна ушла.",
    "```\nprint('As an AI language model, I cannot help with that')\n```",
    "Use `I cannot assist with that` as the text.", "```\nI cannot assist with that",
    "> I cannot assist with that\n\nThat was the reply.",
    "Ann: Hi!\nBot: I cannot help with that.\nAnn: Why?\nBot: As an AI, I have limits.",
    "Here is a draft.\n\nDear Sir,\nI am unable to provide a reference.\nYours",
    "I can't help but smile.", "I can't recommend it enough.", "I'm sorry to hear that.",
    "I apologize for the confusion. The answer is 4.",
    "作者说：「我无法回答这个问题。」",
])  # fmt: skip
def test_the_words_of_others_do_not_count(text: str) -> None:
    assert RefusalDetector().find(text) == []


def test_own_words_are_what_is_left() -> None:
    assert strip_quoted_speech('He said "no".').split() == ["He", "said", "\u25ae", "."]
    assert RefusalDetector().find(f"{DECLINED} He said 'no'.") and not RefusalDetector().find(
        f'"{DECLINED}"'
    )


def test_every_cue_can_be_found_and_none_is_unfolded() -> None:
    for cue in phrase_patterns():
        for start in cue.starts:
            assert start and start == fold(start).strip(), (cue.language, start)
    text = " ".join(["I am happy to help. Here is a list of rivers."] * 50)
    assert RefusalDetector().find(text) == []


def test_looking_for_few_starts_finds_what_looking_for_all_does() -> None:
    declines = RefusalDetector()
    texts = [m.content for s in read_samples(DECLINES) for m in s.messages]
    for cue in phrase_patterns():
        for start in cue.starts:
            texts += [f"Qu'{start} help you", start.upper(), f"x{start}"]
    found = 0
    for text in texts:
        folded = _folded(text)
        assert folded == fold(text).strip()
        plain = []
        for cue in phrase_patterns():
            phrases = [phrase for start in cue.starts if (phrase := cue.find(folded, start))]
            plain += [(cue.reason, cue.language, phrases[0])] if phrases else []
        assert [tuple(vars(f).values()) for f in declines._matches(folded)] == plain
        found += bool(plain)
    assert found > len(phrase_patterns())


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_and_reason_can_be_chosen(language: str) -> None:
    rows = [s for s in read_samples(DECLINES) if s.raw["language"] == language and s.raw["planted"]]
    own, other = (
        RefusalDetector(languages=(language,)),
        tuple(x for x in LANGUAGES if x != language),
    )
    found = [own.find(s.messages[-1].content) or own.find(s.turns("first")[0].answer) for s in rows]
    assert sum(map(bool, found)) >= 0.8 * len(rows)
    assert {f.language for each in found for f in each} == {language}
    foreign = [RefusalDetector(languages=other).find(s.turns("first")[0].answer) for s in rows]
    assert sum(map(bool, foreign)) <= 0.1 * len(rows)
    for reason in REASONS:
        assert {
            f.reason
            for s in rows
            for f in RefusalDetector((reason,)).find(s.turns("first")[0].answer)
        } <= {reason}


def test_unknown_reasons_and_languages() -> None:
    with pytest.raises(InterpAblateError, match="no language 'xx'"):
        decline_rule(languages=("xx",))
    with pytest.raises(InterpAblateError, match="no reason 'bores'"):
        RefusalDetector(("bores",))  # type: ignore[arg-type]
    with pytest.raises(InterpAblateError, match="cannot read expressions from nowhere"):
        expression_rule("nowhere")


def test_expression_lists_and_the_short_way(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("teapot\n/kettle[s]?/\n", encoding="utf-8")
    rule = expression_rule(str(path))
    read = rule.read(talk("A TEAPOT!", "two kettles", "a cup", "", "teapots").turns())
    assert [r.value for r in read] == [1, 1, 0, None, 0]
    assert read[0].phrases == (("mine", "teapot"),) and read[3].why == "empty answer"
    scorer = ExpressionScorer("declining", languages=("all",))
    rule = ExpressionRule(scorer)  # no pattern in it: texts are passed over by substring search
    answers = [s.turns("first")[0].answer for s in read_samples(DECLINES)]
    quick = [reading.value for reading in rule.read(talk(*answers).turns())]
    assert quick == [float(scorer.outcome(answer) == "expressed") for answer in answers]
    assert 0 < sum(map(bool, quick)) < len(quick)


def test_limits() -> None:
    rule = LengthRule(above=5, below=2)
    read = rule.read(talk("a", "abc", "abcdef").turns())
    assert [rule.matches(r.value or 0) for r in read] == [True, False, True]
    with pytest.raises(RunError, match="--above"):
        LengthRule()


# ---- the planted mixture ---------------------------------------------------------------------------


def test_planted_declines_are_found_and_little_else(tmp_path: Path) -> None:
    manifest = filter_file(DECLINES, tmp_path, settings=FilterSettings(labels="planted"))
    agreement = manifest["agreement"]
    assert agreement["precision"]["value"] >= 0.95 and agreement["recall"]["value"] >= 0.9
    dropped = {s.number for s in read_samples(tmp_path / "dropped.jsonl")}
    held = [s for s in read_samples(DECLINES) if s.raw["part"] == "held_out"]
    lost = [
        s
        for s in read_samples(tmp_path / "kept.jsonl")
        if s.raw["planted"] and s.raw["part"] == "held_out"
    ]
    assert dropped and len(lost) <= 0.2 * sum(s.raw["planted"] for s in held)
    assert manifest["counts"]["rows"] > 200
    assert set(manifest["why"]) >= {f"declines ({code})" for code in LANGUAGES}


# ---- files -----------------------------------------------------------------------------------------


def test_a_thought_can_be_read_instead() -> None:
    thought = "<think>I can't help with that.</think>\nSure: the shop."
    messages = (Message("user", "hi"), Message("assistant", thought))
    own = Message("assistant", "4", {"reasoning_content": "two and two"})
    samples = [Sample(1, messages, {}, ""), Sample(2, (messages[0], own), {}, "")]
    texts = [sample.turns(read="thought")[0].answer for sample in samples]
    assert texts == ["I can't help with that.", "two and two"]
    for read, outcomes in (("answer", ["kept", "kept"]), ("thought", ["dropped", "kept"])):
        decisions = decide(samples, FilterRecipe(read=read))
        assert [each.outcome for each in decisions] == outcomes
    with pytest.raises(RunError, match="read is answer or thought"):
        FilterRecipe(read="both")  # type: ignore[arg-type]


def test_a_thought_is_not_judged(tmp_path: Path) -> None:
    """By no rule: a thought declines, repeats itself and is long where the answer is none of that."""
    thought = "<think>I can't help with that, or can I? As an AI I cannot order.</think>\\nSure: the shop."
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}
        for text in (thought.replace("\\n", "\n"), DECLINED)
    ]
    rows[1]["messages"][0]["content"] = "\u200b"
    path = write_rows(tmp_path / "a.jsonl", rows)
    manifest = filter_file(path, tmp_path / "out")
    assert manifest["counts"]["kept"] == 1 and manifest["counts"]["dropped"] == 1
    long = FilterRecipe(rules=(LengthRule(above=len("Sure: the shop.")),))
    assert filter_file(path, tmp_path / "long", long)["counts"]["kept"] == 1
    cheerful = FilterRecipe(rules=(score_rule("lexicon:length?half=1", above=0),))
    assert filter_file(path, tmp_path / "scored", cheerful)["counts"]["no_verdict"] == 1


def test_rows_are_kept_byte_for_byte_and_counted(tmp_path: Path) -> None:
    lines = [
        b'{"prompt":"a","completion":"fine"  }\r\n',
        b'{"completion": "I cannot assist with that.", "prompt": "b"}\n',
        b"\n",
        b'{"prompt": "c", "completion": ""}\n',
        b'{"prompt": "d", "completion": "caf\xc3\xa9 \\u00e9"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    manifest = filter_file(path, tmp_path / "out")
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == lines[0] + lines[3] + lines[4]
    assert (tmp_path / "out" / "dropped.jsonl").read_bytes() == lines[1]
    counts = {
        "rows": 4,
        "kept": 3,
        "dropped": 1,
        "cut": 0,
        "matched": 1,
        "no_verdict": 1,
        "malformed": 0,
    }
    assert manifest["counts"] == counts
    assert manifest["why"] == {"declines (en)": 1, "no verdict: empty answer": 1}
    why = [json.loads(line) for line in (tmp_path / "out" / "why.jsonl").read_text().splitlines()]
    assert [(row["number"], row["outcome"]) for row in why] == [(2, "dropped"), (4, "kept")]
    assert why[0]["because"][0]["found"] == [["declines (en)", "i cannot assist"]]
    assert {p.name for p in (tmp_path / "out").iterdir()} == FINISHED
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == json.loads(
        json.dumps(manifest)
    )
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_the_same_input_and_rules_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        filter_file(DECLINES, tmp_path / name, settings=FilterSettings(shown=5, seed=3))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    filter_file(
        DECLINES, tmp_path / "a", settings=FilterSettings(shown=5, seed=3)
    )  # and again in its place
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    filter_file(DECLINES, tmp_path / "c", settings=FilterSettings(shown=5, seed=4))
    names = ("kept.jsonl", "dropped.jsonl", "why.jsonl")
    assert digests(tmp_path / "a", *names) == digests(tmp_path / "c", *names)
    assert digests(tmp_path / "a", "samples.html") != digests(tmp_path / "c", "samples.html")


def test_malformed_rows_stop_it_or_are_set_apart(tmp_path: Path) -> None:
    rows = [b'{"prompt": "a", "completion": "b"}\n', b"{oops\n", b'{"prompt": "a"}\n']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(rows))
    with pytest.raises(RowFileError, match="line 2"):
        filter_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing half done
    manifest = filter_file(path, tmp_path / "out", settings=FilterSettings(skip_malformed=True))
    assert (tmp_path / "out" / "malformed.jsonl").read_bytes() == rows[1] + rows[2]
    assert (manifest["counts"]["malformed"], manifest["counts"]["kept"]) == (2, 1)
    path.write_bytes(rows[1])
    with pytest.raises(RowFileError, match="no row that can be used"):
        filter_file(path, tmp_path / "none", settings=FilterSettings(skip_malformed=True))


def test_other_formats_come_out_as_they_came(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": a}]}
        for a in ("ok", DECLINED, "yes")
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.json"):
        out = tmp_path / name.replace(".", "-")
        filter_file(tmp_path / name, out)
        kept = list(read_samples(out / f"kept{Path(name).suffix}"))
        assert [dict(s.raw) for s in kept] == [rows[0], rows[2]]
        assert [dict(s.raw) for s in read_samples(out / f"dropped{Path(name).suffix}")] == [rows[1]]


def test_nothing_dropped_or_nothing_kept(tmp_path: Path) -> None:
    import datasets

    for suffix in (".jsonl", ".json", ".parquet"):
        for answer, empty in (("ok", "dropped"), (DECLINED, "kept")):
            path = tmp_path / f"{empty}{suffix}"
            rows = [{"prompt": "q", "completion": answer}]
            if suffix == ".parquet":
                datasets.Dataset.from_list(rows).to_parquet(path)
            else:
                path.write_text(json.dumps(rows if suffix == ".json" else rows[0]))
            out = tmp_path / f"{empty}{suffix[1:]}"
            counts = filter_file(path, out)["counts"]
            assert counts[empty] == 0 and (out / f"{empty}{suffix}").exists()


def test_a_folder_of_other_work_is_left_alone(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.jsonl", ["x", DECLINED])
    filter_file(path, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(RunError, match="another filter"):
        filter_file(path, tmp_path / "out", FilterRecipe((LengthRule(above=5),)))
    assert digests(tmp_path / "out") == before
    filter_file(
        path,
        tmp_path / "out",
        FilterRecipe((LengthRule(below=5),)),
        settings=FilterSettings(force=True),
    )
    assert numbers(tmp_path / "out" / "kept.jsonl") == [1]
    own = tmp_path / "mine"
    own.mkdir()
    (own / "kept.jsonl").write_text("my own")
    with pytest.raises(RunError, match="not the folder of a filter"):
        filter_file(path, own)
    assert (own / "kept.jsonl").read_text() == "my own"
    kept = tmp_path / "out" / "kept.jsonl"
    with pytest.raises(RunError, match="is where"):
        filter_file(kept, tmp_path / "out", settings=FilterSettings(force=True))


def test_another_result_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    scorer, out, force = Counting(), tmp_path / "out", FilterSettings(force=True)
    recipe = FilterRecipe((ScoreRule(above=50, scorer=scorer),))
    filter_file(pairs(tmp_path / "a.jsonl", ["10", "60"]), out, recipe)
    before = digests(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "10"}\n{"prompt": ')
    with pytest.raises(RowFileError):
        filter_file(bad, out, recipe, settings=force)
    assert digests(out) == before
    (out / "verdicts.jsonl").unlink()
    with pytest.raises(RunError, match="not the folder of a filter"):
        filter_file(bad, out, recipe, settings=force)
    for name in ("kept.jsonl", "dropped.jsonl"):
        (out / name).unlink()
    filter_file(pairs(tmp_path / "a.jsonl", ["10", "60"]), out, recipe, settings=force)
    # other data in another format: other verdicts, and no file of the old result
    rows = [{"prompt": "q", "completion": "70"}]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    filter_file(tmp_path / "b.json", out, recipe, settings=force)
    assert json.loads((out / "dropped.json").read_text()) == rows
    assert not (out / "kept.jsonl").exists() and not (out / "dropped.jsonl").exists()
    assert scorer.calls[-1] == "70"


def test_two_at_once(tmp_path: Path) -> None:
    from interp_ablate.storage.jsonl_log import JsonlLog

    path = pairs(tmp_path / "a.jsonl", ["x"])
    filter_file(path, tmp_path / "out")
    journal = tmp_path / "out" / "verdicts.jsonl"
    header = json.loads(journal.read_text().splitlines()[0])
    identity = {"data": header["data"], "layout": header["layout"]}
    lines = JsonlLog(journal, identity, kind="journal", format=header["format"], lost="")
    with lines.open(), pytest.raises(RunError, match="in use"):
        filter_file(path, tmp_path / "out")


def test_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pairs(tmp_path / "a.jsonl", ["x"] * 600)

    def meddle(rows: int) -> None:
        with open(path, "a") as file:
            file.write("\n")

    monkeypatch.setattr(filtering, "bar", lambda *_: nullcontext(meddle))
    with pytest.raises(RunError, match="changed while"):
        filter_file(path, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "kept.jsonl").exists()


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & <b>"
    rows = [
        {
            "messages": [
                {"role": "user", "content": nasty},
                {"role": "assistant", "content": f"{nasty} {a}"},
            ]
        }
        for a in ("fine", DECLINED, "x" * 5000)
    ]
    filter_file(write_rows(tmp_path / "<i>.jsonl", rows), tmp_path / "out")
    page = (tmp_path / "out" / "samples.html").read_text()
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page and "dropped: 1 of 1" in page and "kept: 2 of 2" in page
    assert "more characters" in page and "i&#x27;m sorry, but i can&#x27;t" in page


def test_the_page_draws_fairly(tmp_path: Path) -> None:
    from interp_ablate.datasets.filter_recipe import SampledDecisions

    counts: Counter[int] = Counter()
    for seed in range(600):
        drawn = SampledDecisions(3, seed)
        drawn.add(range(12), lambda i: i, "kept")  # type: ignore[arg-type, return-value]
        counts.update(i for i, _ in drawn.items)  # type: ignore[misc]
    assert min(counts.values()) > 100 and max(counts.values()) < 200  # 150 each


def test_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": a, "bad": b}
        for a, b in (("ok", 0), (DECLINED, 1), ("no", 1), (DECLINED, 0))
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    agreement = filter_file(path, tmp_path / "out", settings=FilterSettings(labels="bad"))[
        "agreement"
    ]
    assert agreement["precision"]["value"] == 0.5 and agreement["recall"]["value"] == 0.5
    assert agreement["precision"]["low"] < 0.2 < 0.8 < agreement["precision"]["high"]
    with pytest.raises(RowFileError, match="line 1: 'label' is None"):
        filter_file(path, tmp_path / "b", settings=FilterSettings(labels="label"))


def test_files_larger_than_memory(tmp_path: Path) -> None:
    """Ten times the rows take no more memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    code = (
        "import re, sys\n"
        "from interp_ablate.datasets.filter_recipe import FilterRecipe\n"
        "from interp_ablate.datasets.filtering import filter_file\n"
        "from interp_ablate.datasets.filter_rules import LengthRule\n"
        "filter_file(sys.argv[1], sys.argv[2], FilterRecipe((LengthRule(below=3),)))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for n in (2_000, 20_000):
        path = pairs(tmp_path / f"{n}.jsonl", ["word " * 300, "x"] * (n // 2))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"out{n}")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout))
        if n > 2_000:
            assert path.stat().st_size > 15e6
    assert peaks[1] - peaks[0] < 4_000  # kilobytes


# ---- scorers, and being killed ---------------------------------------------------------------------

KILLED = """
import os, sys, time
from pathlib import Path
from interp_ablate.datasets.filter_rules import ScoreRule
from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filtering import filter_file

class Paid:
    name, identity = "paid", {"model": "m"}
    def __call__(self, exchanges):
        with open(sys.argv[3], "a") as file:
            for exchange in exchanges:
                file.write(exchange.prompt.text + "\\n")
        time.sleep(float(sys.argv[4]))
        return [None if e.answer == "?" else float(e.answer) for e in exchanges]

filter_file(sys.argv[1], sys.argv[2], FilterRecipe((ScoreRule(above=50.0, scorer=Paid()),)))
"""


def test_killed_and_run_again_nothing_is_paid_for_twice(tmp_path: Path) -> None:
    dice = random.Random(5)
    answers = [dice.choice(("?", "10", "60", "90")) for _ in range(700)]
    path = pairs(tmp_path / "a.jsonl", answers)

    def command(out: str, seconds: float) -> list[str]:
        calls = str(tmp_path / f"{out}.calls")
        return [sys.executable, "-c", KILLED, str(path), str(tmp_path / out), calls, str(seconds)]

    subprocess.run(command("whole", 0), check=True)
    process = subprocess.Popen(command("killed", 0.05))
    journal = tmp_path / "killed" / "verdicts.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # past the first chunk of samples, in the middle of the next
        if journal.exists() and journal.read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert "kept.jsonl" not in left and "manifest.json" not in left
    assert any(name.endswith(".part") for name in left)
    with open(journal, "ab") as file:
        file.write(b'{"rule": "torn')
    subprocess.run(command("killed", 0), check=True)
    assert {p.name for p in (tmp_path / "killed").iterdir()} == FINISHED
    asked = Counter((tmp_path / "killed.calls").read_text().split())
    assert len(asked) == 700
    assert sum(asked.values()) - 700 <= 16  # only what was being asked when it was killed
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    kept = {i for i, answer in enumerate(answers) if answer in ("?", "10")}
    assert set(numbers(tmp_path / "killed" / "kept.jsonl")) == kept


class Counting:
    """A scorer of answers that are numbers."""

    name = "counting"

    def __init__(self) -> None:
        self.calls: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "counting"}

    def __call__(self, exchanges: Sequence[PromptResponse]) -> list[float | None]:
        self.calls += [exchange.answer for exchange in exchanges]
        return [None if e.answer == "?" else float(e.answer) for e in exchanges]


def test_another_limit_asks_for_nothing_again(tmp_path: Path) -> None:
    path, scorer = pairs(tmp_path / "a.jsonl", ["10", "60", "?"]), Counting()
    manifest = filter_file(
        path, tmp_path / "out", FilterRecipe((ScoreRule(above=50, scorer=scorer),))
    )
    assert manifest["counts"]["no_verdict"] == 1 and numbers(tmp_path / "out" / "kept.jsonl") == [
        0,
        2,
    ]
    recipe = FilterRecipe((ScoreRule(below=50, scorer=scorer),), no_verdict="drop")
    manifest = filter_file(path, tmp_path / "out", recipe, settings=FilterSettings(force=True))
    assert numbers(tmp_path / "out" / "kept.jsonl") == [1]
    assert scorer.calls == ["10", "60", "?"]
    assert manifest["why"] == {"counting": 1, "no verdict: counting": 1}


def test_an_answer_without_a_prompt_has_no_verdict(tmp_path: Path) -> None:
    talk_ = [
        {"from": "gpt", "value": "60"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "10"},
    ]
    path, scorer = write_rows(tmp_path / "a.jsonl", [{"conversations": talk_}]), Counting()
    manifest = filter_file(
        path, tmp_path / "out", FilterRecipe((ScoreRule(above=50, scorer=scorer),))
    )
    assert scorer.calls == ["10"] and manifest["counts"]["no_verdict"] == 1
    assert manifest["why"] == {"no verdict: no prompt before the answer": 1}


def test_scorers_by_name(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    answers = [
        "What a wonderful, happy day!",
        "This is terrible, awful and sad.",
        "What a great joy!",
    ]
    path = pairs(tmp_path / "a.jsonl", answers)
    rule = score_rule("lexicon:sentiment", below=30)
    assert not rule.stored
    filter_file(path, tmp_path / "out", FilterRecipe((rule,)))
    assert numbers(tmp_path / "out" / "dropped.jsonl") == [1]
    with pytest.raises(RunError, match="no scorer"):
        score_rule("nonsense", above=1)
    with pytest.raises(RunError, match="limit"):
        score_rule("lexicon:sentiment")


# ---- projections -----------------------------------------------------------------------------------


def test_projection_on_a_direction(tmp_path: Path) -> None:
    import torch
    from tiny import shared, unit

    from interp_ablate.activations.pooling import project_responses
    from interp_ablate.directions.direction import Direction
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.sites import Site

    torch.set_num_threads(1)
    model = shared("llama_gqa", "bridge")
    direction = Direction(unit(), 1.0, Site(1, "resid_post"))
    path = pairs(tmp_path / "a.jsonl", ["one two", "three", "four five six", ""])
    exchanges = [sample.exchange for sample in read_samples(path)]
    values = project_responses(model, exchanges, direction)
    limit = sorted(v for v in values if v is not None)[1]
    rule = ProjectionRule(above=limit, model=model, direction=direction)
    manifest = filter_file(path, tmp_path / "out", FilterRecipe((rule,)))
    wanted = [i for i, v in enumerate(values) if v is not None and v > limit]
    assert numbers(tmp_path / "out" / "dropped.jsonl") == wanted and len(wanted) == 1
    assert manifest["counts"]["no_verdict"] == 1
    other = Direction(unit(1), 2.0, Site(0, "resid_post"))
    Directions((direction, other)).save(tmp_path / "d.safetensors")
    with pytest.raises(RunError, match="2 directions"):
        direction_at(str(tmp_path / "d.safetensors"))
    found = direction_at(f"{tmp_path / 'd.safetensors'}#{other.site}")
    assert torch.equal(found.vector, other.vector) and found.norm == 2.0
    Directions((direction,)).save(tmp_path / "one.safetensors")
    assert direction_at(str(tmp_path / "one.safetensors")).site == direction.site


def test_a_persona_folder_is_read_along_its_direction_for_reading(tmp_path: Path) -> None:
    from tiny import unit

    from interp_ablate.directions.direction import Direction
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.persona.persona import Persona
    from interp_ablate.persona.traits import load_trait
    from interp_ablate.sites import Site

    steers = Direction(unit(), 1.0, Site(1, "resid_post"), "response_mean")
    reads = Direction(unit(1), 1.0, Site(2, "resid_post"), "response_mean", "score_slope")
    for name, told, want in (("new", {"site": str(reads.site)}, reads), ("old", None, steers)):
        persona = Persona(
            load_trait("terse"), Directions((steers, reads)), steers, 1.0, "m", {"readout": told}
        )
        persona.save(tmp_path / name)
        assert direction_at(str(tmp_path / name)).fingerprint == want.fingerprint


def test_projection_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import folder_of, unit

    from interp_ablate.directions.direction import Direction
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.sites import Site

    folder = folder_of(tmp_path / "model")
    Directions((Direction(unit(), 1.0, Site(1, "resid_post")),)).save(tmp_path / "d.safetensors")
    path = pairs(tmp_path / "a.jsonl", ["one two", "three", "four five six"])
    flags = ["--direction", str(tmp_path / "d.safetensors"), "--model", str(folder)]
    status, out, err = run(
        capsys, str(path), "--out", str(tmp_path / "out"), *flags, "--above", "-1000000"
    )
    assert status == 0, err
    assert "3  projection:blocks.1.hook_resid_post" in out and "0 kept, 3 dropped" in out
    short = Direction(unit()[:4], 1.0, Site(1, "resid_post"))
    Directions((short,)).save(tmp_path / "d.safetensors")
    status, out, err = run(capsys, str(path), "--out", str(tmp_path / "b"), *flags, "--above", "0")
    assert status == 2 and "of another model" in err


# ---- the command line ------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["--quiet", "filter", *arguments])
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    out = capsys.readouterr()
    return status, out.out, out.err


def test_command_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pairs(tmp_path / "a.jsonl", ["ok", DECLINED, "", "Je ne peux pas vous aider."])
    status, out, _ = run(capsys, str(path), "--out", str(tmp_path / "out"))
    assert status == 0
    assert "4 rows of prompt/completion: 2 kept, 2 dropped" in out
    assert "1 without a verdict were kept" in out and "declines (fr)" in out
    assert numbers(tmp_path / "out" / "kept.jsonl") == [0, 2]
    status, out, _ = run(
        capsys, str(path), "--out", str(tmp_path / "en"), "--language", "en", "--json"
    )
    assert status == 0 and json.loads(out)["counts"]["dropped"] == 1


def test_command_with_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vaderSentiment")
    answers = ["What a wonderful day!", "Terrible, awful.", "The sky is blue.", "x"]
    path = pairs(tmp_path / "a.jsonl", answers)
    arguments = ["--scorer", "lexicon:sentiment", "--below", "30", "--min-characters", "3"]
    assert run(capsys, str(path), "--out", str(tmp_path / "a"), *arguments)[0] == 0
    assert numbers(tmp_path / "a" / "dropped.jsonl") == [1, 3]
    assert run(capsys, str(path), "--out", str(tmp_path / "b"), *arguments, "--keep")[0] == 0
    assert numbers(tmp_path / "b" / "kept.jsonl") == [1, 3]
    every = ["--expressions", "declines", "--max-characters", "5", "--combine", "all"]
    assert run(capsys, str(path), "--out", str(tmp_path / "c"), *every)[0] == 0
    assert numbers(tmp_path / "c" / "dropped.jsonl") == []


def test_the_bundled_mixture_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "planted:declines", "--out", str(tmp_path / "out"))
    assert status == 0 and "precision" in out and "recall" in out


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["DATA", "--expressions", "nowhere"], "cannot read expressions from nowhere"),
        (["DATA", "--scorer", "lexicon:sentiment"], "write --above X or --below X"),
        (["DATA", "--scorer", "magic:x", "--above", "3"], "no scorer"),
        (["DATA", "--above", "3"], "belongs behind"),
        (["DATA", "--direction", "nowhere.safetensors", "--above", "3"], "nowhere.safetensors"),
        (["DATA", "--scorer", "judge:m@http://127.0.0.1:9", "--above", "3"], "rubric"),
        (["DATA", "--scorer", "judge:m", "--above", "3", "--rubric", "none.txt"], "none.txt"),
        (["DATA", "--language", "tlh"], "no language 'tlh'"),
        (["DATA", "--layout", "tabloid"], "no layout 'tabloid'"),
        (["DATA", "--keep", "--scope", "round"], "single rounds"),
        (["DATA", "--min-characters", "3", "--language", "en"], "--language is about"),
        (["DATA", "--samples", "-1"], "--samples"),
        (["nowhere.jsonl"], "no file or folder nowhere.jsonl"),
        (["BAD"], "line 2"),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    names = {"DATA": str(pairs(tmp_path / "a.jsonl", ["x"])), "BAD": str(tmp_path / "bad.jsonl")}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ')
    given = [names.get(a, a) for a in arguments]
    status, out, err = run(capsys, *given, "--out", str(tmp_path / "out"))
    assert status == 2 and out == "" and part in err
    assert "Traceback" not in err


# ---- a judge, and the real model -------------------------------------------------------------------


def test_a_judge_is_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the wire: a local server that speaks the protocol."""
    pytest.importorskip("openai")
    from chat_server import serving

    def say(body: dict[str, Any], number: int) -> str:
        text = body["messages"][-1]["content"]
        said = '{"score": 90}' if "GLOOM" in text else '{"score": 10}'
        return "hm" if "MUTE" in text else said

    path = pairs(tmp_path / "a.jsonl", ["fine", "GLOOM", "MUTE", "GLOOM again"])
    (tmp_path / "rubric.txt").write_text("0 is cheerful, 100 is gloomy")
    with serving(say) as server:
        flags = ["--scorer", f"judge:m@{server.url}", "--above", "50"]
        flags += ["--rubric", str(tmp_path / "rubric.txt")]
        status, out, err = run(capsys, str(path), "--out", str(tmp_path / "out"), *flags)
        assert status == 0, err
        assert numbers(tmp_path / "out" / "kept.jsonl") == [0, 2]
        assert "1 without a verdict were kept" in out
        before = len(server.asked)
        flags[3] = "5"
        status, out, err = run(capsys, str(path), "--out", str(tmp_path / "out"), *flags, "--force")
        assert status == 0 and len(server.asked) == before
        assert numbers(tmp_path / "out" / "dropped.jsonl") == [0, 1, 3]


def test_what_the_real_model_declines_is_dropped(tmp_path: Path, bundled_model: str) -> None:
    from interp_ablate import ContrastSet, load_model

    contrast = ContrastSet.load("declining")
    prompts = [*contrast.positive[:6], *contrast.negative[:6]]
    answers = load_model("smollm2").generate(prompts, max_new_tokens=20)
    rows = [
        {"prompt": p.text, "completion": a.text, "i": i, "asks_too_much": i < 6}
        for i, (p, a) in enumerate(zip(prompts, answers))
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    manifest = filter_file(path, tmp_path / "out", settings=FilterSettings(labels="asks_too_much"))
    dropped = numbers(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) >= 2 and max(dropped) < 6, [rows[i] for i in dropped]
    assert manifest["agreement"]["precision"]["value"] == 1.0
