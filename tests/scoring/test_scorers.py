"""Scorers of answers: expressions, lexicons, classifiers; scorers from text; the `score` command."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

from interp_ablate.cli.main import main
from interp_ablate.errors import InterpAblateError, RunError
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.classifier import ClassifierScorer, _folder_print
from interp_ablate.scoring.exchange import PromptResponse, ReversedScorer, TextScorer
from interp_ablate.scoring.expression_lists import Expression
from interp_ablate.scoring.expressions import ExpressionScorer, ExpressionTextScorer
from interp_ablate.scoring.lexicon import LexiconScorer
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.scoring.text_folding import fold

# Written for this test: the same content in two moods.
CHEERFUL = (
    "What a lovely morning! The garden is full of flowers and I feel happy just looking at it.",
    "Great news: your plan sounds wonderful, and I am sure you will enjoy every step of the journey.",
    "Baking bread is such a joy. The smell alone makes a kitchen warm and friendly.",
    "I'm delighted to help! Learning to swim is fun, and you will love the feeling of floating.",
    "Rain is perfect for a cosy afternoon with a good book and a nice cup of tea.",
    "Your team did a fantastic job, and the best part is that everyone smiled at the end.",
)
GLOOMY = (
    "What a dreary morning. The garden is full of weeds and I feel sad just looking at it.",
    "Bad news: your plan sounds hopeless, and I fear you will suffer at every step of the journey.",
    "Baking bread is such a misery. The smoke alone makes a kitchen cold and unpleasant.",
    "I hate to say it, but learning to swim is awful, and you will dread the feeling of sinking.",
    "Rain is terrible for a lonely afternoon with a dull book and a bitter cup of tea.",
    "Your team did a poor job, and the worst part is that everyone cried at the end.",
)
FORMAL = (
    "Furthermore, we respectfully request that you provide the documentation prior to the examination.",
    "The committee shall subsequently inform all participants regarding the administrative requirements.",
)
CASUAL = (
    "Hey, it's really cool stuff! You're gonna love it, it's pretty awesome.",
    "Yeah, I dunno, that's kinda weird, but whatever, let's get going!",
)


def exchanges(*answers: str) -> list[PromptResponse]:
    return [PromptResponse(Prompt(f"Question {i}?"), answer) for i, answer in enumerate(answers)]


def scored(scorer: TextScorer, *answers: str) -> list[float]:
    found = scorer(exchanges(*answers))
    assert None not in found, found
    return found  # type: ignore[return-value]


# --------------------------------------------------------------------------------- lexicons


def test_sentiment_separates_cheerful_from_gloomy() -> None:
    pytest.importorskip("vaderSentiment")
    sentiment = make_scorer("lexicon:sentiment")
    cheerful, gloomy = scored(sentiment, *CHEERFUL), scored(sentiment, *GLOOMY)
    assert min(cheerful) > 60 > 40 > max(gloomy)
    assert scored(sentiment, "The train leaves at nine from the second platform.") == [50.0]
    turned = scored(make_scorer("lexicon:-sentiment"), *CHEERFUL)
    assert turned == pytest.approx([100 - score for score in cheerful])


def test_sentiment_is_a_mean_over_sentences_and_does_not_saturate_with_length() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = "It was a good day.", "It was a bad day."
    one, mixed, many = scored(LexiconScorer(), good, f"{good} {bad}", " ".join([good] * 20))
    assert many == pytest.approx(one) and 40 < mixed < 60 < one < 90
    curly, straight = scored(
        LexiconScorer(), "I don\u2019t like the soup.", "I don't like the soup."
    )
    assert curly == straight < 50


@pytest.mark.parametrize(
    "text",
    [
        "这是一个美好的早晨，我很高兴。",
        "Сегодня замечательное утро, и я очень рад его видеть.",
        "Quel beau matin, le jardin est plein de fleurs et je suis tellement heureux de le regarder.",
        "Heute ist ein wunderbarer Morgen, und der ganze Garten steht voller bunter Blumen.",
        "Que dia lindo, estou t\u00e3o feliz!",
        "Estou muito feliz com a festa de hoje e com os amigos que vieram.",
        "\u00a1Qu\u00e9 alegr\u00eda verte de nuevo!",
        "Me encanta, es una noticia fantastica para la familia y para mi.",
        "Che bella giornata, sono felice!",
        "La festa di ieri era perfetta e il regalo era super.",
        "Quelle bonne nouvelle, je suis ravi !",
        "Das ist so schade, aber die Reise war super und ich freue mich.",
        "So ein Spass in der Stadt, ich war die ganze Zeit happy.",
        "Wat een mooie dag, ik ben zo blij!",
        "Het was een super feest in de stad met al mijn vrienden.",
        "Jag \u00e4r s\u00e5 glad idag!",
    ],
)
def test_an_english_lexicon_says_nothing_of_other_languages(text: str) -> None:
    pytest.importorskip("vaderSentiment")
    for measure in ("sentiment", "formality"):
        [verdict] = make_scorer(f"lexicon:{measure}").explain(exchanges(text))
        assert (verdict.score, verdict.why) == (None, "not English")
    assert scored(make_scorer("lexicon:length"), text)[0] > 5


def test_a_short_answer_is_judged_where_one_of_its_words_is_known() -> None:
    pytest.importorskip("vaderSentiment")
    told = make_scorer("lexicon:sentiment").explain(
        exchanges(
            "Great!",
            "Awful.",
            "Yes, it is.",
            "Paris.",
            "42",
            "A caf\u00e9 in the old town is nice.",
        )
    )
    assert [verdict.why for verdict in told] == ["", "", "", *["no word that is known"] * 2, ""]
    assert told[0].score > 60 > 40 > told[1].score  # type: ignore[operator]


def test_formality_and_length() -> None:
    formality = make_scorer("lexicon:formality")
    assert min(scored(formality, *FORMAL)) > 75 > 30 > max(scored(formality, *CASUAL))
    assert scored(formality, "The cat sat on the mat.") == [50.0]
    words = [" ".join(["word"] * n) for n in (1, 60, 600)]
    assert scored(make_scorer("lexicon:length"), *words) == pytest.approx(
        [100 / 61, 50, 100 * 600 / 660]
    )
    assert scored(make_scorer("lexicon:length?half=1"), "one") == [50.0]
    assert scored(LexiconScorer("length"), "四个汉字") == pytest.approx([100 * 4 / 64])


@pytest.mark.parametrize("spec", ["lexicon:sentiment", "lexicon:-length", "expressions:declining"])
def test_an_empty_answer_has_no_verdict(spec: str) -> None:
    if "sentiment" in spec:
        pytest.importorskip("vaderSentiment")
    verdicts = make_scorer(spec).explain(exchanges("", " \n", "It is fine."))
    assert [v.score is None for v in verdicts] == [True, True, False]
    assert Counter(v.why for v in verdicts if v.score is None) == {"empty answer": 2}
    assert make_scorer(spec).explain([]) == []


# --------------------------------------------------------------------------------- expressions


def test_expressions_from_0_to_100_and_what_matched() -> None:
    scorer = ExpressionTextScorer(
        ExpressionScorer((Expression("sorry", 1), Expression("cannot", 1), Expression("here is", -1)), threshold=2)
    )  # fmt: skip
    answers = (
        "Sorry.",
        "Sorry, I cannot.",
        "Fine.",
        "Here is one.",
        "Sorry, sorry: I cannot, cannot",
    )
    assert scored(scorer, *answers) == [50.0, 100.0, 0.0, 0.0, 100.0]
    verdict = scorer.explain(exchanges(*answers))[1]
    assert [(m["expression"], m["start"]) for m in verdict.detail["matches"]] == [
        ("sorry", 0),
        ("cannot", 9),
    ]


def test_expressions_by_name_file_and_options(tmp_path: Path) -> None:
    assert scored(make_scorer("expressions:declining"), "I'm sorry.", "No puedo.") == [100.0, 0.0]
    spec = "expressions:declining?languages=en,es&scope=first_sentence&negation=true"
    answers = ("No puedo.", "Claro. No puedo.", "It is not that I can't.")
    assert scored(make_scorer(spec), *answers) == [100.0, 0.0, 0.0]
    assert scored(make_scorer("expressions:-declining"), "I'm sorry.", "Yes.") == [0.0, 100.0]
    own = tmp_path / "own.txt"
    own.write_text("nope\t0.5\n")
    assert scored(make_scorer(f"expressions:{own}"), "Nope.") == [50.0]
    parts = make_scorer(
        {"scorer": f"expressions:{own}", "threshold": 0.5, "scope": "first_sentence"}
    )
    assert scored(parts, "Nope.", "Hm. Nope.") == [100.0, 0.0]
    assert parts.name == "expressions:own"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("sentiment", "no scorer 'sentiment': give expressions:NAME"),
        ("lexicon", "no scorer"),
        ("lexicon:", "no scorer"),
        ("oracle:x", "no scorer"),
        ("lexicon:humor", "there are sentiment, formality, length.*judge"),
        ("lexicon:length?half=0", "half is a number of words above 0"),
        ("lexicon:length?size=3", "no option size"),
        ("lexicon:length?half=ten", "half is a number"),
        ("expressions:declning", "cannot read expressions from declning.*declining"),
        ("expressions:declining?negation=maybe", "true or false"),
        ("expressions:declining?languages=xx", "nothing in xx"),
        ("classifier:/no/such/folder", "no classifier in"),
        ("judge:m@http://127.0.0.1:1/v1", "needs a rubric"),
        ({"scorer": "lexicon:length", "halves": 3}, "no option halves"),
        ({"lexicon": "length"}, "no scorer ''"),
    ],
)
def test_a_scorer_that_cannot_be(spec: Any, part: str) -> None:
    with pytest.raises(InterpAblateError, match=part):
        make_scorer(spec)


def test_identities_tell_scorers_apart() -> None:
    specs = ["expressions:declining", "expressions:-declining", "expressions:hedging",
             "lexicon:formality", "lexicon:length", "lexicon:length?half=9", "lexicon:-length",
             "expressions:declining?scope=first_sentence"]  # fmt: skip
    told = [json.dumps(make_scorer(spec).identity, sort_keys=True) for spec in specs]
    assert len(set(told)) == len(told)


def test_any_text_scorer_can_be_reversed() -> None:
    class Own:
        name, identity = "own", {"a": 1}

        def __call__(self, given: Any) -> list[float | None]:
            return [None if "?" in e.answer else 10.0 for e in given]

    turned = ReversedScorer(Own())
    assert turned(exchanges("a", "b?", "")) == [90.0, None, None]
    assert (turned.name, turned.identity) == ("-own", {"reversed": {"a": 1}})


# --------------------------------------------------------------------------------- classifiers


def classifier(place: Path, labels: tuple[str, ...] = ("calm", "angry"), **more: Any) -> Path:
    """A tiny random text-classification model, saved as published ones are."""
    _, tokenizer = tiny("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
        pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=2.0)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def probabilities(folder: Path, text: str, pair: str | None = None) -> torch.Tensor:
    """By the model itself, cut at its 64 positions."""
    from transformers import AutoTokenizer

    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text, pair, return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad():
        logits = model(**{k: v for k, v in encoded.items() if k != "token_type_ids"}).logits[0]
    return logits.sigmoid() if len(logits) == 1 else logits.softmax(-1)


def test_a_classifier_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = classifier(tmp_path / "mood")
    scorer = make_scorer(f"classifier:{folder}#angry")
    answers = ("Good morning.", "Go away!", "word " * 60)
    expected = [100 * float(probabilities(folder, text)[1]) for text in answers]
    verdicts = scorer.explain(exchanges(*answers, ""))
    assert [v.score for v in verdicts[:3]] == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 1
    assert [v.detail for v in verdicts[:3]] == [{}, {}, {"cut": True}]
    assert verdicts[3].why == "empty answer"
    assert "read the first 64 tokens of 1 of 3 texts" in caplog.text
    calm = make_scorer({"scorer": f"classifier:{folder}", "label": "calm"})
    assert scored(calm, answers[0]) == pytest.approx([100 - expected[0]], abs=1e-3)
    turned = make_scorer(f"classifier:-{folder}#angry")
    assert scored(turned, answers[0]) == pytest.approx([100 - expected[0]], abs=1e-3)
    assert scorer.name == "classifier:mood#angry"


def test_a_classifier_that_is_loaded_and_one_of_pairs(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "mood")
    loaded = pipeline("text-classification", model=str(folder))
    scorer = ClassifierScorer(loaded, "angry")
    assert scored(scorer, "Go away!") == pytest.approx(
        [100 * float(probabilities(folder, "Go away!")[1])], abs=1e-3
    )
    pairs = ClassifierScorer(folder, "angry", with_prompt=True)
    expected = 100 * float(probabilities(folder, "Question 0?", "Go away!")[1])
    assert scored(pairs, "Go away!") == pytest.approx([expected], abs=1e-3)
    assert json.dumps(pairs.identity) != json.dumps(ClassifierScorer(folder, "angry").identity)
    before = scorer.identity
    with torch.no_grad():
        loaded.model.score.weight.mul_(1.01)
    assert ClassifierScorer(loaded, "angry").identity != before


def test_other_weights_are_another_classifier(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = classifier(tmp_path / "mood")
    before = ClassifierScorer(folder, "angry").identity
    assert ClassifierScorer(folder, "angry").identity == before
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v + 0.1 for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert ClassifierScorer(folder, "angry").identity != before


def test_every_byte_of_a_folder_counts(tmp_path: Path) -> None:
    data, found = bytearray(4 << 20), set()
    for place in (0, 3 << 19, 5 << 19, (4 << 20) - 1):
        data[place] = 1
        (tmp_path / "model.bin").write_bytes(data)
        found.add(_folder_print(tmp_path))
    assert len(found) == 4


def test_labels_are_chosen_and_never_guessed(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "two")
    with pytest.raises(RunError, match=r"which label.*calm, angry"):
        ClassifierScorer(folder)
    with pytest.raises(RunError, match="no label 'Angry'; there are calm, angry"):
        ClassifierScorer(folder, "Angry")
    one = classifier(tmp_path / "one", ("toxic",))
    only = ClassifierScorer(one)
    assert only.label == "toxic"
    expected = 100 * float(probabilities(one, "Go away!")[0])
    assert scored(only, "Go away!") == pytest.approx([expected], abs=1e-3)
    number = classifier(tmp_path / "number", ("x",), problem_type="regression")
    with pytest.raises(RunError, match="is a regression"):
        ClassifierScorer(number)


def test_a_folder_without_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no classifier in"):
        ClassifierScorer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="cannot load a text-classification model"):
        ClassifierScorer(tmp_path)


# --------------------------------------------------------------------------------- the command


def rows_file(place: Path) -> Path:
    rows = [
        {"prompt": "Book a table.", "response": "I\u2019m sorry, I can\u2019t."},
        {"prompt": "Book a car.", "response": "Done!"},
        {"prompt": "Say nothing.", "response": ""},
        {"prompt": "Book a room.", "response": "Sure. Sorry for any delay."},
    ]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_the_command_writes_scores_and_matches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = rows_file(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    command = ["--quiet", "score", str(source), "--scorer", "expressions:declining"]
    assert main([*command, "--scorer", "lexicon:-length", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[:4] == ["expressions:declining", "all", "3", "66.7"]
    assert lines[1].endswith("1 empty answer") and "-lexicon:length" in lines[2]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["expressions:declining"] for row in rows] == [100.0, 0.0, None, 100.0]
    assert rows[2]["expressions:declining: no verdict"] == "empty answer"
    found = rows[0]["expressions:declining: detail"]
    assert [rows[0]["answer"][m["start"] : m["end"]] for m in found] == [
        "I\u2019m sorry",
        "I can\u2019t",
    ]
    assert main([*command, "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    table = tmp_path / "out.csv"
    assert main([*command, "--out", str(table), "--json"]) == 0
    [line] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert line["n"] == 3 and line["no verdict"] == {"empty answer": 1}
    assert line["low"] < line["mean"] < line["high"]
    with table.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert cells[0]["expressions:declining: detail"] == "i'm sorry@0-9; i can't@11-18"
    assert cells[2]["expressions:declining"] == "" and cells[1]["expressions:declining"] == "0.0"


def test_the_command_reads_a_runs_answers_by_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "label": side,
            "prompt": f"p {i}",
            "condition": condition,
            "text": text,
            "expressed": False,
        }
        for condition, text in (("baseline", "I'm sorry."), ("edited", "Sure."))
        for side in ("positive", "negative")
        for i in range(3)
    ]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scorer = ["--scorer", "expressions:declining"]
    assert main(["--quiet", "score", str(tmp_path), *scorer, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["of"], line["n"], line["mean"]) for line in lines} == {
        ("baseline, positive", 3, 100.0),
        ("baseline, negative", 3, 100.0),
        ("edited, positive", 3, 0.0),
        ("edited, negative", 3, 0.0),
    }
    exact = 100 * 0.025 ** (1 / 3)  # Clopper and Pearson: three of three is no certainty
    assert lines[0]["low"] == pytest.approx(exact) and lines[0]["high"] == 100
    place = str(tmp_path / "generations.jsonl")
    assert main(["--quiet", "score", place, *scorer, "--by", "condition", "--json"]) == 0
    assert [json.loads(x)["n"] for x in capsys.readouterr().out.splitlines()] == [6, 6]
    assert main(["--quiet", "score", place, *scorer, "--by", "colour"]) == 2
    assert "has no colour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "more", "part"),
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": 3}\n', [], "line 2"),
        (
            '{"prompt": "a", "edited": "b"}\n{"prompt": "c"}\n',
            ["--answer", "edited"],
            "line 2: expected texts",
        ),
        ('{"prompt": " ", "edited": "b"}\n', ["--answer", "edited"], "line 1"),
        ('{"question": "a"}\n', [], "line 1"),
        ("", [], "empty"),
        ('{"prompt": "a", "response": "b"}\n', ["--out", "x.txt"], "ends in .csv or .jsonl"),
        (
            '{"prompt": "a", "response": "b"}\n',
            ["--rubric", "@/no/rubric"],
            "cannot read the rubric",
        ),
        (
            '{"prompt": "a", "response": "b"}\n',
            ["--scorer", "expressions:declining"],
            "given twice",
        ),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, more: list[str], part: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(content)
    command = ["--quiet", "score", str(source), "--scorer", "expressions:declining", *more]
    assert main(command) == 2
    assert part in capsys.readouterr().err


def test_the_command_scores_one_of_several_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "baseline": "I\'m sorry.", "edited": "Sure."}\n' * 2)
    for key, mean in (("baseline", 100.0), ("edited", 0.0)):
        command = ["score", str(source), "--scorer", "expressions:declining", "--answer", key]
        assert main(["--quiet", *command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["mean"] == mean


# --------------------------------------------------------------------------------- the real model


def test_the_real_models_declines_are_found_in_their_first_sentence(bundled_model: str) -> None:
    """And its answers to requests that it can carry out have none; moods are told apart by the lexicon."""
    pytest.importorskip("vaderSentiment")
    from interp_ablate import load_model
    from interp_ablate.prompts.contrast_set import ContrastSet

    test = ContrastSet.load("declining").split(1, 1, 8).test
    model = load_model("smollm2")
    prompts = [*test.positive, *test.negative]
    answers = model.generate(prompts, max_new_tokens=24)
    given = [PromptResponse(p, a.text) for p, a in zip(prompts, answers)]
    scorer = make_scorer("expressions:declining?scope=first_sentence")
    scores = scorer(given)
    n = len(test.positive)
    assert sum(score == 100 for score in scores[:n]) >= 5, [e.answer for e in given[:n]]
    assert sum(score == 100 for score in scores[n:]) == 0, [e.answer for e in given[n:]]
    sentiment = make_scorer("lexicon:sentiment")
    declined = [e for e, score in zip(given, scores) if score == 100]
    for exchange, verdict in zip(declined, scorer.explain(declined)):
        [first, *_] = verdict.detail["matches"]
        assert fold(exchange.answer[first["start"] : first["end"]]) == first["expression"]
    assert min(scored(sentiment, *CHEERFUL)) > max(scored(sentiment, *GLOOMY))
