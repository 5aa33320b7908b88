"""A filter whose rule asks a server: many answers are under way at a time, and the result is in the file's order."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from chat_server import Fault, Server, serving

from interp_ablate.cli.main import main
from interp_ablate.datasets import filter_batches
from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filter_rules import Rule, ScoreRule
from interp_ablate.datasets.filtering import FilterSettings, filter_file
from interp_ablate.errors import RunError
from interp_ablate.scoring.endpoint import Endpoint, EndpointSettings
from interp_ablate.scoring.exchange import ReversedScorer
from interp_ablate.scoring.judge import Judge
from interp_ablate.scoring.own_function import FunctionScorer
from interp_ablate.storage.json_rows import RowFileError

ROWS = 8  # of a batch here


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_batches, "SLOW_ROWS", ROWS)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


def judged(server: Server, **options: Any) -> ScoreRule:
    settings = EndpointSettings(backoff=0.01, timeout=10.0, **options)
    endpoint = Endpoint("m", server.url, settings=settings)
    return ScoreRule(above=50, scorer=Judge(endpoint, "How red?"))


def written(path: Path, texts: Sequence[str]) -> Path:
    rows = [{"prompt": f"q {i}", "completion": text, "i": i} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(body: dict[str, Any]) -> str:
    text: str = body["messages"][-1]["content"].split("<answer>\n")[1].split("\n")[0]
    return text


def left(out: Path, name: str = "kept.jsonl") -> list[int]:
    return [json.loads(line)["i"] for line in (out / name).read_text().splitlines()]


def test_a_slow_answer_holds_up_a_bounded_number_of_rows(tmp_path: Path) -> None:
    """While the first answer is waited for, those of the next batches come; memory is bounded, order is kept."""
    slow, seen = threading.Event(), list[int]()
    whole = ROWS * (filter_batches.AHEAD + 1)

    def say(body: dict[str, Any], number: int) -> Any:
        if text_of(body) == "answer 0":
            slow.wait(20)
        return "90" if int(text_of(body).split()[1]) % 3 == 0 else "10"

    source = written(tmp_path / "a.jsonl", [f"answer {i}" for i in range(2 * whole)])
    with serving(say) as server:
        recipe = FilterRecipe((judged(server, concurrency=4),))

        def look() -> None:
            deadline = time.monotonic() + 10
            while len(server.asked) < whole and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            seen.append(len(server.asked))
            slow.set()

        watcher = threading.Thread(target=look)
        watcher.start()
        manifest = filter_file(source, tmp_path / "out", recipe)
        watcher.join()
        assert server.most <= 4 and len(server.asked) == 2 * whole
    assert seen == [whole]
    assert left(tmp_path / "out") == [i for i in range(2 * whole) if i % 3]
    assert left(tmp_path / "out", "dropped.jsonl") == list(range(0, 2 * whole, 3))
    notes = [json.loads(line) for line in (tmp_path / "out" / "why.jsonl").read_text().splitlines()]
    assert [note["number"] for note in notes] == list(range(1, 2 * whole + 1, 3))
    assert manifest["counts"]["rows"] == 2 * whole


@pytest.mark.parametrize("broken", ['"high"', "[1]", "1e999", "{}"])
def test_kept_values_that_are_none_are_no_values(broken: str, tmp_path: Path) -> None:
    """In the journal and in the cache of replies: one message that names the line."""
    source, out = written(tmp_path / "a.jsonl", ["answer 0"]), tmp_path / "out"
    cache = tmp_path / "replies.jsonl"
    with serving("77") as server:

        def recipe() -> FilterRecipe:
            endpoint = Endpoint("m", server.url, cache=cache)
            return FilterRecipe((ScoreRule(above=50, scorer=Judge(endpoint, "How red?")),))

        filter_file(source, out, recipe())
        gc.collect()  # the cache is closed
        for path, value in ((out / "verdicts.jsonl", "77.0"), (cache, '"77"')):
            whole = path.read_text()
            assert value in whole
            path.write_text(
                whole.replace(value, "7" if (value, broken) == ('"77"', '"high"') else broken)
            )
            with pytest.raises(RunError, match=r"corrupt .* line [23]"):
                filter_file(source, out, recipe(), settings=FilterSettings(force=True))
            path.write_text(whole)
            gc.collect()


def test_equal_questions_of_several_batches_are_asked_once(tmp_path: Path) -> None:
    def say(body: dict[str, Any], number: int) -> str:
        time.sleep(0.03)
        return "90"

    rows = [{"prompt": "q", "completion": f"answer {i % 3}"} for i in range(6 * ROWS)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(say) as server:
        filter_file(source, tmp_path / "out", FilterRecipe((judged(server),)))
        assert sorted(map(text_of, server.asked)) == [f"answer {i}" for i in range(3)]


def test_only_servers_are_asked_by_several_threads(tmp_path: Path) -> None:
    """A function of the user's is never entered twice at a time, though judges before and after it are."""
    inside, most = [0], [0]

    def own(answer: str) -> float:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return 60.0 if "7" in answer else 20.0

    def say(body: dict[str, Any], number: int) -> str:
        time.sleep(0.002)
        return "70"

    source = written(tmp_path / "a.jsonl", [f"answer {i}" for i in range(6 * ROWS)])
    with serving(say) as server:
        first = judged(server)
        last = ScoreRule(above=20, scorer=ReversedScorer(first.scorer), cost=9)
        middle = ScoreRule(above=50, scorer=FunctionScorer(own, "own", "", False), cost=6)
        rules: tuple[Rule, ...] = (first, middle, last)
        filter_file(source, tmp_path / "out", FilterRecipe(rules, combine="all", action="keep"))
        assert server.most > 1 and most == [1] and len(server.asked) == 6 * ROWS
    assert left(tmp_path / "out") == [i for i in range(6 * ROWS) if "7" in str(i)]


