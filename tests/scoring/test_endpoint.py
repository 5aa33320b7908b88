"""Endpoints and judges against a local server that speaks the protocol, and fails in every way it can."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from chat_server import Fault, Server, completion, serving

from interp_ablate.datasets.filter_recipe import FilterRecipe
from interp_ablate.datasets.filter_rules import ScoreRule
from interp_ablate.datasets.filtering import FilterSettings, filter_file
from interp_ablate.errors import RunError
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.chat_client import Garbled, read_reply
from interp_ablate.scoring.endpoint import GONE_AFTER, Endpoint, EndpointSettings
from interp_ablate.scoring.exchange import PromptResponse, ReversedScorer
from interp_ablate.scoring.judge import SCORE_SCHEMA, Judge, read_score
from interp_ablate.scoring.lexicon import LexiconScorer
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.scoring.replies import (
    AnswerError,
    EndpointError,
    Reply,
    RequestError,
    parse_json,
    schema_error,
    strip_thinking,
)

KEY = "sk-do-not-tell-0123456789"
COLOUR = {
    "title": "colour",
    "type": "object",
    "properties": {"colour": {"type": "string"}, "n": {"type": "integer", "minimum": 1}},
    "required": ["colour", "n"],
    "additionalProperties": False,
}


def endpoint(server: Server, **options: Any) -> Endpoint:
    cache, key = options.pop("cache", None), options.pop("api_key", KEY)
    fast: dict[str, Any] = {"retries": 2, "backoff": 0.01, "timeout": 10.0, **options}
    return Endpoint("m", server.url, api_key=key, cache=cache, settings=EndpointSettings(**fast))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------------- what is asked


def test_a_question_and_its_reply() -> None:
    with serving("Blue.") as server:
        asked = endpoint(server, temperature=0.5, max_tokens=9, options={"seed": 3, "top_p": None})
        reply = asked.ask(user("Which colour?"))
    assert (reply.text, reply.finish, reply.model) == ("Blue.", "stop", "m-served")
    assert server.asked == [
        {
            "model": "m",
            "messages": user("Which colour?"),
            "temperature": 0.5,
            "max_tokens": 9,
            "seed": 3,
        }
    ]
    assert server.keys == [f"Bearer {KEY}"]


def test_structured_answers_are_asked_for_and_held_to_the_schema() -> None:
    with serving(json.dumps({"colour": "blue", "n": 2})) as server:
        found = endpoint(server).ask_json(user("?"), COLOUR)
    assert found == {"colour": "blue", "n": 2}
    held = server.asked[0]["response_format"]
    assert held["type"] == "json_schema"
    assert held["json_schema"] == {"name": "colour", "strict": True, "schema": COLOUR}


@pytest.mark.parametrize("status", [400, 422, 501])
def test_a_server_without_schemas_is_told_in_words(status: int) -> None:
    def say(body: dict[str, Any], number: int) -> Any:
        if "response_format" in body:
            return Fault(status, {"error": {"message": "response_format is not supported"}})
        assert "JSON schema" in body["messages"][-1]["content"]
        return '```json\n{"colour": "red", "n": 1}\n```'

    with serving(say) as server:
        asked = endpoint(server)
        assert asked.ask_json(user("?"), COLOUR)["colour"] == "red"
        asked.ask_json(user("another?"), COLOUR)
    assert ["response_format" in body for body in server.asked] == [True, False, False]


def test_another_refusal_is_not_taken_for_a_missing_feature() -> None:
    refusal = Fault(400, {"error": {"message": "context length exceeded"}})
    with serving(refusal) as server, pytest.raises(RequestError, match="context length exceeded"):
        endpoint(server).ask_json(user("?"), COLOUR)
    with serving(lambda body, number: "blue" if number == 1 else refusal) as server:
        asked = endpoint(server)
        asked.ask(user("?"), schema=COLOUR)  # it takes schemas
        with pytest.raises(RequestError):
            asked.ask(user("longer?"), schema=COLOUR)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("The colour is blue.", "a JSON object and nothing else"),
        ("", "a JSON object and nothing else"),
        ('{"colour": "blue"}', "lacks n"),
        ('{"colour": "blue", "n": 0}', "outside 1"),
        ('{"colour": "blue", "n": 1.5}', "not integer"),
        ('{"colour": 3, "n": 1}', "not string"),
        ('{"colour": "blue", "n": 1, "m": 2}', "has m besides"),
        ('["blue", 1]', "not object"),
        ('{"colour": "blue", "n": NaN}', "not integer"),
        (completion('{"colour": "bl', finish="length"), "cut off: raise max_tokens"),
        (completion(None, message={"refusal": "I would rather not"}), "refuses to answer"),
    ],
)
def test_an_answer_that_does_not_fit_says_what_came(said: Any, part: str) -> None:
    with serving(said) as server, pytest.raises(AnswerError, match=part):
        endpoint(server).ask_json(user("?"), COLOUR)
    assert len(server.asked) == 1


def test_an_answer_that_does_not_fit_can_be_asked_for_again() -> None:
    with serving(
        lambda body, number: "prose" if number < 3 else '{"colour": "b", "n": 1}'
    ) as server:
        asked = endpoint(server)
        with pytest.raises(AnswerError):
            asked.ask_json(user("?"), COLOUR, attempts=2)
        assert asked.ask_json(user("?"), COLOUR, attempts=3) == {"colour": "b", "n": 1}
    assert len(server.asked) == 3  # the first two bad answers were paid for once


def test_a_model_that_thinks_takes_other_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def say(body: dict[str, Any], number: int) -> Any:
        for name in ("max_tokens", "temperature"):
            if name in body:
                error = {
                    "message": f"Unsupported parameter: {name}",
                    "param": name,
                    "code": "unsupported",
                }
                return Fault(400, {"error": error})
        assert body["max_completion_tokens"] == 77
        return '{"colour": "b", "n": 1}' if "response_format" in body else "plain"

    questions = [user(str(i)) for i in range(9)]
    with serving(say) as server:
        asked = endpoint(server, max_tokens=77, cache=tmp_path / "replies.jsonl", concurrency=3)
        identity = asked.identity
        assert asked.asked["max_tokens"] == 77 and asked.asked["structured"] == "not known yet"
        assert len(asked.ask_all(questions, schema=COLOUR)) == 9 and asked.identity == identity
        assert asked.ask_json(questions[0], COLOUR)["colour"] == "b"
        assert (
            sum("max_completion_tokens" in b and "temperature" not in b for b in server.asked) == 9
        )
        del asked
        before = len(server.asked)
        again = endpoint(server, max_tokens=77, cache=tmp_path / "replies.jsonl", concurrency=1)
        again.ask_all(questions, schema=COLOUR)
        assert len(server.asked) == before  # what the server takes is known from the last time
        assert again.asked == {"max_completion_tokens": 77, "structured": "schema"}
    assert "sent as max_completion_tokens" in caplog.text and "takes no temperature" in caplog.text
    other = Fault(400, {"error": {"message": "no", "param": "seed"}})
    with serving(other) as server, pytest.raises(RequestError):
        endpoint(server, options={"seed": 1}).ask(user("?"))


# --------------------------------------------------------------------------------- faults


def test_too_many_requests_then_an_answer() -> None:
    faults = {1: Fault(429, {"error": {"message": "slow down"}}), 2: Fault(503, "busy")}
    with serving(lambda body, number: faults.get(number, "ok")) as server:
        asked = endpoint(server)
        assert asked.ask(user("?")).text == "ok"
    assert (len(server.asked), asked.calls) == (3, 3)


def test_a_retry_after_is_waited_for() -> None:
    wait = Fault(429, {"error": {"message": "slow down"}}, Retry_After="0.6")
    with serving(lambda body, number: wait if number == 1 else "ok") as server:
        began = time.monotonic()
        endpoint(server).ask(user("?"))
        assert time.monotonic() - began >= 0.6
    too_long = Fault(429, {"error": {"message": "slow down"}}, Retry_After="3600")
    with serving(too_long) as server:
        with pytest.raises(EndpointError, match="asks to wait 3600 s"):
            endpoint(server).ask(user("?"))
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (Fault(500, {"error": {"message": "out of memory"}}), "status 500: .*out of memory"),
        (Fault(200, "<html>log in</html>"), "no chat completion: .*log in"),
        (Fault(200, {"error": {"message": "no provider"}}), "no chat completion: .*no provider"),
        (Fault(200, {"choices": []}), "no chat completion"),
        (Fault(200, completion([{"type": "x"}])), "no chat completion"),  # type: ignore[arg-type]
    ],
)
def test_a_server_that_goes_on_failing_is_given_up(fault: Fault, part: str) -> None:
    with serving(fault) as server:
        with pytest.raises(EndpointError, match=part) as raised:
            endpoint(server).ask(user("?"))
        assert len(server.asked) == 3
    assert "in 3 tries" in str(raised.value) and "Run again" in str(raised.value)


def test_a_server_that_hangs_is_left() -> None:
    with serving(Fault(hang=True)) as server:
        began = time.monotonic()
        with pytest.raises(EndpointError, match=r"no answer within 0\.2 s"):
            endpoint(server, timeout=0.2, retries=1).ask(user("?"))
        assert time.monotonic() - began < 5


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = Endpoint(
        "m", f"http://127.0.0.1:{port}/v1", settings=EndpointSettings(retries=1, backoff=0.01)
    )
    with pytest.raises(EndpointError, match=r"no connection.*Is the server up") as raised:
        asked.ask(user("?"))
    assert f"127.0.0.1:{port}" in str(raised.value) and "in 2 tries" in str(raised.value)


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "set OPENAI_API_KEY"),
        (404, {"error": {"message": "no model m"}}, "check the model's name and the URL"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "no credit left"),
    ],
)
def test_what_retrying_does_not_change_is_not_retried(status: int, body: Any, part: str) -> None:
    with serving(Fault(status, body)) as server:
        with pytest.raises(EndpointError, match=part) as raised:
            endpoint(server).ask_all([user("a")])
        assert len(server.asked) == 1
    assert KEY not in str(raised.value) and not isinstance(raised.value, RequestError)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"model": ""}, "no model"),
        ({"base_url": "localhost:8000"}, "no URL of a server"),
        ({"base_url": None}, "no key for api.openai.com"),
        ({"base_url": "http://me:secretive@host:80O0/v1"}, "^'host:80O0/v1' is no URL of a server"),
        ({"base_url": "http://[::1/v1"}, "no URL of a server"),
        ({"base_url": "http://.../v1"}, "no URL of a server"),
        ({"base_url": "http://ho\0st/v1"}, "no URL of a server"),
        ({"api_key": "sk-a\nb"}, "set it again"),
        ({"api_key": "sk-\u00e9"}, "set it again"),
    ],
)
def test_what_cannot_be_an_endpoint(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(EndpointError, match=part):
        Endpoint(**{"model": "m", "base_url": "http://x/v1", **arguments})


def test_text_that_cannot_be_sent_is_one_request_refused() -> None:
    with serving("1") as server:
        found = endpoint(server).ask_all([user("fine"), user("half \ud83d an emoji")])
    assert isinstance(found[0], Reply) and isinstance(found[1], RequestError)
    assert "surrogate" in str(found[1]) and len(server.asked) == 1


# --------------------------------------------------------------------------------- the cache


def test_what_is_cached_is_not_asked_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "replies.jsonl"
    with serving(lambda body, number: f"reply {number}") as server:
        first = endpoint(server, cache=cache)
        said = first.ask(user("a")).text
        assert first.ask(user("a")).text == said
        del first
        again = endpoint(server, cache=cache)
        assert again.ask(user("a")).text == said and (again.calls, again.from_cache) == (0, 1)
        everything = [
            again.ask(user("b")),
            again.ask(user("a"), sample=1),
            again.ask(user("a"), schema=COLOUR),
            again.ask(user("a"), top_logprobs=5),
            endpoint(server, cache=cache, temperature=1.0).ask(user("a")),
            endpoint(server, cache=cache, max_tokens=7).ask(user("a")),
            endpoint(server, cache=cache, options={"seed": 1}).ask(user("a")),
        ]
        other = Endpoint("other", server.url, cache=cache)
        everything.append(other.ask(user("a")))
    assert len({reply.text for reply in everything}) == len(everything)
    assert len(server.asked) == 1 + len(everything)


def test_an_answer_taken_without_schema_is_found_again(tmp_path: Path) -> None:
    def say(body: dict[str, Any], number: int) -> Any:
        return Fault(400, {}) if "response_format" in body else '{"colour": "b", "n": 1}'

    with serving(say) as server:
        for _ in range(2):
            asked = endpoint(server, cache=tmp_path / "replies.jsonl")
            asked.ask_json(user("?"), COLOUR)
            del asked
    assert len(server.asked) == 2


def test_a_key_is_never_written_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as a file read by a shell may end
    cache = tmp_path / "replies.jsonl"
    echo = Fault(500, {"error": {"message": f"key {KEY} crashed me"}})
    with serving(lambda body, number: echo if number < 3 else "ok") as server:
        url = server.url.replace("//", "//me:secretive@") + "?token=hushhush"
        asked = Endpoint("m", url, cache=cache, settings=EndpointSettings(retries=1, backoff=0.01))
        with pytest.raises(EndpointError) as raised:
            asked.ask(user("a"))
        asked.ask(user("b"))
    told = [str(raised.value), repr(asked), json.dumps(asked.identity), cache.read_text()]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("interp_ablate")]
    for text in (*told, *ours):
        assert not any(secret in text for secret in (KEY, "secretive", "hushhush")), text
    assert "***" in str(raised.value)
    assert server.keys[0] is not None
    with serving("ok") as server:
        endpoint(server).ask(user("a"))
    assert server.keys == [f"Bearer {KEY}"]


def test_calls_are_bounded_in_order_and_asked_once() -> None:
    def say(body: dict[str, Any], number: int) -> str:
        time.sleep(0.03)
        return body["messages"][-1]["content"].upper()

    words = ["a", "b", "a", "c", "d", "b", "e", "f", "a", "g"]
    with serving(say) as server:
        replies = endpoint(server, concurrency=3).ask_all([user(word) for word in words])
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == [
        w.upper() for w in words
    ]
    assert sorted(server.questions()) == list("abcdefg")
    assert 1 < server.most <= 3
    assert endpoint(server).ask_all([]) == []


def test_a_server_that_dies_stops_the_batch_and_the_rest_is_asked_later(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    alive = {"yes": True}

    def say(body: dict[str, Any], number: int) -> Any:
        return "1" if number <= 5 or alive["yes"] is False else Fault(500, "gone")

    questions = [user(str(i)) for i in range(40)]
    with serving(say) as server:
        with pytest.raises(EndpointError, match="answers that came are kept"):
            endpoint(server, cache=cache, concurrency=2, retries=1).ask_all(questions)
        failed = len(server.asked) - 5
        assert GONE_AFTER <= failed / 2 <= GONE_AFTER + 2  # not every question was tried
        alive["yes"] = False
        again = endpoint(server, cache=cache, concurrency=2)
        assert all(isinstance(reply, Reply) for reply in again.ask_all(questions))
        assert (again.calls, again.from_cache) == (35, 5)


def test_one_request_that_always_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """It has no verdict, is kept nowhere, and is asked again the next time."""
    alive = {"yes": False}

    def say(body: dict[str, Any], number: int) -> Any:
        odd = "Question 7?" in body["messages"][-1]["content"] and not alive["yes"]
        return Fault(500, "too long for me") if odd else "40"

    asked = exchanges(*(f"answer {i}" for i in range(60)))
    with serving(say) as server:
        judge = Judge(endpoint(server, concurrency=4, cache=tmp_path / "r.jsonl"), "How red?")
        verdicts = judge.explain(asked)
        assert [i for i, verdict in enumerate(verdicts) if verdict.score is None] == [7]
        assert verdicts[7].why == "no answer from the server"
        assert "status 500" in verdicts[7].detail["reply"]
        rule = ScoreRule(above=30, scorer=judge)
        journal = tmp_path / "out" / "verdicts.jsonl"
        rows = [{"prompt": e.prompt.text, "response": e.answer} for e in asked]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for left, known in ((1, 59), (0, 60)):
            settings = FilterSettings(force=True)
            manifest = filter_file(
                tmp_path / "a.jsonl", tmp_path / "out", FilterRecipe((rule,)), settings=settings
            )
            assert manifest["counts"]["no_verdict"] == left
            readings = [
                json.loads(line).get("readings", [])
                for line in journal.read_text().split("\n")[:-1]
            ]
            assert sum(map(len, readings)) == known
            alive["yes"] = True


def test_a_slow_answer_holds_up_no_other() -> None:
    """There is no barrier: while one waits, all the others are asked and given out."""
    last = threading.Event()

    def say(body: dict[str, Any], number: int) -> Any:
        if "answer 0\n" in body["messages"][-1]["content"]:
            last.wait(20)
        return "50"

    asked = exchanges(*(f"answer {i}" for i in range(40)))
    with serving(say) as server:
        judge = Judge(endpoint(server, concurrency=2), "How red?")
        numbers = []
        for number, _ in judge.explain_each(asked):
            numbers.append(number)
            if len(numbers) == 39:
                last.set()
    assert numbers[-1] == 0 and sorted(numbers) == list(range(40))


def test_what_a_judge_cost_is_said() -> None:
    def say(body: dict[str, Any], number: int) -> Any:
        reply = completion("50")
        return {**reply, "usage": {"prompt_tokens": 90, "completion_tokens": 3}}

    with serving(say) as server:
        judge = Judge(endpoint(server), "How red?")
        judge(exchanges("a", "b", ""))
        judge(exchanges("a"))
        assert (
            f"m at {server.url}: 2 calls, 180 + 6 tokens, 1 answers from the cache" in judge.spent
        )
        assert "max_tokens 1024, structured schema" in judge.spent
        assert ReversedScorer(judge).spent == judge.spent and LexiconScorer("length").spent == ""


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"max_tokens": 0}, {"timeout": 0.0}])
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(EndpointError, match=next(iter(wrong))):
        EndpointSettings(**wrong)


KILLED = """
import sys
from interp_ablate.scoring.endpoint import Endpoint, EndpointSettings
settings = EndpointSettings(concurrency=2)
asked = Endpoint("m", sys.argv[1], cache=sys.argv[2], settings=settings)
asked.ask_all([[{"role": "user", "content": str(i)}] for i in range(12)])
"""


def test_killed_and_resumed_no_call_is_paid_for_twice(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    stuck = threading.Event()

    def say(body: dict[str, Any], number: int) -> Any:
        if number > 7 and not stuck.is_set():
            stuck.wait(30)  # these are in flight when the process is killed
        return str(number)

    with serving(say) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.url, str(cache)], cwd=Path(__file__).parents[2]
        )
        deadline = time.monotonic() + 30
        while len(server.asked) < 9 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        stuck.set()
        before = len(server.asked)
        assert before == 9
        with cache.open("ab") as file:
            file.write(b'{"key": "torn')  # as if it had been killed while it wrote
        asked = endpoint(server, cache=cache)
        replies = asked.ask_all([user(str(i)) for i in range(12)])
        assert (asked.calls, asked.from_cache) == (5, 7)
    assert len(server.asked) == 14 and all(isinstance(reply, Reply) for reply in replies)


def test_a_cache_in_use_elsewhere_or_corrupt_is_an_error(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with serving("ok") as server:
        asked = endpoint(server, cache=cache)
        asked.ask(user("a"))
        code = KILLED.replace("asked.ask_all", "0 and asked.ask_all")
        done = subprocess.run(
            [sys.executable, "-c", code, server.url, str(cache)],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode and "in use by another process" in done.stderr
        del asked
        with cache.open("ab") as file:
            file.write(b'{"key": "k", "reply": {"word": 3}}\n')
        with pytest.raises(RunError, match="line 3: no reply"):
            endpoint(server, cache=cache)
        (tmp_path / "other.jsonl").write_text('{"format": "something"}\n')
        with pytest.raises(RunError, match="not a cache of replies"):
            endpoint(server, cache=tmp_path / "other.jsonl")


# --------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize(
    ("value", "schema", "part"),
    [
        (3, {"type": "number", "maximum": 3}, None),
        (True, {"type": "number"}, "not number"),
        (True, {"type": ["boolean", "null"]}, None),
        (None, {"type": ["number", "null"]}, None),
        (2.0, {"type": "integer"}, None),
        (float("inf"), {"type": "number"}, "not number"),
        ("a", {"enum": ["a", "b"]}, None),
        ("c", {"enum": ["a", "b"]}, "none of"),
        (["a", 1], {"type": "array", "items": {"type": "string"}}, r"\[1\] is 1"),
        (["a"], {"type": "array", "minItems": 2}, "has 1 items"),
        ("", {"type": "string", "minLength": 1}, "0 characters"),
        (
            {"a": {"b": 1}},
            {"properties": {"a": {"properties": {"b": {"maximum": 0}}}}},
            r"a\.b is 1",
        ),
        ({"x": 1}, {"type": "object"}, None),
    ],
)
def test_misfits(value: Any, schema: dict[str, Any], part: str | None) -> None:
    found = schema_error(value, schema)
    assert found is None if part is None else (found and re.search(part, found))


def test_thoughts_and_fences_are_not_the_answer() -> None:
    assert strip_thinking("<think>50? no.\n</think>\n\n85") == "85"
    assert strip_thinking("```\n85\n```") == "85" and strip_thinking("  85 ") == "85"
    assert strip_thinking("a ```json\n85\n```") == "a ```json\n85\n```"
    assert parse_json(Reply('<think>{"a": 1}</think>{"a": 2}'), {}) == {"a": 2}


# --------------------------------------------------------------------------------- judges


def exchanges(*answers: str) -> list[PromptResponse]:
    return [PromptResponse(Prompt(f"Question {i}?"), answer) for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("said", "score", "why"),
    [
        ("85", 85.0, ""),
        (" 12.5\n", 12.5, ""),
        ("0", 0.0, ""),
        ("100", 100.0, ""),
        ('{"score": 40}', 40.0, ""),
        ("<think>hm</think>7", 7.0, ""),
        ('{"score": null}', None, "no score given"),
        ('{"score": 101}', None, "out of range"),
        ("-1", None, "out of range"),
        ("1e400", None, "wrong schema"),
        ("NaN", None, "wrong schema"),
        ("true", None, "wrong schema"),
        ('"85"', None, "wrong schema"),
        ('{"score": "85"}', None, "wrong schema"),
        ('{"score": 85, "because": "x"}', None, "wrong schema"),
        ('{"rating": 85}', None, "wrong schema"),
        ("[85]", None, "wrong schema"),
        ("Score: 85", 85.0, ""),
        ("85/100", 85.0, ""),
        ("**Final score:** 85 / 100.", 85.0, ""),
        ("## Rating\n**85 out of 100**", 85.0, ""),
        ("The score is 85%.", 85.0, ""),
        ("Score: 185/100", None, "out of range"),
        ("8/10", None, "another scale"),
        ("Rating: 4 out of 5.", None, "another scale"),
        ("85 or 90", None, "prose"),
        ("Score: 85. It is good.", None, "prose"),
        ("I would say 85 of 100, or maybe 20.", None, "prose"),
        ("", None, "empty reply"),
        ("<think>hm</think>", None, "empty reply"),
        ("REFUSAL", None, "refusal"),
        (completion(None, message={"refusal": "no"}), None, "refusal"),
        (completion("8", finish="length"), None, "cut off"),
        (completion("85", finish="content_filter"), None, "filtered"),
    ],
)
def test_a_judge_is_read_strictly(said: Any, score: float | None, why: str) -> None:
    with serving(said) as server:
        [verdict] = Judge(endpoint(server), "How red?").explain(exchanges("Quite."))
    assert (verdict.score, verdict.why) == (score, why)


def test_a_judge_of_many_counts_what_gives_no_verdict() -> None:
    replies = {"good": "90", "bad": '{"score": 10}', "long": Fault(400, {}), "odd": "who knows"}

    def say(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][-1]["content"]
        return next(reply for word, reply in replies.items() if f"\n{word}\n" in text)

    judge_me = exchanges("good", "", "odd", "bad", "long", "good", " \n")
    with serving(say) as server:
        judge = Judge(endpoint(server, concurrency=1), "Is it good? 0 is bad, 100 is good.")
        verdicts = judge.explain(judge_me)
        assert judge(judge_me) == [90.0, None, None, 10.0, None, 90.0, None]
    assert Counter(v.why for v in verdicts if v.score is None) == {
        "empty answer": 2,
        "prose": 1,
        "refused by the server": 1,
    }
    assert verdicts[2].detail["reply"] == "who knows"
    system, asked = server.asked[0]["messages"]
    assert system["content"] == judge.rubric and "Question 0?" in asked["content"]
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == SCORE_SCHEMA


def test_a_server_that_refuses_everything_is_no_judge() -> None:
    refusal = Fault(400, {"error": {"message": "unknown model"}})
    with serving(refusal) as server, pytest.raises(EndpointError, match="unknown model"):
        Judge(endpoint(server), "?")(exchanges("a", "b"))
    with serving(lambda body, number: "5" if number == 1 else refusal) as server:
        judge = Judge(endpoint(server), "?")
        assert judge(exchanges("a")) == [5.0]
        assert judge(exchanges("b")) == [None]  # it does answer: this one it cannot


def test_a_published_rubric_is_the_whole_question() -> None:
    rubric = 'Rate {"x": 1} for [{question}] and [{answer}]. Say a number, or REFUSAL.'
    answer = "see {question} and {answer}"
    with serving("55") as server:
        judge = Judge(endpoint(server), rubric)
        assert judge(exchanges(answer)) == [55.0]
    [asked] = server.asked[0]["messages"]
    expected = f'Rate {{"x": 1}} for [Question 0?] and [{answer}]. Say a number, or REFUSAL.'
    assert asked == {"role": "user", "content": expected}


def with_logprobs(text: str, tokens: list[str], top: dict[str, float]) -> dict[str, Any]:
    likeliest = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
    content = [{"token": token, "logprob": -0.1, "top_logprobs": likeliest} for token in tokens]
    return completion(text, logprobs={"content": content})


@pytest.mark.parametrize(
    ("said", "score", "why"),
    [
        (
            with_logprobs("80", ["80"], {"80": 0.5, "90": 0.25, " 80": 0.05, "Well": 0.2}),
            83.125,
            "",
        ),
        (with_logprobs("80", ["\n", "80"], {"80": 0.5, "20": 0.5}), 50.0, ""),
        (with_logprobs("80", ["80"], {"80": 0.2, "I": 0.8}), None, "unsure"),
        (with_logprobs("80", ["80"], {"80": 0.5, "101": 0.5}), 80.0, ""),
        (with_logprobs("85", ["8", "5"], {"8": 0.5, "9": 0.5}), 85.0, ""),  # not 8.5
        ("85", 85.0, ""),
        # 7 and 8 may go on: as tokens of one digit
        (with_logprobs("7", ["7"], {"7": 0.5, "8": 0.5}), 7.0, ""),
        (with_logprobs("No.", ["No", "."], {"80": 1.0}), None, "prose"),
    ],
)
def test_weighted_scores(
    said: Any, score: float | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(said) as server:
        judge = Judge(endpoint(server), "How red?", weighted=True)
        [verdict] = judge.explain(exchanges("Quite."))
    assert verdict.why == why and verdict.score == (
        score if score is None else pytest.approx(score)
    )
    body = server.asked[0]
    assert body["logprobs"] and body["top_logprobs"] == 20 and "response_format" not in body
    assert judge.unweighted == (score in (7.0, 85.0))
    assert ("not weighted" in caplog.text) == (score in (7.0, 85.0))


def test_what_is_read_from_the_cache_is_weighted_alike(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with serving(with_logprobs("80", ["80"], {"80": 0.5, "90": 0.5})) as server:
        found = []
        for _ in range(2):
            judge = Judge(endpoint(server, cache=cache), "?", weighted=True)
            found.append(judge(exchanges("a")))
            del judge
    assert found == [[pytest.approx(85)]] * 2 and len(server.asked) == 1


def test_a_judge_from_a_line_of_text(tmp_path: Path) -> None:
    with serving("30") as server:
        options = {"retries": 0, "concurrency": 1}
        judge = make_scorer(
            f"judge:-org/m:1@{server.url}", rubric="?", cache=tmp_path / "c.jsonl", endpoint=options
        )
        assert judge(exchanges("a", "")) == [70.0, None]
        same = make_scorer(
            {"scorer": f"judge:org/m:1@{server.url}", "rubric": "?", "weighted": True}
        )
        assert same.identity["weighted"] is True
        url = f"{server.url}?weighted=true&api-version=2"
        same = make_scorer(f"judge:m@{url}", rubric="?")
        assert isinstance(same, Judge) and same.weighted
        assert same.endpoint._client.url == f"{server.url}?api-version=2"
    assert server.asked[0]["model"] == "org/m:1" and server.keys[0] == "Bearer none"
    assert judge.name == "-judge:org/m:1"
    identity = json.dumps(judge.identity)
    assert server.url in identity and "org/m:1" in identity
    with pytest.raises(RunError, match="needs a rubric"):
        make_scorer(f"judge:m@{server.url}")
    with pytest.raises(RunError, match="needs a rubric"):
        Judge(Endpoint("m", server.url), "  ")


def test_read_score_of_a_reply() -> None:
    assert read_score(Reply("33")).score == 33.0


def test_json_too_deep_to_read_is_no_answer() -> None:
    deep = "[" * 100_000
    assert read_score(Reply(deep)).why == "prose"
    with pytest.raises(AnswerError, match="expected a JSON object"):
        parse_json(Reply(deep), COLOUR)
    with pytest.raises(Garbled, match="ValueError"):
        read_reply(deep.encode())


def test_the_command_goes_on_where_a_judge_went_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_ablate.cli.main import main
    from interp_ablate.scoring import chat_client

    source, out, rubric = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "rubric.txt"))
    rows = [{"prompt": f"p {i}", "response": f"answer {i}" if i else ""} for i in range(8)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rubric.write_text("How long is it? 0 is short, 100 is long.")
    monkeypatch.setattr(chat_client.random, "uniform", lambda low, high: 0.001)  # no long waits
    alive = {"until": 3}

    def say(body: dict[str, Any], number: int) -> Any:
        return '{"score": 25}' if number <= alive["until"] else Fault(503, "down")

    with serving(say) as server:
        command = ["--quiet", "score", str(source), "--scorer", f"judge:m@{server.url}"]
        command += ["--rubric", f"@{rubric}", "--out", str(out), "--json"]
        assert main(command) == 2
        assert "answers that came are kept" in capsys.readouterr().err
        assert not out.exists() and (tmp_path / "out.jsonl.replies.jsonl").is_file()
        alive["until"] = 10**6
        asked = len(server.asked)
        assert main(command) == 0
        assert len(server.asked) - asked == 7 - 3
    line = json.loads(capsys.readouterr().out)
    assert (line["n"], line["mean"], line["no verdict"]) == (7, 25.0, {"empty answer": 1})
    assert [json.loads(x)["judge:m"] for x in out.read_text().splitlines()] == [None] + [25.0] * 7


# --------------------------------------------------------------- servers that are not what they seem


@pytest.mark.parametrize(
    "name",
    [
        *("m@localhost:8000/v1", "m@localhost", "m@10.0.0.1/v1", "m@a:secretive@h/v1", "m@a.b.com"),
        *("localhost:8000/v1", "localhost", "host:8000", "http://a:secretive@h/v1", "ftp://h"),
    ],
)
def test_a_server_without_its_scheme_is_no_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # it would go to api.openai.com
    with pytest.raises(EndpointError, match="neither a model's name nor") as raised:
        make_scorer(f"judge:{name}", rubric="?")
    assert "http://HOST:PORT/v1" in str(raised.value)


@pytest.mark.parametrize("name", ["gpt-4o", "org/m:70b", "claude-3@20240620", "qwen2.5:7b", "a/b"])
def test_names_of_models_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Endpoint(name).model == name


@contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads a request, and then says what it wants, byte by byte."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(1 << 16)
            try:
                while not over.is_set():
                    talk(connection)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        listener.close()


def _drip(start: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            time.sleep(0.05)
            connection.sendall(b"a")

    return talk


BODY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "start",
    [BODY, BODY.replace(b"200 OK", b"400 No"), b"HTTP/1.1 200 OK\r\nX-Drip: "],
    ids=["body", "error body", "headers"],
)
def test_a_server_that_drips_is_left(start: bytes) -> None:
    with talking(_drip(start)) as url:
        began = time.monotonic()
        settings = EndpointSettings(timeout=0.3, retries=0)
        with pytest.raises(EndpointError, match=r"not whole within 0\.6 s|no answer within 0\.3 s"):
            Endpoint("m", url, settings=settings).ask(user("?"))
        assert time.monotonic() - began < 5


def test_a_reply_without_end_is_left() -> None:
    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"100000\r\n" + b"a" * 0x100000 + b"\r\n")

    with talking(pour) as url, pytest.raises(EndpointError, match="more than 8388608 bytes"):
        Endpoint("m", url, settings=EndpointSettings(retries=0)).ask(user("?"))


def test_a_compressed_reply_is_not_read() -> None:
    body = gzip.compress(b" " * 50_000_000)
    start = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        talking(lambda connection: connection.sendall(start + body)) as url,
        pytest.raises(EndpointError, match="compressed"),
    ):
        Endpoint("m", url, settings=EndpointSettings(retries=0)).ask(user("?"))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving("ok") as other:
        moved = Fault(status, "", Location=f"{other.url}/chat/completions")
        with (
            serving(moved) as server,
            pytest.raises(EndpointError, match=f"redirects to {other.url}"),
        ):
            endpoint(server).ask(user("?"))
        assert not other.asked


def test_a_key_in_a_reply_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cache = tmp_path / "replies.jsonl"
    said = completion(f"your key is {KEY}", message={"refusal": f"no, {KEY}"}, finish=KEY)
    with serving(said) as server:
        reply = endpoint(server, cache=cache).ask(user("?"))
    assert reply.text == "your key is ***"
    assert KEY not in repr(reply) + cache.read_text()
