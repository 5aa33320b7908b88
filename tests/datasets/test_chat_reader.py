"""Chat data: every layout and format in and out, byte for byte, and every fault with its place."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from interp_ablate.datasets.chat_reader import read_preferences, read_samples, writing_samples
from interp_ablate.datasets.conversations import LAYOUTS, Sample
from interp_ablate.prompts.messages import Message
from interp_ablate.storage.json_rows import MalformedRow, RowFileError
from interp_ablate.storage.row_files import RowFile

TEXTS = (
    "plain", "two\nlines\t\"quoted\" \\ back", "naïve café œuvre", "中文，标点。", "\U0001f600 emoji",
    "", "  spaces  ", "line\u2028separator\x85", "'single' & <b>markup</b>", "ключ", "\x00nul",
)  # fmt: skip


def sharegpt(say: Callable[[], str]) -> dict[str, Any]:
    turns = [{"from": "human", "value": say()}, {"from": "gpt", "value": say(), "weight": 1}]
    return {"id": say(), "conversations": [{"from": "system", "value": say()}, *turns, *turns]}


def chat(say: Callable[[], str]) -> dict[str, Any]:
    parts = [{"type": "text", "text": say()}, {"type": "text", "text": say()}]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": say(), "name": None},
            {"role": "tool", "content": say()},
            {"role": "assistant", "content": say()},
        ],
        "source": [1, 2.5, None, {"nested": True}],
    }


def alpaca(say: Callable[[], str]) -> dict[str, Any]:
    return {"instruction": say(), "input": say(), "output": say(), "system": say()}


def pair(prompt: str, answer: str) -> Callable[[Callable[[], str]], dict[str, Any]]:
    return lambda say: {prompt: say(), answer: say(), "n": 1e-7}


MAKERS: dict[str, Callable[[Callable[[], str]], dict[str, Any]]] = {
    "sharegpt": sharegpt,
    "messages": chat,
    "alpaca": alpaca,
    **{name: pair(*name.split("/")) for name in LAYOUTS if "/" in name},
}


def dumped(row: dict[str, Any], dice: random.Random) -> str:
    """The row as some writer might write it."""
    separators = dice.choice(((",", ":"), (", ", ": "), (" , ", " : ")))
    return json.dumps(row, ensure_ascii=dice.random() < 0.5, separators=separators)


def rows_of(layout: str, seed: int, n: int = 30) -> tuple[list[dict[str, Any]], random.Random]:
    dice = random.Random(seed)
    return [MAKERS[layout](lambda: dice.choice(TEXTS)) for _ in range(n)], dice


def copied(path: Path, out: Path) -> list[Sample]:
    samples = list(read_samples(path))
    with writing_samples(out, path) as write:
        for sample in samples:
            write(sample)
    return samples


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(RowFileError) as caught:
        list(read_samples(path, **options))
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


GOOD = '{"prompt": "a", "completion": "b"}'


# ---- round trips -----------------------------------------------------------------------------------


def test_every_layout_is_tried() -> None:
    assert set(MAKERS) == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_jsonl_comes_back_byte_for_byte(tmp_path: Path, layout: str, seed: int) -> None:
    rows, dice = rows_of(layout, seed)
    end = "\r\n" if seed % 2 else "\n"
    text = end.join(dumped(row, dice) for row in rows) + (end if seed < 2 else "")
    path = write(tmp_path / "a.jsonl", text)
    samples = copied(path, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == path.read_bytes()
    assert [dict(sample.raw) for sample in samples] == rows
    assert {sample.layout for sample in samples} == {layout}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst"])
def test_other_json_keeps_every_entrys_bytes(tmp_path: Path, layout: str, suffix: str) -> None:
    rows, dice = rows_of(layout, 7)
    lines = [dumped(row, dice) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if "jsonl" not in suffix else "\n".join(lines) + "\n"
    path = tmp_path / f"a{suffix}"
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    elif suffix.endswith(".zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text.encode())
    else:
        path.write_text(text, encoding="utf-8")
    assert RowFile.at(path).suffix == suffix
    samples = copied(path, tmp_path / f"b{suffix}")
    again = list(read_samples(tmp_path / f"b{suffix}"))
    assert [s.line and s.line.strip() for s in samples] == [line.encode() for line in lines]
    assert [s.raw for s in again] == rows
    if suffix == ".json":
        assert (tmp_path / "b.json").read_text(encoding="utf-8") == text
    with writing_samples(tmp_path / f"c{suffix}", path) as out:  # the same bytes at any time of day
        for sample in samples:
            out(sample)
    assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_come_back_with_their_values_and_columns(tmp_path: Path, layout: str) -> None:
    import datasets
    import pyarrow.parquet

    rows, _ = rows_of(layout, 3)
    for row in rows:
        row.pop("source", None)
        for message in row.get("messages", ()):  # a table's column has one type
            message["content"] = str(message["content"])
            message.pop("name", None)
        for message in row.get("conversations", ()):
            message.pop("weight", None)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "folder")
    schemas = []
    for source in (tmp_path / "a.parquet", tmp_path / "folder"):
        out = tmp_path / f"{source.stem}-b.parquet"
        samples = copied(source, out)
        assert [s.raw for s in samples] == rows and {s.layout for s in samples} == {layout}
        assert pyarrow.parquet.read_table(out).to_pylist() == rows
        schemas.append(pyarrow.parquet.read_schema(out))
    assert schemas[0].equals(
        pyarrow.parquet.read_schema(tmp_path / "a.parquet"), check_metadata=True
    )
    assert schemas[1].equals(schemas[0])


def test_a_bad_row_of_a_table_may_hold_times(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    when = datetime(2024, 5, 1)
    rows = [
        {"prompt": "a", "completion": "b", "at": when, "raw": b"x"},
        {"prompt": "a", "completion": None, "at": when, "raw": b"x"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    bad: list[MalformedRow] = []
    assert len(list(read_samples(tmp_path / "a.parquet", malformed=bad.append))) == 1
    assert json.loads(bad[0].line)["at"] == "2024-05-01 00:00:00"


def test_a_long_list_is_read_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.storage import json_rows

    rows, _ = rows_of("sharegpt", 11, 50)
    path = write(tmp_path / "a.json", json.dumps(rows, indent=2, ensure_ascii=False))
    for chunk in (1, 7, 64, 1000):  # every place where a part can end, also inside a character
        monkeypatch.setattr(json_rows, "_CHUNK", chunk)
        assert [sample.raw for sample in read_samples(path)] == rows


# ---- what is understood ----------------------------------------------------------------------------


def one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Sample:
    return next(read_samples(write(tmp_path / "one.jsonl", json.dumps(row)), **options))


def test_messages_of_each_layout(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "GPT", "value": "a"}]
    found = one(tmp_path, {"conversations": talk, "system": "s"})
    assert found.messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a"),
    )
    exchange = found.exchange
    assert (exchange.prompt.text, exchange.prompt.system, exchange.answer) == ("q", "s", "a")
    found = one(tmp_path, {"instruction": "add", "input": "1 2", "output": "3"})
    assert found.messages == (Message("user", "add\n\n1 2"), Message("assistant", "3"))
    assert found.exchange.prompt.system is None
    parts = [{"type": "text", "text": "x"}, "y"]
    found = one(tmp_path, {"messages": [{"role": "developer", "content": parts}]})
    assert found.messages == (Message("system", "x\ny"),)
    listed = {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert one(tmp_path, listed).exchange.answer == "a"
    calls = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
    ]
    assert one(tmp_path, {"messages": calls}).turns() == ()
    orca = one(tmp_path, {"system_prompt": "s", "question": "q", "response": "r", "id": 1})
    assert (orca.system, orca.layout) == ("s", "question/response")
    assert orca.as_dicts[-1] == {"role": "assistant", "content": "r"}


def test_turns_and_their_prompts(tmp_path: Path) -> None:
    names = ["gpt", "human", "gpt", "human", "human", "gpt", "tool", "gpt"]
    talk = [{"from": name, "value": f"{name}{i}"} for i, name in enumerate(names)]
    sample = one(tmp_path, {"conversations": talk})
    assert [(t.index, t.prompt, t.answer) for t in sample.turns()] == [
        (0, None, "gpt0"), (2, "human1", "gpt2"), (5, "human3\n\nhuman4", "gpt5"), (7, "human3\n\nhuman4", "gpt7"),
    ]  # fmt: skip
    assert [t.index for t in sample.turns("last")] == [7]
    assert [t.index for t in sample.turns("first")] == [0]
    with pytest.raises(RowFileError, match="no prompt before it"):
        _ = sample.turns("first")[0].exchange


def test_a_thought_is_no_answer(tmp_path: Path) -> None:
    def answers(*messages: tuple[str, str]) -> list[tuple[str | None, str | None, str]]:
        rows = [{"role": role, "content": content} for role, content in messages]
        return [(t.system, t.prompt, t.answer) for t in one(tmp_path, {"messages": rows}).turns()]

    for said, answer in (
        ("<think>I can't.</think>\nSure.", "Sure."),
        ("reasons\n</think>\n\nSure.", "Sure."),
        (" <thinking>a</thinking> b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<think>never ended", ""),
        ("Write <think> and </think> around it.", "Write <think> and </think> around it."),
    ):
        assert answers(("user", "q"), ("assistant", said)) == [(None, "q", answer)]
    # two messages of the user are one question, and the last system message counts
    talk = [("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "x"), ("system", "t"),
            ("user", "c"), ("assistant", "y")]  # fmt: skip
    assert answers(*talk) == [("s", "a\n\nb", "x"), ("t", "c", "y")]


def test_calls_of_tools_are_no_answers_and_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "two", "reasoning_content": "easy"},
    ]
    sample = one(tmp_path, {"messages": messages})
    assert [(turn.index, turn.prompt, turn.answer) for turn in sample.turns()] == [(3, "q", "two")]
    assert sample.as_dicts == messages and sample.messages[3].thought == "easy"


def test_rounds_can_be_taken_out(tmp_path: Path) -> None:
    names = ["system", "human", "gpt", "human", "gpt", "tool", "gpt", "human", "gpt"]
    talk = [{"from": name, "value": f"é{i}"} for i, name in enumerate(names)]
    sample = one(tmp_path, {"conversations": talk, "id": "x"})
    left = sample.without([4])  # its round is messages 3 to 6
    assert left is not None and left.raw == {
        "conversations": [talk[i] for i in (0, 1, 2, 7, 8)],
        "id": "x",
    }
    assert left.line is not None and json.loads(left.line) == left.raw and left.line.isascii()
    assert [m.content for m in left.messages] == ["é0", "é1", "é2", "é7", "é8"]
    assert sample.without([]) is sample and sample.without([2, 6, 8]) is None
    own = one(
        tmp_path, {"system": "s", "conversations": talk[1:5]}
    )  # a system prompt beside the list
    left = own.without([2])
    assert left is not None and left.raw == {"system": "s", "conversations": talk[3:5]}
    assert own.without([2]) == left and left.system == "s"
    assert one(tmp_path, json.loads(GOOD)).without([1]) is None


def test_a_layout_can_be_said(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "response": "r"}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    refused(path, "line 1", "prompt/completion and prompt/response", "--layout")
    assert one(tmp_path, row, layout="prompt/response").exchange.answer == "r"
    refused(path, "no layout 'nope'", "sharegpt", layout="nope")
    refused(path, "the layout asked for is alpaca", layout="alpaca")


def test_preferences(tmp_path: Path) -> None:
    def read(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
        return next(read_preferences(write(tmp_path / "p.jsonl", json.dumps(row)))).as_dict

    user, good, bad = (
        {"role": r, "content": c}
        for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
    )
    wanted = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    assert read({"prompt": "q", "chosen": "g", "rejected": "b"}) == wanted
    assert read({"question": "q", "chosen": "g", "rejected": "b"}) == wanted
    assert read(wanted) == wanted
    assert read({"chosen": [user, good], "rejected": [user, bad]}) == wanted
    assert read({"prompt": "q", "chosen": [user, good], "rejected": [user, bad]}) == wanted
    system = {"role": "system", "content": "s"}
    told = read({"system": "s", "question": "q", "chosen": "g", "rejected": "b"})
    assert told["prompt"] == [system, user]


def test_a_preference_keeps_its_input_and_its_own_system_prompt(tmp_path: Path) -> None:
    def prompt(row: dict[str, Any]) -> list[dict[str, str]]:
        path = write(tmp_path / "p.jsonl", json.dumps({"chosen": "g", "rejected": "b", **row}))
        return next(read_preferences(path)).as_dict["prompt"]

    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "do\n\nthis"}
    assert prompt({"instruction": "do", "input": "this"}) == [user]
    assert prompt({"prompt": "do", "context": "this", "input": ""}) == [user]
    whole = {
        side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    assert prompt({"prompt": [system, user], **whole}) == [system, user]
    assert prompt({"instruction": "do", "input": "this", "system": "s", **whole}) == [system, user]
    assert prompt({"prompt": None, **whole}) == [user]
    for strange in ({"prompt": "other", **whole}, {"prompt": "q", "history": [["a", "b"]]}):
        with pytest.raises(
            RowFileError, match=r"line 1: (a history|the prompt under 'prompt' is not)"
        ):
            prompt(strange)


@pytest.mark.parametrize(
    "row, part",
    [
        ({"prompt": "q", "chosen": "g"}, "a preference has chosen and rejected"),
        ({"chosen": "g", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "g", "rejected": "g"}, "say the same"),
        ({"prompt": "q", "chosen": 3, "rejected": "g"}, "chosen is 3"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
                "rejected": [
                    {"role": "user", "content": "z"},
                    {"role": "assistant", "content": "y"},
                ],
            },
            "no prompt",
        ),
    ],
)
def test_preferences_that_are_none(tmp_path: Path, row: dict[str, Any], part: str) -> None:
    path = write(tmp_path / "p.jsonl", "\n" + json.dumps(row))
    with pytest.raises(RowFileError, match=part) as caught:
        list(read_preferences(path))
    assert "line 2" in str(caught.value)


# ---- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, part",
    [
        (b'{"prompt": "a", "completion": "\xe9"}', "byte 0xe9 at 32 is not UTF-8"),
        (b'{"prompt": "a", "completion"', "cut off"),
        (b'{"prompt": "a", "completion": "b"}}', "Extra data"),
        (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "'prompt' is there twice"),
        (b'["prompt"]', "a JSON list, not an object"),
        (b"3", "a JSON int"),
        (b'{"prompt": "a", "completion": "\\ud83d"}', "lone surrogate"),
        (b'{"prompt": "a", "completion": null}', "completion is None"),
        (b'{"prompt": "a", "text": "b"}', "its keys are prompt, text; accepted are sharegpt"),
        (b"{}", "its keys are none"),
        (b'{"messages": []}', "without messages"),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "its layout is messages, but row 1 is prompt/",
        ),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b"}', "a preference, not a sample"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"instruction": "a", "output": "b", "history": [["x", "y"]]}', "its layout is alpaca"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: bytes, part: str) -> None:
    data = GOOD.encode() + b"\n\n" + line
    path = write(tmp_path / "a.jsonl", data)
    refused(path, "line 3", part)
    faults: list[MalformedRow] = []
    good = (b"\n" + GOOD.encode()) if b"\n" not in line else b""
    samples = list(read_samples(write(path, data + good), malformed=faults.append))
    assert [s.number for s in samples] == [1, 4]
    assert [(f.number, f.line.strip()) for f in faults] == [(3, line)]


@pytest.mark.parametrize(
    "messages, part",
    [
        ([{"role": "robot", "content": "x"}], "messages[0]: the role 'robot' is not known"),
        ([{"role": "user", "content": "x"}, "y"], "messages[1] is 'y'"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "messages[1] has the keys content"),
        ([{"role": "user", "content": 4}], "messages[0].content is 4"),
        ([{"role": "user"}], "messages[0].content is None"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "only text parts are read",
        ),
        ([{"role": None, "content": "x"}], "the role None"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: list[Any], part: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    refused(path, "line 1", part)


def test_two_lists_and_a_history(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "x"}]
    row = {"messages": talk, "conversations": talk}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    refused(path, "line 1", "both conversations and messages hold a list")
    row = {"instruction": "a", "output": "b", "history": [["x", "y"]]}
    refused(write(path, json.dumps(row)), "history", "messages layout")


@pytest.mark.parametrize(
    "name, data, parts",
    [
        ("a.jsonl", b"", ("is empty",)),
        ("a.jsonl", b"\n \n", ("holds no row",)),
        ("a.json", b"[]", ("holds no row",)),
        ("a.jsonl", b"\xff\xfe{\x00", ("UTF-16",)),
        ("a.csv", b"x", ("cannot read", ".jsonl")),
        ("a.parquet.gz", b"x", ("cannot read",)),
        ("a.json", b'[{"prompt": "a", "completion": "b"},\n{"prompt": "a"', ("line 2", "the file ends")),
        ("a.json", b'[{"prompt": "a", "completion": "b"}', ("the end of the file after entry 1",)),
        ("a.json", b'[{"prompt": "a", "completion": "b"}\n{', ("line 2", "'{' after entry 1")),
        ("a.json", b'[{"prompt": "a", "completion": "b"}] x', ("something follows",)),
        ("a.json", b'\n[{"prompt": "a",\n "completion": b}]' + b" " * 99, ("line 3", "Expecting value")),
        ("a.json", b'"text"', ("not a list of objects",)),
        ("a.json", b'[{"prompt": "a", "prompt": "b"}]', ("line 1", "twice")),
        ("a.json", b'[{"prompt": "a", "completion": "\xe9"}]', ("0xe9", "UTF-8")),
        ("a.json", b"[12]", ("entry 1", "a JSON int")),
        ("a.json.gz", gzip.compress(b"[1, 2, 3" * 99, mtime=0)[:-12], ("cannot read", "damaged")),
        ("a.jsonl.gz", b"plain", ("cannot read", "gzip")),
        ("a.jsonl.zst", b"plain", ("cannot read",)),
        ("a.parquet", b"PAR1 no", ("cannot read",)),
    ],
)  # fmt: skip
def test_a_bad_file(tmp_path: Path, name: str, data: bytes, parts: tuple[str, ...]) -> None:
    refused(write(tmp_path / name, data), name, *parts)


def test_bad_places(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", "there is no file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "is a folder, but not one of datasets")
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "holds the splits train", "splits/train")
    assert len(list(read_samples(tmp_path / "splits" / "train"))) == 1
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(RowFileError, match="cannot write"), writing_samples(path / "b.jsonl", path):
        pass


def test_a_byte_order_mark_and_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "\ufeff" + GOOD + "\n" + GOOD + "\n")
    assert [s.number for s in read_samples(path)] == [1, 2]
    assert RowFile.at(path).suffix == ".jsonl"
    path = write(tmp_path / "b.json", f"\ufeff[{GOOD}]")
    assert len(list(read_samples(path))) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    sample = next(read_samples(path))
    with pytest.raises(KeyError), writing_samples(tmp_path / "b.jsonl", path) as out:
        out(sample)
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_the_fingerprint_is_of_the_bytes(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "a.jsonl", GOOD)
    assert RowFile.at(path).fingerprint() == hashlib.sha256(GOOD.encode()).hexdigest()
    folder = tmp_path / "f"
    folder.mkdir()
    write(folder / "x", b"1")
    before = RowFile.at(folder).fingerprint()
    (folder / "x").rename(folder / "y")
    assert RowFile.at(folder).fingerprint() != before


def test_reading_is_light() -> None:
    import subprocess
    import sys

    heavy = ["torch", "transformers", "pandas", "numpy", "pyarrow", "datasets"]
    code = f"import sys, interp_ablate.datasets.chat_reader\nprint([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
