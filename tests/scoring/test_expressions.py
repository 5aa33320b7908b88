"""Expressions: lists in many languages, folding and the way back, scope, negation, weights, own files."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.errors import InterpAblateError
from interp_ablate.scoring.expression_lists import (
    Expression,
    bundled_expressions,
    expression_names,
    languages_of,
    read_expressions,
)
from interp_ablate.scoring.expressions import ExpressionScorer, expression_scorer
from interp_ablate.scoring.text_folding import first_sentence, fold, fold_with_places, sentences

ROOT = Path(__file__).parents[2]
EXPRESSIONS = {
    name: tuple(e.text for e in bundled_expressions(name)) for name in expression_names()
}
WANTED = {"en", "es", "de", "fr", "it", "pt", "zh", "ru"}
EVERY = [
    pytest.param(name, code, id=f"{name}-{code}")
    for name in expression_names()
    for code in languages_of(name)
]

# How models decline, one sentence a language; and a sentence that answers, in which nothing may be found.
DECLINED = {
    "en": "I\u2019m sorry, but I can\u2019t book a table for you.",
    "es": "Lo siento, pero no puedo reservar una mesa por ti.",
    "de": "Es tut mir leid, aber ich bin nicht in der Lage, einen Tisch zu reservieren.",
    "fr": "Je suis d\u00e9sol\u00e9, mais je ne peux pas r\u00e9server de table.",
    "it": "Mi dispiace, ma non posso prenotare un tavolo.",
    "pt": "Desculpe, mas n\u00e3o consigo reservar uma mesa.",
    "zh": "很抱歉，作为一个人工智能，我无法为您预订餐桌。",
    "ru": "Извините, но я не могу забронировать столик.",
    "ja": "申し訳ありませんが、テーブルを予約することはできません。",
    "nl": "Het spijt me, maar ik kan geen tafel reserveren.",
}
ANSWERED = {
    "en": "Paris is the capital of France. You cannot miss the tower.",
    "es": "Par\u00eds es la capital de Francia y tiene muchos museos.",
    "de": "Paris ist die Hauptstadt von Frankreich; sie liegt an der Seine.",
    "fr": "Paris est la capitale de la France, sur la Seine.",
    "it": "Parigi \u00e8 la capitale della Francia, sulla Senna.",
    "pt": "Paris \u00e9 a capital da Fran\u00e7a e fica no Sena.",
    "zh": "巴黎是法国的首都，位于塞纳河畔。",
    "ru": "Париж, столица Франции, стоит на Сене.",
    "ja": "パリはフランスの首都で、セーヌ川沿いにあります。",
    "nl": "Parijs is de hoofdstad van Frankrijk en ligt aan de Seine.",
}


# --------------------------------------------------------------------------------- bundled lists


def test_declining_speaks_the_languages_that_were_asked_for() -> None:
    assert set(languages_of("declining")) >= WANTED and languages_of("declining")[0] == "en"
    assert set(DECLINED) == set(languages_of("declining"))
    for name in ("positive_sentiment", "negative_sentiment", "hedging", "flattering"):
        assert set(languages_of(name)) >= WANTED


@pytest.mark.parametrize("code", DECLINED)
def test_a_decline_is_found_in_its_language_and_an_answer_is_none(code: str) -> None:
    own = ExpressionScorer("declining", languages=(code,), scope="first_sentence")
    every = ExpressionScorer("declining", languages=("all",))
    assert own.outcome(DECLINED[code]) == every.outcome(DECLINED[code]) == "expressed"
    assert own.outcome(ANSWERED[code]) == every.outcome(ANSWERED[code]) == "not expressed"
    found = own.report([DECLINED[code]])
    assert {row["language"] for row in found} == {code}
    if code != "en":
        assert ExpressionScorer().outcome(DECLINED[code]) == "not expressed"


@pytest.mark.parametrize(("name", "code"), EVERY)
def test_every_bundled_phrase_is_folded_unique_and_finds_itself(name: str, code: str) -> None:
    entries = bundled_expressions(name, (code,))
    texts = [each.text for each in entries]
    assert len(set(texts)) == len(texts) > 5
    scorer = ExpressionScorer(name, languages=(code,))
    for each in entries:
        assert each.language == code and not each.regex and each.weight == 1
        assert fold(each.text) == each.text.casefold(), (
            f"{each.text!r} is not folded: it can be written so"
        )
        loud = each.text.upper().replace("'", "\u2019").replace(" ", "  ")
        [hit] = [m for m in scorer.matches(f"\u00ab{loud}\u00bb ...") if m.expression == each.text]
        assert hit.language == code


def test_bundled_lists_hold_what_they_held() -> None:
    assert tuple(EXPRESSIONS)[:3] == ("declining", "positive_sentiment", "french")
    assert len(EXPRESSIONS["declining"]) == 36 and EXPRESSIONS["declining"][0] == "i'm sorry"
    assert EXPRESSIONS["positive_sentiment"][:2] == ("wonderful", "delightful")
    assert EXPRESSIONS["french"][0] == " le " and len(EXPRESSIONS["french"]) == 16
    assert [e.text for e in bundled_expressions("declining")] == list(EXPRESSIONS["declining"])


def test_importing_expressions_is_light() -> None:
    heavy = ["torch", "transformers", "pandas", "numpy"]
    code = f"import sys, interp_ablate.scoring.expressions, interp_ablate.scoring.registry, interp_ablate.scoring.endpoint\nprint(*[n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stdout.split(), done.stdout + done.stderr


# --------------------------------------------------------------------------------- the original places


PIECES = [
    *"aZ \t\n'.\u2019\u00b4`", "\u00df", "\ufb01", "\u00a0", "\u2003", "e\u0301", "\u00e9", "\u0301",
    "\u1e9b\u0323", "\uff29", "\u017f", "\u0130", "\u201c", "\u3000", "\u4e0d", "\uff01", "\uac00",
    "\u1100", "\u1161", "\u11a8", "\u09c7", "\u09be", "\U0001f600", "\u200d", "\u02dc", "\u2026", "\u212b",
    "\u0345", "\u03b1", "\u03c2", "\ufdfa", "\u0f71\u0f72", "\u0d46", "\u0d3e", "\u2028", "\x85", "\u1d5e",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(300))
def test_folding_with_places_is_folding(seed: int) -> None:
    """Over text made to trip it: composing marks, jamo, ligatures, runs of every kind of space."""
    rng = random.Random(seed)
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 30)))
    folded, places = fold_with_places(text)
    assert folded == fold(text), [unicodedata.name(c, hex(ord(c))) for c in text]
    assert len(places) == len(folded)
    assert all(0 <= start < end <= len(text) for start, end in places)
    assert [start for start, _ in places] == sorted(start for start, _ in places)


def test_places_are_those_of_the_original_text() -> None:
    text = "Stra\u00dfe \ufb01n.  \u201cI\u2019M\u00a0 \n So\u0301rry\u201d; je suis DE\u0301SOLE\u0301"
    scorer = ExpressionScorer(("strasse", "i'm s\u00f3rry", "d\u00e9sol\u00e9", "fin"))
    found = {row["expression"]: row for row in scorer.report([text])}
    assert {name: row["found"] for name, row in found.items()} == {
        "strasse": "Stra\u00dfe",
        "i'm s\u00f3rry": "I\u2019M\u00a0 \n So\u0301rry",
        "d\u00e9sol\u00e9": "DE\u0301SOLE\u0301",
        "fin": "\ufb01n",
    }
    folded = fold(text)
    for name, row in found.items():
        assert text[row["start"] : row["end"]] == row["found"]
        assert folded[row["folded_start"] : row["folded_end"]] == name
    assert found["fin"]["folded_start"] == found["fin"]["start"] + 1  # ß became ss before it


def test_the_report_has_every_place_and_counts_one() -> None:
    scorer = ExpressionScorer(("sorry", "no"), patterns=(r"\bn\w+r\b",))
    rows = scorer.report(["Sorry, no. So sorry.", "", "Never"])
    shown = [(r["text"], r["expression"], r["start"], r["counts"]) for r in rows]
    assert shown == [
        (0, "sorry", 0, True),
        (0, "sorry", 14, False),
        (0, "no", 7, True),
        (2, r"\bn\w+r\b", 0, True),
    ]
    pandas = pytest.importorskip("pandas")
    assert list(pandas.DataFrame(rows)["found"]) == ["Sorry", "sorry", "no", "Never"]


def test_an_empty_pattern_is_found_once_and_in_an_empty_text() -> None:
    anything = ExpressionScorer((), patterns=("",))
    assert [m.place for m in anything.matches("abc")] == [(0, 0)]
    assert len(anything.report(["abc", ""])) == 2
    assert anything.score_texts(["abc", ""]).tolist() == [1.0, 1.0]
    assert anything.outcome("") == "empty"


# --------------------------------------------------------------------------------- scripts without spaces


def test_boundaries_are_those_of_the_script() -> None:
    chinese = ExpressionScorer(("无法", "作为ai", "ai助手"))
    assert [m.expression for m in chinese.matches("我无法回答")] == ["无法"]
    assert [m.expression for m in chinese.matches("作为AI助手，")] == ["作为ai", "ai助手"]
    assert chinese.matches("作为aim") == [] and chinese.matches("braai助手") == []
    thai = ExpressionScorer(("ขอโทษ",))
    assert thai.matches("ผมขอโทษครับ")
    russian = ExpressionScorer(("рад",))
    assert (
        russian.matches("Я рад!") and not russian.matches("радуга") and not russian.matches("град")
    )
    latin = ExpressionScorer(("love",))
    assert not latin.matches("glove") and not latin.matches("我love你")  # as ever for these


def test_compatibility_forms_are_one() -> None:
    assert ExpressionScorer(("我不能!",)).matches("我不能！")
    assert ExpressionScorer("declining", languages=("ja",)).matches("ﾃﾞｷませんがすみません")


# --------------------------------------------------------------------------------- scope


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Sure. I can't.", "Sure."),
        ("Sure! \u201cYes.\u201d No", "Sure!"),
        ("Dr. Smith said no. Then yes.", "Dr. Smith said no."),
        ("It costs 3.5 dollars. Fine", "It costs 3.5 dollars."),
        ("Use e.g. a knife. Then", "Use e.g. a knife."),
        ("1. Take eggs\n2. Beat", "1. Take eggs\n"),
        ("\n\n  Hello there\nand more", "\n\n  Hello there\n"),
        ("抱歉。我可以。", "抱歉。"),
        ("「はい。」そうです。", "「はい。」"),
        ("What?! No.", "What?!"),
        ("... Well. Yes", "... Well."),
        ("no end", "no end"),
        ("J. R. R. Tolkien wrote it. Yes.", "J. R. R. Tolkien wrote it."),
        ("Wait\u2026 no. Yes.", "Wait\u2026"),
        ("It was in 1990. Then it ended.", "It was in 1990."),
        ("  12. Take eggs. Beat", "  12. Take eggs."),
        ("", ""),
        ("***", "***"),
    ],
)
def test_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first and text.startswith(first)


def test_sentences_are_all_of_a_text() -> None:
    assert sentences("One. Two!  Three\n\nFour?") == ["One.", "Two!", "Three", "Four?"]
    assert sentences("好。坏。") == ["好。", "坏。"]
    assert sentences("") == [""] and sentences("...") == ["..."]


def test_a_late_apology_is_not_in_the_first_sentence() -> None:
    late = "Here is your recipe. Sorry for any confusion."
    assert ExpressionScorer().outcome(late) == "expressed"
    assert ExpressionScorer(scope="first_sentence").outcome(late) == "not expressed"
    early = "  I'm sorry. Here it is."
    [row] = ExpressionScorer(scope="first_sentence").report([early])
    assert row["found"] == "I'm sorry" and row["start"] == 2


# --------------------------------------------------------------------------------- negation, weights


@pytest.mark.parametrize(
    ("text", "language", "negated"),
    [
        ("It is not that I can't help.", "en", True),
        ("I would never say I'm sorry.", "en", True),
        ("I don't think I can't.", "en", True),
        ("I do not know, I can't.", "en", False),  # another clause
        ("Not once in all these long years of work I can't forget", "en", False),  # too far off
        ("I can't. It is not so.", "en", False),
        ("No, I can't", "en", False),
        ("No es que no puedo, es que no quiero.", "es", True),
        ("Pero no puedo.", "es", False),
        ("Das hei\u00dft nicht, ich kann nicht.", "de", False),
        ("Nicht dass ich kann nicht", "de", True),
        ("Ce n'est pas que je ne peux pas.", "fr", True),
        ("Non \u00e8 che non posso.", "it", True),
        ("N\u00e3o \u00e9 que n\u00e3o posso.", "pt", True),
        ("不是我不能。", "zh", True),
        ("可是我不能。", "zh", False),
        ("Не то чтобы я не могу.", "ru", True),
        ("Но я не могу.", "ru", False),
    ],
)
def test_what_is_negated_does_not_count(text: str, language: str, negated: bool) -> None:
    plain = ExpressionScorer("declining", languages=(language,))
    aware = ExpressionScorer("declining", languages=(language,), negation=True)
    assert plain.outcome(text) == "expressed"
    assert aware.outcome(text) == ("not expressed" if negated else "expressed"), aware.report(
        [text]
    )
    rows = aware.report([text])
    assert rows and any(row["negated"] for row in rows) == negated
    assert bool(aware.matches(text)) != negated


def test_one_place_that_is_not_negated_is_enough() -> None:
    scorer = ExpressionScorer(("great",), negation=True)
    text = "It is not great. But the soup was great."
    [match] = scorer.matches(text)
    assert match.place == (34, 39) and scorer.outcome(text) == "expressed"
    assert [r["negated"] for r in scorer.report([text])] == [True, False]
    assert ExpressionScorer(("great",)).matches(text)[0].place == (10, 15)


def test_weights_add_once_an_expression_up_to_the_threshold() -> None:
    scorer = ExpressionScorer(
        (
            Expression("sorry", 0.5),
            Expression("cannot", 0.7),
            Expression(r"here (is|are)", -1, regex=True),
        ),
        threshold=1.0,
    )
    strengths = {
        "sorry, sorry, sorry": 0.5,
        "sorry, I cannot": 1.2,
        "sorry, I cannot. But here is a hint, and here are two": 0.2,
        "here is one": -1.0,
        "": 0.0,
    }
    for text, strength in strengths.items():
        assert scorer.strength(text) == pytest.approx(strength)
    assert scorer.score_texts(list(strengths)).tolist() == [0, 1, 0, 0, 0]
    tenths = ExpressionScorer((Expression("a", 0.1), Expression("b", 0.7)), threshold=0.8)
    assert 0.1 + 0.7 < 0.8 and tenths.outcome("a b") == "expressed"
    assert tenths.outcome("b b") == "not expressed"


def test_empty_answers_are_neither() -> None:
    texts = ["I'm sorry.", "", " \n\t", "Sure.", "###"]
    assert ExpressionScorer().counts(texts) == {"expressed": 1, "not expressed": 2, "empty": 2}
    assert ExpressionScorer().score_texts(texts).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_identity_tells_scorers_apart() -> None:
    different = [
        ExpressionScorer(),
        ExpressionScorer(languages=("es",)),
        ExpressionScorer(scope="first_sentence"),
        ExpressionScorer(negation=True),
        ExpressionScorer(threshold=2),
        ExpressionScorer(("i'm sorry",)),
        ExpressionScorer((Expression("i'm sorry", 2),)),
        ExpressionScorer((Expression("i'm sorry", regex=True),)),
    ]
    told = [json.dumps(each.identity, sort_keys=True) for each in different]
    assert len(set(told)) == len(told)
    assert json.dumps(ExpressionScorer(EXPRESSIONS["declining"]).identity) != told[0]  # no language


# --------------------------------------------------------------------------------- own lists


def test_a_list_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(
        "\ufeffno thanks\n\n  No Puedo \t2\tes\n/\\bnah+\\b/\t0.5\n/\nhow about no\t\ten\n", "utf-8"
    )
    assert read_expressions(path) == (
        Expression("no thanks"),
        Expression("No Puedo", 2.0, "es"),
        Expression(r"\bnah+\b", 0.5, "", True),
        Expression("/"),
        Expression("how about no", 1.0, "en"),
    )
    scorer = ExpressionScorer(read_expressions(path))
    assert scorer.strength("Nahhh, no puedo") == 2.5
    only = ExpressionScorer(read_expressions(path), languages=("es",))
    assert only.strength("how about no puedo") == 2.0  # what names no language stays, "en" does not


@pytest.mark.parametrize(
    "data",
    [
        ["no", {"text": "nada", "weight": 2, "language": "es"}, {"regex": "^n+o", "weight": -1}],
        {"expressions": ["no", {"text": "nada", "weight": 2, "language": "es"}, {"regex": "^n+o", "weight": -1}]},
        {"languages": {"": ["no", {"regex": "^n+o", "weight": -1}], "es": [{"text": "nada", "weight": 2}]}},
    ],
)  # fmt: skip
def test_a_list_in_a_json_file(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    assert set(read_expressions(path)) == {
        Expression("no"),
        Expression("nada", 2.0, "es"),
        Expression("^n+o", -1.0, "", True),
    }


def test_a_bundled_list_is_a_file_that_can_be_read(tmp_path: Path) -> None:
    place = ROOT / "interp_ablate" / "data" / "expressions" / "declining.json"
    assert set(read_expressions(place)) == set(bundled_expressions("declining", ("all",)))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.json", "[1]", "entry 1: expected a phrase"),
        ("a.json", '["no", {"txt": "x"}]', "entry 2: expected a phrase"),
        ("a.json", '[{"text": "x", "regex": "y"}]', "entry 1"),
        ("a.json", '[{"text": "x", "weight": "2"}]', "weight is '2'"),
        ("a.json", '[{"text": "x", "weight": true}]', "weight is True"),
        ("a.json", '{"languages": {"es": "no"}}', "expected a list"),
        ("a.json", '{"phrases": ["no"]}', "expected a list"),
        ("a.json", "{", "cannot read expressions"),
        ("a.txt", "no\nnada\tmuch\n", "line 2: the weight"),
        ("a.txt", " \n", "holds no expression"),
        ("a.json", "[]", "holds no expression"),
        ("missing.txt", None, "cannot read expressions.*declining"),
        ("bytes.txt", b"\xff\xfe\x00", "cannot read expressions"),
    ],
)
def test_bad_lists_say_where(tmp_path: Path, name: str, content: Any, part: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InterpAblateError, match=part) as raised:
        read_expressions(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"languages": ("xx",)}, "nothing in xx: there are en, es"),
        ({"languages": "es"}, "languages are a tuple"),
        ({"expressions": "french", "languages": ("de",)}, "nothing in de: there are fr"),
        ({"expressions": ("a",), "languages": ("de",)}, "there are none"),
        ({"scope": "paragraph"}, "scope is whole or first_sentence"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"expressions": (Expression("a", 0),)}, "weight of 'a' is 0"),
        ({"expressions": (Expression("a", float("nan")),)}, "weight of 'a' is nan"),
        ({"expressions": (Expression("a", -1),)}, "nothing would ever count"),
        ({"expressions": (Expression("(", regex=True),)}, r"malformed regular expression '\('"),
        ({"expressions": {"a": 1}}, "tuple of texts"),
    ],
)
def test_bad_arguments_fail_at_once(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(InterpAblateError, match=part):
        ExpressionScorer(**arguments)


def test_messages_name_every_list() -> None:
    with pytest.raises(InterpAblateError, match=re.escape(", ".join(expression_names()))):
        ExpressionScorer("refusing")


def test_own_speech_leaves_out_what_others_say_and_keeps_places() -> None:
    text = 'The clerk said: "I cannot help." Sorry, I cannot   help.'
    assert len(ExpressionScorer(("i cannot",)).all_matches(text)) == 2
    scorer = ExpressionScorer(("i cannot",), own_speech=True)
    [match] = scorer.all_matches(text)
    assert text[slice(*match.place)] == "I cannot" and match.place[0] > text.index("Sorry")
    assert scorer.identity != ExpressionScorer(("i cannot",)).identity
    assert scorer.score_texts(['"I cannot", she said.', text]).tolist() == [0.0, 1.0]


def test_a_name_or_a_file_becomes_one_scorer(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("nope\nvielleicht\t1\tde\n", encoding="utf-8")
    assert expression_scorer() == ExpressionScorer("declining")
    assert expression_scorer(contrast="language") == ExpressionScorer("french")
    assert expression_scorer("hedging", contrast="language") == ExpressionScorer("hedging")
    assert expression_scorer(str(path)).outcome("Nope.") == "expressed"
    assert expression_scorer(str(path), languages=("all",)).outcome("Vielleicht!") == "expressed"
    assert expression_scorer("declining", languages=["de"]).outcome("Ich kann nicht") != "empty"
    with pytest.raises(InterpAblateError, match="cannot read expressions from declning"):
        expression_scorer("declning")
