"""Replies of a judge's server: the types, the errors, JSON inside prose, schema checks, a cache on disk.

Knows: reply formats, and an append-only file of replies by key. Does not know: the network, what was asked.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp_ablate.errors import RunError
from interp_ablate.prompts.thoughts import split_thought
from interp_ablate.storage.json_shapes import NONE, NUMBER, OBJECT, misfit
from interp_ablate.storage.jsonl_log import JsonlLog


class EndpointError(RunError):
    """The server cannot be reached, wants another key, or does not speak the protocol."""


class RequestError(EndpointError):
    """The server takes this one request not (too long, filtered, malformed); others may pass."""


class UnansweredError(RequestError):
    """The server gave no answer to this one request in any of its tries."""


class AnswerError(RunError):
    """There is an answer, but not what was asked for: prose, another schema, a refusal, cut off."""


@dataclass(frozen=True)
class Reply:
    """One answer of the server."""

    text: str
    finish: str = "stop"
    """The reason why the text ended."""
    refusal: str | None = None
    tokens: tuple[str, ...] = ()
    """The answer's tokens, where log-probabilities were asked for."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest (token, log-probability) at the place of the first token that is not blank."""
    model: str = ""
    """The server's own name of the model."""
    used: tuple[int, int] = (0, 0)
    """Tokens of the question and of the answer, as the server counts them."""


# ---- answers held to a schema --------------------------------------------------------------------


def strip_thinking(text: str) -> str:
    """An answer without the thoughts (<think>...</think>) and the code fence around it."""
    text = split_thought(text)[1].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, flags=re.DOTALL)
    return fenced[1].strip() if fenced else text


def parse_json(reply: Reply, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The object that a reply consists of, if it fits the schema.

    Raises:
        AnswerError: a refusal, an answer that was cut off, something else than one object, a misfit.
    """
    if reply.refusal:
        raise AnswerError(f"the model refuses to answer: {reply.refusal[:200]!r}")
    if reply.finish == "length":
        raise AnswerError(
            "the answer was cut off: raise max_tokens. It begins " + repr(reply.text[:100])
        )
    try:
        value = json.loads(strip_thinking(reply.text))
    except (ValueError, RecursionError):
        raise AnswerError(
            f"expected a JSON object and nothing else; got {reply.text[:200]!r}"
        ) from None
    wrong = schema_error(value, {"type": "object", **schema})
    if wrong:
        raise AnswerError(f"the answer does not fit its schema: {wrong}; got {reply.text[:200]!r}")
    return value


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def schema_error(value: Any, schema: Mapping[str, Any], where: str = "the answer") -> str | None:
    """The first misfit of a value to a JSON schema (types, ranges, lengths, enum, required); None: it fits."""
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{where} is {value!r:.60}, not {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r:.60}, none of {schema['enum']}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return None if low <= value <= high else f"{where} is {value}, outside {low} to {high}"
    if isinstance(value, str):
        return _count(len(value), schema, "Length", f"{where} has %d characters")
    if isinstance(value, list):
        inside = (
            schema_error(v, schema.get("items", {}), f"{where}[{i}]") for i, v in enumerate(value)
        )
        wrong = _count(len(value), schema, "Items", f"{where} has %d items")
        return wrong or next(filter(None, inside), None)
    if isinstance(value, dict):
        return _misfit_object(value, schema, where)
    return None


def _misfit_object(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{where} lacks {', '.join(missing)}"
    surplus = [name for name in value if name not in properties]
    if surplus and schema.get("additionalProperties") is False:
        return f"{where} has {', '.join(surplus)} besides {', '.join(properties)}"
    inside = (
        schema_error(value[name], part, f"{where}.{name}")
        for name, part in properties.items()
        if name in value
    )
    return next(filter(None, inside), None)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return False  # Python's JSON takes NaN and Infinity
    return isinstance(value, _TYPES[kind]) or (
        kind == "integer" and isinstance(value, float) and value.is_integer()
    )


def _count(n: int, schema: Mapping[str, Any], what: str, text: str) -> str | None:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}", n)
    return None if low <= n <= high else f"{text % n}, not {low} to {high}"


CACHE_FORMAT = "interp_ablate.replies/1"
_REPLY = {
    **dict.fromkeys(("text", "finish", "model"), str),
    "refusal": (NONE, str),
    "tokens": [str],
    "top": [[str, NUMBER]],
    "used": [int, int],
}
_LINE = ({"server": str, "takes": OBJECT}, {"key": str, "reply": _REPLY})


class ReplyCache:
    """Replies by key. On disk where there is a path, in a file that is locked as long as it is in use."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock, self._stack = path, threading.Lock(), ExitStack()
        self._turn, self._taken = threading.Condition(), set[str]()
        self._replies: dict[str, Reply] = {}
        self._servers: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        self._lines = JsonlLog(
            path,
            {},
            kind="cache of replies",
            format=CACHE_FORMAT,
            lost="its call is paid for again",
            any_version=True,
        )
        weakref.finalize(self, self._stack.close)  # a cache that stayed empty leaves no file
        for number, line in enumerate(self._stack.enter_context(self._lines.open()), 2):
            try:
                if (place := misfit(line, _LINE)) is not None:
                    raise TypeError(f"{place} is another thing")
                if "server" in line:
                    self._servers[line["server"]] = dict(line["takes"])
                    continue
                fields = dict(line["reply"])
                fields["tokens"] = tuple(fields["tokens"])
                fields["top"] = tuple((str(t), float(p)) for t, p in fields["top"])
                fields["used"] = tuple(fields["used"])
                self._replies[line["key"]] = Reply(**fields)
            except (LookupError, TypeError, ValueError) as error:
                self._stack.close()
                raise self._lines.corrupt(number, f"no reply ({error!r})") from error

    @contextmanager
    def one_at_a_time(self, key: str) -> Iterator[None]:
        """A block that one thread enters at a time for a key: who comes second finds the first one's reply."""
        with self._turn:
            self._turn.wait_for(lambda: key not in self._taken)
            self._taken.add(key)
        try:
            yield
        finally:
            with self._turn:
                self._taken.discard(key)
                self._turn.notify_all()

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        with self._lock:
            if self.path is not None and key not in self._replies:
                self._lines.append({"key": key, "reply": asdict(reply)})
            self._replies[key] = reply

    def server(self, key: str) -> dict[str, Any]:
        """What is known of a server: the fields that it takes."""
        return self._servers.get(key, {})

    def put_server(self, key: str, takes: dict[str, Any]) -> None:
        with self._lock:
            if self.path is not None and self._servers.get(key) != takes:
                self._lines.append({"server": key, "takes": takes})
            self._servers[key] = takes


_CACHES: weakref.WeakValueDictionary[Path, ReplyCache] = weakref.WeakValueDictionary()
_CACHES_LOCK = threading.Lock()


def reply_cache(path: str | Path | None) -> ReplyCache:
    """The cache of a file: one object in a process, whoever asks for it. None: a cache in memory.

    Raises:
        RunError: a file that another process uses, or that holds something else.
    """
    if path is None:
        return ReplyCache(None)
    place = Path(path).resolve()
    with _CACHES_LOCK:
        cache = _CACHES.get(place)
        if cache is None:
            cache = _CACHES[place] = ReplyCache(place)
        return cache