def test_a_server_that_goes_away_ends_the_run_and_the_rest_is_asked_later(tmp_path: Path) -> None:
    gone = threading.Event()

    def say(body: dict[str, Any], number: int) -> Any:
        if number == 5 * ROWS:
            gone.set()
        return Fault(503, "down") if gone.is_set() else "90"

    source = written(tmp_path / "a.jsonl", [f"answer {i}" for i in range(40 * ROWS)])
    with serving(say) as server:
        recipe = FilterRecipe((judged(server, concurrency=4, retries=0),))
        with pytest.raises(RunError, match="gave no answer"):
            filter_file(source, tmp_path / "out", recipe)
        assert not (tmp_path / "out" / "kept.jsonl").exists()
        assert len(server.asked) < 20 * ROWS
        assert not [each.name for each in threading.enumerate() if each.name.startswith("filter")]
        answered = sum(
            len(json.loads(line).get("readings", ()))
            for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
        )
        assert answered == 5 * ROWS - 1
        server.say, before = lambda body, number: "90", len(server.asked)
        manifest = filter_file(source, tmp_path / "out", recipe)
        assert len(server.asked) - before == 40 * ROWS - answered
    assert manifest["counts"]["dropped"] == 40 * ROWS


def test_a_row_that_is_none_ends_the_run_in_the_order_of_the_file(tmp_path: Path) -> None:
    """The first of two is named, and rows before it that are slow do not change that."""

    def say(body: dict[str, Any], number: int) -> str:
        time.sleep(0.1 if text_of(body) == "answer 1" else 0.0)
        return "90"

    source = written(tmp_path / "a.jsonl", [f"answer {i}" for i in range(5 * ROWS)])
    lines = source.read_text().splitlines()
    lines[2 * ROWS], lines[4 * ROWS] = '{"prompt": 1', "[]"
    source.write_text("\n".join(lines) + "\n")
    with serving(say) as server:
        recipe = FilterRecipe((judged(server),))
        with pytest.raises(RowFileError, match=f"line {2 * ROWS + 1}"):
            filter_file(source, tmp_path / "out", recipe)
        settings = FilterSettings(skip_malformed=True)
        counts = filter_file(source, tmp_path / "out", recipe, settings=settings)["counts"]
        assert (counts["malformed"], counts["dropped"]) == (2, 5 * ROWS - 2)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_and_the_next_run_goes_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls under way are waited for, and no other begins."""

    def say(body: dict[str, Any], number: int) -> str:
        if number == 21:
            os.kill(os.getpid(), getattr(signal, name))
        if 20 < number <= 24:
            time.sleep(0.3)
        return "90"

    source = written(tmp_path / "a.jsonl", [f"answer {i}" for i in range(60)])
    (tmp_path / "rubric.txt").write_text("How red?")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with serving(say) as server:
            command = ["filter", str(source), "--out", str(tmp_path / "out"), "--concurrency", "4"]
            command += ["--scorer", f"judge:m@{server.url}", "--above", "50"]
            command += ["--rubric", str(tmp_path / "rubric.txt")]
            assert main(command) == 130
            assert capsys.readouterr().err.endswith("goes on from what it kept\n")
            assert 21 <= len(server.asked) <= 25
            assert main(command) == 0
            assert len(server.asked) == 60
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert left(tmp_path / "out", "dropped.jsonl") == list(range(60))
