"""Endpoints: questions to an OpenAI-compatible server, each paid for once.

Knows: the chat completions protocol (through the `openai` package), answers held to a JSON schema, retries, a
cache of replies on disk, bounded concurrency, keeping the key out of sight.
Does not know: what is asked, or what an answer means.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from time import time
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

from interp_ablate.scoring.replies import (
    AnswerError,
    EndpointError,
    Reply,
    RequestError,
    parse_json,
)
from interp_ablate.storage.jsonl_log import JsonlLog

logger = logging.getLogger(__name__)


Message = Mapping[str, str]
Structured = Literal["auto", "schema", "plain"]
OPENAI_URL = "https://api.openai.com/v1"
CACHE_FORMAT = "interp_ablate.replies/1"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
# What a server that knows no response_format answers; any other 4xx is about something else.
UNSUPPORTED = (400, 422, 501)
# Fields that models which think refuse, and what they take in their place (None: their own choice).
ADAPTED: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for


class Endpoint:
    """A model behind an OpenAI-compatible chat completions URL (OpenAI, vLLM, llama.cpp, Ollama, ...).

    Args:
        model: as the server names it.
        base_url: usually ends in /v1; default: OPENAI_BASE_URL, or OpenAI's.
        api_key: default: OPENAI_API_KEY; servers that want none get none. Never written or logged.
        cache: an append-only JSONL file of replies; what is in it is not asked again, in this run or the
            next. Endpoints of one process may share it. None: replies are kept in memory.
        structured: whether a schema is sent as `response_format`: "schema" always, "plain" never (it is
            described in words), "auto" until the server refuses it.
        retries: after the first try, of 429, 5xx, time-outs, broken connections and garbled replies.
        backoff: seconds before the first retry, doubled for each further; a Retry-After is honoured.
        timeout: seconds of silence after which a call counts as hanging.
        options: further fields of the request (`seed`, `top_p`, `max_completion_tokens`); None drops one.

    Raises:
        EndpointError: no openai package, a URL without http, no key for OpenAI's own server.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        structured: Structured = "auto",
        retries: int = 5,
        backoff: float = 1.0,
        timeout: float = 60.0,
        concurrency: int = 4,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.base_url = _shown(self._url)
        # a header takes no line break, and the error about one would show the key
        self._key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        self._settings: dict[str, Any] = {
            "temperature": temperature, "max_tokens": max_tokens, **dict(options or {})
        }  # fmt: skip
        self._sent = dict(self._settings)  # as this server takes them
        self.structured: Structured = structured
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.concurrency = max(1, concurrency)
        self._cache = _cache_at(cache)
        self._lock = threading.Lock()
        self._schema_taken: bool | None = {"schema": True, "plain": False}.get(structured)
        self._answered = False
        self.calls = 0  # requests sent, retries included
        self.from_cache = 0  # answers that cost nothing
        self._check()

    def __repr__(self) -> str:
        return f"<Endpoint {self.model} at {self.base_url}>"

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on, as JSON; no key."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "structured": self.structured,
            **{name: value for name, value in self._settings.items() if value is not None},
        }

    def ask(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        top_logprobs: int = 0,
        sample: int = 0,
    ) -> Reply:
        """One reply, from the cache where it is known; `sample` tells equal questions apart.

        Raises:
            RequestError: the server refuses this request.
            EndpointError: the server cannot be reached, or fails in each of its tries.
        """
        return self._ask(messages, schema, top_logprobs, sample, threading.Event())

    def ask_json(
        self, messages: Sequence[Message], schema: Mapping[str, Any], *, attempts: int = 1
    ) -> dict[str, Any]:
        """An object that fits the JSON schema; one that does not is asked for again, `attempts` in all.

        Raises:
            AnswerError: no attempt gave such an object: what came, and what does not fit.
            EndpointError: as for `ask`.
        """
        for sample in range(max(1, attempts)):
            reply = self.ask(messages, schema=schema, sample=sample)
            try:
                return parse_json(reply, schema)
            except AnswerError as error:
                failure = error
                logger.info("%s, attempt %d: %s", self.model, sample + 1, error)
        raise failure

    def ask_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        schema: Mapping[str, Any] | None = None,
        top_logprobs: int = 0,
    ) -> list[Reply | RequestError]:
        """Many replies in order, `concurrency` calls at a time; equal questions are asked once.

        A request that the server refuses stands in the list as its error, if it has ever answered one.
        When the server goes away, what came before is in the cache and the rest is not asked.

        Raises:
            EndpointError: the server cannot be reached, or has refused every request so far.
        """
        keys = [json.dumps([dict(m) for m in messages]) for messages in conversations]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        found: dict[str, Reply | RequestError] = {}
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            waiting: dict[Future[Reply], str] = {
                pool.submit(self._ask, conversations[i], schema, top_logprobs, 0, stop): key
                for key, i in sorted(first.items(), key=lambda pair: pair[1])
            }
            for done in as_completed(waiting):
                try:
                    found[waiting[done]] = done.result()
                except RequestError as error:
                    found[waiting[done]] = error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        refused = [reply for reply in found.values() if isinstance(reply, RequestError)]
        if refused and not self._answered:
            raise refused[0]
        return [found[key] for key in keys]

    def _ask(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None,
        top_logprobs: int,
        sample: int,
        stop: threading.Event,
    ) -> Reply:
        while True:
            try:
                return self._asked(messages, schema, top_logprobs, sample, stop)
            except _Refused as refused:
                if not self._adapt(refused):
                    raise refused.error from None

    def _asked(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None,
        top_logprobs: int,
        sample: int,
        stop: threading.Event,
    ) -> Reply:
        ways = [
            self._body(messages, schema, top_logprobs, structured=way) for way in self._ways(schema)
        ]
        keys = [self._key_of(body, sample) for body in ways]
        for key in keys:
            known = self._cache.get(key)
            if known is not None:
                with self._lock:
                    self.from_cache += 1
                self._answered = True
                return known
        try:
            reply = self._send(ways[0], stop)
            used = keys[0]
        except _Refused as refused:
            about = refused.field in ways[0] and refused.field != "response_format"
            if len(ways) == 1 or refused.status not in UNSUPPORTED or about:
                raise
            reply, used = self._without_schema(ways[1], keys[1], refused, stop)
        else:
            if len(ways) == 2:
                self._schema_taken = True
        self._answered = True
        self._cache.put(used, reply)
        return reply

    def _without_schema(
        self, body: dict[str, Any], key: str, refused: _Refused, stop: threading.Event
    ) -> tuple[Reply, str]:
        try:
            reply = self._send(body, stop)
        except _Refused as again:  # it was not about the schema
            raise (again if again.field in ADAPTED else refused) from None
        if self._schema_taken is None:
            self._schema_taken = False
            logger.warning("%r takes no JSON schema: it is described in words", self)
        return reply, key

    def _adapt(self, refused: _Refused) -> bool:
        """Leave out or rename the field that the server names as one it does not take."""
        name = refused.field
        if refused.status not in UNSUPPORTED or name not in ADAPTED:
            return False
        with self._lock:
            if name in self._sent:  # else another thread did it
                value = self._sent.pop(name)
                other = ADAPTED[name]
                if other:
                    self._sent[other] = value
                logger.warning(
                    "%r takes no %s: %s",
                    self,
                    name,
                    f"sent as {other}" if other else "its own is used",
                )
                return True
        return name in refused.sent

    def _ways(self, schema: Mapping[str, Any] | None) -> tuple[bool, ...]:
        """Whether to send the schema as such: the ways to ask, the first one first."""
        if schema is None:
            return (False,)
        return (True, False) if self._schema_taken is None else (self._schema_taken,)

    def _body(
        self,
        messages: Sequence[Message],
        schema: Mapping[str, Any] | None,
        top_logprobs: int,
        *,
        structured: bool,
    ) -> dict[str, Any]:
        said = [dict(message) for message in messages]
        body = {"model": self.model, "messages": said, **self._sent}
        if schema is not None and structured:
            name = re.sub(r"\W", "_", str(schema.get("title", "answer")))[:64]
            held = {"name": name, "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": held}
        elif schema is not None:
            said[-1]["content"] += (
                "\n\nAnswer with one JSON object and nothing else. It follows this JSON schema: "
                + json.dumps(schema)
            )
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return {name: value for name, value in body.items() if value is not None}

    def _key_of(self, body: Mapping[str, Any], sample: int) -> str:
        whole = {"base_url": self.base_url, "body": body, "sample": sample}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    # ---- the wire --------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.model:
            raise EndpointError("no model: name it as the server does (its /v1/models lists them)")
        parts = _split(self._url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _no_url(self.base_url)
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError("OPENAI_API_KEY holds characters that no key has: set it again")
        if not self._key and self._url.startswith(OPENAI_URL):
            raise EndpointError(
                "no key for api.openai.com: set OPENAI_API_KEY, or give another server as base_url"
            )
        _openai()

    @cached_property
    def _client(self) -> Any:
        parts = urlsplit(self._url)
        return _openai().OpenAI(
            api_key=self._key or "none",
            base_url=urlunsplit(parts._replace(query="", fragment="")),
            default_query=dict(parse_qsl(parts.query)),
            max_retries=0,  # ours, below: counted, and stopped with the batch
            timeout=self.timeout,
        )

    def _send(self, body: dict[str, Any], stop: threading.Event) -> Reply:
        """The reply of the first try that gets through."""
        openai = _openai()
        rest = {k: v for k, v in body.items() if k not in ("model", "messages")}
        create = self._client.chat.completions.with_raw_response.create
        _check_unicode(body)
        for tried in range(1, self.retries + 2):
            asked_to_wait = 0.0
            with self._lock:
                self.calls += 1
            try:
                raw = create(model=body["model"], messages=body["messages"], extra_body=rest)
                return _reply(raw.content)
            except openai.APIStatusError as error:
                if error.status_code not in RETRIED or error.code == "insufficient_quota":
                    refused = self._refused(error)
                    refused.sent = frozenset(body)
                    raise refused from None
                why = f"status {error.status_code}: {error.message}"
                asked_to_wait = _retry_after(error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                why = f"no connection ({error.__cause__ or error})"
            except _Garbled as error:
                why = f"a reply that is no chat completion: {error}"
            why = self._hide(why)
            wait = max(asked_to_wait, self.backoff * 2 ** (tried - 1) * random.uniform(0.5, 1))
            last = tried > self.retries or asked_to_wait > LONGEST_WAIT
            if last or stop.wait(min(wait, LONGEST_WAIT)):
                break
            logger.info("%r: %s; try %d", self, why, tried + 1)
        more = f"; it asks to wait {asked_to_wait:g} s" if asked_to_wait > LONGEST_WAIT else ""
        raise EndpointError(
            f"{self.model} at {self.base_url} gave no answer in {tried} "
            f"{'try' if tried == 1 else 'tries'}; the last: {why}{more}. Is the server up, and the URL "
            "right (it usually ends in /v1)? Run again to go on: answers that came are kept"
            + ("" if self._cache.path else " (give a cache)")
        )

    def _refused(self, error: Any) -> _Refused:
        status, said = error.status_code, self._hide(str(error.message))
        advice = ""
        kind: type[EndpointError] = RequestError
        if status in (401, 403):
            advice, kind = "set OPENAI_API_KEY to a key of this server", EndpointError
        elif status == 404:
            advice, kind = "check the model's name and the URL (usually .../v1)", EndpointError
        elif status == 429:
            advice, kind = "the account has no credit left: nothing to retry", EndpointError
        text = f"{self.model} at {self.base_url} refuses the request with status {status}: {said}"
        return _Refused(
            status, kind(f"{text}. {advice}".rstrip(". ")), field=str(error.param or "")
        )

    def _hide(self, text: str) -> str:
        """Without what must not be seen: servers repeat keys in their messages."""
        parts = urlsplit(self._url)
        for secret in (self._key, parts.password, *(v for _, v in parse_qsl(parts.query))):
            if secret and len(secret) > 3:
                text = text.replace(secret, "***")
        return text[:500]


class _Refused(Exception):
    """A status that trying again does not change, with the error it becomes."""

    def __init__(self, status: int, error: EndpointError, *, field: str = "") -> None:
        super().__init__(str(error))
        self.status, self.error, self.field = status, error, field
        self.sent: frozenset[str] = frozenset()


class _Garbled(Exception):
    """Status 200 with something else than a chat completion."""


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise EndpointError(
            "judges behind a URL need the openai package: pip install 'interp-ablate[judge]'"
        ) from error
    return openai


def _no_url(shown: str) -> EndpointError:
    return EndpointError(f"{shown!r} is no URL of a server: give http(s)://HOST[:PORT]/v1")


def _split(url: str) -> SplitResult:
    """The parts of a URL.

    Raises:
        EndpointError: brackets, a host or a port that are none.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (read only when it is asked for)
        (parts.hostname or "").encode("idna")
        if not parts.geturl().isprintable():
            raise ValueError
    except ValueError:
        raise _no_url(re.split("[?#]", url.rpartition("@")[2])[0]) from None
    return parts


def _shown(url: str) -> str:
    """A URL without user, password, query and closing slash: as it may be written down."""
    parts = _split(url)
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
    )


def _check_unicode(body: Mapping[str, Any]) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Refused(
            0, RequestError(f"the question is not valid Unicode ({error.reason}): a lone surrogate")
        ) from None


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except ValueError:
        return 0.0


def _reply(content: bytes) -> Reply:
    """Read a chat completion, trusting nothing."""
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        positions = (choice.get("logprobs") or {}).get("content") or []
        tokens = tuple(str(position["token"]) for position in positions)
        at = next((i for i, token in enumerate(tokens) if token.strip()), None)
        top = () if at is None else positions[at].get("top_logprobs") or ()
        likeliest = tuple((str(one["token"]), float(one["logprob"])) for one in top)
        finish, model = choice.get("finish_reason") or "stop", data.get("model") or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = content[:200].decode(errors="replace")
        raise _Garbled(f"{shown!r} ({type(error).__name__})") from None
    return Reply(
        text, str(finish), str(refusal) if refusal else None, tokens, likeliest, str(model)
    )


# ---- the cache -----------------------------------------------------------------------------------


class _Cache:
    """Replies by key, on disk where there is a path; open (and locked) as long as it is in use."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock, self._stack = path, threading.Lock(), ExitStack()
        self._known: dict[str, Reply] = {}
        if path is None:
            return
        self._lines = JsonlLog(
            path,
            {},
            kind="cache of replies",
            format=CACHE_FORMAT,
            lost="its call is paid for again",
        )
        for number, line in enumerate(self._stack.enter_context(self._lines.open()), 2):
            try:
                fields = dict(line["reply"])
                fields["tokens"] = tuple(fields["tokens"])
                fields["top"] = tuple((str(t), float(p)) for t, p in fields["top"])
                self._known[line["key"]] = Reply(**fields)
            except (LookupError, TypeError, ValueError) as error:
                self._stack.close()
                raise self._lines.corrupt(number, f"no reply ({error!r})") from error

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def put(self, key: str, reply: Reply) -> None:
        with self._lock:
            if self.path is not None and key not in self._known:
                self._lines.append({"key": key, "reply": asdict(reply)})
            self._known[key] = reply


_CACHES: weakref.WeakValueDictionary[Path, _Cache] = weakref.WeakValueDictionary()
_CACHES_LOCK = threading.Lock()


def _cache_at(path: str | Path | None) -> _Cache:
    """The cache of a file: one in a process, whoever asks for it."""
    if path is None:
        return _Cache(None)
    place = Path(path).resolve()
    with _CACHES_LOCK:
        cache = _CACHES.get(place)
        if cache is None:
            cache = _CACHES[place] = _Cache(place)
        return cache
