"""Prompts: every format and every bad input, the split, lint on planted faults, rendering."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interp_ablate import prompts as module
from interp_ablate.errors import PromptError
from interp_ablate.prompts import (
    ContrastSet,
    Prompt,
    bundled_names,
    encode,
    lint,
    normalised,
    render,
    suffix_length,
)

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}"
)
WITH_BOS = "{{ '<s>' }}" + CHATML
NO_SYSTEM = (
    "{{ '<s>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] | trim + '<|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model ' }}{% endif %}"
)
IGNORES_SYSTEM = (
    "{% for m in messages if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endfor %}"
)


def make_tokenizer(template: str | None = None, *, eos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, BOS put in front (and EOS behind) of text with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|start|>", "<|end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_set(n: int = 20, *, m: int | None = None) -> ContrastSet:
    return ContrastSet.from_texts(
        [f"positive number {i}" for i in range(n)],
        [f"negative number {i}" for i in range(n if m is None else m)],
        name="numbers",
    )


def texts(side: tuple[Prompt, ...]) -> list[str]:
    return [prompt.text for prompt in side]


def keys(contrast: ContrastSet) -> set[str]:
    return {normalised(p) for p in contrast.positive + contrast.negative}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(*parts: str, **load: object) -> str:
    """The message of the PromptError that loading raises; all parts must be in it."""
    with pytest.raises(PromptError) as caught:
        ContrastSet.load(**load)  # type: ignore[arg-type]
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


# --------------------------------------------------------------------------------- the set


def test_a_set_needs_both_sides_and_prompts() -> None:
    with pytest.raises(PromptError, match="0 positive and 1 negative"):
        ContrastSet("x", (), (Prompt("a"),), "memory")
    with pytest.raises(PromptError, match="1 positive and 0 negative"):
        ContrastSet.from_texts(["a"], [])
    with pytest.raises(PromptError, match="from_texts"):
        ContrastSet("x", ("a",), (Prompt("b"),), "memory")  # type: ignore[arg-type]
    assert isinstance(ContrastSet("x", [Prompt("a")], [Prompt("b")], "").positive, tuple)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "  \n\t", None, 3, b"bytes"])
def test_a_prompt_needs_text(text: object) -> None:
    with pytest.raises(PromptError):
        Prompt(text)  # type: ignore[arg-type]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(PromptError, match="surrogate"):
        Prompt("half an emoji \ud83d")


def test_the_same_prompt_on_both_sides_is_shown() -> None:
    with pytest.raises(PromptError, match="Tell  me a JOKE") as caught:
        ContrastSet.from_texts(["Tell  me a JOKE", "other"], ["tell me a joke ", "third"])
    assert "other" not in str(caught.value)
    # Not the same prompt: another system prompt, which is how traits are contrasted.
    ContrastSet("x", (Prompt("hi", "be rude"),), (Prompt("hi", "be kind"),), "memory")


def test_fingerprint_is_of_the_content_only() -> None:
    first = ContrastSet.from_texts(["a"], ["b"])
    assert (
        first.fingerprint == ContrastSet.from_texts(["a"], ["b"], name="y", source="z").fingerprint
    )
    assert len(first.fingerprint) == 64
    others = [
        ContrastSet.from_texts(["b"], ["a"]),
        ContrastSet.from_texts(["a"], ["b"], system=""),
        ContrastSet.from_texts(["a", "c"], ["b"]),
        ContrastSet.from_texts(["A"], ["b"]),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


# --------------------------------------------------------------------------------- split


def test_split_is_disjoint_and_of_the_sizes_asked_for() -> None:
    split = make_set().split(10, 6, 4)
    parts = [split.train, split.validation, split.test]
    assert [(len(p.positive), len(p.negative)) for p in parts] == [(10, 10), (6, 6), (4, 4)]
    assert sum(len(keys(p)) for p in parts) == len(set().union(*map(keys, parts))) == 40
    assert {p.name for p in parts} == {"numbers"}


def test_split_is_the_same_everywhere() -> None:
    """Pinned: a change here changes every published number."""
    split = make_set().split(10, 6, 4, seed=0)
    assert split == make_set().split(10, 6, 4, seed=0)
    assert split != make_set().split(10, 6, 4, seed=1)
    assert texts(split.test.positive) == PINNED_TEST
    code = (
        "from interp_ablate.prompts import ContrastSet as C;"
        "c = C.from_texts([f'positive number {i}' for i in range(20)],"
        "[f'negative number {i}' for i in range(20)]);"
        "print([p.text for p in c.split(10, 6, 4).test.positive])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1], env={"PYTHONHASHSEED": "7", "PATH": ""},
    )  # fmt: skip
    assert out.stdout.strip() == str(PINNED_TEST)


PINNED_TEST = [f"positive number {i}" for i in (18, 3, 10, 0)]


def test_split_does_not_depend_on_order_and_keeps_the_test_part() -> None:
    contrast = make_set()
    back = ContrastSet("x", contrast.positive[::-1], contrast.negative[::-1], "")
    assert keys(contrast.split(10, 6, 4).test) == keys(back.split(10, 6, 4).test)
    assert contrast.split(10, 6, 4).test == contrast.split(3, 1, 4).test


def test_matched_pairs_stay_together() -> None:
    split = make_set().split(10, 6, 4)
    for part in (split.train, split.validation, split.test):
        pairs = zip(part.positive, part.negative, strict=True)
        assert all(p.text.split()[-1] == n.text.split()[-1] for p, n in pairs)


def test_duplicates_never_reach_two_parts() -> None:
    contrast = ContrastSet.from_texts(
        ["A", "a ", " A", "b", "c", "d"], ["1", "2", "2", "2 ", "3", "4"]
    )
    split = contrast.split(2, 1, 1)
    assert sum(len(keys(p)) for p in (split.train, split.validation, split.test)) == 8
    with pytest.raises(PromptError, match="4 positive and 4 negative different"):
        contrast.split(3, 1, 1)


def test_sides_of_different_length() -> None:
    split = make_set(20, m=8).split(4, 2, 2)
    assert len(split.train.negative) == len(split.train.positive) == 4


@pytest.mark.parametrize("sizes", [(4, 2, 0), (0, 1, 1), (4, -1, 1), (1.5, 1, 1), (True, 1, 1)])
def test_three_sets_are_three(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(PromptError, match="three different sets"):
        make_set().split(*sizes)


def test_a_side_too_small_says_what_fits() -> None:
    with pytest.raises(PromptError) as caught:
        make_set(20, m=12).split()
    message = str(caught.value)
    assert "20 positive and 12 negative" in message and "128 of each" in message
    assert "n_train=6, n_validation=3, n_test=3" in message
    make_set(20, m=12).split(6, 3, 3)
    with pytest.raises(PromptError, match="n_train=2, n_validation=1, n_test=1"):
        make_set(4).split(64, 1, 1)
    with pytest.raises(PromptError, match="at least 3 of each"):
        make_set(2).split(1, 1, 1)


def test_shuffled_labels_carry_no_information() -> None:
    contrast = make_set(20)
    shuffled = contrast.shuffled_labels(1)
    assert keys(shuffled) == keys(contrast)
    for side in (shuffled.positive, shuffled.negative):
        assert sum(text.startswith("positive") for text in texts(side)) == 10
    assert shuffled == contrast.shuffled_labels(1)
    assert keys(shuffled) == keys(contrast.shuffled_labels(2))
    assert set(shuffled.positive) != set(contrast.shuffled_labels(2).positive)
    uneven = make_set(30, m=10).shuffled_labels(0)
    former = [sum(t.startswith("positive") for t in texts(s)) / len(s)
              for s in (uneven.positive, uneven.negative)]  # fmt: skip
    assert abs(former[0] - former[1]) < 0.1 and (len(uneven.positive), len(uneven.negative)) == (
        30,
        10,
    )
    with pytest.raises(PromptError, match="at least 2"):
        make_set(1).shuffled_labels(0)


# --------------------------------------------------------------------------------- loading


ROWS = [
    {"prompt": "Sing, please", "label": "positive"},
    {"prompt": "Dance", "label": "positive", "system": "Be brief."},
    {"prompt": "What is a song?", "label": "negative"},
]


def write_rows(folder: Path, suffix: str) -> Path:
    import pandas as pd

    path = folder / f"set{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\r\n", encoding="utf-8")
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_one_file_with_labels(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix)
    contrast = ContrastSet.load(path, system="Sing.")
    assert contrast.positive == (Prompt("Sing, please", "Sing."), Prompt("Dance", "Be brief."))
    assert contrast.negative == (Prompt("What is a song?", "Sing."),)
    assert (contrast.name, contrast.source) == ("set", str(path))
    assert ContrastSet.load(str(path), name="mine").name == "mine"


@pytest.mark.parametrize(
    "labels", [(1, 0), (True, False), ("True", "FALSE"), ("pos", "neg"), (1.0, 0.0)]
)
def test_labels(tmp_path: Path, labels: tuple[object, object]) -> None:
    rows = [{"instruction": str(i), "class": label} for i, label in enumerate(labels)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    contrast = ContrastSet.load(path)
    assert (texts(contrast.positive), texts(contrast.negative)) == (["0"], ["1"])


def test_columns_of_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "positive,negative\nyes,no\nup,down\n")
    contrast = ContrastSet.load(path)
    assert (texts(contrast.positive), texts(contrast.negative)) == (["yes", "up"], ["no", "down"])


def test_two_text_files(tmp_path: Path) -> None:
    positive = write(
        tmp_path / "p.txt", "\ufeff# a comment\nfirst\r\n\n  #tag is a prompt\n#\nlast\u2028x"
    )
    negative = write(tmp_path / "n", "other")
    contrast = ContrastSet.load(positive=positive, negative=str(negative))
    assert texts(contrast.positive) == ["first", "#tag is a prompt", "last\u2028x"]
    assert texts(contrast.negative) == ["other"]
    assert contrast.name == "p-vs-n" and str(positive) in contrast.source


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_side_of_another_format(tmp_path: Path, suffix: str) -> None:
    """A side takes every row; a named column wins over the usual ones."""
    contrast = ContrastSet.load(
        positive=write_rows(tmp_path, suffix), negative=write(tmp_path / "n.txt", "x")
    )
    assert len(contrast.positive) == 3
    labels = ContrastSet.load(
        positive=write_rows(tmp_path, suffix), negative=tmp_path / "n.txt", column="label"
    )
    assert texts(labels.positive) == ["positive", "positive", "negative"]


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "traits"
    folder.mkdir()
    refused("0 files for the positive side", "nothing", spec=folder)
    write(folder / "positive.txt", "a\nb")
    write(folder / "README.md", "not a side")
    refused("0 files for the negative side", "README.md", spec=folder)
    write(folder / "negative.jsonl", '{"text": "c"}')
    contrast = ContrastSet.load(folder)
    assert (contrast.name, texts(contrast.negative)) == ("traits", ["c"])
    write(folder / "negative.csv", "text\nd")
    refused("2 files for the negative side", spec=folder)


def test_duplicates_are_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    positive = write(tmp_path / "p.txt", "One\none\nONE \ntwo")
    with caplog.at_level(logging.WARNING):
        contrast = ContrastSet.load(positive=positive, negative=write(tmp_path / "n.txt", "x"))
    assert texts(contrast.positive) == ["One", "two"]
    assert "dropped 2 duplicates of 4 positive" in caplog.text
    assert [f.kind for f in lint(contrast).of("warning")] == ["duplicate"]


def test_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the hub: what `load_dataset` returns, with a ClassLabel and two splits."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["pos", "neg"])  # 0 is positive here, and must stay so
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    table = datasets.Dataset.from_dict(
        {"text": ["good", "bad"], "label": [0, 1]}, features=features
    )
    hub = {("a/b", None): datasets.DatasetDict(train=table, test=table.select([1, 0])),
           ("a/c", "x"): datasets.DatasetDict(only=table.select([0])),
           ("a/d", None): datasets.DatasetDict(p=table, q=table)}  # fmt: skip

    def load_dataset(name: str, configuration: str | None) -> object:
        if (name, configuration) not in hub:
            raise ConnectionError("Couldn't reach the hub\nat all")
        return hub[name, configuration]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    contrast = ContrastSet.load("hf:a/b")
    assert (texts(contrast.positive), texts(contrast.negative)) == (["good"], ["bad"])
    assert (contrast.name, contrast.source) == ("a/b", "hf:a/b")
    assert ContrastSet.load("hf:a/b", split="test", column="text").name == "a/b"
    sides = ContrastSet.load(positive="hf:a/c:x", negative=write(tmp_path / "n.txt", "x"))
    assert texts(sides.positive) == ["good"]
    refused("no split 'dev'", "train, test", spec="hf:a/b", split="dev")
    refused("no split 'train'", "p, q", spec="hf:a/d")
    refused("no column 'body'", "text, label", spec="hf:a/b", column="body")
    refused("one-sided", spec="hf:a/c:x")
    refused("cannot load the dataset 'a/z'", "ConnectionError", "local file", spec="hf:a/z")
    refused("names no dataset", spec="hf:")


@pytest.mark.parametrize(
    ("suffix", "content", "parts"),
    [
        (".jsonl", '{"prompt": "a", "label": 1}\n{"prompt": \n', ["line 2", "is not JSON"]),
        (".jsonl", '["a"]', ["line 1", "not an object"]),
        (".jsonl", '{"body": "a", "label": 1}', ["no column prompt", "body, label", "column="]),
        (".jsonl", '{"prompt": "a"}', ["no label column", "positive="]),
        (".jsonl", '{"prompt": "a", "label": "maybe"}', ["line 1", "'maybe'", "pos"]),
        (".jsonl", '{"prompt": "a", "label": null}', ["line 1", "label None"]),
        (".jsonl", '{"prompt": "a", "label": 1}', ["one-sided", "1 prompts positive and 0"]),
        (".jsonl", '{"prompt": "", "label": 1}', ["line 1", "empty prompt"]),
        (".jsonl", '{"prompt": ["a"], "label": 1}', ["line 1", "list"]),
        (".jsonl", '{"prompt": "a", "label": 1}\n{"label": 0}', ["line 2", "no 'prompt'"]),
        (".jsonl", '{"prompt": "a\\ud800", "label": 1}', ["line 1", "surrogate"]),
        (".jsonl", '{"prompt": "a", "label": 1, "system": 3}', ["line 1", "3"]),
        (
            ".jsonl",
            '{"prompt": "a", "label": 1}\n{"prompt": "A", "label": 0}',
            ["both sets", "'a'"],
        ),
        (".jsonl", "", ["holds no prompt"]),
        (".json", '{"prompt": "a"}', ["not an array"]),
        (".json", '[{"prompt": "a",]', ["line 1 is not JSON"]),
        (".json", '["a"]', ["entry 1", "not an object"]),
        (".csv", "prompt,label\na,b,positive\n", ["line 2", "3 fields", "double quotes"]),
        (".csv", "prompt,label\n", ["a header (prompt, label) and no row"]),
        (".csv", "", ["holds no prompt"]),
        (".csv", 'prompt,label\n"a"b,1\n', ["line 2", "not CSV"]),
        (".csv", "words;label\na;1\n", ["words;label"]),
        (".parquet", "not parquet", ["as parquet"]),
        (".txt", "a\nb", ["positive=FILE and negative=FILE"]),
        (".xlsx", "a", [".jsonl", ".parquet"]),
    ],
)
def test_bad_files(tmp_path: Path, suffix: str, content: str, parts: list[str]) -> None:
    path = write(tmp_path / f"set{suffix}", content)
    message = refused(*parts, spec=path)
    assert str(path) in message


def test_bad_places(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", "a")
    refused("no contrast set", "declining", "hf:owner/name")
    refused("spec=declining and positive=x", spec="declining", positive="x")
    refused("got positive=x", "both positive= and negative=", positive="x")
    refused("did you mean declining?", "sentiment", spec="declinign")
    refused("hf:owner/data", spec="owner/data")
    refused("no file, folder or bundled set", spec="x" * 5000)
    refused("there is no file", "hf:owner/name", positive=tmp_path / "no.txt", negative=good)
    refused("is a folder", positive=tmp_path, negative=good)
    refused("cannot read", positive=write(tmp_path / "a.pdf", "x"), negative=good)
    refused("holds no prompt", positive=write(tmp_path / "empty.txt", "\n# only\n"), negative=good)
    refused("holds no prompt", positive=write(tmp_path / "e.jsonl", "\n"), negative=good)
    refused("only Hugging Face datasets have splits", spec="declining", split="train")
    refused("no column 'body'", "prompt, label", spec="declining", column="body")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("good\ncaf\xe9".encode("latin1"))
    refused("latin.txt, line 2", "0xe9", "iconv", positive=latin, negative=good)
    latin.write_bytes("plain".encode("utf-16-le"))
    refused("NUL", positive=latin, negative=good)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", "{}")
    monkeypatch.setattr(Path, "read_bytes", deny)
    refused("cannot read", "Permission denied", spec=path)


# --------------------------------------------------------------------------------- lint


def kinds(contrast: ContrastSet) -> dict[str, str]:
    return {finding.kind: finding.severity for finding in lint(contrast).findings}


COMMON = "please tell me about the long history of that old stone village beside our river"
THINGS = [
    "bread",
    "cheese",
    "paper",
    "glass",
    "silk",
    "bridges",
    "boats",
    "gardens",
    "clocks",
    "coins",
    "maps",
    "lamps",
]


def test_lint_finds_duplicates_and_leaks() -> None:
    base = [f"{thing} {i}" for i, thing in enumerate(THINGS)]
    near = f"{COMMON} small town square"
    found = kinds(ContrastSet.from_texts([*base, near, near + "s", "x y", "X  y"], ["z"]))
    assert found["duplicate"] == found["near-duplicate"] == "warning"
    leak = kinds(ContrastSet.from_texts(["Order a pizza!", "b"], ["c", "order a pizza"]))
    assert leak["leak"] == "error"
    across = ContrastSet.from_texts([f"{COMMON} town now", "b c"], ["d e", f"{COMMON} town then"])
    assert kinds(across)["near-leak"] == "warning"
    paired = ContrastSet.from_texts([f"{COMMON} town now", "b c"], [f"{COMMON} town then", "d e"])
    assert kinds(paired)["matched-pair"] == "info" and "near-leak" not in kinds(paired)


def test_a_shared_system_prompt_makes_no_duplicates() -> None:
    contrast = ContrastSet.from_texts(THINGS[:6], THINGS[6:], system=COMMON + " and much more")
    assert {"near-duplicate", "near-leak", "leak", "matched-pair"}.isdisjoint(kinds(contrast))
    same = ContrastSet("x", (Prompt("hi", "be rude"),), (Prompt("hi", "be kind"),), "")
    assert "leak" not in kinds(same)


def test_lint_measures_words_and_length() -> None:
    rooms = [f"{a} {b}" for a in THINGS[:5] for b in THINGS[5:]]
    worded = lint(
        ContrastSet.from_texts([f"great {r}" for r in rooms], [f"awful {r}" for r in rooms])
    )
    assert worded.bag_of_words_auc > 0.99
    assert worded.telling_words == {"positive": ("great",), "negative": ("awful",)}
    assert [f.severity for f in worded.findings if f.kind == "bag-of-words"] == ["warning"]
    assert worded.length_auc == 0.5 and worded.length_difference == 0.0
    same_words = lint(ContrastSet.from_texts(rooms, [" ".join(r.split()[::-1]) for r in rooms]))
    assert abs(same_words.bag_of_words_auc - 0.5) < 0.1
    longer = lint(ContrastSet.from_texts([f"{r} and so on" for r in rooms], rooms))
    assert "length" in {f.kind for f in longer.of("warning")}
    assert longer.length_auc == 1.0
    assert longer.lengths["positive"]["words"] == {"mean": 5, "median": 5, "min": 5, "max": 5}


def test_near_duplicates_do_not_leak_between_folds() -> None:
    """Each side repeats a few prompts with small changes: easily learned by heart."""
    variants = ["", " ok", " hey"]
    sides = [
        [" ".join(f"{t}{i}" for i in range(6)) + v for t in THINGS[k::2] for v in variants]
        for k in (0, 1)
    ]
    assert lint(ContrastSet.from_texts(*sides)).bag_of_words_auc < 0.6


def test_lint_of_tiny_and_odd_sets() -> None:
    tiny = lint(ContrastSet.from_texts(["a"], ["b"]))
    assert (
        tiny.to_dict()["bag_of_words_auc"] is None and tiny.to_dict()["length_difference"] is None
    )
    json.dumps(tiny.to_dict(), allow_nan=False)
    wordless = lint(
        ContrastSet.from_texts(["?" * i for i in range(1, 9)], ["!" * i for i in range(1, 9)])
    )
    assert wordless.telling_words == {"positive": (), "negative": ()}
    one_word = lint(ContrastSet.from_texts([f"x{'!' * i}" for i in range(9)], THINGS[:9]))
    assert one_word.to_dict()
    chinese = lint(ContrastSet.from_texts(["今天天气怎么样"], ["天空为什么是蓝色的"]))
    assert chinese.lengths["positive"]["words"]["mean"] == 7
    uneven = kinds(make_set(10, m=3))
    assert uneven["imbalance"] == "warning" and uneven["size"] == "info"
    mixed = ContrastSet("x", (Prompt("a", "system"),), (Prompt("b"),), "")
    assert kinds(mixed)["system"] == "warning"


# --------------------------------------------------------------------------------- bundled sets


def test_bundled_names() -> None:
    assert bundled_names() == ("declining", "language", "sentiment")
    provenance = resources.files("interp_ablate").joinpath("data", "PROVENANCE.md").read_text()
    assert all(f"`{name}`" in provenance for name in bundled_names())


@pytest.mark.parametrize("name", ["declining", "language", "sentiment"])
def test_the_contract_of_the_bundled_sets(name: str) -> None:
    contrast = ContrastSet.load(name)
    assert len(contrast.positive) == len(contrast.negative) == 128
    assert contrast.duplicates == () and contrast.source == f"bundled:{name}"
    report = lint(contrast)
    assert report.of("error") == ()
    assert {f.kind for f in report.findings} <= {"bag-of-words", "matched-pair"}
    means = [report.lengths[side]["words"]["mean"] for side in ("positive", "negative")]
    assert max(means) / min(means) < 1.05 and abs(report.length_auc - 0.5) < 0.05
    split = contrast.split()
    assert [len(p.positive) for p in (split.train, split.validation, split.test)] == [64, 32, 32]
    assert contrast.shuffled_labels(0).fingerprint != contrast.fingerprint


def test_pairs_of_language_differ_in_the_language_only() -> None:
    contrast = ContrastSet.load("language")
    for p, n in zip(contrast.positive, contrast.negative, strict=True):
        assert p.text.replace("French", "English") == n.text and p.text != n.text


# --------------------------------------------------------------------------------- rendering


def test_render_with_and_without_a_template() -> None:
    prompt = Prompt("Hello?", "Be kind.")
    chat = render(prompt, make_tokenizer(CHATML))
    assert chat.templated
    assert (
        chat.text
        == "<|start|>system Be kind.<|end|> <|start|>user Hello?<|end|> <|start|>assistant "
    )
    plain = "Be kind.\n\nHello?"
    for tokenizer, template in ((make_tokenizer(), None), (make_tokenizer(CHATML), "none")):
        raw = render(prompt, tokenizer, template=template)
        assert (raw.text, raw.templated) == (plain, False)
    given = render(Prompt("Hello?"), make_tokenizer(), template=CHATML, response=" Oh\n")
    assert given.text == "<|start|>user Hello?<|end|> <|start|>assistant  Oh\n"
    assert render(Prompt("a", ""), make_tokenizer(CHATML)).text.startswith(
        "<|start|>system <|end|>"
    )
    assert render(Prompt("a", ""), make_tokenizer()).text == "a"


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_a_system_prompt_that_the_template_refuses_is_folded(template: str) -> None:
    tokenizer = make_tokenizer(template)
    text = render(Prompt("Hello?", "Be kind."), tokenizer).text
    assert "Be kind.\n\nHello?" in text and text.count("Hello?") == 1
    assert render(Prompt("Hello?", ""), tokenizer) == render(Prompt("Hello?"), tokenizer)


@pytest.mark.parametrize("template", ["{{ undefined.x.y }}", "{% if %}", "constant text"])
def test_a_bad_template(template: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        render(Prompt("Hello?", "Be kind."), make_tokenizer(), template=template)


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS, NO_SYSTEM])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("text", ["Hello?", "<s>Hello?", "<s>"])
def test_never_a_second_bos_nor_an_eos(template: str | None, eos: bool, text: str) -> None:
    tokenizer = make_tokenizer(template, eos=eos)
    ids = encode(Prompt(text, "Be kind." if text == "Hello?" else None), tokenizer)
    assert ids[:2] != [0, 0] and ids[-1] != 1
    assert (ids[0] == 0) is (template != CHATML)
    assert all(type(i) is int for i in ids)


def test_encode_is_the_rendered_text() -> None:
    tokenizer = make_tokenizer(CHATML, eos=True)
    prompt = Prompt("Hi", "Be kind.")
    assert tokenizer.decode(encode(prompt, tokenizer)) == render(prompt, tokenizer).text
    assert tokenizer.decode(encode(prompt, tokenizer, template="none")) == "<s>Be kind.\n\nHi"
    assert str(tokenizer.decode(encode(prompt, tokenizer, response="Yes</s>"))).endswith(" Yes</s>")
    # An EOS that the caller wrote stays; only what the tokenizer appends goes.
    assert encode(prompt, tokenizer, template="none", response="</s>")[-1] == 1


def test_no_token_at_all() -> None:
    def empty(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] if add_special_tokens else []}

    with pytest.raises(PromptError, match="made no token"):
        encode(Prompt("x"), empty)


def test_suffix_length() -> None:
    tokenizer = make_tokenizer(CHATML)
    suffix = tokenizer("<|end|> <|start|>assistant ", add_special_tokens=False)["input_ids"]
    assert suffix_length(tokenizer) == len(suffix) == 13
    assert suffix_length(tokenizer, system="Be kind.") == 13
    assert suffix_length(tokenizer, template="none") == suffix_length(make_tokenizer()) == 1
    assert suffix_length(make_tokenizer(), template=IGNORES_SYSTEM, system="Be kind.") == 8
    for text in ("one", "Another one?"):
        assert encode(Prompt(text), tokenizer)[-13:] == suffix


# --------------------------------------------------------------------------------- imports


def test_import_is_light() -> None:
    code = (
        "import sys, interp_ablate.prompts\n"
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'sklearn', 'numpy', 'pyarrow'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    root = Path(module.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
