"""Replies of a server on disk, so that none is paid for twice.

Knows: an append-only file of replies by key. Does not know: what was asked.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from interp_ablate.scoring.replies import Reply
from interp_ablate.storage.jsonl_log import JsonlLog

CACHE_FORMAT = "interp_ablate.replies/1"


class ReplyCache:
    """Replies by key. On disk where there is a path, in a file that is locked as long as it is in use."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock, self._stack = path, threading.Lock(), ExitStack()
        self._replies: dict[str, Reply] = {}
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
                self._replies[line["key"]] = Reply(**fields)
            except (LookupError, TypeError, ValueError) as error:
                self._stack.close()
                raise self._lines.corrupt(number, f"no reply ({error!r})") from error

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        with self._lock:
            if self.path is not None and key not in self._replies:
                self._lines.append({"key": key, "reply": asdict(reply)})
            self._replies[key] = reply


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
