"""Prompt files: every format, every bad input and bad place, with the message each one gives."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from interp_ablate.errors import PromptError
from interp_ablate.prompts.contrast_set import ContrastSet
from interp_ablate.prompts.linting import lint
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.prompts.readers import read_side
from interp_ablate.storage import row_files


def texts(side: tuple[Prompt, ...]) -> list[str]:
    return [prompt.text for prompt in side]


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
        tmp_path / "p.txt", "\ufeff# a heading\nfirst\r\n\n  #tag is a prompt\n#\nlast\u2028x"
    )
    negative = write(tmp_path / "n", "other")
    contrast = ContrastSet.load(positive=positive, negative=str(negative))
    every = ["# a heading", "first", "#tag is a prompt", "#", "last\u2028x"]
    assert texts(contrast.positive) == every
    commented = ContrastSet.load(positive=positive, negative=negative, comments=True)
    assert texts(commented.positive) == every[1:3] + every[4:]
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
        (".jsonl", '"a"', ["no label column"]),
        (
            ".jsonl",
            '{"prompt": "a", "prompt": "b", "label": 1}',
            ["line 1", "'prompt' is there twice"],
        ),
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
        (".jsonl", '{"messages": [{"role": "wizard", "content": "a"}], "label": 1}', ["wizard"]),
        (".jsonl", '{"messages": [{"role": "assistant", "content": "a"}], "label": 1}', ["line 1"]),
        (".jsonl", '{"messages": ["a"], "label": 1}', ["line 1", "list"]),
        (".jsonl", "", ["is empty"]),
        (".json", '{"prompt": "a"}', ["no label column"]),
        (".json", '{"positive": ["a"], "negative": [3]}', ["int '3'"]),
        (".json", '[{"prompt": "a",]', ["line 1 is not JSON"]),
        (".json", '["a"]', ["no label column"]),
        (".json", "[3]", ["entry 1", "not an object"]),
        (".csv", "prompt,label\na,b,positive\n", ["line 2", "3 fields", "double quotes"]),
        (".csv", "prompt,label\n", ["a header (prompt, label) and no row"]),
        (".csv", "", ["is empty"]),
        (".csv", 'prompt,label\n"a"b,1\n', ["line 2", "not CSV"]),
        (".csv", "words;label\na;1\n", ["no column prompt", "words, label"]),
        (".csv.gz", "a;1\n", ["cannot read", "gz"]),
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
    refused("did you mean declining", "sentiment", spec="declinign")
    refused("hf:owner/data", spec="owner/data")
    refused("no file, folder or bundled set", spec="x" * 5000)
    refused("there is no file", "hf:owner/name", positive=tmp_path / "no.txt", negative=good)
    refused("is a folder", positive=tmp_path, negative=good)
    refused("cannot read", positive=write(tmp_path / "a.pdf", "x"), negative=good)
    empty = write(tmp_path / "empty.txt", "\n# only\n")
    refused("holds no prompt", positive=empty, negative=good, comments=True)
    refused("holds no prompt", positive=write(tmp_path / "e.jsonl", "\n"), negative=good)
    refused("only Hugging Face datasets have splits", spec="declining", split="train")
    refused("no column 'body'", "prompt, label", spec="declining", column="body")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("good\ncaf\xe9".encode("latin1"))
    refused("latin.txt, line 2", "0xe9", "iconv", positive=latin, negative=good)
    latin.write_bytes("plain".encode("utf-16-le"))
    refused("NUL", positive=latin, negative=good)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    path, text = write(tmp_path / "a.jsonl", "{}"), write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(row_files, "open", deny, raising=False)
    refused("cannot read", "Permission denied", spec=path)
    refused("cannot read", "Permission denied", positive=text, negative=text)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
MORE = [
    {"from": "system", "value": "Sing."},
    {"from": "human", "value": "go"},
    {"from": "gpt", "value": "la"},
]


def test_chat_files_are_prompt_sets(tmp_path: Path) -> None:
    """The answer at the end is no part of the prompt; turns before it are."""
    rows = [
        {"messages": CHAT, "label": 1},
        {"conversations": MORE, "label": 0},
        {
            "messages": [*CHAT, {"role": "user", "content": [{"type": "text", "text": "bye"}]}],
            "label": 0,
        },
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    refused("line 2", "no 'messages'", spec=path)
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in (rows[0], rows[2])))
    contrast = ContrastSet.load(path)
    assert contrast.positive == (Prompt("hi"),)
    (last,) = contrast.negative
    assert last.messages == [*CHAT, {"role": "user", "content": "bye"}]
    assert last != Prompt("bye")
    assert read_side(write(tmp_path / "b.jsonl", json.dumps(rows[1]))) == [Prompt("go", "Sing.")]


def test_lists_of_texts(tmp_path: Path) -> None:
    sides = {"positive": ["a", "b"], "negative": ["c", [CHAT[0]]]}
    indented = write(tmp_path / "two.json", json.dumps(sides, indent=2))
    lines = write(tmp_path / "lines.jsonl", '"a"\n{"text": "b"}\n')
    listed = write(tmp_path / "list.json", '["c", "hi"]')
    for contrast in (ContrastSet.load(indented), ContrastSet.load(positive=lines, negative=listed)):
        assert (texts(contrast.positive), texts(contrast.negative)) == (["a", "b"], ["c", "hi"])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, compression: str) -> None:
    import pyarrow

    def packed(name: str, text: str) -> Path:
        path = tmp_path / f"{name}{compression}"
        codec = {".gz": "gzip", ".zst": "zstd"}[compression]
        with pyarrow.output_stream(str(path), compression=codec) as stream:
            stream.write(text.encode())
        return path

    table = packed("set.csv", "text,label\nyes,1\nno,0\n")
    rows = packed("rows.jsonl", '{"text": "no"}')
    lines = packed("lines.txt", "yes\n")
    for contrast in (ContrastSet.load(table), ContrastSet.load(positive=lines, negative=rows)):
        assert (texts(contrast.positive), texts(contrast.negative)) == (["yes"], ["no"])
    assert ContrastSet.load(table).name == "set"


def test_a_csv_with_semicolons_and_long_cells(tmp_path: Path) -> None:
    long = "word " * 40_000 + "end"
    path = write(tmp_path / "a.csv", f'text;label\n"one, two";1\n{long};0\n')
    contrast = ContrastSet.load(path)
    assert (texts(contrast.positive), texts(contrast.negative)) == (["one, two"], [long])


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_of_datasets(tmp_path: Path, named: bool) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["pos", "neg"]) if named else datasets.Value("int64"),
    })  # fmt: skip
    labels = [0, 1] if named else [1, 0]
    table = datasets.Dataset.from_dict({"text": ["yes", "no"], "label": labels}, features=features)
    table.save_to_disk(tmp_path / "saved")
    contrast = ContrastSet.load(tmp_path / "saved")
    assert (texts(contrast.positive), texts(contrast.negative)) == (["yes"], ["no"])
    both = tmp_path / "both"
    table.select([0]).save_to_disk(both / "positive")
    table.select([1]).save_to_disk(both / "negative")
    assert ContrastSet.load(both).fingerprint == contrast.fingerprint
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    refused("holds the splits train", spec=tmp_path / "splits")
    assert texts(ContrastSet.load(tmp_path / "splits" / "train").negative) == ["no"]
