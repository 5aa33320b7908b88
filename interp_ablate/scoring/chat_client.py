"""The chat completions protocol: one request, tried until it gets through.

Knows: the `openai` package, retries, and keeping the key out of sight. Does not know: what is asked, or why.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from functools import cached_property
from time import time
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

from interp_ablate.scoring.http_limits import LimitPassed, limited_client
from interp_ablate.scoring.replies import EndpointError, Reply, RequestError, UnansweredError
from interp_ablate.storage.incoming_files import parse_json

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for


class ChatClient:
    """Requests to one server, counted in `calls`; `shown` is its URL as it may be written down.

    Args:
        url: default: OPENAI_BASE_URL, or OpenAI's.
        api_key: default: OPENAI_API_KEY; servers that want none get none. Never written or logged.
        keeps_replies: replies go to a file, so that a run that failed can go on.

    Raises:
        EndpointError: no openai package, a URL without http, no key for OpenAI's own server.
    """

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        *,
        retries: int,
        backoff: float,
        timeout: float,
        keeps_replies: bool,
    ) -> None:
        self.url = url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self.shown = shown_url(self.url)
        # a header takes no line break, and the error about one would show the key
        self._key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.keeps_replies = keeps_replies
        self.calls = 0
        self._lock = threading.Lock()
        parts = _split(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _no_url(self.shown)
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError("OPENAI_API_KEY holds characters that no key has: set it again")
        if not self._key and self.url.startswith(OPENAI_URL):
            raise EndpointError(
                "no key for api.openai.com: set OPENAI_API_KEY, or give another server as base_url"
            )
        _openai()

    def __repr__(self) -> str:
        return f"<server {self.shown}>"

    @cached_property
    def _openai(self) -> Any:
        parts = urlsplit(self.url)
        return _openai().OpenAI(
            api_key=self._key or "none",
            base_url=urlunsplit(parts._replace(query="", fragment="")),
            default_query=dict(parse_qsl(parts.query)),
            max_retries=0,  # ours, below: counted, and stopped with the batch
            timeout=self.timeout,
            http_client=limited_client(_openai(), timeout=self.timeout),
        )

    def send(self, body: dict[str, Any], stop: threading.Event) -> Reply:
        """Send a request until it gets through; `stop` ends the waiting.

        Raises:
            Refused: a status that trying again does not change.
            UnansweredError: no try gave a reply.
        """
        openai = _openai()
        rest = {k: v for k, v in body.items() if k not in ("model", "messages")}
        create = self._openai.chat.completions.with_raw_response.create
        _check_unicode(body)
        for tried in range(1, self.retries + 2):
            asked_to_wait = 0.0
            with self._lock:
                self.calls += 1
            try:
                raw = create(model=body["model"], messages=body["messages"], extra_body=rest)
                return self._without_secrets(read_reply(raw.content))
            except openai.APIStatusError as error:
                if error.status_code not in RETRIED or error.code == "insufficient_quota":
                    raise self._refused(error, body) from None
                why = f"status {error.status_code}: {error.message}"
                asked_to_wait = _retry_after(error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                why = str(cause) if isinstance(cause, LimitPassed) else f"no connection ({cause})"
            except LimitPassed as error:
                why = str(error)
            except Garbled as error:
                why = f"a reply that is no chat completion: {error}"
            why = self._hide(why)
            wait = max(asked_to_wait, self.backoff * 2 ** (tried - 1) * random.uniform(0.5, 1))
            last = tried > self.retries or asked_to_wait > LONGEST_WAIT
            if last or stop.wait(min(wait, LONGEST_WAIT)):
                break
            logger.info("%r: %s; try %d", self, why, tried + 1)
        more = f"; it asks to wait {asked_to_wait:g} s" if asked_to_wait > LONGEST_WAIT else ""
        raise UnansweredError(
            f"{body['model']} at {self.shown} gave no answer in {tried} "
            f"{'try' if tried == 1 else 'tries'}; the last: {why}{more}. Is the server up, and the URL "
            "right (it usually ends in /v1)? Run again to go on: answers that came are kept"
            + ("" if self.keeps_replies else " (give a cache)")
        )

    def _refused(self, error: Any, body: Mapping[str, Any]) -> Refused:
        status, message = error.status_code, self._hide(str(error.message))
        advice = ""
        kind: type[EndpointError] = RequestError
        if status in (401, 403):
            advice, kind = "set OPENAI_API_KEY to a key of this server", EndpointError
        elif 300 <= status < 400:
            place = error.response.headers.get("location", "another place")
            advice = (
                f"it redirects to {self._hide(place)}: redirects are not followed, give that URL"
            )
            kind = EndpointError
        elif status == 404:
            advice, kind = "check the model's name and the URL (usually .../v1)", EndpointError
        elif status == 429:
            advice, kind = "the account has no credit left: nothing to retry", EndpointError
        text = (
            f"{body['model']} at {self.shown} refuses the request with status {status}: {message}"
        )
        return Refused(
            status,
            kind(f"{text}. {advice}".rstrip(". ")),
            field=str(error.param or ""),
            sent=frozenset(body),
        )

    def _hide(self, text: str) -> str:
        """A message without keys and passwords, which servers repeat."""
        return self._redacted(text)[:500]

    def _redacted(self, text: str) -> str:
        parts = urlsplit(self.url)
        for secret in (self._key, parts.password, *(v for _, v in parse_qsl(parts.query))):
            if secret and len(secret) > 3:
                text = text.replace(secret, "***")
        return text

    def _without_secrets(self, reply: Reply) -> Reply:
        """A reply as it may be kept: a server that repeats the key would have it written down."""
        text, tokens = self._redacted(reply.text), "".join(reply.tokens)
        return replace(
            reply,
            text=text,
            finish=self._redacted(reply.finish),
            refusal=None if reply.refusal is None else self._redacted(reply.refusal),
            model=self._redacted(reply.model),
            tokens=reply.tokens if self._redacted(tokens) == tokens else (),
            top=tuple((self._redacted(token), p) for token, p in reply.top),
        )


class Refused(Exception):
    """A status that trying again does not change, with the error it becomes."""

    def __init__(
        self,
        status: int,
        error: EndpointError,
        *,
        field: str = "",
        sent: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(str(error))
        self.status, self.error, self.field, self.sent = status, error, field, sent


class Garbled(Exception):
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


def shown_url(url: str) -> str:
    """A URL without user, password, query and closing slash: as it may be written down."""
    parts = _split(url)
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
    )


# What follows an @ in a name, as a version does, or a colon, as a tag does; a host and a port are neither.
_VERSION = re.compile(r"(?!localhost$)[\w-]+")
_PORT = re.compile(r":\d{4,5}$|:\d+/|^localhost\b")


def check_model_name(name: str) -> None:
    """Refuse a name that was meant as a server: it would be asked of another one, with the key.

    Raises:
        EndpointError: no name, or one with a host, a port or a URL in it.
    """
    if not name:
        raise EndpointError("no model: name it as the server does (its /v1/models lists them)")
    _, at, version = name.rpartition("@")
    if "://" in name or _PORT.search(name) or (at and not _VERSION.fullmatch(version)):
        raise EndpointError(
            f"{_withheld(name)!r} is neither a model's name nor a name and a whole URL: write "
            "MODEL@http://HOST:PORT/v1 (judge:m@http://localhost:8000/v1). Nothing was sent"
        )


def _withheld(name: str) -> str:
    """A mistyped URL without what may be a password in it."""
    return re.sub(r"//[^/@]*@", "//***@", name)


def _check_unicode(body: Mapping[str, Any]) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(
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


def read_reply(content: bytes) -> Reply:
    """Read a chat completion, trusting nothing."""
    try:
        data = parse_json(content)
        choice = data["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        positions = (choice.get("logprobs") or {}).get("content") or []
        tokens = tuple(str(position["token"]) for position in positions)
        at = next((i for i, token in enumerate(tokens) if token.strip()), None)
        top = () if at is None else positions[at].get("top_logprobs") or ()
        likeliest = tuple((str(one["token"]), float(one["logprob"])) for one in top)
        usage = data.get("usage") or {}
        used = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        finish, model = choice.get("finish_reason") or "stop", data.get("model") or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = content[:200].decode(errors="replace")
        raise Garbled(f"{shown!r} ({type(error).__name__})") from None
    return Reply(
        text, str(finish), str(refusal) if refusal else None, tokens, likeliest, str(model), used
    )
