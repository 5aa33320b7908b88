"""A local server that speaks the chat completions protocol, and fails in every way it can."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """A chat completion as servers write it."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": more.pop("finish", "stop"), **more}
    return {"id": "1", "object": "chat.completion", "model": "m-served", "choices": [choice]}


class Fault:
    """What a server does instead of answering: a status, a body that is no completion, silence."""

    def __init__(
        self, status: int = 200, body: Any = "", *, hang: bool = False, **headers: str
    ) -> None:
        self.status, self.body, self.hang, self.headers = status, body, hang, headers


class Server:
    """Answers POST /v1/chat/completions with what `say(body, number)` returns; keeps what was asked."""

    def __init__(self, say: Callable[[dict[str, Any], int], Any]) -> None:
        self.say, self.asked, self.keys = say, [], []  # type: ignore[var-annotated]
        self.lock, self.over = threading.Lock(), threading.Event()
        self.busy, self.most = 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet: two wait for each other

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                    number = len(outer.asked)
                try:
                    self.reply(outer.say(body, number), self.path)
                finally:
                    with outer.lock:
                        outer.busy -= 1

            def reply(self, said: Any, path: str) -> None:
                if path.partition("?")[0] != "/v1/chat/completions":
                    said = Fault(404, {"error": {"message": f"no route {path}"}})
                if isinstance(said, (str, dict)):
                    said = Fault(200, completion(said) if isinstance(said, str) else said)
                if said.hang:
                    outer.over.wait(20)
                    self.close_connection = True
                    return
                content = (
                    said.body.encode()
                    if isinstance(said.body, str)
                    else json.dumps(said.body).encode()
                )
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


@contextmanager
def serving(say: Callable[[dict[str, Any], int], Any] | Any) -> Iterator[Server]:
    server = Server(say if callable(say) else lambda body, number: say)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
