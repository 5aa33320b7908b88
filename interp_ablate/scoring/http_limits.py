"""Connections to a judge's server that end: in time, in bytes, and where they were meant to go.

A client's read limit is one of silence: a server that sends a byte a minute holds a call for ever, in its headers
too. So every request has a deadline of its own at the socket, below TLS and HTTP, and a number of bytes. Redirects
are not followed (they would take prompts and key elsewhere), and compressed bodies, which grow, are not read.

Knows: sockets under the openai package's HTTP client. Does not know: what is asked.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

MAX_BYTES = 1 << 23  # of a reply with its headers; the longest completions have a hundredth


class LimitPassed(Exception):
    """A reply that took too long or is too large."""


class _Stream:
    """A connection; its limits start anew with every request, that is with what is written."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds
        self._begin()

    def _begin(self) -> None:
        self._deadline, self._left = monotonic() + self._seconds, MAX_BYTES

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        remaining = self._deadline - monotonic()
        if remaining <= 0:
            raise LimitPassed(f"the reply was not whole within {self._seconds:g} s")
        data: bytes = self._inner.read(max_bytes, min(remaining, timeout or remaining))
        self._left -= len(data)
        if self._left < 0:
            raise LimitPassed(f"the reply has more than {MAX_BYTES} bytes")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._begin()
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*args, **options), self._seconds)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend:
    """What opens connections."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    def connect_tcp(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.connect_tcp(*args, **options), self._seconds)

    def connect_unix_socket(self, *args: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.connect_unix_socket(*args, **options), self._seconds)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


def limited_client(openai: Any, *, timeout: float) -> Any:
    """The openai package's HTTP client with these limits; proxies of the environment are used as ever.

    Args:
        timeout: seconds of silence; twice that is the time of a whole reply.
    """
    client = openai.DefaultHttpxClient(
        timeout=timeout, follow_redirects=False, event_hooks={"response": [_check_encoding]}
    )
    client.headers["accept-encoding"] = "identity"
    for transport in (client._transport, *client._mounts.values()):
        if transport is not None:  # where no proxy is used
            pool = transport._pool
            pool._network_backend = _Backend(pool._network_backend, 2 * timeout)
    return client


def _check_encoding(response: Any) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise LimitPassed(f"the reply is compressed ({encoding}), though nobody asked for it")
