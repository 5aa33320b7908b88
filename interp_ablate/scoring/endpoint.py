"""Endpoints: questions to an OpenAI-compatible server, each paid for once.

Knows: answers held to a JSON schema, and fields that a server does not take. Does not know: what an answer means.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from interp_ablate.scoring.chat_client import ChatClient, Refused, check_model_name
from interp_ablate.scoring.replies import (
    AnswerError,
    EndpointError,
    Reply,
    RequestError,
    UnansweredError,
    parse_json,
    reply_cache,
)
from interp_ablate.storage.strict_json import as_read_back

logger = logging.getLogger(__name__)


Message = Mapping[str, str]
Structured = Literal["auto", "schema", "plain"]
# The statuses of a server that knows no response_format; any other 4xx is about something else.
UNSUPPORTED = (400, 422, 501)
# Fields that models which think refuse, and what they take in their place (None: their own choice).
ADAPTED: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
# So many requests without an answer, one after the other, and the server counts as gone.
GONE_AFTER = 10


@dataclass(frozen=True)
class EndpointSettings:
    """The way in which a server is asked."""

    temperature: float = 0.0
    max_tokens: int = 1024
    """Tokens of an answer, at most."""
    structured: Structured = "auto"
    """A schema is sent as `response_format`: "schema" always, "plain" never (it is described in words),
    "auto" until the server refuses it."""
    retries: int = 5
    """Tries after the first one: of 429, 5xx, time-outs, broken connections and garbled replies."""
    backoff: float = 1.0
    """Seconds before the first retry, doubled for each further; a Retry-After is honoured."""
    timeout: float = 60.0
    """Seconds of silence after which a call counts as hanging."""
    concurrency: int = 16
    """Calls at a time."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request (`seed`, `top_p`, `max_completion_tokens`); None drops one."""

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "max_tokens": 1, "retries": 0}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                raise EndpointError(f"{name} is {fewest} or more; got {getattr(self, name)}")
        if not self.timeout > 0:
            raise EndpointError(f"timeout is a number of seconds above 0; got {self.timeout}")


DEFAULTS = EndpointSettings()


