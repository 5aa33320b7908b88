"""Chat templates run in a process of their own, with limits of time and memory.

A template comes with a model: it is somebody else's program. Jinja's sandbox keeps it from files and attributes,
not from loops without end or strings of gigabytes; counting steps inside Jinja leaves as many holes as it has
filters. A process can be stopped whatever it does, from any thread, on every system. Its memory is limited by the
kernel where that can (Linux), and looked at every 20 ms everywhere. One process, started when first needed, renders
for all.

Knows: the process, its limits, what transformers renders with. Does not know: prompts, or which template is right.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from interp_ablate.errors import PromptError

TIME_LIMIT = 20.0  # seconds of one rendering, which takes a thousandth of one
MEMORY_LIMIT = 1 << 30  # bytes beside those that the process starts with
MAX_TEXT = 1 << 24  # characters
_LOOK_EVERY = 0.02  # seconds between two looks at the memory of a rendering
_START_LIMIT = 300.0  # seconds until the process has imported what it needs
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {0} import serve; serve()"


class TemplateFailed(Exception):
    """What a template, or the library that renders it, raised."""


class TemplateProcess:
    """The process that renders; it is started again after it was stopped, and in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._most_memory = math.inf  # bytes

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        """The text that a Jinja chat template makes of messages.

        Args:
            variables: further arguments of transformers' `render_jinja_template`, as JSON: special tokens,
                `add_generation_prompt`, variables of the template.

        Raises:
            TemplateFailed: with the template's own complaint.
            PromptError: it took more time or memory than a template may.
        """
        request = {"chat_template": template, "conversations": [list(messages)], **variables}
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            reply = self._ask(line, TIME_LIMIT)
        if reply is None:
            raise PromptError(
                f"the chat template was stopped: it ran for {TIME_LIMIT:g} s, or took more memory than "
                f"{MEMORY_LIMIT >> 30} GiB. It is a program that came with the model, and does not end: mend "
                'it, or pass template="none" for raw text'
            )
        if "failure" in reply:
            raise TemplateFailed(reply["failure"])
        return str(reply["text"])

    def _ask(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """The reply; None where the process had to be stopped, or stopped."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        done = threading.Event()
        limits = (process, seconds, self._most_memory, done)
        threading.Thread(target=_stop_beyond, args=limits, daemon=True).start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: what is still to come would answer the next question
            self.stop()
            raise
        finally:
            done.set()
        if not reply.endswith(b"\n"):
            self.stop()
            return None
        return dict(json.loads(reply))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        path = json.dumps([os.path.abspath(place) for place in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(__name__), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is this process's affair
        )
        self._owner, self._most_memory = os.getpid(), math.inf
        if self._ask(b"{}\n", _START_LIMIT) is None:
            raise PromptError(
                "the process that renders chat templates does not start: is jinja2 there?"
            )
        self._most_memory = _memory(self._process.pid) + MEMORY_LIMIT
        return self._process

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _memory(pid: int) -> float:
    """The bytes that a process has in memory; infinity for one that is gone."""
    import psutil

    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return math.inf


def _stop_beyond(
    process: subprocess.Popen[bytes], seconds: float, memory: float, done: threading.Event
) -> None:
    """Kill a process that is not done in time, or takes more memory."""
    end = time.monotonic() + seconds
    while not done.wait(_LOOK_EVERY):
        if time.monotonic() > end or _memory(process.pid) > memory:
            process.kill()
            return


RENDERER = TemplateProcess()
atexit.register(RENDERER.stop)


def serve() -> None:
    """The work of the process: a request a line of standard input, a reply a line of standard output."""
    from transformers.utils.chat_template_utils import render_jinja_template

    replies = open(os.dup(1), "wb")  # noqa: SIM115  (until the process ends)
    os.dup2(2, 1)  # nothing else writes between them
    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            text = render_jinja_template(**request)[0][0] if request else ""
            if len(text) > MAX_TEXT:
                raise ValueError(f"it writes {len(text)} characters, more than any model reads")
            reply = {"text": text}
        except Exception as error:  # whatever it is: the template's
            reply = {"failure": f"{type(error).__name__}: {str(error)[:1000]}"}
        answer = json.dumps(reply)
        replies.write(answer.encode() + b"\n")
        replies.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows; see `_stop_beyond`
        return
    import psutil

    most = psutil.Process().memory_info().vms + MEMORY_LIMIT
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ValueError, OSError):  # macOS knows the limit, and refuses to set it
        return