class Endpoint:
    """A model behind an OpenAI-compatible chat completions URL (OpenAI, vLLM, llama.cpp, Ollama, ...).

    Args:
        model: as the server names it.
        base_url: usually ends in /v1; default: OPENAI_BASE_URL, or OpenAI's.
        api_key: default: OPENAI_API_KEY; servers that want none get none. Never written or logged.
        cache: an append-only JSONL file of replies; what is in it is not asked again, in this run or the
            next. Endpoints of one process may share it. None: replies are kept in memory.

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
        settings: EndpointSettings = DEFAULTS,
    ) -> None:
        check_model_name(model)
        self.model, self.settings = model, settings
        self._client = ChatClient(
            base_url,
            api_key,
            retries=settings.retries,
            backoff=settings.backoff,
            timeout=settings.timeout,
            keeps_replies=cache is not None,
        )
        self.base_url = self._client.shown
        self._cache = reply_cache(cache)
        self._fields: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            **settings.options,
        }
        about = [self.base_url, model, settings.structured, self._fields]
        self._server = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        takes = self._cache.server(self._server)
        self._sent: dict[str, Any] = dict(takes.get("fields", self._fields))
        given = {"schema": True, "plain": False}.get(settings.structured)
        self._schema_taken: bool | None = takes.get("schema", given)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="endpoint")
        self._stops: set[threading.Event] = set()  # of `ask_each` that go on
        self._answered = False
        self.from_cache = 0  # answers that cost nothing
        self.used = [0, 0]  # tokens of questions and of answers, as the server counts them

    @property
    def calls(self) -> int:
        """Requests that were sent, retries included."""
        return self._client.calls

    def __repr__(self) -> str:
        return f"<Endpoint {self.model} at {self.base_url}>"

    @property
    def asked(self) -> dict[str, Any]:
        """What the server is really sent beside the messages: fields as it takes them, schema or words."""
        ways = {True: "schema", False: "words", None: "not known yet"}
        fields = {name: value for name, value in self._sent.items() if value is not None}
        return {**fields, "structured": ways[self._schema_taken]}

    @property
    def spent(self) -> str:
        """Calls and tokens so far, for a person."""
        tokens = f", {self.used[0]} + {self.used[1]} tokens" if any(self.used) else ""
        asked = ", ".join(f"{name} {value}" for name, value in self.asked.items())
        return (
            f"{self.model} at {self.base_url}: {self.calls} calls{tokens}, {self.from_cache} answers from "
            f"the cache; asked with {asked}"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON; no key. What a server takes of it is in `asked`."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "structured": self.settings.structured,
            **{name: value for name, value in self._fields.items() if value is not None},
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
        """The replies of `ask_each`, in the order of the conversations."""
        replies = dict(self.ask_each(conversations, schema=schema, top_logprobs=top_logprobs))
        return [replies[number] for number in range(len(conversations))]

    def ask_each(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        schema: Mapping[str, Any] | None = None,
        top_logprobs: int = 0,
    ) -> Iterator[tuple[int, Reply | RequestError]]:
        """Many replies as they come, each with its conversation's number; equal questions are asked once.

        `concurrency` calls run at a time, those of other threads among them, and a slow one holds up no other.
        A request that the server refuses, or never answers, comes as its error. When the server goes away, what
        came before is in the cache and the rest is not asked.

        Raises:
            EndpointError: the server cannot be reached, has refused every request so far, or has left
                GONE_AFTER requests in a row, or most of all, without an answer; `stop` was called.
        """
        same: dict[str, list[int]] = {}
        for number, messages in enumerate(conversations):
            same.setdefault(json.dumps([dict(m) for m in messages]), []).append(number)
        stop, in_a_row, errors = threading.Event(), 0, list[RequestError]()
        waiting: dict[Future[Reply], list[int]] = {}
        self._stops.add(stop)
        try:
            for each in same.values():
                first = conversations[each[0]]
                waiting[self._pool.submit(self._ask, first, schema, top_logprobs, 0, stop)] = each
            for done in as_completed(waiting):
                reply: Reply | RequestError
                try:
                    reply, in_a_row = done.result(), 0
                except RequestError as error:
                    reply = error
                    errors.append(error)
                    in_a_row += isinstance(error, UnansweredError)
                    gone = GONE_AFTER if self._answered else self.settings.concurrency
                    if in_a_row >= gone or stop.is_set():
                        raise
                for number in waiting.pop(done):
                    yield number, reply
        finally:
            stop.set()
            self._stops.discard(stop)
            wait([each for each in waiting if not each.cancel()])
        lost = [error for error in errors if isinstance(error, UnansweredError)]
        if 2 * len(lost) > len(same):
            raise lost[-1]
        if errors and not self._answered:
            raise errors[0]

    def stop(self) -> None:
        """End what other threads ask by `ask_each`, with an error, once the calls under way have ended."""
        for stop in [*self._stops]:
            stop.set()

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
            except Refused as refused:
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
        with self._cache.one_at_a_time(keys[0]):
            for key in keys:
                cached = self._cache.get(key)
                if cached is not None:
                    with self._lock:
                        self.from_cache += 1
                    self._answered = True
                    return cached
            if stop.is_set():
                raise UnansweredError(f"{self.model} at {self.base_url} is no longer asked")
            return self._sent_now(ways, keys, stop)

    def _sent_now(
        self, ways: Sequence[dict[str, Any]], keys: Sequence[str], stop: threading.Event
    ) -> Reply:
        try:
            reply = self._client.send(ways[0], stop)
            used = keys[0]
        except Refused as refused:
            about = refused.field in ways[0] and refused.field != "response_format"
            if len(ways) == 1 or refused.status not in UNSUPPORTED or about:
                raise
            reply, used = self._without_schema(ways[1], keys[1], refused, stop)
        else:
            if len(ways) == 2:
                self._learn(schema_taken=True)
        self._answered = True
        with self._lock:
            self.used = [total + new for total, new in zip(self.used, reply.used)]
        self._cache.put(used, reply)
        return reply

    def _learn(self, schema_taken: bool | None) -> None:
        """Keep what the server takes, so that the next run does not find it out again."""
        self._schema_taken = schema_taken
        takes = {"fields": self._sent, "schema": schema_taken}
        self._cache.put_server(self._server, as_read_back(takes))

    def _without_schema(
        self, body: dict[str, Any], key: str, refused: Refused, stop: threading.Event
    ) -> tuple[Reply, str]:
        try:
            reply = self._client.send(body, stop)
        except Refused as again:  # it was not about the schema
            raise (again if again.field in ADAPTED else refused) from None
        if self._schema_taken is None:
            self._learn(schema_taken=False)
            logger.warning("%r takes no JSON schema: it is described in words", self)
        return reply, key

    def _adapt(self, refused: Refused) -> bool:
        """Leave out or rename the field that the server names as one it does not take."""
        name = refused.field
        if refused.status not in UNSUPPORTED or name not in ADAPTED:
            return False
        with self._lock:
            if name in self._sent:  # else another thread did it
                sent, other = dict(self._sent), ADAPTED[name]
                value = sent.pop(name)
                if other:
                    sent[other] = value
                self._sent = sent  # whole: other threads read it
                logger.warning(
                    "%r takes no %s: %s",
                    self,
                    name,
                    f"sent as {other}" if other else "its own is used",
                )
                self._learn(self._schema_taken)
                return True
        return name in refused.sent

    def _ways(self, schema: Mapping[str, Any] | None) -> tuple[bool, ...]:
        """The ways to ask, the first one first: True sends the schema as such."""
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
        conversation = [dict(message) for message in messages]
        body = {"model": self.model, "messages": conversation, **self._sent}
        if schema is not None and structured:
            name = re.sub(r"\W", "_", str(schema.get("title", "answer")))[:64]
            wrapped = {"name": name, "strict": True, "schema": dict(schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        elif schema is not None:
            conversation[-1]["content"] += (
                "\n\nAnswer with one JSON object and nothing else. It follows this JSON schema: "
                + json.dumps(schema)
            )
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return {name: value for name, value in body.items() if value is not None}

    def _key_of(self, body: Mapping[str, Any], sample: int) -> str:
        whole = {"base_url": self.base_url, "body": body, "sample": sample}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
